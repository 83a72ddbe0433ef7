"""Parameters of the backbone itself that a delta trains: whose they are, and their values without it and with it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from deltaexp import addressing, quantised
from deltaexp.errors import AddressingError, listing
from deltaexp.registry import DeltaConfig
from deltaexp.structure import backbone_modules, backbone_parameters
from deltaexp.targets import Site

OWNED = "_deltaexp_owned"
"""Attribute of a backbone: what the parameters that its attached deltas own were without them. It is kept with the backbone,
so that a copy knows as well."""


def originals(backbone: nn.Module) -> dict[str, torch.Tensor]:
    """Return the values, without any delta, of the parameters that attached deltas own, under their names."""
    return backbone.__dict__.get(OWNED, {})


class Ownership:
    """What one delta owns of its backbone.

    While the delta is attached, the backbone's parameters hold the trained values and `without` the original ones;
    while it is detached, they hold the original values and `trained` the others.
    """

    def __init__(self, backbone: nn.Module) -> None:
        self.backbone = backbone
        self.without: dict[str, torch.Tensor] = {}
        self.trained: dict[str, torch.Tensor] = {}
        self.active = False

    def take(self, names: set[str]) -> None:
        """Own the parameters called ``names`` and no others, with their trained values where there are any.

        Raises:
            AddressingError: If one belongs to another delta; two owners could not both restore what was.
        """
        parameters = backbone_parameters(self.backbone) if names or self.without or self.trained else {}
        others = self._others()
        taken = sorted(names & set(others))
        if taken:
            raise AddressingError(
                f"{listing(taken, 3)}, which this delta would train, belongs to another delta that is attached to this "
                "backbone. Detach that one first, or leave the module to one of the two."
            )
        if self.active:
            assign(parameters, {name: value for name, value in self.without.items() if name not in names})
        kept = self.without if self.active else {}
        self.without = {n: kept[n] if n in kept else parameters[n].detach().clone() for n in parameters if n in names}
        assign(parameters, {name: value for name, value in self.trained.items() if name in names})
        self.trained = {}  # from here on the parameters themselves are what is trained
        self._record({**others, **self.without})
        self.active = True

    def forget(self, names: set[str]) -> None:
        """While the delta is detached: own no others than ``names`` any more."""
        self.without = {name: value for name, value in self.without.items() if name in names}
        self.trained = {name: value for name, value in self.trained.items() if name in names}

    def release(self) -> None:
        """Give every parameter its original value back, and keep the trained ones; a second call changes nothing."""
        if not self.active:
            return
        parameters = backbone_parameters(self.backbone)
        self.trained = {name: parameters[name].detach().clone() for name in self.without}
        assign(parameters, self.without)
        self._record(self._others())
        self.active = False

    def exchange(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Do what `release` does, or after that `take`, by exchanging memory: without copying.

        Args:
            parameters: The backbone's parameters, those that are owned at least, by name.
        """
        others = self._others()
        if self.active:
            now, self.trained = self.without, {name: parameters[name].data for name in self.without}
        else:
            now, self.trained = self.trained, {}
            self.without = {name: parameters[name].data for name in now}
        for name, value in now.items():
            parameters[name].data = value
        self.active = not self.active
        self._record({**others, **self.without} if self.active else others)

    def values(self) -> dict[str, torch.Tensor]:
        """Return the trained values under the parameters' names."""
        if not self.without:
            return {}
        source: Mapping[str, torch.Tensor] = backbone_parameters(self.backbone) if self.active else self.trained
        return {name: source[name] for name in self.without}

    def _others(self) -> dict[str, torch.Tensor]:
        """Return what other deltas own."""
        mine = self.without if self.active else {}
        return {name: value for name, value in originals(self.backbone).items() if name not in mine}

    def _record(self, values: dict[str, torch.Tensor]) -> None:
        if values:
            self.backbone.__dict__[OWNED] = values
        else:
            self.backbone.__dict__.pop(OWNED, None)


def assign(parameters: Mapping[str, nn.Parameter], values: Mapping[str, torch.Tensor]) -> None:
    """Set parameters, in place."""
    with torch.no_grad():
        for name, value in values.items():
            parameters[name].copy_(value)


def in_place(config: DeltaConfig, sites: Iterable[Site], backbone: nn.Module) -> set[str]:
    """Return the names of the backbone's own parameters that a delta's type trains in place."""
    names = {".".join(part for part in (site.name, name) if part) for site in sites for name in config.owned(site)}
    return first_names(names, backbone)


def unfrozen(config: DeltaConfig, backbone: nn.Module) -> set[str]:
    """Return the names of the backbone's own parameters that ``unfrozen_modules`` means.

    Raises:
        AddressingError: If a pattern means none.
    """
    if set(config.unfrozen_modules) <= {"deltas"}:
        return set()
    first = {id(parameter) for parameter in backbone_parameters(backbone).values()}
    own = [name for name, parameter in backbone.named_parameters(remove_duplicate=False) if id(parameter) in first]
    result: set[str] = set()
    for pattern in config.unfrozen_modules:
        if pattern == "deltas":
            continue
        found = {name for name in own if addressing.covers(pattern, name)}
        if not found:
            addressing.resolve([pattern], [*own, *dict(backbone_modules(backbone))])
            raise AddressingError(f"The pattern {pattern!r} in unfrozen_modules means no parameter.")
        result |= found
    return first_names(result, backbone)


def first_names(names: set[str], backbone: nn.Module) -> set[str]:
    """Return names of the backbone's parameters as they are saved: a tied one is known by its first name.

    Raises:
        AddressingError: If one is quantised: what is trained in place cannot be.
    """
    if not names:
        return set()
    first = {id(parameter): name for name, parameter in backbone_parameters(backbone).items()}
    every = dict(backbone.named_parameters(remove_duplicate=False))
    quantised.check_trainable(names, every)
    return {first[id(every[name])] for name in names}
