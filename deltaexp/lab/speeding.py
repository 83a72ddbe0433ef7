"""What ``trainer.speed=auto`` chooses for the device, and why: the fastest of what is safe.

On a CPU that multiplies matrices of bfloat16 that is mixed precision, as by ``trainer.precision=bf16``, with changes that are
exact to its rounding: casts of frozen weights are kept (`deltaexp.casting`), low-rank updates are gathered
(`deltaexp.gathered`), and attention is computed by plain products, the backward pass of which is faster
(`deltaexp.half_attention`). On every CPU freed memory is kept for the next step, where the C library can do so
(`deltaexp.lab.memory`). A GPU computes in mixed precision anyway; there casts are kept and updates gathered, too, where that
takes little of its memory, and the steps of small models are replayed as CUDA graphs (`deltaexp.lab.replaying`).

The choice goes by the config and by what the hardware says that it can do, never by a measurement, so that it is the same
every time. What is set explicitly is kept.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from deltaexp import casting, gathered, half_attention, quantised
from deltaexp.lab import arguments, memory, processes, replaying
from deltaexp.lab.config import RunConfig, TrainerConfig

SHARE = 16
"""Kept casts may take one part of so many of a GPU's memory."""


@dataclass(frozen=True)
class Choice:
    """How a run computes."""

    trainer: TrainerConfig
    """The section ``trainer`` with precision and optimizer as they are from now on."""
    casts: bool = False
    """Whether casts of frozen weights are kept, and low-rank updates gathered."""
    attention: bool = False
    """Whether attention is computed by `deltaexp.half_attention`."""
    graphs: bool = False
    """Whether training steps are replayed as CUDA graphs."""
    memory: bool = False
    """Whether freed memory is kept for the next step, which no result depends on."""
    reasons: tuple[str, ...] = ()
    """What was chosen and why; nothing where nothing was to be chosen."""

    def recorded(self) -> dict[str, Any]:
        """Return what was chosen, for JSON."""
        return {
            "asked": self.trainer.speed, "precision": self.trainer.precision, "optimizer": self.trainer.optimizer,
            "kept_casts": self.casts, "attention_by_products": self.attention, "kept_memory": self.memory,
            "cuda_graphs": self.graphs, "reasons": list(self.reasons),
        }  # fmt: skip

    @property
    def name(self) -> str:
        """What results depend on, in a few words."""
        words = {"kept casts": self.casts, "attention by products": self.attention, "CUDA graphs": self.graphs}
        extra = [word for word, on in words.items() if on]
        return ", ".join([self.trainer.precision, self.trainer.optimizer, *extra])


def multiplies_bf16() -> bool:
    """Say whether the CPU has instructions for products of bfloat16: AMX, or those of AVX-512."""
    found = (getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("amx_tile", "avx512_bf16"))
    return torch.backends.mkldnn.is_available() and any(ask is not None and ask() for ask in found)


def choose(config: RunConfig, model: Any) -> Choice:
    """Return how a run computes on this machine.

    Args:
        config: The run's config.
        model: Its backbone.

    Raises:
        ConfigError: If the hardware cannot do what is asked for.
    """
    trainer = dataclasses.replace(config.trainer, precision=arguments.precision(config.trainer))
    if trainer.speed == "off":
        return Choice(trainer)
    if processes.count() > 1 or quantised.names(model):
        what = "several processes" if processes.count() > 1 else "a quantised backbone"
        return Choice(trainer, reasons=(f"nothing is chosen for {what}: all is as with trainer.speed=off",))
    if torch.cuda.is_available() and not trainer.cpu:
        return on_gpu(trainer, config, model, torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
    trainer, precision = _precision(config, trainer, model)
    reasons = [precision]
    casts = attention = False
    if trainer.precision == "bf16" and trainer.compile:
        reasons.append("casts and attention left to torch.compile")
    elif trainer.precision == "bf16":
        casts = True
        reasons.append("frozen weights are cast once, and low-rank updates gathered")
        attention = config.backbone.attention is None and getattr(model.config, "_attn_implementation", None) == "sdpa"
        if attention:
            reasons.append("attention by plain products (sdpa's backward pass is slow in bf16)")
        elif config.backbone.attention:
            reasons.append(f"attention {config.backbone.attention}, as set")
    kept = memory.reusable()
    if kept:
        reasons.append("freed memory is kept for the next step")
    return _with_optimizer(Choice(trainer, casts, attention, memory=kept, reasons=tuple(reasons)))


def on_gpu(trainer: TrainerConfig, config: RunConfig, model: Any, memory: int | None) -> Choice:
    """Return how a run computes on a GPU.

    Args:
        trainer: Its section ``trainer``, with the precision.
        config: Its config.
        model: Its backbone.
        memory: The bytes that the GPU has; None where that is not known, and taken to be enough.
    """
    reasons = [f"{trainer.precision} and attention as with trainer.speed=off, which are for a GPU already"]
    casts = False
    if trainer.precision == "bf16" and not trainer.compile:
        taken = sum(parameter.numel() for parameter in model.parameters()) * torch.bfloat16.itemsize
        casts = memory is None or taken * SHARE <= memory
        if casts:
            reasons.append("frozen weights are cast once, and low-rank updates gathered")
        else:
            reasons.append(f"no casts of frozen weights are kept, which would take {taken / 2**30:.3g} GiB")
    why = "fp16 scales the loss by what it finds" if trainer.precision == "fp16" else replaying.refused(config)
    small = "steps of small batches are CUDA graphs, begun by one call"
    reasons.append(small if why is None else f"no CUDA graphs: {why}")
    return _with_optimizer(Choice(trainer, casts, graphs=why is None, reasons=tuple(reasons)))


def _with_optimizer(choice: Choice) -> Choice:
    """Return a choice with the fastest optimizer of the same kind."""
    if choice.trainer.optimizer != "adamw":
        return choice
    trainer = dataclasses.replace(choice.trainer, optimizer="adamw_fused")
    return dataclasses.replace(choice, trainer=trainer, reasons=(*choice.reasons, "AdamW fused, the same to rounding"))


def _precision(config: RunConfig, trainer: TrainerConfig, model: Any) -> tuple[TrainerConfig, str]:
    """Return the section ``trainer`` with what a CPU computes fastest in, and the reason."""
    if config.trainer.precision != "auto":
        return trainer, f"{trainer.precision}, as set"
    if not multiplies_bf16():
        return trainer, "fp32, as this CPU has no instructions for products of bf16"
    if any(parameter.dtype == torch.float16 for parameter in model.parameters()):
        return trainer, "fp32, as the backbone's weights are in float16"
    chosen = dataclasses.replace(trainer, precision="bf16")
    return chosen, "bf16 (this CPU multiplies in it), what is trained in fp32"


@contextlib.contextmanager
def applied(choice: Choice, model: Any) -> Iterator[None]:
    """Within this context a model computes as was chosen; afterwards it is what it was."""
    with contextlib.ExitStack() as stack:
        if choice.memory:
            stack.enter_context(memory.reused())
        if choice.casts:
            stack.enter_context(casting.kept(model))
            stack.enter_context(gathered.applied(model))
        if choice.attention:
            stack.enter_context(half_attention.registered())
        yield


@contextlib.contextmanager
def without_denormals() -> Iterator[None]:
    """Within this context a CPU takes numbers for zero that are too small to be normal, of less than 1.2e-38 in float32.

    It computes with them many times slower than with others, and a model that is sure of what it says has many of them: the
    probabilities of all else, and their gradients. The threads that PyTorch computes in have for ever what held where they were
    begun: so this is for a whole run, from before the first of them on, and they may go on with it afterwards.
    """
    before = not float(torch.tensor(1e-39) * 1)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)
