"""From a run's config to the arguments of transformers' Trainer."""

from __future__ import annotations

import dataclasses
import os
import shutil
from typing import Any

import torch
from torch import nn

from deltaexp.errors import ConfigError, listing
from deltaexp.lab import processes
from deltaexp.lab.checkpoints import Checkpoints
from deltaexp.lab.config import TrainerConfig
from deltaexp.lab.hyperparameters import NO_FP16, OPTIMIZERS
from deltaexp.lab.tasks.kinds import Kind
from deltaexp.lab.tasks.metrics import greater_is_better
from deltaexp.lab.trainer import TrainingArguments
from deltaexp.model import DeltaModel

COMPILERS = ("g++", "clang++", "c++")
"""C++ compilers that torch.compile looks for."""


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
    config: TrainerConfig, delta_model: DeltaModel, kind: Kind, rows: int, saved: Checkpoints, seeds: dict[str, int]
) -> TrainingArguments:
    """Return the arguments of a run.

    Args:
        config: How to train.
        delta_model: What to train, frozen as it should be.
        kind: The task's kind.
        rows: Number of rows of the training split; 0 where the trainer only evaluates.
        saved: Where checkpoints go.
        seeds: The seeds of ``data`` and ``dropout``.

    Raises:
        ConfigError: If the backbone or the hardware cannot do what is asked for.
    """
    model, mixed = delta_model.backbone_model, precision(config)
    if mixed == "fp16":
        _check_scaled(delta_model)
    if config.compile and not any(map(shutil.which, (os.environ.get("CXX", "g++"), *COMPILERS))):
        raise ConfigError(
            "trainer.compile=true needs a C++ compiler, such as g++, and there is none. Install one, or leave it out."
        )
    assert config.learning_rate is not None, "see deltaexp.lab.config.completed"
    best = config.early_stopping_patience is not None or config.restore_best
    steps = config.max_steps
    if steps < 1:
        per_epoch = -(-rows // (config.batch_size * config.gradient_accumulation_steps * processes.count()))
        steps = max(1, round(per_epoch * config.epochs))
    warmup = _warmup(config, steps) if rows else 0
    metric = config.metric or kind.metric
    every = config.eval_every or (max(1, steps // 10) if best else None)
    pinned = torch.cuda.is_available() and not config.cpu
    return TrainingArguments(
        output_dir=str(saved.folder),
        max_steps=steps,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.eval_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.lr_scheduler,
        lr_scheduler_kwargs=_schedule(config, steps, warmup),
        warmup_steps=warmup,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        seed=seeds["dropout"],
        data_seed=seeds["data"],
        # transformers takes bf16 for a GPU's, and several processes for GPUs', unless it is told to stay on the CPU.
        use_cpu=config.cpu or ((mixed == "bf16" or processes.count() > 1) and not torch.cuda.is_available()),
        bf16=mixed == "bf16",
        fp16=mixed == "fp16",
        eval_strategy="steps" if every else "no",
        eval_steps=every,
        # With "steps" there is one in the end too; those between are `CheckpointCallback`'s, and rotating them `Checkpoints`'.
        save_strategy="steps" if best or saved.every != 0 else "no",
        save_steps=every if best else steps,
        restore_callback_states_from_checkpoint=True,
        load_best_model_at_end=best,
        metric_for_best_model=metric if best else None,
        greater_is_better=greater_is_better(metric) if best else None,
        train_sampling_strategy="group_by_length" if config.group_by_length else "random",
        logging_steps=config.log_every,
        report_to="none",
        disable_tqdm=not config.progress,
        remove_unused_columns=False,
        dataloader_pin_memory=pinned,
        # Else a batch is copied to the GPU only once that has done all that it was given before.
        accelerator_config={"non_blocking": pinned},
        label_smoothing_factor=config.label_smoothing,
        torch_compile=config.compile,
        optim=OPTIMIZERS[config.optimizer],
        optim_args=f"momentum={config.momentum}" if config.optimizer == "sgd" else None,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        adam_epsilon=config.adam_epsilon,
        # A loss that is no number any more is told, not left out of the mean.
        logging_nan_inf_filter=mixed == "fp16",
        **checkpointing(config, model),
    )


def _schedule(config: TrainerConfig, steps: int, warmup: int) -> dict[str, Any]:
    """Return the options of the schedule of a training of so many steps, the first of which are the warm-up.

    Raises:
        ConfigError: If there are too few steps for it.
    """
    options = dict(config.scheduler_options)
    if config.lr_scheduler == "warmup_stable_decay":
        falling = options.setdefault("num_decay_steps", max(1, steps // 5))
        if warmup + falling > steps:
            raise ConfigError(
                f"The learning rate would rise over {warmup} steps and fall over {falling} (trainer.scheduler_options."
                f"num_decay_steps), and the training has {steps}. Take fewer, or train for more steps or epochs."
            )
    return options


def _warmup(config: TrainerConfig, steps: int) -> int:
    """Return the number of steps over which the learning rate rises.

    Raises:
        ConfigError: If that is all of them.
    """
    if config.warmup_steps is None:
        return round(config.warmup_ratio * steps)
    if config.warmup_steps >= steps:
        raise ConfigError(
            f"trainer.warmup_steps is {config.warmup_steps}, and the training has {steps} steps: the learning rate would "
            "never be reached. Take fewer, or train for more steps or epochs."
        )
    return config.warmup_steps


def without_cache(model: nn.Module) -> None:
    """Have no part of a backbone keep keys and values for a next token, unless it is asked to, as by ``generate``.

    The Trainer says so to the backbone's config, but the decoder of T5 has one of its own.
    """
    for module in model.modules():
        if getattr(getattr(module, "config", None), "use_cache", False):
            module.config.use_cache = False  # type: ignore[union-attr]


def checkpointing(config: TrainerConfig, model: Any) -> dict[str, Any]:
    """Return the arguments of transformers for `gradient_checkpointing`, whose names changed.

    Raises:
        ConfigError: If the backbone cannot do it.
    """
    if not config.gradient_checkpointing:
        return {}
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise ConfigError(
            f"trainer.gradient_checkpointing=true is not possible: transformers' {type(model).__name__} has no checkpointing "
            "of activations. To save memory halve trainer.batch_size and double trainer.gradient_accumulation_steps."
        )
    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    name = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
    # The reentrant kind has no gradients where a block's input has none, as behind frozen embeddings.
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}}


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
