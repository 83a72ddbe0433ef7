"""A contender, and how one takes its steps."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from shapes import Backbones
from torch import nn

BF16 = torch.bfloat16


@dataclass
class Contender:
    """One way of taking a step."""

    name: str
    library: str
    """"torch", "peft" or "deltaexp"."""
    method: str
    precision: str
    """"fp32" or "bf16"."""
    make: Callable[[Backbones], Prepared]


@dataclass
class Prepared:
    """A model with its step."""

    model: nn.Module
    forward: Callable[..., Any]
    """The forward pass of the batch, or of other inputs."""
    step: Callable[[], Any]
    """A step as a training takes it."""
    once: Callable[[], Any]
    """The same as plain operations that leave nothing behind, so that they can be counted, and captured as a CUDA graph."""
    keep: list[Any] = field(default_factory=list)
    """What must live as long as the model."""


@dataclass
class Group:
    """Contenders that are measured in turns."""

    name: str
    training: bool
    contenders: list[Contender]
    against: str
    """The name of the one that the others are compared with."""


def prepared(
    model: Any,
    backbones: Backbones,
    training: bool = True,
    autocast: bool = False,
    around: Callable[[], Any] = contextlib.nullcontext,
    entered: list[torch.Tensor] | None = None,
    **extra: Any,
) -> Prepared:
    """Return a model with a step: forward and backward pass, or the forward pass alone.

    Args:
        entered: Where the forward pass puts the tensor that the gradient is computed for; by default it is that of all
            parameters that are trained.
    """
    batch = backbones.batch()
    wanted = [one for one in model.parameters() if one.requires_grad] if entered is None else entered
    kind = backbones.device.partition(":")[0]

    def forward(inputs: dict[str, torch.Tensor] = batch) -> Any:
        with torch.autocast(kind, BF16, enabled=autocast), around():
            return model(**inputs, **extra)

    def train() -> None:
        forward().loss.backward()
        for tensor in wanted:
            tensor.grad = None
        if entered is not None:
            entered.clear()

    def gradients() -> None:
        torch.autograd.grad(forward().loss, wanted, allow_unused=True)
        if entered is not None:
            entered.clear()

    def infer() -> None:
        with torch.inference_mode():
            forward()

    model.train(training)
    return Prepared(model, forward, train, gradients) if training else Prepared(model, forward, infer, infer)
