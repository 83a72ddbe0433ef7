"""Training and evaluating through transformers' Trainer; only what a delta owns is ever written to a checkpoint."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import EarlyStoppingCallback, Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from deltaexp.checkpoint import WEIGHTS
from deltaexp.errors import listing
from deltaexp.lab.config import TrainerConfig
from deltaexp.lab.tasks.kinds import Kind
from deltaexp.model import DeltaModel


class DeltaTrainer(Seq2SeqTrainer):
    """transformers' Trainer, whose checkpoints hold the delta instead of the whole model."""

    def __init__(self, delta_model: DeltaModel, generates: bool, **options: Any) -> None:
        self.delta_model = delta_model
        self.generates = generates
        super().__init__(model=delta_model.backbone_model, **options)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.delta_model.delta_tensors().items()}
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    def _load_best_model(self) -> None:
        folder = self.state.best_model_checkpoint
        self.delta_model.load_tensors(load_file(os.path.join(folder, WEIGHTS)), folder)

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

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None, **options: Any
    ) -> Any:
        """Generate for tasks of text to text, classify for the others."""
        if self.generates:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys, **options)
        return super(Seq2SeqTrainer, self).prediction_step(model, inputs, prediction_loss_only, ignore_keys)


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


def build(
    config: TrainerConfig,
    delta_model: DeltaModel,
    kind: Kind,
    splits: Any,
    folder: Path,
    seeds: dict[str, int],
    callbacks: list,
) -> DeltaTrainer:
    """Make the trainer of a run.

    Args:
        config: How to train.
        delta_model: What to train, frozen as it should be.
        kind: How to pad and to measure.
        splits: The tokenised data.
        folder: Where checkpoints go, if there are any.
        seeds: The seeds of ``data`` and ``dropout``.
        callbacks: The tracker's callbacks.
    """
    model = delta_model.backbone_model
    stopping = config.early_stopping_patience
    steps = config.max_steps
    if steps < 1:
        per_epoch = -(-len(splits["train"]) // (config.batch_size * config.gradient_accumulation_steps))
        steps = max(1, round(per_epoch * config.epochs))
    every = config.eval_every or (max(1, steps // 10) if stopping else None)
    arguments = Seq2SeqTrainingArguments(
        output_dir=str(folder),
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
        use_cpu=config.cpu,
        eval_strategy="steps" if every else "no",
        eval_steps=every,
        save_strategy="steps" if stopping else "no",
        save_steps=every or steps,
        save_total_limit=1 if stopping else None,
        save_only_model=True,
        load_best_model_at_end=stopping is not None,
        metric_for_best_model=kind.metric if stopping else None,
        greater_is_better=True if stopping else None,
        train_sampling_strategy="group_by_length" if config.group_by_length else "random",
        logging_steps=config.log_every,
        report_to="none",
        disable_tqdm=not config.progress,
        remove_unused_columns=True,
        predict_with_generate=kind.generates,
        generation_max_length=kind.task.max_target_length if kind.generates else None,
        generation_num_beams=1 if kind.generates else None,
        dataloader_pin_memory=torch.cuda.is_available() and not config.cpu,
        optim="adamw_torch",
    )
    extra = [EarlyStoppingCallback(early_stopping_patience=stopping)] if stopping else []
    trainer = DeltaTrainer(
        delta_model,
        kind.generates,
        args=arguments,
        train_dataset=splits["train"],
        eval_dataset=splits["validation"],
        data_collator=kind.collator(model),
        compute_metrics=lambda p: kind.metrics(p.predictions, p.label_ids),
        callbacks=[StepCallback(delta_model), *extra, *callbacks],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def evaluate(trainer: DeltaTrainer, rows: Any) -> dict[str, float]:
    """Return the loss and the metrics on rows, without the prefix and the timings that the Trainer adds."""
    measured = trainer.evaluate(rows, metric_key_prefix="x")
    timings = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
    names = {name.removeprefix("x_"): float(value) for name, value in measured.items() if name.startswith("x_")}
    return {name: value for name, value in names.items() if name not in timings}
