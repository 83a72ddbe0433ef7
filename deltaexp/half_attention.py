"""Attention in bfloat16 on the CPU, for training: what ``scaled_dot_product_attention`` computes, with a fast backward pass.

PyTorch's own is fast forward and slow backward there: for 32 rows of 64 tokens, 12 heads of size 32, it took 74 ms back, and
the plain products take 4. So these are computed here, ``S = s Q K^T + M``, ``P = softmax(S)``, ``O = P V``, with one rounding
to bfloat16 for each product, as everywhere in bfloat16; sums, and what is inside the softmax, are in float32. Kept for the
backward pass are Q, K, V and P. P grows with the square of the length, so that for long inputs PyTorch's attention is taken, in
float32, the backward pass of which is fast.

`registered` puts it into transformers' attention interface under the name of ``sdpa``: transformers prepares masks, groups of
queries and position biases as it always does, and nothing of a model or its config changes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface

LONGEST = 512
"""Number of keys above which P is not kept: it would take more memory than all else that a layer keeps."""
plain = torch.nn.functional.scaled_dot_product_attention


@contextlib.contextmanager
def registered() -> Iterator[None]:
    """Within this context all models of transformers with ``sdpa`` attention compute it here where that is faster."""
    before = AttentionInterface._global_mapping["sdpa"]

    def attend(*args: Any, **kwargs: Any) -> Any:
        with _Instead():
            return before(*args, **kwargs)

    AttentionInterface.register("sdpa", attend)
    try:
        yield
    finally:
        AttentionInterface.register("sdpa", before)


class _Instead(TorchFunctionMode):
    """Within this context `attention` is called in the place of PyTorch's."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (attention if func is plain else func)(*args, **(kwargs or {}))


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Return what ``torch.nn.functional.scaled_dot_product_attention`` does, to rounding.

    Args:
        query: Shape ``(batch, heads, queries, head_dim)``.
        key: Shape ``(batch, key heads, keys, head_dim)``.
        value: Shape ``(batch, key heads, keys, value head_dim)``.
        attn_mask: What is added to the scores, or False for what is not seen; broadcast to ``(batch, heads, queries, keys)``.
        dropout_p: Probability of dropping an element of P.
        is_causal: A query sees the keys up to its own number.
        scale: The s; null is one over the square root of ``head_dim``.
        enable_gqa: Several heads of queries share one of keys.
    """
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
    options: dict[str, Any] = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
    trained = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    if kind != "cpu" or dtype != torch.bfloat16 or not trained or query.dim() != 4:
        return plain(query, key, value, attn_mask, **options)
    if key.shape[2] > LONGEST or (attn_mask is not None and attn_mask.requires_grad):
        with torch.autocast(kind, enabled=False):
            mask = attn_mask if attn_mask is None or attn_mask.dtype == torch.bool else attn_mask.float()
            return plain(query.float(), key.float(), value.float(), mask, **options).to(dtype)
    if is_causal:
        attn_mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        # The smallest number, not minus infinity: the row of a query that sees nothing is to be finite.
        lowest = torch.finfo(dtype).min
        attn_mask = torch.zeros(attn_mask.shape, dtype=dtype).masked_fill_(~attn_mask, lowest)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    form = torch.contiguous_format  # cast and made contiguous in one, where there is anything to cast
    q, k, v = (tensor.to(dtype, memory_format=form).contiguous() for tensor in (query, key, value))
    return _Attention.apply(q, k, v, attn_mask, dropout_p, scale)


class _Attention(torch.autograd.Function):
    """``softmax(s Q K^T + M) V``, of which the heads are divided equally among those of K and V."""

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, mask: Any, dropout: float, scale: float) -> Any:
        batch, heads, queries, dim = query.shape
        q = query.view(batch * key.shape[1], -1, dim)
        k, v = key.flatten(0, 1), value.flatten(0, 1)
        scores = _product(q, k.mT, scale)
        if mask is not None:
            scores.view(batch, heads, queries, -1).add_(mask)
        p = torch.softmax(scores, -1)
        kept, seen = torch.native_dropout(p, dropout, True) if dropout else (p, None)
        ctx.save_for_backward(q, k, v, p, seen)
        ctx.shapes, ctx.dropout, ctx.scale = (query.shape, key.shape, value.shape), dropout, scale
        return torch.bmm(kept, v).view(batch, heads, queries, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Any) -> Any:
        q, k, v, p, seen = ctx.saved_tensors
        g = g.reshape(*q.shape[:2], v.shape[-1])
        d_p, kept = torch.bmm(g, v.mT), p
        if seen is not None:
            again = 1 / (1 - ctx.dropout)
            d_p, kept = d_p.mul_(seen).mul_(again), p * seen * again
        d_scores = torch._softmax_backward_data(d_p, p, -1, p.dtype)
        found = _product(d_scores, k, ctx.scale), _product(d_scores.mT, q, ctx.scale), torch.bmm(kept.mT, g)
        return (*(grad.view(shape) for grad, shape in zip(found, ctx.shapes, strict=True)), None, None, None)


def _product(left: torch.Tensor, right: torch.Tensor, scale: float) -> torch.Tensor:
    """Return ``scale left right``, rounded once."""
    out = left.new_empty(len(left), left.shape[1], right.shape[2])
    return torch.baddbmm(out, left, right, beta=0, alpha=scale, out=out)
