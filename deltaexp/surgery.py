"""Putting delta layers into a backbone and taking them out, by public PyTorch means only.

A layer becomes a child of the module it modifies, so that its parameters appear in the backbone's own
``named_parameters()`` and ``state_dict()`` under OpenDelta's names, and a forward hook joins it to the computation.
No method of the backbone is replaced. The hooks are module-level functions bound to the child's *name*: a deep copy
or an unpickled backbone computes with its own layers. Taking a layer out removes hook and child and leaves the
backbone as it was, whatever else hangs in it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from deltaexp.errors import AddressingError, DeltaExpError, listing
from deltaexp.lazy import Layer
from deltaexp.registry import DeltaConfig
from deltaexp.structure import linear_dims, output_dim


@dataclass
class Site:
    """One place in a backbone at which a delta is to be put."""

    name: str
    module: nn.Module
    hidden_size: int | None = None
    """The backbone's hidden size, taken as the output's where the module does not tell."""

    def linear_dims(self, delta_type: str) -> tuple[int, int]:
        """Return ``(in_dim, out_dim)`` of the linear map at this place.

        Raises:
            AddressingError: If it is no linear map.
        """
        dims = linear_dims(self.module)
        if dims is None:
            inside = [name for name, module in self.module.named_modules() if name and linear_dims(module)]
            advice = f" It contains {listing(inside, 6)}." if inside else ""
            raise AddressingError(
                f"The delta type {delta_type!r} goes on Linear or Conv1D modules, and {self.name!r} is a "
                f"{type(self.module).__name__}.{advice} Name linear modules in modified_modules."
            )
        return dims

    def out_dim(self, delta_type: str) -> int:
        """Return the size of the last dimension of the output at this place.

        Raises:
            AddressingError: If neither the module nor the backbone's config tells.
        """
        dim = output_dim(self.module) or self.hidden_size
        if dim is None:
            raise AddressingError(
                f"The delta type {delta_type!r} needs to know the width of the output of {self.name!r}, which a "
                f"{type(self.module).__name__} does not tell. Name a Linear module in modified_modules."
            )
        return dim


def add_parallel(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any, *, name: str) -> Any:
    """Forward hook: add what the layer makes of the module's input to the module's output."""
    layer = getattr(module, name)
    x = args[0] if args else next(iter(kwargs.values()))
    return _on_first(output, lambda h: h + layer(x.to(_dtype(layer, x))).to(h.dtype))


def add_sequential(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any, *, name: str) -> Any:
    """Forward hook: replace the module's output by what the layer makes of it."""
    layer = getattr(module, name)
    return _on_first(output, lambda h: layer(h.to(_dtype(layer, h))).to(h.dtype))


INSERTIONS: dict[str, Callable[..., Any]] = {"parallel": add_parallel, "sequential": add_sequential}
"""The ways in which a layer may join the forward pass, by the names that configs use."""


def _on_first(output: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Apply ``change`` to the hidden states of an output, which is a tensor or a tuple that starts with them."""
    if isinstance(output, torch.Tensor):
        return change(output)
    if isinstance(output, tuple) and output and isinstance(output[0], torch.Tensor):
        rest = (change(output[0]), *output[1:])
        return type(output)(*rest) if hasattr(output, "_fields") else rest
    raise DeltaExpError(
        f"A delta hangs on a module that returns {type(output).__name__}, where a tensor or a tuple that starts with "
        "one was expected. Name a module inside it in modified_modules."
    )


def _dtype(layer: nn.Module, like: torch.Tensor) -> torch.dtype:
    """Return the dtype in which a layer computes: a half-precision backbone may carry float32 deltas."""
    parameter = next(layer.parameters(), like)
    return parameter.dtype if like.is_floating_point() else like.dtype


@dataclass
class Attachment:
    """One layer at one place: the means of putting it in and taking it out, any number of times."""

    site: str
    module: nn.Module
    attribute: str
    layer: Layer
    insertion: str
    handle: RemovableHandle | None = field(default=None, repr=False)

    @property
    def prefix(self) -> str:
        """What the names of this layer's parameters start with, e.g. ``SelfAttention.q.lora``."""
        return f"{self.site}.{self.attribute}" if self.site else self.attribute

    def insert(self) -> None:
        """Hang the layer on its module.

        Raises:
            DeltaExpError: If something else hangs there under the same name.
        """
        if hasattr(self.module, self.attribute):
            raise DeltaExpError(
                f"{self.prefix!r} exists already, so the delta cannot be attached there. Detach what took its place."
            )
        self.module.add_module(self.attribute, self.layer)
        hook = partial(INSERTIONS[self.insertion], name=self.attribute)
        self.handle = self.module.register_forward_hook(hook, with_kwargs=True)

    def remove(self) -> None:
        """Take the layer out, which leaves the module as it was."""
        if self.handle is not None:
            self.handle.remove()
            self.handle = None
        delattr(self.module, self.attribute)


def prepare(config: DeltaConfig, names: list[str], backbone: nn.Module) -> list[Attachment]:
    """Build the layers of a delta for the modules called ``names``, without touching the backbone.

    A layer is initialised on the CPU, so that a seed gives the same values wherever the backbone lives, in float32
    or wider, so that small updates of a half-precision backbone's delta do not vanish in rounding.
    """
    hidden_size = _hidden_size(backbone)
    result = []
    for name in names:
        module = backbone.get_submodule(name)
        like = next((p for p in module.parameters() if p.is_floating_point()), None)
        device = like.device if like is not None else torch.device("cpu")
        dtype = torch.promote_types(like.dtype, torch.float32) if like is not None else torch.float32
        with torch.device("meta" if device.type == "meta" else "cpu"):
            layer = config.build(Site(name, module, hidden_size))
        layer.to(device=device, dtype=dtype)
        layer.train(module.training)
        result.append(Attachment(name, module, _free_attribute(module, config.attribute), layer, config.insertion))
    return result


def _free_attribute(module: nn.Module, wanted: str) -> str:
    """Return ``wanted``, or ``wanted_1``, ``wanted_2``, ... where the module has that already."""
    name, count = wanted, 0
    while hasattr(module, name):
        count += 1
        name = f"{wanted}_{count}"
    return name


def _hidden_size(backbone: nn.Module) -> int | None:
    config = getattr(backbone, "config", None)
    if config is not None and hasattr(config, "get_text_config"):
        config = config.get_text_config()
    return getattr(config, "hidden_size", None)
