"""Whether a delta's layer can be folded into the weight of the linear map it hangs on, and the new weight.

Only layers that are linear maps themselves can be folded, and only where the order of the layers on a module allows it. The
layers of other deltas stay hooks around the new weight, so the fold is exact if

- an input layer is the last one before the weight, and no other delta's layer reads what it makes beside the weight;
- an output layer is the first one after the weight, or adds to what others add as well;
- no other delta's layer that reads the weight itself follows.

Everything else is refused.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import nn

from deltaexp import quantised, registry
from deltaexp.errors import DeltaExpError, listing
from deltaexp.lazy import Layer
from deltaexp.ownership import originals
from deltaexp.structure import Rows, backbone_modules, linear_dims
from deltaexp.surgery import Attachment


def mergeable_types() -> list[str]:
    """Return the delta types that have layers which can be folded into a weight."""

    def can(value: object) -> bool:
        return isinstance(value, type) and issubclass(value, Layer) and value.merged is not None

    homes = {name: vars(sys.modules[registry.get(name).__module__]) for name in registry.known()}
    return [name for name, home in homes.items() if any(map(can, home.values()))]


def check(module: nn.Module, own: Sequence[Attachment]) -> None:
    """Raise a `DeltaExpError` unless the delta's layers on one module can be folded into its weight."""
    for attachment in own:
        if attachment.layer.merged is None:
            raise DeltaExpError(
                f"{attachment.prefix!r} cannot be merged: a {type(attachment.layer).__name__} is no change of a weight. The "
                f"delta types that can be merged are {listing(mergeable_types())}."
            )
    where, weight = own[0].site, getattr(module, "weight", None)
    if library := quantised.weight_library(module):
        raise DeltaExpError(
            f"The delta cannot be merged into {where!r}, the weight of which is quantised by {library}: "
            f"rounding it again would lose most of the delta. {quantised.INSTEAD}, or use the delta without merging it."
        )
    convolution = isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    if not (linear_dims(module) or convolution) or not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
        kind = f"{type(module).__name__} with a weight of dtype {weight.dtype}" if isinstance(weight, torch.Tensor) else ""
        raise DeltaExpError(
            f"The delta cannot be merged into {where!r}, which is a {kind or type(module).__name__}: only the floating-point "
            "weight of a linear map can take it up."
        )
    if weight.is_meta:
        raise DeltaExpError(f"The delta cannot be merged into {where!r}: its weight is on the meta device and has no values.")
    orders = [getattr(hook, "keywords", {}).get("order") for hook in module._forward_hooks.values()]
    pairs = [order for order in orders if order is not None]  # of layers on other modules that add to this one's output
    for attachment in own:
        if attachment.layer.insertion != "parallel" and any(order < attachment.layer.order for order in pairs):
            raise DeltaExpError(
                f"{attachment.prefix!r} cannot be merged: another delta adds to the output of {where!r} before it. Detach that."
            )
    rows = _rows(module)
    layers: list[tuple[str, Layer]] = [(n, child) for n, child in module.named_children() if isinstance(child, Layer)]
    for attachment in own:
        for name, other in layers:
            mine = any(other is one.layer for one in own)
            overlap = _overlap(rows_of(attachment), rows.get(name))
            if other is not attachment.layer and overlap and _in_the_way(attachment.layer, other, mine):
                raise DeltaExpError(
                    f"{attachment.prefix!r} cannot be merged while {name!r} hangs on the same module: folded into the weight, "
                    f"it would no longer be computed {'before' if other.order > attachment.layer.order else 'after'} that. "
                    f"Detach the delta with {name!r}, or merge that one first."
                )


def check_parameter(backbone: nn.Module, module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Raise a `DeltaExpError` if a parameter of a module, by its full name, must not be overwritten."""
    sharing = [n for n, m in backbone_modules(backbone) if m is not module and any(p is parameter for p in _parameters(m))]
    if sharing:
        raise DeltaExpError(
            f"The delta cannot be merged into {name!r}, which is a parameter of {listing(sharing)} as well, and would change "
            "what that computes. Leave the module out with exclude_modules, or use the delta without merging it."
        )
    if name in originals(backbone):
        raise DeltaExpError(
            f"The delta cannot be merged into {name!r}, which is trained itself, or has another delta merged into it already. "
            "Detach or unmerge that one first; deltaexp.combine makes one delta of several."
        )


def _parameters(module: nn.Module) -> list[nn.Parameter]:
    return list(module.parameters(recurse=False))


def _in_the_way(layer: Layer, other: Layer, own: bool) -> bool:
    """Say whether folding ``layer`` into the weight would change what is computed, ``other`` staying where it is.

    Where ``other`` is the same delta's, ``own``, it is folded as well: those on the output in their order, then those on
    the input from the last to the first.
    """
    if layer.connect is not None or other.connect is not None:
        return True  # nothing is known about what it does with the module
    later = other.order > layer.order
    if own:  # what reads the weight reads the module's own
        return layer.insertion == "weighted" and other.insertion != "input" and not later
    if layer.insertion == "input":
        return other.insertion in ("parallel", "weighted") or (other.insertion == "input" and later)
    if other.insertion == "input":
        return False
    if later:
        return other.insertion == "weighted"
    return not layer.insertion == other.insertion == "parallel"


def _rows(module: nn.Module) -> dict[str, Rows | None]:
    """Return the rows of the module's output that each of its layers is for, as far as its hooks tell."""
    keywords = [getattr(hook, "keywords", {}) for hook in module._forward_hooks.values()]
    return {found["name"]: found["rows"] for found in keywords if "name" in found and "rows" in found}


def rows_of(attachment: Attachment) -> Rows | None:
    """Return the rows of the output that a layer changes: all of them where it changes the input."""
    return None if attachment.layer.insertion == "input" else attachment.rows


def _overlap(first: Rows | None, second: Rows | None) -> bool:
    if first is None or second is None or (first.groups, first.size) != (second.groups, second.size):
        return True
    return first.start < second.start + second.width and second.start < first.start + first.width


class _Merging(nn.Module):
    """Makes a layer's ``merged`` a forward pass, which is what `torch.func.functional_call` can call."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return weight and bias with the delta in them."""
        return self.layer.merged(weight, bias)


def merged(layer: Layer, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return a layer's ``merged(weight, bias)``, computed with its tensors in the weight's dtype."""
    wrapped = _Merging(layer)
    tensors = {**dict(wrapped.named_parameters()), **dict(wrapped.named_buffers())}
    wider = {name: t.detach().to(weight.dtype) for name, t in tensors.items() if t.is_floating_point()}
    return torch.func.functional_call(wrapped, wider, (weight, bias))
