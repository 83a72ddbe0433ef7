"""Operations of a model as a GPU computes them, for the estimate of what a step would take there, made without one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn import functional
from torch.utils._pytree import tree_map_only

aten = torch.ops.aten

WIDE = ("layer_norm", "group_norm", "softmax", "log_softmax")
"""Functions that autocast computes in float32 on a GPU (https://docs.pytorch.org/docs/stable/amp.html) and not on the CPU."""


@contextlib.contextmanager
def as_on_gpu(autocast: bool) -> Iterator[None]:
    """Within this context tensors on the CPU are computed as on a GPU, where PyTorch chooses other operations there.

    They are attention (kernels without a matrix of scores also under dropout), dropout (a mask of bytes) and those that
    autocast does in float32. The functions are exchanged: a mode would not be there when activations are computed again.
    """
    found = {"scaled_dot_product_attention": _attention, "dropout": _dropout}
    found |= {name: _wide(getattr(functional, name)) for name in WIDE if autocast}
    before = {name: getattr(functional, name) for name in found}
    try:
        for name, function in found.items():
            setattr(functional, name, function)
        yield
    finally:
        for name, function in before.items():
            setattr(functional, name, function)


def _wide(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def computed(*args: Any, **kwargs: Any) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            return function(*tree_map_only(torch.Tensor, widened, args), **tree_map_only(torch.Tensor, widened, kwargs))

    return computed


def widened(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor in float32, unless it holds no floating-point numbers."""
    return tensor.float() if tensor.is_floating_point() else tensor


def _attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> torch.Tensor:  # fmt: skip
    if enable_gqa and key.shape[-3] != query.shape[-3]:
        key, value = (t.repeat_interleave(query.shape[-3] // key.shape[-3], -3) for t in (key, value))
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, float("-inf"))
        attn_mask = attn_mask.to(query.dtype).expand(*query.shape[:-1], key.shape[-2])
    grad = torch.is_grad_enabled()
    return aten._scaled_dot_product_efficient_attention(query, key, value, attn_mask, grad, dropout_p, is_causal, scale=scale)[
        0
    ]


def _dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    return torch.native_dropout(input, p, True)[0] if training and p > 0 else input
