"""A linear map and the updates that deltas add to it, computed in one (`deltaexp.low_rank` has the computation).

In place of the module's own computation this comes so: the module gets a subclass of its own class, as it does from
``torch.nn.utils.parametrize`` and ``fully_shard``, with another ``__call__`` and nothing else. That looks at what hangs on the
module at that moment. If it is only hooks of layers that can be computed here, it computes everything and calls no hook;
otherwise it does what every module does, and the hooks add what they add. So the hooks stay what defines the result: whatever
else is hooked in, wrapped around, parametrized, sharded, quantised or traced, before or after, finds a module with ordinary
hooks. A replaced ``forward`` would be in the way of all these, and a hook alone comes too late to save the sum of two gradients
of ``x``.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook
from transformers import pytorch_utils

from deltaexp import gathered
from deltaexp.casting import cast_all
from deltaexp.deltas._linear import LowRankDelta, WeightDelta
from deltaexp.full_size import DirectedLinear, ShiftedLinear
from deltaexp.hooks import add_parallel, add_weighted
from deltaexp.indices import index
from deltaexp.layout import Rows
from deltaexp.lazy import Layer
from deltaexp.low_rank import (
    LowRankLinear,
    Update,
    exact,
    low_rank_linear,
    simple,
    simply,
    small,
    updated,
)
from deltaexp.shared_input import shared
from deltaexp.speed import settings

PLAIN = (torch.Tensor, nn.Parameter, FakeTensor)
"""Tensors that hide nothing; those without values are what a step is planned with (`deltaexp.lab.estimate`)."""

KEPT = 1 << 20
"""Elements of a weight from which what is as large is computed twice rather than kept, however small the input is."""


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
        or weight is None
        or type(weight) not in (nn.Parameter, FakeTensor)
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
        if getattr(hook, "func", None) not in (add_parallel, add_weighted):
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
    kind = x.device.type
    cast = kind != "meta" and torch.is_autocast_enabled(kind)
    member = module.__dict__.get(gathered.MEMBER)
    if member is not None and cast and torch.get_autocast_dtype(kind) == gathered.DTYPE and not torch.compiler.is_compiling():
        unit, number, casts = member
        if (output := unit.output(number, x, casts, _layers)) is not None:
            return output
    if cast:
        if torch.float64 in (x.dtype, weight.dtype):
            return None
        x, weight, bias = cast_all(module, x, torch.get_autocast_dtype(kind))
    elif x.dtype != weight.dtype:
        return None
    if type(module) is Conv1D:
        weight = weight.T
    layer, rows = layers[0]
    alone = len(layers) == 1 and rows is None and layer.batch_rows is None
    directed, few = any(layer.insertion == "weighted" for layer, _ in layers), small(x, weight)
    if few and alone and not cast and not directed and _simply(layer, weight):
        return nn.functional.linear(x, weight, bias).add_(layer.forward(x))
    if not directed and all(isinstance(layer, LowRankDelta) for layer, _ in layers):
        updates, factors = _updates(x, layers, weight.dtype if cast or settings.delta_in_backbone_dtype else None)
        if not updates:
            return None
        parts = tuple(updates)
        if few and simple(weight, parts, factors):
            return simply(x, weight, bias, parts, *factors)
        if not torch.is_grad_enabled():
            return low_rank_linear(x, weight, bias, parts, *factors)
        x, gradient = shared(x)
        return LowRankLinear.apply(x, weight, bias, gradient, parts, *factors)
    if not alone or layer.drops or cast or not exact(weight):
        return None
    parameters = list(layer.parameters())
    if not all(type(parameter) in PLAIN and parameter.dtype == weight.dtype for parameter in parameters):
        return None
    if directed:
        return _directed(x, weight, bias, layer)
    if not torch.is_grad_enabled():
        return nn.functional.linear(x, weight + layer.delta(), bias)
    x, gradient = shared(x)
    return ShiftedLinear.apply(x, weight, bias, gradient, layer, *parameters)


def _simply(layer: WeightDelta, weight: torch.Tensor) -> bool:
    """Say whether of a small input a layer itself makes the update faster than anything that is done here."""
    kept = not isinstance(layer, LowRankDelta) and weight.numel() < KEPT
    return (layer.light or kept) and all(parameter.dtype == weight.dtype for parameter in layer.parameters())


def _directed(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, layer: Any) -> torch.Tensor:
    """Return the output of a module with a DoRA on it."""
    update, factors = Update(layer.scale, 0.0, None), layer.factors()
    with torch.no_grad():
        directed = updated(weight, (update,), factors)
    ratio = layer.ratio(directed)
    if not torch.is_grad_enabled():
        return nn.functional.linear(x, directed * ratio[:, None], bias)
    x, gradient = shared(x)
    return DirectedLinear.apply(x, weight, bias, gradient, directed, update, *factors, ratio)


def _updates(
    x: torch.Tensor, layers: list[tuple[Any, Rows | None]], dtype: torch.dtype | None
) -> tuple[list[Update], list[torch.Tensor]]:
    """Return the updates of layers and their factors, ``A`` and ``B`` for each; nothing where the hooks have to do it.

    Several layers on the same outputs make one update, with the ranks of all. Where rows of the batch use different ones, its
    factors have one matrix for each of these rows, shapes ``(rows, r, in_dim)`` and ``(rows, out_dim, r)``.
    """
    parts: dict[Any, list[Any]] = {}
    for layer, rows in layers:
        if layer.batch_rows is not None and not layer.batch_rows.rows:
            continue
        part = None if rows is None else (rows.groups, rows.size, rows.start, rows.width)
        down, up = layer.factors()
        if type(down) not in PLAIN or type(up) not in PLAIN:
            return [], []
        parts.setdefault(part, []).append((layer, down, up))
    updates, result = [], []
    for part, found in parts.items():
        layer, down, up = found[0]
        if len(found) == 1 and layer.batch_rows is None:
            updates.append(Update(layer.scale, layer.drops, part, dtype))
        elif any(layer.drops for layer, _, _ in found) or torch.compiler.is_compiling():
            return [], []
        else:
            if dtype is not None:
                found = [(layer, down.to(dtype), up.to(dtype)) for layer, down, up in found]
            scale, down, up = _together(x, found)
            updates.append(Update(scale, 0.0, part))
        result += [down, up]
    return updates, result


def _together(x: torch.Tensor, found: list[Any]) -> tuple[float, torch.Tensor, torch.Tensor]:
    """Return scale and factors of several layers, or of those that each row of the batch, or each few rows, use."""
    scales = [layer.scale for layer, _, _ in found]
    scale = scales[0] if len(set(scales)) == 1 else 1.0
    downs = [down for _, down, _ in found]
    ups = [up if scale != 1.0 else up * own for own, (_, _, up) in zip(scales, found, strict=True)]
    routed = [layer.batch_rows for layer, _, _ in found if layer.batch_rows is not None]
    if not routed:
        return scale, torch.cat(downs), torch.cat(ups, dim=1)
    routed[0].repeats(x)  # checks that the rows of x are the batch's
    kinds, which = _kinds(tuple(None if one.batch_rows is None else one.batch_rows.rows for one, _, _ in found), routed[0].size)
    most = max(sum(len(downs[n]) for n in kind) for kind in kinds)
    # Each rank a row here, and the matrices turned round afterwards: the layout in which they are multiplied.
    up, down = _stacked([up.T for up in ups], kinds, most), _stacked(downs, kinds, most).mT.contiguous()
    if which != tuple(range(len(kinds))):
        where = index(which, x.device)
        up, down = up[where], down[where]
    return scale, down.mT, up.mT


def _stacked(factors: list[torch.Tensor], kinds: list[tuple[int, ...]], most: int) -> torch.Tensor:
    """Return for every kind the ranks of its layers, and zeros up to ``most`` ranks, shape ``(kinds, most, dim)``."""
    if all(len(kind) == 1 and len(factors[kind[0]]) == most for kind in kinds):
        return torch.stack([factors[kind[0]] for kind in kinds])
    zeros = factors[0].new_zeros(most, factors[0].shape[1])
    joined = [torch.cat([*(factors[n] for n in kind), zeros]) for kind in kinds]
    return torch.stack([ranks[:most] for ranks in joined])


@functools.lru_cache(maxsize=64)
def _kinds(rows: tuple[tuple[int, ...] | None, ...], size: int) -> tuple[list[tuple[int, ...]], tuple[int, ...]]:
    """Return which layers rows of the batch use, each kind once, and the kind of every row, or of equally many neighbours.

    Args:
        rows: For each layer the rows that use it; None for all.
        size: The number of rows.
    """
    used = [tuple(n for n, own in enumerate(rows) if own is None or row in own) for row in range(size)]
    kinds = list(dict.fromkeys(used))
    runs = math.gcd(size, *(row for row in range(1, size) if used[row] != used[row - 1]))
    return kinds, tuple(kinds.index(kind) for kind in used[::runs])
