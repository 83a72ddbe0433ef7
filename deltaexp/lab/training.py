"""Training and evaluating through transformers' Trainer, whose own checkpoints are not used: see `deltaexp.lab.checkpoints`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import Sampler
from transformers import (
    EarlyStoppingCallback,
    EvalPrediction,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_callback import ExportableState, PrinterCallback

from deltaexp.checkpoint import WEIGHTS
from deltaexp.errors import ConfigError, DamagedFileError, listing
from deltaexp.lab import checkpoints
from deltaexp.lab.checkpoints import Checkpoints
from deltaexp.lab.config import NO_FP16, TrainerConfig
from deltaexp.lab.tasks.kinds import Kind, Split
from deltaexp.lab.tasks.kinds.base import ROW
from deltaexp.model import DeltaModel

TRAINER_STATE = "trainer_state.json"


class DeltaTrainer(Trainer):
    """transformers' Trainer, whose checkpoints hold the delta instead of the whole model, and are complete or not there."""

    def __init__(
        self, delta_model: DeltaModel, kind: Kind, splits: Mapping[str, Split], saved: Checkpoints, **options: Any
    ) -> None:
        self.delta_model = delta_model
        self.kind, self.splits = kind, splits
        self.answers: list[Any] = []
        """What the last evaluation found, one answer for each row."""
        self.checkpoints = saved
        self.notes: Callable[[], dict[str, Any]] = dict
        """What the run wants to find again in a checkpoint, for JSON."""
        super().__init__(
            model=delta_model.backbone_model, train_dataset=splits["train"].features if "train" in splits else None,
            eval_dataset=splits["validation"].features if "validation" in splits else None,
            data_collator=kind.collator(delta_model.backbone_model), compute_metrics=self._measure, **options,
        )  # fmt: skip

    def train_from(self, checkpoint: Path | None) -> None:
        """Train, from a checkpoint on where there is one; where training had ended, only its outcome is taken over."""
        if checkpoint is None:
            set_seed(self.args.seed)  # training is the same whatever was evaluated before
        if checkpoint is None or not checkpoints.read_values(checkpoint)["ended"]:
            self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            return
        self._load_from_checkpoint(str(checkpoint))
        self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE))
        if self.args.load_best_model_at_end:
            self._load_best_model()

    def unwrap(self) -> None:
        """Take the autocast of accelerate off the backbone, which computes in the precision of its weights again."""
        # unwrap_model(keep_fp32_wrapper=False) of accelerate takes off the decorators of the model's own class, too.
        for name in ("forward", "_original_forward"):
            self.delta_model.backbone_model.__dict__.pop(name, None)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.store_flos()
        state = self.state
        state.best_model_checkpoint = self._best()
        for part in (*self.callback_handler.callbacks, self.control):
            if isinstance(part, ExportableState):
                state.stateful_callbacks[type(part).__name__] = part.state()
        layers = [attachment.layer for attachment in self.delta_model.attachments]
        # What the loss has added up to since the last entry of the log; Trainers of some versions keep it to themselves.
        loss = [float(self._tr_loss), self._globalstep_last_logged] if hasattr(self, "_tr_loss") else None
        scaler = None if self.accelerator.scaler is None else self.accelerator.scaler.state_dict()
        values = {"notes": self.notes(), "ended": self.control.should_training_stop, "loss": loss, "scaler": scaler}

        def fill(folder: Path) -> None:
            checkpoints.write_tensors(folder / WEIGHTS, self.delta_model.delta_tensors())
            own = self.delta_model.config.training_state(layers)
            checkpoints.write_state(folder, self.optimizer, self.lr_scheduler, own, values)
            state.save_to_json(str(folder / TRAINER_STATE))

        self.checkpoints.write(state.global_step, fill, best=state.best_global_step)

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
                self.add_callback(_LossCallback(self, *loss))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            checkpoints.load_random(Path(checkpoint))

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
        return None if sampler is None else EpochSampler(sampler, self.args.data_seed, lambda: int(self.state.epoch or 0))

    def create_optimizer(self, *arguments: Any) -> torch.optim.Optimizer:
        """Make the optimizer with the learning rates that the delta's type asks for (LoRA+ has two)."""
        if self.optimizer is None:
            optimizer, factors = super().create_optimizer(*arguments), self.delta_model.learning_rate_factors()
            groups = []
            for group in optimizer.param_groups:
                for factor in sorted({factors.get(parameter, 1.0) for parameter in group["params"]}):
                    mine = [parameter for parameter in group["params"] if factors.get(parameter, 1.0) == factor]
                    groups.append({**group, "params": mine, "lr": group["lr"] * factor})
            optimizer.param_groups = groups
        return self.optimizer

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **options: Any) -> Any:
        """Return the task's loss, while training with the term that the delta's type adds (AdaLoRA has one)."""
        result = super().compute_loss(model, inputs, return_outputs=return_outputs, **options)
        penalty = self.delta_model.penalty() if model.training else None
        if penalty is None:
            return result
        # A loss that is averaged over all accumulated batches already is not divided by their number any more.
        if self.model_accepts_loss_kwargs and options.get("num_items_in_batch") is not None:
            penalty = penalty / self.current_gradient_accumulation_steps
        return (result[0] + penalty, result[1]) if return_outputs else result + penalty

    def evaluate(self, eval_dataset: Any = None, *arguments: Any, **options: Any) -> dict[str, float]:
        """Measure one split by its features, the validation split where none are given."""
        features = self.eval_dataset if eval_dataset is None else eval_dataset
        self._measured = next(split for split in self.splits.values() if split.features is features)
        return super().evaluate(eval_dataset, *arguments, **options)

    def answer(self, split: Split) -> tuple[list[Any], list[dict[str, float]] | None]:
        """Return the answers to rows that need no targets, and the probabilities of each where the kind knows them."""
        self._measured = split
        self.compute_metrics = None
        try:
            found = self.predict(split.features)
        finally:
            self.compute_metrics = self._measure
        numbers = np.asarray(found.label_ids)
        order = np.argsort(numbers, kind="stable")
        predictions, numbers = np.asarray(found.predictions)[order], numbers[order]
        return self.kind.answers(predictions, split.rows, numbers), self.kind.scores(predictions, numbers)

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler | None:
        """Order what is measured by length, so that little of a batch is padding; the longest come first."""
        lengths = self._measured.lengths
        if lengths is None:
            return super()._get_eval_sampler(eval_dataset)
        return ListedSampler(sorted(range(len(lengths)), key=lambda number: -lengths[number]))

    def _measure(self, found: EvalPrediction) -> dict[str, float]:
        """Return the metrics of an evaluation, in which the rows' numbers take the place of labels."""
        rows, numbers = self._measured.rows, np.asarray(found.label_ids)
        order = np.argsort(numbers, kind="stable")
        self.answers = self.kind.answers(found.predictions[order], rows, numbers[order])
        return self.kind.measure(self.answers, rows)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Any, Any, Any]:
        """Have the kind of task predict a batch; in the place of labels the rows' numbers are returned."""
        batch = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, predictions = self.kind.predict(model, batch)
        return loss, None if prediction_loss_only else predictions, batch[ROW]


class ListedSampler(Sampler):
    """The places of a list, in its order."""

    def __init__(self, places: list[int]) -> None:
        self.places = places

    def __iter__(self) -> Iterator[int]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


class EpochSampler(Sampler):
    """Another sampler, whose order in an epoch depends on the seed and the epoch's number only, not on what was before.

    Args:
        sampler: The sampler, which draws from its attribute ``generator``.
        seed: The seed of the data.
        epoch: Returns the number of the epoch, from 0.
    """

    def __init__(self, sampler: Any, seed: int, epoch: Callable[[], int]) -> None:
        self.sampler, self.seed, self.epoch = sampler, seed, epoch

    def __iter__(self) -> Iterator[int]:
        self.sampler.generator = torch.Generator().manual_seed(self.seed + self.epoch())
        return iter(self.sampler)

    def __len__(self) -> int:
        return len(self.sampler)


class _LossCallback(TrainerCallback):
    """Sets what the loss had added up to in a checkpoint, so that the next entry of the log is the mean that it would be."""

    def __init__(self, trainer: DeltaTrainer, loss: float, since: int) -> None:
        self.trainer, self.loss, self.since = trainer, loss, since

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trainer: Any = self.trainer
        trainer._tr_loss += self.loss
        trainer._total_loss_scalar -= self.loss  # the mean in the end is this session's
        trainer._globalstep_last_logged = self.since


class CheckpointCallback(TrainerCallback):
    """Has a checkpoint written when one is due."""

    def __init__(self, saved: Checkpoints) -> None:
        self.checkpoints = saved

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Find the best checkpoint again, in a folder that may have been moved since."""
        if state.best_global_step:
            state.best_model_checkpoint = str(self.checkpoints.path(state.best_global_step))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Ask for one; transformers asks for those after an evaluation and in the end."""
        if self.checkpoints.due(state.global_step):
            control.should_save = True


class StepCallback(TrainerCallback):
    """Tells the delta's type of every optimizer step, while the gradients are there (AdaLoRA moves its budget then)."""

    def __init__(self, delta_model: DeltaModel) -> None:
        self.delta_model = delta_model

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        """Pass the number of the step on; after the first, say what the loss does not depend on."""
        if state.global_step == 0:
            idle = [name for name, p in self.delta_model.trainable_parameters().items() if p.grad is None]
            if idle:
                warnings.warn(
                    f"{len(idle)} trainable parameters have no gradient ({listing(idle, 3)}): the backbone does not call their "
                    "modules on this data, so they stay as they are. Leave these modules out of modified_modules.",
                    stacklevel=2,
                )
        self.delta_model.after_step(state.global_step + 1, state.max_steps)


def precision(config: TrainerConfig) -> str:
    """Return what is computed in, ``fp32``, ``bf16`` or ``fp16``, where ``auto`` leaves it to the hardware.

    Raises:
        ConfigError: If the hardware cannot do what is asked for.
    """
    gpu = torch.cuda.is_available() and not config.cpu
    has_bf16 = gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    if config.precision == "auto":
        return ("bf16" if has_bf16 else "fp16") if gpu else "fp32"
    if config.precision == "fp16" and not gpu:
        raise ConfigError(NO_FP16)
    if config.precision == "bf16" and gpu and not has_bf16:
        raise ConfigError(
            f"trainer.precision=bf16 is not what the GPU ({torch.cuda.get_device_name()}) computes in. Take "
            "trainer.precision=fp16 or fp32."
        )
    return config.precision


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
    """
    mixed = precision(config)
    if mixed == "fp16":
        _check_scaled(delta_model)
    assert config.learning_rate is not None, "see deltaexp.lab.config.completed"
    stopping = config.early_stopping_patience
    steps = config.max_steps
    if steps < 1:
        per_epoch = -(-len(splits["train"].features) // (config.batch_size * config.gradient_accumulation_steps))
        steps = max(1, round(per_epoch * config.epochs))
    every = config.eval_every or (max(1, steps // 10) if stopping else None)
    arguments = TrainingArguments(
        output_dir=str(saved.folder),
        max_steps=steps,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.eval_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.lr_scheduler,
        warmup_steps=round(config.warmup_ratio * steps),
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        seed=seeds["dropout"],
        data_seed=seeds["data"],
        # transformers takes bf16 for a GPU's unless it is told to stay on the CPU.
        use_cpu=config.cpu or (mixed == "bf16" and not torch.cuda.is_available()),
        bf16=mixed == "bf16",
        fp16=mixed == "fp16",
        eval_strategy="steps" if every else "no",
        eval_steps=every,
        # With "steps" there is one in the end too; those between are `CheckpointCallback`'s, and rotating them `Checkpoints`'.
        save_strategy="steps" if stopping or saved.every != 0 else "no",
        save_steps=every if stopping else steps,
        restore_callback_states_from_checkpoint=True,
        load_best_model_at_end=stopping is not None,
        metric_for_best_model=kind.metric if stopping else None,
        greater_is_better=kind.greater_is_better if stopping else None,
        train_sampling_strategy="group_by_length" if config.group_by_length else "random",
        logging_steps=config.log_every,
        report_to="none",
        disable_tqdm=not config.progress,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available() and not config.cpu,
        optim="adamw_torch",
    )
    extra = [EarlyStoppingCallback(early_stopping_patience=stopping)] if stopping else []
    trainer = DeltaTrainer(
        delta_model,
        kind,
        splits,
        saved,
        args=arguments,
        callbacks=[StepCallback(delta_model), CheckpointCallback(saved), *extra, *callbacks],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _check_scaled(delta_model: DeltaModel) -> None:
    """Check that the gradients of a scaled loss can be scaled back, which those in half precision cannot.

    Raises:
        ConfigError: If a trainable parameter is in half precision.
    """
    half = [name for name, p in delta_model.trainable_parameters().items() if p.dtype == torch.float16]
    if half:
        raise ConfigError(
            f"trainer.precision=fp16 scales the loss, for which what is trained must be in float32, and {listing(half, 2)} "
            "are in float16. Take backbone.dtype=float32, or trainer.precision=fp32 to train them as they are."
        )


def evaluate(trainer: DeltaTrainer, split: Split) -> dict[str, float]:
    """Return the loss and the metrics on a split, without the prefix and the timings that the Trainer adds."""
    measured = trainer.evaluate(split.features, metric_key_prefix="x")
    timings = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
    names = {name.removeprefix("x_"): float(value) for name, value in measured.items() if name.startswith("x_")}
    return {name: value for name, value in names.items() if name not in timings}
