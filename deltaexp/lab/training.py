"""Training and evaluating through transformers' Trainer, whose own checkpoints are not used: see `deltaexp.lab.checkpoints`."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import Sampler

from deltaexp.checkpoint import WEIGHTS
from deltaexp.errors import ConfigError, DamagedFileError, RunError, listing, unknown
from deltaexp.lab import arguments, checkpoints, kernels, optimizers, processes, quantisation, sharding, smoothing
from deltaexp.lab.callbacks import CheckpointCallback, EarlyStopping, LossCallback, StepCallback
from deltaexp.lab.checkpoints import Checkpoints
from deltaexp.lab.config import TrainerConfig
from deltaexp.lab.parallel import ParallelTrainer
from deltaexp.lab.samplers import EpochSampler, ListedSampler
from deltaexp.lab.tasks.kinds import Kind, Split
from deltaexp.lab.tasks.kinds.base import ROW
from deltaexp.lab.tracking import TIMINGS
from deltaexp.lab.trainer import (
    EvalPrediction,
    ExportableState,
    LengthGroupedSampler,
    PrinterCallback,
    TrainerState,
    set_seed,
)
from deltaexp.model import DeltaModel

TRAINER_STATE = "trainer_state.json"
SPREAD = 1_000_003
"""What the seeds of dropout differ by from one process to the next."""


class DeltaTrainer(ParallelTrainer):
    """transformers' Trainer, whose checkpoints hold the delta instead of the whole model, and are complete or not there."""

    def __init__(
        self, delta_model: DeltaModel, kind: Kind, splits: Mapping[str, Split], saved: Checkpoints, **options: Any
    ) -> None:
        self.delta_model = delta_model
        self.kind, self.splits = kind, splits
        self.shifted = getattr(kind, "shifted", False)
        self.sharded = sharding.is_sharded(delta_model.backbone_model)
        self.answers: list[Any] = []
        """What the last evaluation found, one answer for each row."""
        self.checkpoints = saved
        self.optimizer: Any = None
        self.label_smoother: Any = None
        self._ops_per_value: tuple[int, str] | None = None
        self.checkpointing = False
        """Whether activations are computed again in the backward pass."""
        self.learning_rates: dict[str, float] = {}
        """Learning rates of their own, by pattern."""
        self.notes: Callable[[], dict[str, Any]] = dict
        """What the run wants to find again in a checkpoint, for JSON."""
        self.joint: Any = None
        """Computes batches together with those of other runs (`deltaexp.lab.joint`); None where there are none."""
        self.replays: Any = None
        """Replays steps (`deltaexp.lab.replaying`); None where all are computed."""
        self.alone: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
        """Makes a context in which no other run's delta is in the backbone."""
        model = delta_model.backbone_model
        # Their statistics are the backbone's, which stays what it is: no batch may change them.
        self._norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        self._own_forward = model.__dict__.get("forward")  # a backbone that is spread over devices has one of its own
        with quantisation.trainable(model):
            super().__init__(
                model=model, train_dataset=splits["train"].features if "train" in splits else None,
                eval_dataset=splits["validation"].features if "validation" in splits else None,
                data_collator=kind.collator(model), compute_metrics=self._measure, **options,
            )  # fmt: skip
        arguments.without_cache(model)

    def train_from(self, checkpoint: Path | None) -> None:
        """Train, from a checkpoint on where there is one; where training had ended, only its outcome is taken over."""
        if checkpoint is None:
            # Training is the same whatever was evaluated before; what is random differs between processes.
            set_seed((self.args.seed + SPREAD * processes.rank()) % 2**32)
        if checkpoint is None or not checkpoints.read_values(checkpoint)["ended"]:
            self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            self._check_finite()
            return
        self._load_from_checkpoint(str(checkpoint))
        self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE))
        if self.args.load_best_model_at_end:
            self._load_best_model()

    def log(self, logs: dict[str, float], *arguments: Any, **options: Any) -> None:
        """Write an entry of the log, unless the loss is none any more: then stop."""
        if not math.isfinite(logs.get("loss", 0.0)):
            self._stop(f"the loss is {logs['loss']}")
        super().log(logs, *arguments, **options)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return transformers' estimate for a batch, without counting the model's parameters at every step."""
        if self._ops_per_value is None:
            name = getattr(self.model, "main_input_name", "input_ids")
            if name not in inputs or not inputs[name].numel():
                return super().floating_point_ops(inputs)
            self._ops_per_value = super().floating_point_ops(inputs) // inputs[name].numel(), name
        per_value, name = self._ops_per_value
        return per_value * inputs[name].numel() if name in inputs else 0

    def _check_finite(self) -> None:
        """Check that what was trained is worth keeping.

        Raises:
            RunError: If it holds what is no number.
        """
        trained = self.delta_model.trainable_parameters()
        broken = [name for name, parameter in trained.items() if not torch.isfinite(parameter.detach()).all()]
        if broken:
            self._stop(f"not all numbers in {listing(broken, 2)} are finite")

    def _stop(self, what: str) -> None:
        """Say that training has diverged, and what can be done.

        Raises:
            RunError: Always.
        """
        entries = [entry for entry in self.state.log_history if "loss" in entry]
        last = f"; after step {entries[-1]['step']:,} it was {entries[-1]['loss']:.4g}" if entries and "loss" in what else ""
        newest, _ = self.checkpoints.newest()
        kept = "There is no checkpoint." if newest is None else f"The last checkpoint before that is {str(newest)!r}."
        raise RunError(
            f"Training has diverged: after step {self.state.global_step:,} {what}{last}. {kept} The same run would diverge "
            f"again; start another with a smaller trainer.learning_rate (it was {self.args.learning_rate:g}), a longer warm-up "
            "or a smaller trainer.max_grad_norm."
        )

    def unwrap(self) -> None:
        """Leave the backbone as it was given: without accelerate's autocast, and without checkpoints of activations."""
        model: Any = self.delta_model.backbone_model
        # unwrap_model(keep_fp32_wrapper=False) of accelerate takes off the decorators of the model's own class, too.
        for name in ("forward", "_original_forward", "_is_accelerate_prepared"):
            model.__dict__.pop(name, None)
        if self.checkpointing:
            getattr(model, "activation_checkpointing_disable", model.gradient_checkpointing_disable)()
        if self.sharded:
            sharding.put_together(model)
        if self._own_forward is not None:
            model.__dict__["forward"] = self._own_forward

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._check_finite()
        self.store_flos()
        state = self.state
        state.best_model_checkpoint = self._best()
        for part in (*self.callback_handler.callbacks, self.control):
            if isinstance(part, ExportableState):
                state.stateful_callbacks[type(part).__name__] = part.state()
        layers = [attachment.layer for attachment in self.delta_model.attachments]
        # What the loss has added up to since the last entry of the log; Trainers of some versions keep it to themselves.
        loss = None
        if hasattr(self, "_tr_loss"):
            summed = processes.gather(float(self._tr_loss))
            loss = [sum(summed) / len(summed), self._globalstep_last_logged]
        scaler = None if self.accelerator.scaler is None else self.accelerator.scaler.state_dict()
        values = {"notes": self.notes(), "ended": self.control.should_training_stop, "loss": loss, "scaler": scaler}
        random = processes.gather(checkpoints.random_state())

        def fill(folder: Path) -> None:
            checkpoints.write_tensors(folder / WEIGHTS, self.delta_model.delta_tensors())
            own = self.delta_model.config.training_state(layers)
            checkpoints.write_state(folder, self.optimizer, self.lr_scheduler, own, values, random)
            state.save_to_json(str(folder / TRAINER_STATE))

        if processes.is_main():
            self.checkpoints.write(state.global_step, fill, best=state.best_global_step)
        processes.wait()

    def _best(self) -> str | None:
        step = self.state.best_global_step
        return str(self.checkpoints.path(step)) if step else None

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        self.delta_model.load_tensors(load_file(folder / WEIGHTS), str(folder))
        layers = [attachment.layer for attachment in self.delta_model.attachments]
        self.delta_model.config.load_training_state(layers, checkpoints.read_delta_state(folder))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            checkpoints.load_optimizer(Path(checkpoint), self.optimizer, self.lr_scheduler)
            loss = checkpoints.read_values(Path(checkpoint))["loss"]
            if loss is not None:
                self.add_callback(LossCallback(self, *loss))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            checkpoints.load_random(Path(checkpoint), processes.rank())

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(checkpoints.read_values(Path(checkpoint))["scaler"])

    def _load_best_model(self) -> None:
        best = self._best()
        if best is None:
            return
        wrong = checkpoints.fault(Path(best))
        if wrong is not None:
            raise DamagedFileError(
                f"The best checkpoint, {best!r}, to which early stopping goes back, cannot be used: {wrong}. Train anew, in "
                "another folder."
            )
        self.delta_model.load_tensors(load_file(Path(best) / WEIGHTS), best)

    def _get_train_sampler(self, *arguments: Any) -> Sampler | None:
        sampler = super()._get_train_sampler(*arguments)
        if isinstance(sampler, LengthGroupedSampler):
            sampler.batch_size *= processes.count()  # of all processes, whose rows are to be of similar length
        if sampler is None:
            return None
        whole = EpochSampler(sampler, self.args.data_seed, lambda: int(self.state.epoch or 0))
        return self.train_share(whole)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make the optimizer, with the learning rates and the weight decay that belong to each parameter."""
        if self.optimizer is None:
            args = self.args
            matrices = self.get_decay_parameter_names(self.delta_model.backbone_model)
            own = optimizers.groups(self.delta_model, args.learning_rate, self.learning_rates, args.weight_decay, matrices)
            kind, options = self.get_optimizer_cls_and_kwargs(args, model or self.model)
            self.optimizer = kind(own, **options)
        return self.optimizer

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **options: Any) -> Any:
        """Return the task's loss, while training with the term that the delta's type adds (AdaLoRA has one)."""
        if model.training:
            for norm in self._norms:
                norm.eval()
        outputs, loss = None, self.joint.loss(inputs) if self.joint is not None and model.training else None
        if loss is None:
            loss, outputs = self._own_loss(model, inputs, **options)
        if model.training:
            penalty = self.delta_model.penalty()
            loss = self.weighted(loss) if penalty is None else self.weighted(loss) + penalty
        return (loss, outputs) if return_outputs else loss

    def _own_loss(self, model: nn.Module, inputs: dict[str, Any], **options: Any) -> Any:
        """Return the loss of a batch and the outputs, computed for it alone."""
        smoother, self.label_smoother = self.label_smoother, self.label_smoother if model.training else None
        if self.label_smoother is not None:
            inputs = smoothing.prepared(inputs, self.delta_model.backbone_model)
        try:
            return super().compute_loss(model, inputs, return_outputs=True, **options)
        finally:
            self.label_smoother = smoother

    def computed(self, *arguments: Any, **options: Any) -> torch.Tensor:
        """Compute loss and gradients of a batch."""
        if self.replays is not None and self.joint is None:
            loss = self.replays.step(self._prepare_inputs(arguments[1]), self._weight)
            if loss is not None:
                return loss
        loss = super().computed(*arguments, **options)
        if self.joint is not None:
            self.joint.backward()
        return loss

    def evaluate(self, eval_dataset: Any = None, *arguments: Any, **options: Any) -> dict[str, float]:
        """Measure one split by its features, the validation split where none are given."""
        features = self.eval_dataset if eval_dataset is None else eval_dataset
        self._begin(next(split for split in self.splits.values() if split.features is features))
        with self.alone():
            found = super().evaluate(eval_dataset, *arguments, **options)
        chosen, prefix = self.args.metric_for_best_model, options.get("metric_key_prefix", "eval")
        names = sorted(name.removeprefix(f"{prefix}_") for name in found if not name.endswith(TIMINGS))
        if chosen is not None and chosen not in names:
            raise ConfigError(unknown("trainer.metric", chosen, set(names) - {"epoch"}))
        return found

    def _begin(self, split: Split) -> None:
        self._measured, self._seen = split, 0
        self.gather_function = self.gathered

    def answer(self, split: Split) -> tuple[list[Any], list[dict[str, float]] | None]:
        """Return the answers to rows that need no targets, and the probabilities of each where the kind knows them."""
        self._begin(split)
        self.compute_metrics = None
        try:
            found = self.predict(split.features)
        finally:
            self.compute_metrics = self._measure
        predictions, rows, numbers = _in_order(found, split)
        return self.kind.answers(predictions, rows, numbers), self.kind.scores(predictions, numbers)

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler | None:
        """Order what is measured by length, so that little of a batch is padding; the longest come first."""
        lengths = self._measured.lengths
        order = range(len(self._measured.features))
        places = order if lengths is None else sorted(order, key=lambda number: -lengths[number])
        self._eval_share = self.share(ListedSampler(list(places)), self.args.eval_batch_size)
        return self._eval_share

    def _measure(self, found: EvalPrediction) -> dict[str, float]:
        """Return the metrics of an evaluation, in which the rows' numbers take the place of labels."""
        self.answers = self.kind.answers(*_in_order(found, self._measured))
        return self.kind.measure(self.answers, self._measured.rows)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Any, Any, Any]:
        """Have the kind of task predict a batch; in the place of labels the rows' numbers are returned."""
        batch = self._prepare_inputs(inputs)
        with torch.no_grad(), kernels.of_any_length(self.args.device), self.compute_loss_context_manager():
            loss, predictions = self.kind.predict(model, batch)
        if loss is not None:
            # The Trainer takes the mean over all batches: each is to count in it as its rows do.
            share = self._eval_share
            loss = loss * (share.sizes(self._seen)[share.rank] * share.batches * share.count / len(share.sampler))
        self._seen += 1
        return loss, None if prediction_loss_only else predictions, batch[ROW]


def _in_order(found: Any, split: Split) -> tuple[np.ndarray, Any, np.ndarray]:
    """Return predictions in the order of the rows that they are about, these rows, and the number of each one's row."""
    # What is behind those of all features are stand-ins, of processes that had no row left.
    numbers = np.asarray(found.label_ids)[: len(split.features)]
    order = np.argsort(numbers, kind="stable")
    return np.asarray(found.predictions)[order], split.rows, numbers[order]


def build(
    config: TrainerConfig,
    delta_model: DeltaModel,
    kind: Kind,
    splits: Mapping[str, Split],
    saved: Checkpoints,
    seeds: dict[str, int],
    callbacks: list,
) -> DeltaTrainer:
    """Make the trainer of a run.

    Args:
        config: How to train.
        delta_model: What to train, frozen as it should be.
        kind: How to pad and to measure.
        splits: The rows and features of each split; without ``train`` the trainer only evaluates.
        saved: Where checkpoints go.
        seeds: The seeds of ``data`` and ``dropout``.
        callbacks: The tracker's callbacks.

    Raises:
        ConfigError: If the backbone, the task or the hardware cannot do what is asked for.
    """
    stopping = config.early_stopping_patience
    options = arguments.build(
        config, delta_model, kind, len(splits["train"].features) if "train" in splits else 0, saved, seeds
    )
    extra = [EarlyStopping(stopping, config.early_stopping_min_delta)] if stopping else []
    trainer = DeltaTrainer(
        delta_model,
        kind,
        splits,
        saved,
        args=options,
        callbacks=[StepCallback(delta_model), CheckpointCallback(saved), *extra, *callbacks],
    )
    if config.label_smoothing:
        trainer.label_smoother = smoothing.Smoother(config.label_smoothing)
    trainer.checkpointing = config.gradient_checkpointing
    trainer.learning_rates = dict(config.learning_rates)
    optimizers.named_rates(delta_model, config.learning_rates)  # a pattern that means nothing is told now
    trainer.remove_callback(PrinterCallback)
    return trainer


def evaluate(trainer: DeltaTrainer, split: Split) -> dict[str, float]:
    """Return the loss and the metrics on a split, without the prefix and the timings that the Trainer adds."""
    with torch.compiler.set_stance("force_eager"):  # compiling takes longer than most evaluations
        measured = trainer.evaluate(split.features, metric_key_prefix="x")
    names = {name.removeprefix("x_"): float(value) for name, value in measured.items() if name.startswith("x_")}
    return {name: value for name, value in names.items() if name not in TIMINGS}
