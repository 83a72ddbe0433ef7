"""Hadamard products of low-rank matrices, as a function with a backward pass of its own."""

from __future__ import annotations

from typing import Any

import torch


class HadamardProduct(torch.autograd.Function):
    """``s (A B) * (C D)``, an elementwise product of two low-rank matrices; only the four factors are kept: LoHa."""

    generate_vmap_rule = (
        True  # with `setup_context` and `jvp`, it goes with all transforms of torch.func, as plain operations do
    )

    @staticmethod
    def forward(a: Any, b: Any, c: Any, d: Any, scale: float) -> Any:
        """Compute the product, shape ``(out_dim, in_dim)``."""
        return (a @ b) * (c @ d) * scale

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keep the factors."""
        *factors, ctx.scale = inputs
        ctx.save_for_backward(*factors)
        ctx.save_for_forward(*factors)

    @staticmethod
    def jvp(ctx: Any, a_t: Any, b_t: Any, c_t: Any, d_t: Any, _: Any) -> Any:
        """Return the derivative along tangents of the factors."""
        (a, b, c, d), zero = ctx.saved_tensors, torch.zeros_like
        a_t, b_t, c_t, d_t = (zero(one) if t is None else t for one, t in zip((a, b, c, d), (a_t, b_t, c_t, d_t), strict=True))
        return ((a_t @ b + a @ b_t) * (c @ d) + (a @ b) * (c_t @ d + c @ d_t)) * ctx.scale

    @staticmethod
    def backward(ctx: Any, g: Any) -> Any:
        """Return the gradients of the factors."""
        a, b, c, d = ctx.saved_tensors
        left, right = g * (c @ d) * ctx.scale, g * (a @ b) * ctx.scale
        return left @ b.T, a.T @ left, right @ d.T, c.T @ right, None
