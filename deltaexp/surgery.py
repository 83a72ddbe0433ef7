"""Putting delta layers into a backbone and taking them out, by public PyTorch means only.

A layer becomes a child of the module it modifies, so that its parameters appear in the backbone's own
``named_parameters()`` and ``state_dict()`` under OpenDelta's names, and hooks join it to the computation. No method of the
backbone is replaced. The hooks are module-level functions bound to the child's *name*: a deep copy or an unpickled backbone
computes with its own layers. (Where nothing else hangs on a linear map, it computes them together with itself; see
`deltaexp.fused`.) Taking a layer out removes hooks and child and leaves the backbone as it was, whatever else hangs in it;
putting it in again gives it its old place among the layers on the same module.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from deltaexp import fused
from deltaexp.errors import DeltaExpError
from deltaexp.hooks import OUTPUT_HOOKS, add_input
from deltaexp.lazy import Layer
from deltaexp.registry import DeltaConfig
from deltaexp.structure import Rows
from deltaexp.targets import Site

_orders = itertools.count(1)


@dataclass
class Attachment:
    """One layer at one place: the means of putting it in and taking it out, any number of times."""

    site: str
    module: nn.Module
    attribute: str
    """The name of the child that the layer is; another one than `saved_as` where that was taken."""
    saved_as: str
    layer: Layer
    rows: Rows | None = None
    after: nn.Module | None = None
    """For a pair: the module that the layer's output goes to."""
    handles: list[Any] = field(default_factory=list, repr=False)

    @property
    def prefix(self) -> str:
        """What the names of this layer's parameters start with, e.g. ``SelfAttention.q.lora``."""
        return f"{self.site}.{self.attribute}" if self.site else self.attribute

    @property
    def saved_prefix(self) -> str:
        """The same in a checkpoint, where another delta on the same module changes nothing."""
        return f"{self.site}.{self.saved_as}" if self.site else self.saved_as

    def insert(self) -> None:
        """Hang the layer on its module.

        Raises:
            DeltaExpError: If something else hangs there under the same name.
        """
        if hasattr(self.module, self.attribute):
            raise DeltaExpError(
                f"{self.prefix!r} exists already, so the delta cannot be attached there. Detach what took its place."
            )
        like, own = next(self.module.parameters(), None), next(self.layer.parameters(), None)
        if like is not None and own is not None and own.device != like.device:
            self.layer.to(like.device)  # the backbone has moved while the layer was out
        self.module.add_module(self.attribute, self.layer)
        try:
            self.handles = self._connect()
        except DeltaExpError:
            delattr(self.module, self.attribute)
            raise
        fused.enter(self.module)
        for module in (self.module, *([self.after] if self.after is not None else [])):
            _sort(module._forward_hooks, module)
            _sort(module._forward_pre_hooks, module)

    def _connect(self) -> list[Any]:
        layer, module, name = self.layer, self.module, self.attribute
        if layer.connect is not None:
            return layer.connect(module, name) if self.after is None else layer.connect(module, name, self.after)
        if layer.insertion == "input":
            return [module.register_forward_pre_hook(partial(add_input, name=name), with_kwargs=True)]
        hook = partial(OUTPUT_HOOKS[layer.insertion], name=name, rows=self.rows)
        return [module.register_forward_hook(hook, with_kwargs=True)]

    def remove(self) -> None:
        """Take the layer out, which leaves the module as it was."""
        for handle in self.handles:
            handle.remove()
        self.handles = []
        delattr(self.module, self.attribute)
        fused.leave(self.module)


def insert(attachments: Sequence[Attachment]) -> None:
    """Hang all layers of a delta on their modules, or none of them.

    Raises:
        DeltaExpError: If something else hangs where one of them should.
    """
    done: list[Attachment] = []
    try:
        for attachment in attachments:
            attachment.insert()
            done.append(attachment)
    except DeltaExpError:
        remove(done)
        raise
    _forget_compiled()


def remove(attachments: Sequence[Attachment]) -> None:
    """Take all layers of a delta out."""
    for attachment in reversed(attachments):
        attachment.remove()
    _forget_compiled()


def _forget_compiled() -> None:
    """Let torch.compile compile again: it does not look at hooks once it has, and would compute with those that were."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def _sort(hooks: Any, module: nn.Module) -> None:
    """Bring the hooks of the delta layers on a module into the layers' order."""

    def order(hook: Any) -> int | None:
        keys = getattr(hook, "keywords", {})
        layer = getattr(module, keys.get("name", ""), None)
        # The layer whose output comes here from another module hangs there, so that the hook itself has to say it.
        return layer.order if isinstance(layer, Layer) else keys.get("order")

    found = {key: number for key, hook in hooks.items() if (number := order(hook)) is not None}
    wanted = sorted(found, key=lambda key: found[key])
    if list(found) != wanted:
        for key in wanted:
            hooks.move_to_end(key)


def prepare(config: DeltaConfig, sites: Sequence[Site], on: torch.device | None = None) -> list[Attachment]:
    """Build the layers of a delta for its sites, without touching the backbone.

    A layer is initialised on the CPU, so that a seed gives the same values wherever the backbone lives, in float32
    or wider, so that small updates of a half-precision backbone's delta do not vanish in rounding.

    Args:
        config: What to build.
        sites: Where it goes.
        on: Where it is to live, if not where the backbone does; on the meta device nothing is allocated.
    """
    result = []
    for site in sites:
        like = next((p for p in site.module.parameters() if p.is_floating_point()), None)
        device = on or (like.device if like is not None else torch.device("cpu"))
        dtype = torch.promote_types(like.dtype, torch.float32) if like is not None else torch.float32
        with torch.device("meta" if device.type == "meta" else "cpu"):
            layer = config.build(site)
        if layer is None:
            continue
        layer.to(device=device, dtype=dtype)
        layer.train(site.module.training)
        layer.order = next(_orders)
        # A slice of a fused projection is called after its part: lora_q, lora_v.
        name = f"{config.attribute}_{(site.role or '').rpartition('.')[2]}" if site.rows else config.attribute
        after = site.after[1] if site.after else None
        taken_name = _free_attribute(site.module, name)
        result.append(Attachment(site.name, site.module, taken_name, name, layer, site.rows, after))
    return result


def saved_tensors(attachments: Sequence[Attachment]) -> dict[str, torch.Tensor]:
    """Return what is saved of a delta's layers, under its names in a checkpoint; what layers share under its first name."""
    result: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for attachment in attachments:
        layer, prefix = attachment.layer, attachment.saved_prefix
        for name, tensor in (*layer.named_parameters(prefix=prefix), *layer.named_buffers(prefix=prefix)):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                result[name] = tensor
    return result


def _free_attribute(module: nn.Module, wanted: str) -> str:
    """Return ``wanted``, or ``wanted_1``, ``wanted_2``, ... where the module has that already."""
    name, count = wanted, 0
    while hasattr(module, name):
        count += 1
        name = f"{wanted}_{count}"
    return name
