"""Norms and activations that transformers writes as several operations, computed in few.

The root mean square norm of Llama, T5, Gemma and others is seven operations there, and about fourteen in the backward pass,
most of them over the whole hidden state; GELU by the hyperbolic tangent (GPT-2, T5 v1.1) is eight, which keep four tensors of
its size. A frozen backbone needs neither. In a model that `InFew` has,

- a norm whose scale s is frozen is one function for autograd, which keeps its input and one number r for each token::

      y = s r x,   r = 1 / sqrt(mean(x²) + eps),   dx = r (s g - x r² mean(s g x))

  on a CPU. (How that compares with PyTorch's own kernel on a GPU has not been measured.)
- GELU is PyTorch's own operation, and ``x sigmoid(1.702 x)`` (CLIP) is ``silu(1.702 x) / 1.702``.

All is exact to rounding. In half precision a norm is rounded once, at the end, where transformers may round twice. What is not
known word for word, such as a norm that a model computes in a way of its own, is left as it is.
"""

from __future__ import annotations

import collections
import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import activations

from deltaexp.errors import listing

MARK = "_deltaexp_in_few"
"""Attribute of a class that computes in few operations what its base does."""
QUICK = 1.702
"""The factor of CLIP's activation."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Norm(NamedTuple):
    """How a class of norms computes."""

    eps: str
    """The attribute that has the eps."""
    offset: float
    """What is added to the weight to give the scale."""


KNOWN = {
    "llama": ("LlamaRMSNorm", Norm("variance_epsilon", 0)), "olmo2": ("Olmo2RMSNorm", Norm("variance_epsilon", 0)),
    "t5": ("T5LayerNorm", Norm("variance_epsilon", 0)), "gemma": ("GemmaRMSNorm", Norm("eps", 1)),
}  # fmt: skip
"""One norm of each wording, by its architecture. What differs between the first three is where they round."""


class _RootMeanSquare(torch.autograd.Function):
    """``y = s x / sqrt(mean(x²) + eps)`` over the last dimension, with an s that needs no gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: torch.Tensor, eps: float) -> torch.Tensor:
        r = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        r.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, scale, r)
        return torch.mul(x, r).mul_(scale).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        x, scale, r = ctx.saved_tensors
        wide = x.float()
        scaled = g.float() * scale
        mean = (scaled * wide).sum(-1, keepdim=True).mul_(r).mul_(r).mul_(r).div_(-x.shape[-1])
        return scaled.mul_(r).addcmul_(wide, mean).to(x.dtype), None, None


def _gelu_by_tanh(self: Any, input: torch.Tensor) -> torch.Tensor:
    return nn.functional.gelu(input, approximate="tanh")


def _gelu(self: Any, input: torch.Tensor) -> torch.Tensor:
    return nn.functional.gelu(input)


def _quick_gelu(self: Any, input: torch.Tensor) -> torch.Tensor:
    if input.dtype == torch.float16:  # in which the product would overflow sooner
        return input * torch.sigmoid(QUICK * input)
    return nn.functional.silu(QUICK * input) * (1 / QUICK)


GELUS: dict[str, Callable[..., torch.Tensor]] = {
    "NewGELUActivation": _gelu_by_tanh,
    "FastGELUActivation": _gelu_by_tanh,
    "AccurateGELUActivation": _gelu_by_tanh,
    "BloomGelu": _gelu_by_tanh,
    "QuickGELUActivation": _quick_gelu,
}
"""Activations that transformers computes in several operations."""
WRITTEN_OUT = {"_gelu_python": _gelu, "_gelu_tanh_python": _gelu_by_tanh}
"""What an activation that can be PyTorch's operation has in its place, where it was asked for."""


class InFew:
    """The norms and activations of a model that are computed in few operations, from now on until `remove`.

    They have first derivatives only. A copy that is made meanwhile, by ``copy`` or ``pickle``, computes as transformers does.

    Args:
        model: The model.
        norms: Whether norms are taken; of these only those on a CPU (or without values) that are frozen.
    """

    def __init__(self, model: nn.Module, norms: bool = True) -> None:
        self.model, self.norms = model, norms
        self.modules: list[nn.Module] = []
        """What this has changed, and has to change back: not what is changed already."""
        self.put()
        self.kinds = collections.Counter(type(module).__name__ for module in self.modules)
        """How many modules of which class that is."""

    def put(self) -> None:
        """Compute in few operations again after `remove`."""
        for module in self.model.modules():
            other = _other(module, self.norms)
            if other is not type(module):
                module.__class__ = other
                self.modules.append(module)

    def remove(self) -> None:
        """Let the model compute as transformers does."""
        for module in self.modules:
            module.__class__ = type(module).__mro__[1]
        self.modules.clear()

    def __str__(self) -> str:
        return listing(f"{count} {name}" for name, count in self.kinds.items())

    def __enter__(self) -> InFew:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def _other(module: nn.Module, norms: bool) -> Any:
    """Return the class that computes as a module's own does, in fewer operations; its own where there is none."""
    kind: Any = type(module)
    if MARK in kind.__dict__ or "forward" in vars(module):  # such as that of a module which is moved when it is called
        return kind
    how = _written(kind)
    if how is None and norms:
        weight = module._parameters.get("weight")  # a property of that name may be anything
        here = weight is not None and weight.device.type in ("cpu", "meta") and not weight.requires_grad
        how = _norm(kind) if here else None
    if how is None and isinstance(module, (activations.GELUActivation, activations.GELUTanh)):
        how = WRITTEN_OUT.get(getattr(module.act, "__name__", ""))
    return kind if how is None else _subclass(kind, how)


@functools.cache
def _subclass(kind: Any, forward: Callable[..., torch.Tensor]) -> type:
    def reduced(self: Any, protocol: Any) -> Any:
        _, _, *state = super(made, self).__reduce_ex__(protocol)
        return _empty, (kind,), *state

    # Under its base's name, as code of transformers may ask for it.
    facts = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__reduce_ex__": reduced}
    made: Any = type(kind.__name__, (kind,), {**facts, "forward": forward, MARK: True})
    return made


def _empty(kind: Any) -> Any:
    return kind.__new__(kind)


@functools.cache
def _written(kind: Any) -> Callable[..., torch.Tensor] | None:
    return GELUS.get(kind.__name__) if kind.__module__.startswith("transformers.") else None


@functools.cache
def _norm(kind: Any) -> Callable[..., torch.Tensor] | None:
    """Return how a class of norms computes in few operations; None where it is not one of those known."""
    words = _wording(kind)
    known = _known().get(words) if words else None
    if known is None:
        return None
    plain = kind.forward

    def forward(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        weight = self.weight
        apart = weight.requires_grad and torch.is_grad_enabled()
        usual = hidden.dtype == weight.dtype and hidden.dtype in DTYPES and hidden.device.type == "cpu" == weight.device.type
        if apart or not usual or torch.compiler.is_compiling():
            return plain(self, hidden)
        scale = weight.float() + known.offset if known.offset else weight
        return _RootMeanSquare.apply(hidden, scale.detach(), getattr(self, known.eps))

    return forward


@functools.cache
def _known() -> dict[tuple[Any, ...] | None, Norm]:
    modules = {name: importlib.import_module(f"transformers.models.{name}.modeling_{name}") for name in KNOWN}
    return {_wording(getattr(modules[name], kind)): norm for name, (kind, norm) in KNOWN.items()}


def _wording(kind: Any) -> tuple[Any, ...] | None:
    """Return what a class of norms does, but for the names of its variables: transformers has the same class many times.

    None is said of everything else, without a look at the architectures that are `KNOWN`.
    """
    found: list[Any] = []
    for name in ("forward", "_norm"):
        code = getattr(getattr(kind, name, None), "__code__", None)
        if code is not None:
            numbers = tuple(value for value in code.co_consts if not isinstance(value, str))
            found.append((code.co_code, code.co_names, numbers))
    return tuple(found) if any("rsqrt" in names for _, names, _ in found) else None
