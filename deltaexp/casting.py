"""Casts under autocast, made once: of frozen weights as long as they are frozen, of an input once for all maps that take it.

Autocast to half precision casts the weight of a linear map each time it is used, and remembers the cast within one forward pass
only where the weight is trained. A frozen weight gives the same every time. While `kept` is active, the casts of a model's
frozen linear maps are kept beside the weights, which stay what they are: their dtype, their digests, what is saved. That takes
half as much memory again as they do in float32. An input that several maps take, such as that of queries, keys and values, is
cast once for all of them, and kept once for the backward pass; its gradients are added up in half precision.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import pytorch_utils

CAST = "_deltaexp_cast"
"""Attribute of a tensor: its cast, with what tells whether that is still of it; of a weight None until there is one."""


def cast_all(module: Any, x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return an input, and weight and bias of a linear map, in another dtype; casts are kept where `kept` says so."""
    weight, bias = module.weight, module.bias
    keep = not torch.compiler.is_compiling() and CAST in weight.__dict__  # of which it cannot make sense
    return cast(x, dtype, keep), cast(weight, dtype, keep), None if bias is None else cast(bias, dtype, keep)


def cast(tensor: torch.Tensor, dtype: torch.dtype, keep: bool) -> torch.Tensor:
    """Return a tensor in another dtype; ``keep``: the cast is kept for the next time, where it can be."""
    # A cast is kept by its tensor. Of a leaf with a gradient it would lead back to it, in a circle that nothing frees.
    leaf = tensor.requires_grad and tensor.grad_fn is None
    if tensor.dtype == dtype or not keep or leaf or tensor.is_inference():
        return tensor.to(dtype)
    state = tensor._version, tensor.data_ptr(), dtype, tensor.requires_grad and torch.is_grad_enabled()
    found = getattr(tensor, CAST, None)
    if found is None or found[0] != state:
        found = state, tensor.to(dtype)
        setattr(tensor, CAST, found)
    return found[1]


def kept_cast(tensor: torch.Tensor) -> torch.Tensor | None:
    """Return the cast that is kept of a tensor; None where there is none."""
    found = getattr(tensor, CAST, None)
    return None if found is None else found[1]


def _forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    """Compute what the class does, with kept casts under autocast."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind) or torch.float64 in (x.dtype, self.weight.dtype):
        return ORIGINAL[type(self)].forward(self, x)
    x, weight, bias = cast_all(self, x, torch.get_autocast_dtype(kind))
    return nn.functional.linear(x, weight.T if isinstance(self, Conv1D) else weight, bias)


# Under their bases' names, as in `deltaexp.fused`, which has those of the modules that deltas hang on.
class Linear(nn.Linear):
    """A ``torch.nn.Linear`` whose casts are kept."""

    forward = _forward  # type: ignore[assignment]


class Conv1D(pytorch_utils.Conv1D):
    """A ``transformers.pytorch_utils.Conv1D`` whose casts are kept."""

    forward = _forward


KEEPING: dict[type, type] = {nn.Linear: Linear, pytorch_utils.Conv1D: Conv1D}
ORIGINAL: dict[type, Any] = {keeping: original for original, keeping in KEEPING.items()}


@contextlib.contextmanager
def kept(model: nn.Module) -> Iterator[None]:
    """Within this context the casts of a model's frozen linear maps are kept, those with deltas included."""
    for module in model.modules():
        if isinstance(module, tuple(KEEPING)):
            for parameter in module.parameters(recurse=False):
                setattr(parameter, CAST, None)
            module.__class__ = KEEPING.get(type(module), type(module))
    try:
        yield
    finally:
        for module in model.modules():
            module.__class__ = ORIGINAL.get(type(module), type(module))
        for parameter in model.parameters():
            parameter.__dict__.pop(CAST, None)
