"""A linear map and the updates that deltas add to it, computed in one.

The hook of a LoRA computes ``h + s (x A^T) B^T`` after its module has computed ``h = x W^T + b``: it makes two tensors of the
size of ``h``, and in the backward pass one more of the size of ``x``. For N rows of ``x`` one of two ways is cheaper:

- ``h`` gets ``z B^T`` with ``z = s x A^T`` added in place by the matrix product itself, and so does the gradient of ``x``;
- ``W + s B A`` is computed, which is small where N is large, and ``x`` multiplied by that: nothing of the size of ``h`` is
  touched a second time.

Both ways are the same to rounding. The second is taken only in the precision of the parameters: in half precision, or where
products are computed in TF32, a small ``s B A`` would vanish in the rounding of the sum. In the backward pass are the products
``u = s g B``, ``grad_A = u^T x`` and ``grad_B = g^T z``, of which ``z`` is computed anew where it was not needed before; only
``x``, the parameters and, in the first way, ``z`` are kept for it, and no gradient of ``W`` is computed.

How it comes in place of the module's own computation: the module gets a subclass of its own class, as it does from
``torch.nn.utils.parametrize`` and ``fully_shard``, with another ``__call__`` and nothing else. That looks at what hangs on the
module at that moment. If it is only hooks of layers that can be computed here, it computes everything and calls no hook;
otherwise it does what every module does, and the hooks add what they add. So the hooks stay what defines the result: whatever
else is hooked in, wrapped around, parametrized, sharded, quantised or traced, before or after, finds a module with ordinary
hooks. A replaced ``forward`` would be in the way of all these, and a hook alone comes too late to save the sum of two gradients
of ``x``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook
from transformers import pytorch_utils

from deltaexp.deltas._linear import LowRankDelta, WeightDelta
from deltaexp.hooks import add_parallel
from deltaexp.layout import Rows
from deltaexp.lazy import Layer
from deltaexp.speed import settings

functional = nn.functional
PLAIN = (torch.Tensor, nn.Parameter)
MOST_RANKS = 128
"""How many ranks several layers may have together to be computed as one."""


def _call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Compute base and updates in one where nothing else hangs on the module; otherwise do what every module does."""
    if len(args) == 1 and not kwargs and (layers := _layers(self, args[0])):
        output = _computed(self, args[0], layers)
        if output is not None:
            return output
    return nn.Module.__call__(self, *args, **kwargs)


# Under their bases' names: these are what a module says that it is, and `Conv1D` is known by it here and elsewhere.
class Linear(nn.Linear):
    """A ``torch.nn.Linear`` on which layers of deltas hang."""

    __call__ = _call


class Conv1D(pytorch_utils.Conv1D):
    """A ``transformers.pytorch_utils.Conv1D`` on which layers of deltas hang."""

    __call__ = _call


FUSED: dict[type, type] = {nn.Linear: Linear, pytorch_utils.Conv1D: Conv1D}
ORIGINAL = {fused: original for original, fused in FUSED.items()}


def enter(module: nn.Module) -> None:
    """Let a module that layers hang on compute them itself, where its class is known."""
    if type(module) in FUSED:
        module.__class__ = FUSED[type(module)]


def leave(module: nn.Module) -> None:
    """Give a module its class back once no layer hangs on it."""
    if type(module) in ORIGINAL and not any(isinstance(child, Layer) for child in module.children()):
        module.__class__ = ORIGINAL[type(module)]


def _layers(module: nn.Module, x: Any) -> list[tuple[Any, Rows | None]]:
    """Return the layers on a module, or none where anything speaks against computing them here."""
    parameters = module._parameters
    weight, bias = parameters.get("weight"), parameters.get("bias")
    if (
        not settings.fused
        or not module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or type(module) not in ORIGINAL
        or "forward" in module.__dict__  # accelerate's hooks
        or type(x) not in PLAIN
        or type(weight) is not nn.Parameter
        or not x.is_floating_point()
        or _has_any_global_hook()
        or torch._C._get_tracing_state()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    ):
        return []
    trained = weight.requires_grad or (bias is not None and bias.requires_grad)
    if trained and torch.is_grad_enabled():
        return []
    result = []
    for hook in module._forward_hooks.values():
        if getattr(hook, "func", None) is not add_parallel:
            return []
        keywords: dict[str, Any] = hook.keywords  # type: ignore[attr-defined]
        layer = module._modules.get(keywords["name"])
        if not isinstance(layer, WeightDelta) or not _plain(layer):
            return []
        result.append((layer, keywords["rows"]))
    return result


def _plain(layer: WeightDelta) -> bool:
    """Say whether a layer computes nothing but what its kind does."""
    return (
        layer.fusable
        and not layer.target.kernel
        and not (layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)
        and "forward" not in layer.__dict__
    )


def _computed(module: Any, x: torch.Tensor, layers: list[tuple[Any, Rows | None]]) -> torch.Tensor | None:
    """Return the output of a module with the layers on it; None where the hooks have to do it."""
    weight, bias = module.weight, module.bias
    if type(module) is Conv1D:
        weight = weight.T
    kind = x.device.type
    cast = torch.is_autocast_enabled(kind)
    if cast:
        dtype = torch.get_autocast_dtype(kind)
        if torch.float64 in (x.dtype, weight.dtype):
            return None
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    elif x.dtype != weight.dtype:
        return None
    if all(isinstance(layer, LowRankDelta) for layer, _ in layers):
        updates, factors = _updates(x, layers, weight.dtype if cast or settings.delta_in_backbone_dtype else None)
        if not updates:
            return None
        function = _LowRank.apply if torch.is_grad_enabled() else _low_rank
        return function(x, weight, bias, tuple(updates), *factors)
    layer, rows = layers[0]
    if len(layers) > 1 or rows is not None or layer.batch_rows is not None or layer.drops or cast or not _exact(weight):
        return None
    delta = layer.delta()
    if type(delta) not in PLAIN or delta.dtype != weight.dtype:
        return None
    return _Shifted.apply(x, weight, bias, delta) if torch.is_grad_enabled() else functional.linear(x, weight + delta, bias)


def _exact(weight: torch.Tensor) -> bool:
    """Say whether products with a weight are computed in float32 or wider, so that a small update of it is not lost."""
    if weight.dtype != torch.float32 or torch.compiler.is_compiling():
        return weight.dtype == torch.float64
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # it was set for single backends
        return False


class Update(NamedTuple):
    """What of one low-rank update is no parameter."""

    scale: float
    dropout: float
    """Probability of dropping an element of ``x``."""
    part: tuple[int, int, int, int] | None
    """The outputs it is added to, as the fields of a `Rows`; None for all."""
    foreign: torch.Tensor | None = None
    """Where rows of the batch use different deltas: shape ``(rows, r)``, true for the ranks that a row does not use."""


def _updates(
    x: torch.Tensor, layers: list[tuple[Any, Rows | None]], dtype: torch.dtype | None
) -> tuple[list[Update], list[torch.Tensor]]:
    """Return the updates of layers and their factors, ``A`` and ``B`` for each; nothing where the hooks have to do it.

    Several layers on the same outputs make one update, with the ranks of all.
    """
    parts: dict[Any, list[Any]] = {}
    for layer, rows in layers:
        if layer.batch_rows is not None and not layer.batch_rows.rows:
            continue
        part = None if rows is None else (rows.groups, rows.size, rows.start, rows.width)
        down, up = layer.factors()
        if type(down) not in PLAIN or type(up) not in PLAIN:
            return [], []
        factors = (down, up) if dtype is None else (down.to(dtype), up.to(dtype))
        parts.setdefault(part, []).append((layer, *factors))
    updates, result = [], []
    for part, found in parts.items():
        layer, down, up = found[0]
        if len(found) == 1 and layer.batch_rows is None:
            updates.append(Update(layer.scale, layer.drops, part))
        else:
            ranks = [len(down) for _, down, _ in found]
            if any(layer.drops for layer, _, _ in found) or sum(ranks) > MOST_RANKS or torch.compiler.is_compiling():
                return [], []
            routed = [layer.batch_rows for layer, _, _ in found]
            down = torch.cat([down for _, down, _ in found])
            up = torch.cat([up * layer.scale for layer, _, up in found], dim=1)
            updates.append(Update(1.0, 0.0, part, _foreign(x, routed, ranks)))
        result += [down, up]
    return updates, result


def _foreign(x: torch.Tensor, routed: list[Any], ranks: list[int]) -> torch.Tensor | None:
    """Return `Update.foreign` of layers of which some are for some rows of the batch only."""
    size = next((rows.size for rows in routed if rows is not None), 0)
    if not size:
        return None
    columns = [[True] * size for _ in routed]
    for column, rows in zip(columns, routed, strict=True):
        for number in range(size) if rows is None else rows.rows:
            column[number] = False
    for rows in routed:
        if rows is not None:
            rows.repeats(x)  # checks that these are the batch's rows
    mask = torch.tensor(columns).repeat_interleave(torch.tensor(ranks), dim=0)
    return mask.T.contiguous().to(x.device)


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor as a matrix of rows."""
    return tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])


def _taken(tensor: torch.Tensor, part: tuple[int, int, int, int] | None, dim: int) -> torch.Tensor:
    """Return a view of the columns (``dim=1``) or rows (``dim=0``) of a matrix that an update is for, by groups."""
    if part is None:
        return tensor
    groups, size, start, width = part
    if groups == 1:
        return tensor.narrow(dim, start, width)
    return tensor.unflatten(dim, (groups, size)).narrow(dim + 1, start, width)


def _add_product(target: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scale: float = 1.0) -> None:
    """Add ``scale left right`` to a matrix, or to the groups of one, in place."""
    if target.dim() == 2 and target.dtype == left.dtype:
        target.addmm_(left, right, alpha=scale)
    else:
        target.add_((left @ right).view(target.shape), alpha=scale)


def _whole(weight: torch.Tensor, updates: tuple[Update, ...], factors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the weight with all updates in it."""
    if len(updates) > 1 or updates[0].part is not None:
        whole = weight.clone()
        for update, down, up in zip(updates, factors[::2], factors[1::2], strict=True):
            _add_product(_taken(whole, update.part, 0), up, down, update.scale)
        return whole
    (down, up), scale = factors, updates[0].scale
    if weight.is_contiguous():
        return torch.addmm(weight, up, down, alpha=scale)
    return torch.addmm(weight.T, down.T, up.T, alpha=scale).T  # the other way round in memory


def _can_be_whole(weight: torch.Tensor, updates: tuple[Update, ...], factors: Sequence[torch.Tensor]) -> bool:
    """Say whether ``W + s B A`` may take the place of ``W``."""
    return (
        _exact(weight)
        and all(update.dropout == 0 and update.foreign is None for update in updates)
        and all(factor.dtype == weight.dtype for factor in factors)
    )


def _inner(x: torch.Tensor, down: torch.Tensor, foreign: torch.Tensor | None) -> torch.Tensor:
    """Return ``x A^T``, zero where a row does not use a rank."""
    z = x.to(down.dtype) @ down.T.contiguous()  # a product with a narrow matrix is faster in this layout, of the next too
    return z if foreign is None else _without(z, foreign)


def _without(z: torch.Tensor, foreign: torch.Tensor) -> torch.Tensor:
    """Return ``z`` with zeros where a row of the batch does not use a rank."""
    rows, ranks = foreign.shape
    return z.view(rows, len(z) // rows, ranks).masked_fill(foreign[:, None], 0).view(z.shape)


def _outer(x: torch.Tensor, updates: tuple[Update, ...], masks: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
    """Return the inputs of the updates: ``x`` without what is dropped."""
    return [x if mask is None else x * mask * (1 / (1 - update.dropout)) for update, mask in zip(updates, masks, strict=True)]


def _low_rank(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, updates: tuple[Update, ...], *factors: torch.Tensor
) -> torch.Tensor:
    """Return ``x W^T + b`` and the updates, without anything for a backward pass."""
    rows = x.shape[:-1].numel()
    if 2 * weight.numel() < rows * sum(weight.shape) and _can_be_whole(weight, updates, factors):
        return functional.linear(x, _whole(weight, updates, factors), bias)
    return _separately(x, weight, bias, updates, factors)[0]


def _separately(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    updates: tuple[Update, ...],
    factors: Sequence[torch.Tensor],
) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor | None]]:
    """Return the output, ``x A^T`` of every update, and what each has dropped."""
    out = functional.linear(x, weight, bias)
    flat = _rows(x)
    matrix = out.view(len(flat), out.shape[-1])
    inner: list[torch.Tensor] = []
    masks: list[torch.Tensor | None] = []
    for update, down, up in zip(updates, factors[::2], factors[1::2], strict=True):
        dropped, mask = torch.native_dropout(flat, update.dropout, True) if update.dropout else (flat, None)
        z = _inner(dropped, down, update.foreign)
        _add_product(_taken(matrix, update.part, 1), z, up.T.contiguous(), update.scale)
        inner.append(z)
        masks.append(mask)
    return out, inner, masks


class _LowRank(torch.autograd.Function):
    """``x W^T + b`` and low-rank updates of some of the outputs: the factors follow, ``A`` and ``B`` of each update."""

    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, bias: Any, updates: tuple[Update, ...], *factors: Any) -> Any:
        ctx.updates = updates
        rows = x.shape[:-1].numel()
        ctx.can_be_whole = _can_be_whole(weight, updates, factors)
        inner: list[torch.Tensor] = []
        masks: list[torch.Tensor | None] = [None] * len(updates)
        if ctx.can_be_whole and 2 * x.shape[-1] <= rows:
            out = functional.linear(x, _whole(weight, updates, factors), bias)
        else:
            out, inner, masks = _separately(x, weight, bias, updates, factors)
        ctx.has_inner, ctx.has_bias = bool(inner), bias is not None
        ctx.save_for_backward(x, weight, *factors, *masks, *inner)
        return out

    @staticmethod
    def backward(ctx: Any, g: Any) -> Any:
        count = len(ctx.updates)
        x, weight, *rest = ctx.saved_tensors
        factors, masks, inner = rest[: 2 * count], rest[2 * count : 3 * count], rest[3 * count :]
        if torch.is_grad_enabled():
            inner = []  # it would be a constant in the gradient of this
        flat, g_flat = _rows(x), _rows(g)
        needs_x, needs_factors = ctx.needs_input_grad[0], ctx.needs_input_grad[4:]
        whole = ctx.can_be_whole and 2 * g.shape[-1] <= len(g_flat)
        grad_x = None
        if needs_x:
            grad_x = g_flat @ (_whole(weight, ctx.updates, factors) if whole else weight)
        grads: list[torch.Tensor | None] = []
        for number, (update, dropped) in enumerate(zip(ctx.updates, _outer(flat, ctx.updates, masks), strict=True)):
            down, up = factors[2 * number : 2 * number + 2]
            part = _taken(g_flat, update.part, 1).reshape(len(g_flat), len(up)).to(up.dtype)
            grad_down = grad_up = None
            if needs_factors[2 * number] or (needs_x and not whole):
                u = part @ up.T.contiguous().T
                u = u * update.scale if update.foreign is None else _without(u, update.foreign) * update.scale
                if needs_factors[2 * number]:
                    grad_down = u.T @ dropped.to(down.dtype)
                if grad_x is not None and not whole:
                    if update.dropout:
                        grad_x.add_(u @ down * masks[number], alpha=1 / (1 - update.dropout))
                    else:
                        _add_product(grad_x, u, down)
            if needs_factors[2 * number + 1]:
                z = inner[number] if inner else _inner(dropped, down, update.foreign)
                grad_up = ((z * update.scale).T @ part).T.contiguous()
            grads += [grad_down, grad_up]
        return None if grad_x is None else grad_x.view(x.shape), None, None, None, *grads


class _Shifted(torch.autograd.Function):
    """``x (W + D)^T + b``: one product in place of two, for a full-size update ``D``."""

    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, bias: Any, delta: Any) -> Any:
        ctx.save_for_backward(x, weight, delta)
        return functional.linear(x, weight + delta, bias)

    @staticmethod
    def backward(ctx: Any, g: Any) -> Any:
        x, weight, delta = ctx.saved_tensors
        grad_x = g @ (weight + delta) if ctx.needs_input_grad[0] else None
        grad_delta = _rows(g).T @ _rows(x) if ctx.needs_input_grad[3] else None
        return grad_x, None, None, grad_delta
