"""From a delta's config to the places in a backbone at which its layers go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from deltaexp import addressing
from deltaexp.errors import AddressingError, listing
from deltaexp.quantised import dequantised, weight_library
from deltaexp.registry import DeltaConfig
from deltaexp.structure import Role, Rows, backbone_modules, blocks, common_structure, linear_dims, output_dim

Structure = Mapping[str, tuple[Role, ...]]
"""What `deltaexp.structure.common_structure` returns."""
FALLBACK: dict[str, tuple[str, ...]] = {
    "attn": ("mixer", "conv"),
    "attn.q": ("mixer.in", "conv", "ff.w1"),
    "attn.v": ("mixer.in", "conv", "ff.w1"),
    "attn.k": ("mixer.in", "conv", "ff.w1"),
    "attn.proj": ("mixer", "mixer.out", "conv"),  # training kernels take the weight of Mamba's way out past the module itself
    "ff.w1": ("ff.experts", "ff", "conv"),
    "ff.w2": ("ff.experts", "ff", "conv"),
}
"""What a default module stands for in a backbone that has none of it, the first that there is: a state-space model has a mixer
in attention's place, a mixture of experts may hold all experts' weights in one module, a convolutional net has neither."""
BLOCK = "block"
"""The role of every block of every stack, which is there for a type or a user who asks for it."""
NOT_ALL_LINEAR = {"lm_head", "head", "ff.router"}
"""What ``all-linear`` leaves out, with what is in it: what chooses experts, and what maps to the vocabulary or the classes."""


@dataclass
class Site:
    """One place in a backbone at which a delta is to be put."""

    name: str
    module: nn.Module
    hidden_size: int | None = None
    """The backbone's hidden size, taken as the output's where the module does not tell."""
    role: str | None = None
    """The name in the common structure under which the module was chosen, or the only one it has."""
    rows: Rows | None = None
    """The elements of a fused projection's output that are meant; None is all of it."""
    after: tuple[str, nn.Module] | None = None
    """For a pair: name and module of where the output goes."""
    backbone: nn.Module | None = None
    """The whole backbone."""
    index: int = 0
    """The number of this place among all the delta's."""
    total: int = 1
    """How many there are."""
    shared: dict[str, Any] = field(default_factory=dict)
    """The same dict for all places of one delta: what its layers share. Under "sites" it has the list of the places."""

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
        return dims if self.rows is None else (dims[0], self.rows.groups * self.rows.width)

    def out_dim(self, delta_type: str) -> int:
        """Return the size of the last dimension of the output at this place.

        Raises:
            AddressingError: If neither the module nor the backbone's config tells.
        """
        if self.rows is not None:
            return self.rows.groups * self.rows.width
        dim = output_dim(self.module) or _only_linear(self.module) or self.hidden_size
        if dim is None:
            raise AddressingError(
                f"The delta type {delta_type!r} needs to know the width of the output of {self.name!r}, which a "
                f"{type(self.module).__name__} does not tell. Name a Linear module in modified_modules."
            )
        return dim

    def weight(self) -> torch.Tensor:
        """Return the weight of the linear map at this place, shape ``(out_dim, in_dim)``."""
        return linear_weight(self.module, self.rows)


def linear_weight(module: nn.Module, rows: Rows | None = None) -> torch.Tensor:
    """Return a linear map's weight as ``(out_dim, in_dim)``, whatever its own layout: where ``rows`` is None, a view of it,
    or of a quantised one a new tensor."""
    weight: Any = dequantised(module) if weight_library(module) else module.weight
    return taken(weight.T if type(module).__name__ == "Conv1D" else weight, rows, dim=0)


def taken(tensor: torch.Tensor, rows: Rows | None, dim: int = -1) -> torch.Tensor:
    """Return the elements along ``dim`` that ``rows`` means."""
    if rows is None:
        return tensor
    seen = tensor.unflatten(dim, (rows.groups, rows.size)) if rows.groups > 1 else tensor
    axis = dim if dim < 0 or rows.groups == 1 else dim + 1
    part = seen.narrow(axis, rows.start, rows.width)
    return part.flatten(axis - 1, axis) if rows.groups > 1 else part


def replaced(tensor: torch.Tensor, rows: Rows | None, part: torch.Tensor) -> torch.Tensor:
    """Return a tensor with other elements along the last dimension where ``rows`` says so; `taken` reads them."""
    if rows is None:
        return part
    seen = tensor.unflatten(-1, (rows.groups, rows.size))
    middle = part.unflatten(-1, (rows.groups, rows.width))
    stop = rows.start + rows.width
    return torch.cat([seen[..., : rows.start], middle, seen[..., stop:]], dim=-1).flatten(-2)


def _only_linear(module: nn.Module) -> int | None:
    """Return the output size of a module whose only parameters are those of one linear map (BERT's ``intermediate``)."""
    holders = [inner for _, inner in backbone_modules(module) if any(True for _ in inner.parameters(recurse=False))]
    dims = linear_dims(holders[0]) if len(holders) == 1 else None
    return dims[1] if dims else None


def find(
    config: DeltaConfig, backbone: nn.Module, structure: Structure | None = None
) -> tuple[dict[str, list[str]], list[Site]]:
    """Return, pattern by pattern, the names of the modules that a config chooses, and the places that follow from it.

    Where the type's default modules are taken, they are written into ``config``: a saved delta then means the same modules
    under a version with other defaults.

    Args:
        config: The config.
        backbone: The backbone.
        structure: Its common structure, where that is known already.

    Raises:
        AddressingError: If a pattern matches nothing.
    """
    modules = dict(backbone_modules(backbone))
    structure = common_structure(backbone) if structure is None else structure
    if any(pattern.replace("@", "") == BLOCK for pattern in config.modified_modules or config.defaults()):
        structure = {**structure, **{n: (*structure.get(n, ()), Role(BLOCK)) for stack in blocks(backbone) for n in stack}}
    common = {name: [role.name for role in roles] for name, roles in structure.items()}
    if config.modified_modules is None and config.defaults():
        patterns = _defaults(config, common)
        targets = _resolve(config, patterns, modules, common, True)
        config.modified_modules, config.common_structure = patterns, True
    elif config.modified_modules is None:
        targets = {"": [""]}
    else:
        targets = _resolve(config, config.modified_modules, modules, common, config.common_structure)
    if config.layers is not None and targets != {"": [""]}:
        targets = _in_layers(config, targets, backbone)
    places = _pairs(config, targets) if config.paired else _singles(config, targets, modules, structure, common)
    order = {name: number for number, name in enumerate(modules)}
    places.sort(key=lambda place: order[place[0]])
    hidden_size = _hidden_size(backbone)
    shared: dict[str, Any] = {}
    sites = [
        Site(
            name,
            modules[name],
            hidden_size,
            role.name if role else None,
            role.rows if role else None,
            (after, modules[after]) if after is not None else None,
            backbone,
            number,
            len(places),
            shared,
        )
        for number, (name, role, after) in enumerate(places)
    ]
    shared["sites"] = sites
    return targets, sites


Place = tuple[str, "Role | None", "str | None"]


def _defaults(config: DeltaConfig, common: addressing.CommonNames) -> list[str]:
    """Return the type's default patterns as they are in this backbone, without those of which it has nothing."""
    has = {role for roles in common.values() for role in roles}
    result = []
    for pattern in config.defaults():
        plain = pattern.replace("@", "")
        found = next((role for role in (plain, *FALLBACK.get(plain, ())) if role in has), None)
        if found and (config.paired or found not in result):
            result.append(found)
        elif config.paired:
            result.append("")
    if config.paired:  # a pair of which one half is missing is no pair
        pairs = [pair for pair in zip(result[::2], result[1::2], strict=True) if all(pair)]
        result = [pattern for pair in dict.fromkeys(pairs) for pattern in pair]
    if not result:
        raise AddressingError(
            f"The default modules of {config.delta_type!r} ({listing(config.defaults())}) are not found in this backbone, "
            f"whose common structure has {listing(sorted(has), 20) or 'nothing'}. Name modules in modified_modules."
        )
    return result


def _resolve(
    config: DeltaConfig,
    patterns: Sequence[str],
    modules: Mapping[str, nn.Module],
    common: addressing.CommonNames,
    common_structure: bool | None,
) -> dict[str, list[str]]:
    linear: dict[str, list[str]] = {}
    if addressing.ALL_LINEAR in patterns:
        aside = tuple(f"{name}." for name, roles in common.items() if not NOT_ALL_LINEAR.isdisjoint(roles))
        linear = {
            name: [addressing.ALL_LINEAR]
            for name, module in modules.items()
            if linear_dims(module) and not f"{name}.".startswith(aside)
        }
    result: dict[str, list[str]] = {}
    for pattern in patterns:
        everything = pattern == addressing.ALL_LINEAR
        result |= addressing.resolve(
            [pattern],
            list(modules),
            common=linear if everything else common,
            common_structure=True if everything else common_structure,
            exclude=config.exclude_modules,
        )
    return result


def _in_layers(config: DeltaConfig, targets: Mapping[str, list[str]], backbone: nn.Module) -> dict[str, list[str]]:
    """Keep of every pattern's modules those in the blocks that ``layers`` means."""
    stacks = blocks(backbone)
    wanted = {
        name
        for stack in stacks
        for number, name in enumerate(stack)
        if number in addressing.layer_numbers(config.layers, len(stack))
    }
    deepest = max((len(stack) for stack in stacks), default=0)
    beyond = sorted(n for n in addressing.layer_numbers(config.layers) if n >= deepest)
    if beyond or not wanted:
        raise AddressingError(
            f"layers is {config.layers!r}, and this backbone has {listing([f'{len(s)} blocks' for s in stacks]) or 'none'}, "
            "counted from 0."
        )
    result = {}
    for pattern, names in targets.items():
        result[pattern] = [name for name in names if any(f"{name}.".startswith(f"{block}.") for block in wanted)]
        if not result[pattern]:
            raise AddressingError(
                f"The pattern {pattern!r} matches {listing(list(names), 3)}, none of which lies in the blocks that "
                f"layers={config.layers!r} means."
            )
    return result


def _singles(
    config: DeltaConfig,
    targets: Mapping[str, list[str]],
    modules: Mapping[str, nn.Module],
    structure: Structure,
    common: addressing.CommonNames,
) -> list[Place]:
    """Return the places for a type that goes on single modules; a slice of a projection where only that was asked for."""
    whole: dict[str, Role | None] = {}
    parts: dict[str, dict[str, Role]] = {}
    for pattern, names in targets.items():
        for name in names:
            by_role = addressing.roles(pattern, name, common)
            named = config.common_structure is not True and "@" not in pattern and addressing.matches(pattern, name)
            chosen = [role for role in structure.get(name, ()) if role.name in by_role and role.rows is not None]
            if chosen and not named:
                parts.setdefault(name, {}).update({role.name: role for role in chosen})
            else:
                found = structure.get(name, ())
                role = next((r for r in found if r.name in by_role), found[0] if len(found) == 1 else None)
                whole.setdefault(name, Role(role.name) if role else None)
    places: list[Place] = []
    for name in modules:
        if name in whole:
            inside = [
                found
                for found in config.expand(name, modules[name])
                if not any(addressing.covers(entry, found, common.get(found, ())) for entry in config.exclude_modules)
            ]
            places += [(found, whole[name] if found == name else None, None) for found in inside]
        else:
            places += [(name, role, None) for role in parts.get(name, {}).values()]
    return list({(place[0], place[1].name if place[1] and place[1].rows else None): place for place in places}.values())


def _pairs(config: DeltaConfig, targets: Mapping[str, list[str]]) -> list[Place]:
    """Return the places for a type that goes on pairs of modules: each pattern's modules with those of the next one."""
    patterns = config.modified_modules or []
    places: list[Place] = []
    for before, after in zip(patterns[::2], patterns[1::2], strict=True):
        first, second = targets[before], targets[after]
        if len(first) != len(second):
            raise AddressingError(
                f"The patterns {before!r} and {after!r} make pairs, and they mean {len(first)} and {len(second)} modules "
                f"({listing(first, 2)}; {listing(second, 2)}). Name patterns that mean equally many."
            )
        places += [(name, None, other) for name, other in zip(first, second, strict=True)]
    return places


def _hidden_size(backbone: nn.Module) -> int | None:
    """Return the hidden size that a backbone's config tells, also that of a backbone inside a wrapper."""
    for module in backbone.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "get_text_config"):
            return getattr(config.get_text_config(), "hidden_size", None)
        if config is not None and isinstance(getattr(config, "hidden_size", None), int):
            return config.hidden_size
    return None
