"""From a run's config to what its steps take: the batch, how it is computed, memory and FLOPs (see `deltaexp.lab.estimate`)."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from deltaexp.errors import ConfigError
from deltaexp.lab import arguments, estimate, shortcuts, smoothing, speeding
from deltaexp.lab.blueprint import Blueprint
from deltaexp.lab.config import RunConfig, TrainerConfig
from deltaexp.lab.estimate import Dry, Execution, Forward
from deltaexp.lab.hyperparameters import OPTIMIZERS
from deltaexp.lab.speeding import Choice
from deltaexp.lab.tasks.kinds import text
from deltaexp.lab.tasks.kinds.base import position_limit
from deltaexp.lab.trainer import Trainer, TrainingArguments
from deltaexp.model import DeltaModel
from deltaexp.ownership import originals
from deltaexp.registry import DeltaConfig

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
PIXELS = 224
"""Height and width of images where the backbone takes any, as those of ImageNet mostly are."""
CHOICES = 4
"""Answers of multiple choice, where only the data tell how many there are."""


@dataclass(frozen=True)
class Sizes:
    """What is known of the data that the config does not tell."""

    length: int | None = None
    """Tokens of an input, such as the mean; null takes the longest that the config allows."""
    target_length: int | None = None
    """Tokens of a target; null takes the longest that the config allows."""
    rows: int | None = None
    """Rows of the training split, for the number of steps; null takes ``task.train_rows``."""


@dataclass
class Memory:
    """What a run holds on one device, in bytes."""

    precision: str
    training: dict[str, int]
    """At the peak of a training step, by what it is."""
    during: str
    """When in a step the peak is."""
    saved_for_backward: int
    gradients: int
    """All of them; there may be fewer at the peak."""
    evaluation: int
    """At the peak of a forward pass with ``trainer.eval_batch_size`` rows, the optimizer's states included."""
    verification: int
    """Of the weights alone, when the saved delta is loaded onto a second backbone in the end of a run."""

    @property
    def peak(self) -> int:
        """The most that is held at any time."""
        return max(sum(self.training.values()), self.evaluation, self.verification)


@dataclass
class Costs:
    """Memory by device and FLOPs of a step; empty, with the reason in `remarks`, where they cannot be told."""

    memory: dict[str, Memory] = field(default_factory=dict)
    flops: dict[str, int] = field(default_factory=dict)
    """Of the ``forward`` and the ``backward`` pass and of the ``step``, over all accumulated batches."""
    remarks: list[str] = field(default_factory=list)


def batch_sizes(config: RunConfig, delta_config: DeltaConfig, drawn: Blueprint, sizes: Sizes) -> dict[str, int]:
    """Return the sizes of a training batch: of rows, and of tokens in each.

    Raises:
        ConfigError: If the backbone does not take inputs of that length.
    """
    task, result = config.task, {"rows": config.trainer.batch_size}
    if drawn.kind.processes == "image":
        return result
    target = sizes.target_length or task.max_target_length
    together = issubclass(drawn.kind, text.DecoderText)  # source and target in one sequence
    limit = position_limit(drawn.settings)
    left = None if limit is None else limit - delta_config.positions() - (target if together else 0)
    if left is not None and (left < 1 or (sizes.length or 0) > left):
        raise ConfigError(
            f"Inputs are to have {sizes.length or task.max_source_length} tokens, and of the {limit} that the backbone "
            f"{config.backbone.name!r} takes, {max(left, 0)} are left for them."
        )
    length = sizes.length or (task.max_source_length if left is None else min(task.max_source_length, left))
    if type(drawn.model).__name__.endswith("ForMultipleChoice"):
        result["choices"] = len(task.choices) if len(task.choices) > 1 else CHOICES
    result["length"] = length + (target if together else 0)
    if drawn.settings.is_encoder_decoder and issubclass(drawn.kind, text.Text):
        result["target_length"] = target
    return result


def batch(dry: Dry, drawn: Blueprint, sizes: Mapping[str, int], rows: int) -> dict[str, torch.Tensor]:
    """Make a batch of tensors that hold nothing, with the names and shapes that the kind's collator gives."""
    model, name = drawn.model, type(drawn.model).__name__
    if drawn.kind.processes == "image":
        vision = getattr(drawn.settings, "vision_config", drawn.settings)
        size = getattr(vision, "image_size", PIXELS)
        height, width = (size, size) if isinstance(size, int) else size
        image = (rows, getattr(vision, "num_channels", 3), height, width)
        return {model.main_input_name: dry.empty(image, torch.float32), "labels": dry.empty((rows,), torch.long)}
    tokens: tuple[int, ...] = (rows, *([sizes["choices"]] if "choices" in sizes else []), sizes["length"])
    made = {"input_ids": dry.empty(tokens, torch.long), "attention_mask": dry.empty(tokens, torch.long)}
    if name.endswith("ForQuestionAnswering"):
        return made | {key: dry.empty((rows,), torch.long) for key in ("start_positions", "end_positions")}
    if name.endswith(("ForSequenceClassification", "ForMultipleChoice")):
        numbers = getattr(drawn.settings, "problem_type", None) == "regression"
        return made | {"labels": dry.empty((rows,), torch.float32 if numbers else torch.long)}
    labels = (rows, sizes["target_length"]) if "target_length" in sizes else tokens
    return made | {"labels": dry.empty(labels, torch.long)}


def computed(config: RunConfig, drawn: Blueprint, device: str) -> Choice:
    """Return how a run computes on a device: on a GPU with bf16, or on the CPU of this machine.

    Args:
        config: The run.
        drawn: Its backbone.
        device: ``gpu`` or ``cpu``.
    """
    trainer = dataclasses.replace(config.trainer, cpu=device == "cpu")
    if device == "gpu":
        trainer = dataclasses.replace(trainer, precision="bf16") if trainer.precision == "auto" else trainer
        plain = trainer.speed == "off" or drawn.packed
        return Choice(trainer) if plain else speeding.on_gpu(trainer, config, drawn.model, memory=None)
    if trainer.precision == "fp16":
        return Choice(dataclasses.replace(trainer, precision="fp32"))  # a CPU does not train in it
    if drawn.packed:
        trainer = dataclasses.replace(trainer, speed="off")  # for a quantised backbone nothing is chosen
    return speeding.choose(dataclasses.replace(config, trainer=trainer), drawn.model)


def find(config: RunConfig, delta_model: DeltaModel, drawn: Blueprint, sizes: Mapping[str, int]) -> Costs:
    """Return what the steps of a run take. The model cannot be used afterwards.

    Args:
        config: The run.
        delta_model: What is trained, frozen as it should be, on a backbone without weights.
        drawn: That backbone.
        sizes: Of a batch, from `batch_sizes`.

    Raises:
        ConfigError: If the backbone cannot do gradient checkpointing, which is asked for.
    """
    model, trainer, found = drawn.model, config.trainer, Costs()
    again = arguments.checkpointing(trainer, model)
    arguments.without_cache(model)
    if again:
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        # The state of random generators is nothing to keep where no number is drawn.
        enable({"use_reentrant": False, "preserve_rng_state": False})
    if trainer.compile:
        found.remarks.append("torch.compile fuses operations and may keep less than is told here, where nothing is compiled.")
    if trainer.sharding:
        found.remarks.append(f"trainer.sharding={trainer.sharding}: told is what a process holds that has all of the weights.")
    if drawn.packed:
        found.remarks.append(
            "Quantised weights are counted by their format; what its kernels take beside them is not known here."
        )
    model.train()
    dry = Dry(model, originals(model), drawn.packed)
    held = dry.weights()
    forward, optimizer = _forward(trainer, delta_model), _optimizer(trainer)
    try:
        for device in estimate.DEVICES:
            choice = computed(config, drawn, device)
            if choice.reasons:
                where = "a GPU" if device == "gpu" else "the CPU of this machine"
                found.remarks.append(f"speed={trainer.speed} on {where}: {'; '.join(choice.reasons)}.")
            if choice.graphs:
                found.remarks.append(
                    "CUDA graphs hold the activations of a step between steps, too, and twice while they are tried."
                )
            kind = choice.trainer.precision
            how = Execution(device, AUTOCAST[kind], trainer.gradient_accumulation_steps, trainer.max_grad_norm)
            with (
                speeding.applied(dataclasses.replace(choice, memory=False), model),
                shortcuts.in_few(config, model, norms=device == "cpu") or contextlib.nullcontext(),
            ):
                # First the evaluation, with which casts that are kept begin to be there.
                largest = dry.evaluation(forward, batch(dry, drawn, sizes, trainer.eval_batch_size), how)
                rows = batch(dry, drawn, sizes, sizes["rows"])
                cost = dry.train_step(forward, rows, how, optimizer, flops=device == "cpu")
            states = cost.peak.get(estimate.STATES, 0)
            found.memory[device] = Memory(
                kind, cost.peak, cost.during, cost.saved, cost.gradients, largest + states, 2 * held + states
            )
            if device == "cpu":
                found.flops = {**cost.flops, "step": sum(cost.flops.values())}
    except Exception as error:  # the code of a model may want values, e.g. to send each token to its experts
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        why = f"Memory and FLOPs cannot be told: this backbone computes with values, and there are none here ({reason})."
        return Costs(remarks=[*found.remarks, why])
    return found


def _forward(trainer: TrainerConfig, delta_model: DeltaModel) -> Forward:
    """Return what computes the loss as the run's trainer does."""
    model: Any = delta_model.backbone_model
    smoother = smoothing.Smoother(trainer.label_smoothing) if trainer.label_smoothing else None
    causal = type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))

    def forward(**inputs: torch.Tensor) -> tuple[Any, torch.Tensor | None]:
        if smoother is not None and model.training:
            inputs = smoothing.prepared(inputs, model)
            labels = inputs.pop("labels")
            outputs = model(**inputs)
            loss = smoother(outputs, labels, shift_labels=causal)
        else:
            outputs = model(**inputs)
            loss = outputs.get("loss")
        penalty = delta_model.penalty() if model.training else None
        return loss if penalty is None else loss + penalty, outputs.get("logits")

    return forward


def _optimizer(trainer: TrainerConfig) -> Callable[[list[nn.Parameter], bool], torch.optim.Optimizer] | None:
    """Return what makes the run's optimizer; None for one that is not PyTorch's and computes on a GPU only."""
    if "8bit" in trainer.optimizer:
        return None
    name = OPTIMIZERS["adamw" if trainer.optimizer == "adamw_fused" else trainer.optimizer]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        momentum = f"momentum={trainer.momentum}" if trainer.optimizer == "sgd" else None
        told = TrainingArguments(output_dir="unused", optim=name, optim_args=momentum, use_cpu=True, report_to="none")
    kind, options = Trainer.get_optimizer_cls_and_kwargs(told)

    def make(parameters: list[nn.Parameter], gpu: bool) -> torch.optim.Optimizer:
        # On a GPU PyTorch's optimizers update all parameters at once, with copies of all; the fused one, and on the CPU, not.
        foreach = {"foreach": gpu and trainer.optimizer != "adamw_fused"} if kind.__module__.startswith("torch.") else {}
        return kind(parameters, **{**options, **foreach})

    return make
