"""Linear maps with full-size updates, as functions with a backward pass of their own: DoRA, and what has a ``delta()``.

For these the weight with the update in it is made anyway, and in both passes the input is multiplied by it once. What is small,
or is quickly made again, is not kept for the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from deltaexp.low_rank import Update, as_rows, gradient_by, in_rank, no_view, updated
from deltaexp.shared_input import InputGradient

functional = nn.functional


class DirectedLinear(torch.autograd.Function):
    """``x (c * (W + s B A))^T + b``, where ``c``, shape ``(out_dim,)``, scales the rows of ``W + s B A``: DoRA.

    ``W + s B A`` is given for the forward pass, where its norms were needed for ``c``, and computed anew in the backward pass.
    Its product with ``x`` is kept, from which the gradient of ``c`` comes.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Any, weight: Any, bias: Any, gradient: InputGradient | None, directed: Any, update: Update,
        down: Any, up: Any, ratio: Any,
    ) -> Any:  # fmt: skip
        """Compute the outputs ``(..., out_dim)`` of ``x (..., in_dim)``; ``directed`` is ``W + s B A``."""
        out = functional.linear(x, directed, bias)
        straight = out if bias is None else out - bias
        # In this form it is the output of W to the last bit where c is one.
        out = out * ratio if bias is None else out.addcmul_(straight, ratio - 1)
        ctx.gradient, ctx.update = gradient, update
        ctx.save_for_backward(x, weight, down, up, ratio, straight)
        return no_view(out)

    @staticmethod
    def backward(ctx: Any, g: Any) -> Any:
        """Return the gradients of ``x``, ``A``, ``B`` and ``c``; the frozen weight has none."""
        x, weight, down, up, ratio, straight = ctx.saved_tensors
        flat, g_flat = as_rows(x), as_rows(g)
        directed = updated(weight, (ctx.update,), (down, up))
        gradient = ctx.gradient
        if torch.is_grad_enabled():
            straight, gradient = x @ directed.T, None  # kept, they would be constants in the gradient of this
        grad_x = grad_down = grad_up = grad_ratio = None
        if ctx.needs_input_grad[0]:
            grad_x = gradient_by(g_flat, directed * ratio[:, None], gradient).view(x.shape)
        scale = (ratio * ctx.update.scale)[:, None]
        if ctx.needs_input_grad[6]:
            grad_down = (g_flat @ (up * scale)).T @ flat
        if ctx.needs_input_grad[7]:
            grad_up = (in_rank(flat, down, 1.0).T @ g_flat).T * scale
        if ctx.needs_input_grad[8]:
            grad_ratio = (g_flat * as_rows(straight)).sum(0)
        return grad_x if gradient is None else None, None, None, None, None, None, grad_down, grad_up, grad_ratio


class ShiftedLinear(torch.autograd.Function):
    """``x (W + D)^T + b``: one product in place of two, for the full-size update ``D`` that a layer's ``delta()`` returns.

    ``D`` is computed anew in the backward pass, and only the parameters it comes from are kept.
    """

    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, bias: Any, gradient: InputGradient | None, layer: Any, *parameters: Any) -> Any:
        """Compute the outputs ``(..., out_dim)`` of ``x (..., in_dim)``."""
        ctx.gradient, ctx.layer = gradient, layer
        ctx.save_for_backward(x, weight, *parameters)
        return no_view(functional.linear(x, weight + layer.delta(), bias))

    @staticmethod
    def backward(ctx: Any, g: Any) -> Any:
        """Return the gradients of ``x`` and of the update's parameters; the frozen weight has none."""
        x, weight, *parameters = ctx.saved_tensors
        again = torch.is_grad_enabled()
        with torch.enable_grad():
            delta = ctx.layer.delta()
        gradient, grad_x = None if again else ctx.gradient, None
        if ctx.needs_input_grad[0]:
            grad_x = gradient_by(as_rows(g), weight + (delta if again else delta.detach()), gradient).view(x.shape)
        grads: list[Any] = [None] * len(parameters)
        wanted = [number for number, needs in enumerate(ctx.needs_input_grad[5:]) if needs]
        if wanted:
            grad_delta = as_rows(g).T @ as_rows(x)
            found = torch.autograd.grad(delta, [parameters[number] for number in wanted], grad_delta, create_graph=again)
            for number, grad in zip(wanted, found, strict=True):
                grads[number] = grad
        return grad_x if gradient is None else None, None, None, None, None, *grads
