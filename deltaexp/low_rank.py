"""Linear maps with low-rank updates, as functions with a backward pass of their own.

The hook of a LoRA computes ``h + s (x A^T) B^T`` after its module has computed ``h = x W^T + b``: it makes two tensors of the
size of ``h``, and in the backward pass one more of the size of ``x``. For N rows of ``x`` one of two ways is cheaper:

- ``h`` gets ``z B^T`` with ``z = s x A^T`` added in place by the matrix product itself, and so does the gradient of ``x``; in
  bfloat16 on the CPU, if ``h`` is at least twice as wide as ``x``, the product is that of ``x`` and ``z`` side by side with
  ``W`` and ``B`` side by side instead, and likewise in the backward pass: ``h`` is not read and written a second time;
- ``W + s B A`` is computed, which is small where N is large, and ``x`` multiplied by that: nothing of the size of ``h`` is
  touched a second time.

Both ways are the same to rounding. The second is taken only in the precision of the parameters: in half precision, or where
products are computed in TF32, a small ``s B A`` would vanish in the rounding of the sum. In the backward pass are the products
``u = s g B``, ``grad_A = u^T x`` and ``grad_B = g^T z``, of which ``z`` is computed anew where it was not needed before; only
``x``, the parameters and, in the first way, ``z`` are kept for it, and no gradient of ``W`` is computed. Where other maps take
the same ``x``, its gradients are added up by the products with ``W`` (`deltaexp.shared_input`).

A step of a small model on a small batch takes as long as its operations need to be begun. So there are few of them: ``s`` is a
factor of the small ``z`` and ``u``, and factors that are computed in another dtype are cast here, without nodes of autograd. Of
very small inputs PyTorch's own operations make less ado than a function in Python, and the sums cost nothing (`small`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from deltaexp.shared_input import InputGradient
from deltaexp.speed import settings

functional = nn.functional
SMALL = 1 << 18
"""Elements of ``x`` and ``h`` together below which passes over them cost less than calling a function in Python, on the CPU."""
ON_GPU = 64
"""By how much that is multiplied on a GPU."""
LARGE, ROWS = 1 << 21, 256
"""Elements in bfloat16 that no longer fit into the cache of a core, and rows of them that do."""
ADDS_BIAS = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
"""Whether oneDNN can add a bias while it multiplies."""


def exact(weight: torch.Tensor) -> bool:
    """Say whether products with a weight are computed in float32 or wider, so that a small update of it is not lost."""
    if weight.dtype != torch.float32 or torch.compiler.is_compiling():
        return weight.dtype == torch.float64
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # it was set for single backends
        return False


class Update(NamedTuple):
    """What of one low-rank update is no tensor."""

    scale: float
    dropout: float
    """Probability of dropping an element of ``x``."""
    part: tuple[int, int, int, int] | None
    """The outputs it is added to, as the fields of a `Rows`; None for all."""
    dtype: torch.dtype | None = None
    """What its factors are cast to; None where they are computed in their own."""


def as_rows(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor as a matrix of rows."""
    return tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])


def _for(tensor: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Return a matrix of rows as it is multiplied by a factor: by rows of the batch where that has a matrix for each."""
    return tensor if factor.dim() == 2 else tensor.view(len(factor), len(tensor) // len(factor), tensor.shape[-1])


def _taken(tensor: torch.Tensor, part: tuple[int, int, int, int] | None, dim: int = -1) -> torch.Tensor:
    """Return a view of the columns (``dim=-1``) or rows (``dim=0``) of a matrix that an update is for, by groups."""
    if part is None:
        return tensor
    groups, size, start, width = part
    if groups == 1:
        return tensor.narrow(dim, start, width)
    return tensor.unflatten(dim, (groups, size)).narrow(dim or 1, start, width)


def _scaled(left: torch.Tensor, right: torch.Tensor, scale: float) -> torch.Tensor:
    """Return ``scale left right``."""
    product = left @ right
    return product if scale == 1 else product.mul_(scale)


def _add_product(target: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scale: float = 1.0) -> None:
    """Add ``scale left right`` to a matrix, to several of them, or to the groups of one, in place."""
    if target.dtype != left.dtype or target.dim() != left.dim():
        target.add_((left @ right).view(target.shape), alpha=scale)
    elif target.dim() == 2:
        target.addmm_(left, right, alpha=scale)
    else:
        target.baddbmm_(left, right, alpha=scale)


def updated(weight: torch.Tensor, updates: tuple[Update, ...], factors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the weight with all updates in it."""
    if len(updates) > 1 or updates[0].part is not None:
        result = weight.clone()
        for update, down, up in zip(updates, factors[::2], factors[1::2], strict=True):
            _add_product(_taken(result, update.part, dim=0), up, down, update.scale)
        return result
    (down, up), scale = factors, updates[0].scale
    if weight.is_contiguous():
        return torch.addmm(weight, up, down, alpha=scale)
    return torch.addmm(weight.T, down.T, up.T, alpha=scale).T  # the other way round in memory


def _can_be_whole(weight: torch.Tensor, updates: tuple[Update, ...], factors: Sequence[torch.Tensor]) -> bool:
    """Say whether ``W + s B A`` may take the place of ``W``."""
    return (
        exact(weight)
        and all(update.dropout == 0 for update in updates)
        and all(factor.dtype == weight.dtype and factor.dim() == 2 for factor in factors)
    )


def _side_by_side(
    rows: int, wide: int, weight: torch.Tensor, updates: tuple[Update, ...], factors: Sequence[torch.Tensor]
) -> bool:
    """Say whether a product with a weight and that with a factor are faster as one, of copies of both side by side.

    They are on a CPU that multiplies in bfloat16, where it takes longer to add to what comes out than to copy what goes in.

    Args:
        rows: Of ``x``.
        wide: The width of what comes out: ``out_dim`` in the forward pass, ``in_dim`` in the backward pass.
        weight: Shape ``(out_dim, in_dim)``.
        updates: The updates.
        factors: Their factors, as they are computed.
    """
    narrow = weight.numel() // wide if wide else 0
    return (
        weight.dtype == torch.bfloat16
        and weight.device.type == "cpu"
        and 2 * narrow <= wide <= rows
        and len(updates) == 1
        and updates[0].part is None
        and all(factor.dtype == weight.dtype and factor.dim() == 2 for factor in factors)
        and weight.is_contiguous()
        and not torch.compiler.is_compiling()
    )


def in_rank(x: torch.Tensor, down: torch.Tensor, scale: float) -> torch.Tensor:
    """Return ``z = s x A^T``."""
    return _scaled(_for(x, down).to(down.dtype), _turned(down), scale)


def _turned(factor: torch.Tensor) -> torch.Tensor:
    """Return a factor's transpose, in the layout in which the product with it is fast."""
    plain = factor.dim() == 2 and (factor.dtype != torch.float32 or factor.device.type != "cpu")
    return factor.mT if plain else factor.mT.contiguous()


def _cast(updates: tuple[Update, ...], factors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Return factors in the dtypes in which they are computed."""
    dtypes = [update.dtype for update in updates for _ in range(2)]
    return tuple(factor if dtype is None else factor.to(dtype) for factor, dtype in zip(factors, dtypes, strict=True))


def _over_rows(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return ``left^T right``, which is a sum over the rows of both."""
    many = left.dtype == torch.bfloat16 and left.dim() == 2 and left.device.type == "cpu" and right.numel() >= LARGE
    if many and left.shape[1] <= 16 and len(left) % ROWS == 0 and left.is_contiguous() and right.is_contiguous():
        # Of parts that fit into the cache: one product of so few by so many columns goes through memory more than once.
        return torch.bmm(left.view(-1, ROWS, left.shape[1]).mT, right.view(-1, ROWS, right.shape[1])).sum(0)
    return left.mT @ right


def _gradient_of(factor: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Return a factor's gradient in its dtype, and contiguous if autograd keeps it."""
    form = torch.contiguous_format if factor.is_leaf else torch.preserve_format
    return gradient.to(factor.dtype, memory_format=form)


def _outer(x: torch.Tensor, updates: tuple[Update, ...], masks: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
    """Return the inputs of the updates: ``x`` without what is dropped."""
    return [x if mask is None else x * mask * (1 / (1 - update.dropout)) for update, mask in zip(updates, masks, strict=True)]


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return ``x W^T + b``, without anything for a backward pass."""
    half = bias is not None and type(x) is torch.Tensor and x.dtype == weight.dtype == bias.dtype == torch.bfloat16
    if half and x.device.type == "cpu" and ADDS_BIAS and not torch.compiler.is_compiling():
        # The same numbers; PyTorch's own copies the bias into every row first, which takes a third of the time again.
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return functional.linear(x, weight, bias)


def no_view(out: torch.Tensor) -> torch.Tensor:
    """Return a new tensor that is no view, as a product with a bias is: autograd lets nobody change one of these in place."""
    return torch.ops.aten._unsafe_view(out, out.shape)


def gradient_by(g: torch.Tensor, weight: torch.Tensor, gradient: InputGradient | None) -> torch.Tensor:
    """Return the gradient of ``x`` by way of a weight, added to those of other maps if there are some."""
    return g @ weight if gradient is None else gradient.add(g, weight)


def small(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Say whether input and output of a map are so small that PyTorch's own operations are faster than a function here."""
    limit = SMALL if x.device.type == "cpu" else SMALL * ON_GPU
    return x.shape[:-1].numel() * sum(weight.shape) < limit and not settings.recorded and not torch.compiler.is_compiling()


def simple(weight: torch.Tensor, updates: tuple[Update, ...], factors: Sequence[torch.Tensor]) -> bool:
    """Say whether updates are such that `simply` can compute them."""
    (update, *others), down = updates, factors[0]
    plain = update.part is None and not update.dropout and down.dim() == 2
    return plain and not others and (update.dtype or down.dtype) == weight.dtype


def simply(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, updates: tuple[Update, ...], *factors: torch.Tensor
) -> torch.Tensor:
    """Return ``x W^T + b`` and one update, by PyTorch's own operations and their backward passes."""
    (down, up), flat = _cast(updates, factors), as_rows(x)
    z = functional.linear(flat, down)
    out = torch.addmm(functional.linear(flat, weight, bias), z, up.mT, alpha=updates[0].scale)
    return out.view(*x.shape[:-1], len(weight))


def low_rank_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, updates: tuple[Update, ...], *factors: torch.Tensor
) -> torch.Tensor:
    """Return ``x W^T + b`` and the updates, without anything for a backward pass."""
    rows, factors = x.shape[:-1].numel(), _cast(updates, factors)
    if 2 * weight.numel() < rows * sum(weight.shape) and _can_be_whole(weight, updates, factors):
        return functional.linear(x, updated(weight, updates, factors), bias)
    return _separately(x, weight, bias, updates, factors)[0]


def _separately(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    updates: tuple[Update, ...],
    factors: Sequence[torch.Tensor],
) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor | None]]:
    """Return the output, ``z`` of every update, and what each has dropped."""
    flat = as_rows(x)
    if len(updates) == 1 and factors[1].dim() == 3 and updates[0].part is None and not updates[0].dropout:
        down, up = factors
        if x.device.type == "cpu" and up.dtype == weight.dtype == torch.float32 and flat.numel():
            # The product with W is added to the rest, and the bias is one more rank, which spares its copies.
            z = in_rank(flat, down, updates[0].scale)
            left, right = z, up.mT
            if bias is not None:
                left = torch.cat([left, left.new_ones(*left.shape[:-1], 1)], dim=-1)
                right = torch.cat([right, bias.expand(len(right), 1, -1)], dim=1)
            out = (left @ right.contiguous()).view(len(flat), len(weight)).addmm_(flat, weight.T)
            return out.view(*x.shape[:-1], len(weight)), [z], [None]
    inner: list[torch.Tensor] = []
    masks: list[torch.Tensor | None] = []
    for update, down in zip(updates, factors[::2], strict=True):
        dropped, mask = torch.native_dropout(flat, update.dropout, True) if update.dropout else (flat, None)
        inner.append(in_rank(dropped, down, update.scale))
        masks.append(mask)
    if _side_by_side(len(flat), len(weight), weight, updates, factors):
        out = _linear(torch.cat([flat, *inner], 1), torch.cat([weight, factors[1]], 1), bias)
        return out.view(*x.shape[:-1], len(weight)), inner, masks
    out = _linear(x, weight, bias)
    matrix = out.view(len(flat), out.shape[-1])
    for update, z, up in zip(updates, inner, factors[1::2], strict=True):
        _add_product(_taken(_for(matrix, up), update.part), z, _turned(up))
    return out, inner, masks


class LowRankLinear(torch.autograd.Function):
    """``x W^T + b`` and low-rank updates of some of the outputs: the factors follow, ``A`` and ``B`` of each update."""

    @staticmethod
    def forward(
        ctx: Any, x: Any, weight: Any, bias: Any, gradient: InputGradient | None, updates: tuple[Update, ...], *factors: Any
    ) -> Any:
        """Compute the outputs ``(..., out_dim)`` of ``x (..., in_dim)``, and keep what the gradients need."""
        ctx.gradient, ctx.updates = gradient, updates
        rows, cast = x.shape[:-1].numel(), _cast(updates, factors)
        ctx.can_be_whole = _can_be_whole(weight, updates, cast)
        inner: list[torch.Tensor] = []
        masks: list[torch.Tensor | None] = [None] * len(updates)
        if ctx.can_be_whole and 2 * x.shape[-1] <= rows:
            out = functional.linear(x, updated(weight, updates, cast), bias)
        else:
            out, inner, masks = _separately(x, weight, bias, updates, cast)
        ctx.save_for_backward(x, weight, *factors, *cast, *masks, *inner)
        return no_view(out)

    @staticmethod
    def backward(ctx: Any, g: Any) -> Any:
        """Return the gradients of ``x`` and of the update's parameters; the frozen weight has none."""
        count = len(ctx.updates)
        x, weight, *rest = ctx.saved_tensors
        given, factors, masks, inner = (rest[start * count : end * count] for start, end in ((0, 2), (2, 4), (4, 5), (5, 6)))
        gradient = ctx.gradient
        if torch.is_grad_enabled():  # they would be constants in the gradient of this
            factors, inner, gradient = _cast(ctx.updates, given), [], None
        flat, g_flat = as_rows(x), as_rows(g)
        needs_x, needs_factors = ctx.needs_input_grad[0], ctx.needs_input_grad[5:]
        whole = ctx.can_be_whole and 2 * g.shape[-1] <= len(g_flat)
        beside = needs_x and gradient is None and not ctx.updates[0].dropout
        beside = beside and _side_by_side(len(flat), flat.shape[-1], weight, ctx.updates, factors)
        grad_x = None
        if needs_x and not beside:
            grad_x = gradient_by(g_flat, updated(weight, ctx.updates, factors) if whole else weight, gradient)
        grads: list[torch.Tensor | None] = []
        for number, (update, dropped) in enumerate(zip(ctx.updates, _outer(flat, ctx.updates, masks), strict=True)):
            down, up = factors[2 * number : 2 * number + 2]
            part = _taken(_for(g_flat, up), update.part)
            part = part.reshape(*part.shape[: up.dim() - 1], up.shape[-2]).to(up.dtype)
            grad_down = grad_up = None
            if needs_factors[2 * number] or (needs_x and not whole):
                u = _scaled(part, up, update.scale)
                if needs_factors[2 * number]:
                    grad_down = _gradient_of(given[2 * number], _over_rows(u, _for(dropped, down).to(down.dtype)))
                if beside:
                    grad_x = torch.cat([part, u], 1) @ torch.cat([weight, down])
                elif grad_x is not None and not whole:
                    if update.dropout:
                        grad_x.add_(u @ down * masks[number], alpha=1 / (1 - update.dropout))
                    elif gradient is not None and u.dim() == 2 and u.dtype == grad_x.dtype:
                        gradient.add_later(u, down)
                    else:
                        _add_product(_for(grad_x, down), u, down)
            if needs_factors[2 * number + 1]:
                z = inner[number] if inner else in_rank(dropped, down, update.scale)
                grad_up = _gradient_of(given[2 * number + 1], _over_rows(z, part).mT)
            grads += [grad_down, grad_up]
        own = None if grad_x is None or gradient is not None else grad_x.view(x.shape)  # what is shared has its own way
        return own, None, None, None, None, *grads
