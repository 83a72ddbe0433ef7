"""A backbone as the page shows it: a row for every module with parameters, blocks that are alike in one row."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from deltaexp.lab.inspecting import span
from deltaexp.structure import Role, common_structure, linear_dims
from deltaexp.visualize import folded

Unit = tuple[str, "str | None"]
"""What can be chosen: a module by its name, or of a fused projection the slice that has a role."""


@dataclass
class Row:
    """Modules that are alike and that one row of the page stands for."""

    parent: int | None
    """The number of the row above it in the tree."""
    numbers: list[str]
    """Its name below its parent, or the numbers of blocks that are alike."""
    kind: str
    """The class; of a slice its elements."""
    shape: str
    """``in → out`` of a linear map, else the shapes of the module's own parameters."""
    roles: list[str]
    """Its names in the common structure."""
    parameters: int
    """How many one of these modules has, with all below it."""
    slice: bool = False
    """Whether it is no module, but a part of the output of the one above."""


class Outline:
    """The rows of a backbone, and where in them its modules are.

    A row within folded blocks stands for as many modules as there are combinations of the blocks' numbers. They are counted
    like the digits of a number, the outermost fold first: the ``offset`` of a module is its place in this order.

    Args:
        backbone: The backbone, on any device, without deltas.
    """

    def __init__(self, backbone: nn.Module) -> None:
        self.structure = common_structure(backbone)
        self.rows: list[Row] = []
        self.units: list[list[Unit]] = []
        """For every row what it stands for, in the order of the offsets."""
        self.places: dict[Unit, tuple[int, int]] = {}
        """For everything that can be chosen its row and offset."""
        self._grow(None, [type(backbone).__name__], backbone, [""])

    def described(self) -> list[dict[str, Any]]:
        """Return the rows as the page reads them."""
        return [asdict(row) for row in self.rows]

    def folds(self, row: int) -> list[int]:
        """Return how many modules are folded at every step from the root down to a row: the base of each digit."""
        steps: list[int] = []
        at: int | None = row
        while at is not None:
            steps.insert(0, len(self.rows[at].numbers))
            at = self.rows[at].parent
        return steps

    def chosen(self, row: int, digits: Sequence[int | None]) -> list[Unit]:
        """Return what a row stands for where some of its folds are unfolded.

        Args:
            row: The number of the row.
            digits: For every step from the root which of the folded modules is meant, None for all of them.

        Raises:
            ValueError: If there is no such row or module.
        """
        if not 0 <= row < len(self.rows):
            raise ValueError(f"There is no row {row}.")
        folds = self.folds(row)
        if len(digits) != len(folds) or any(d is not None and not 0 <= d < n for d, n in zip(digits, folds, strict=True)):
            raise ValueError(f"Row {row} has the folds {folds}, and {list(digits)} fits none of them.")
        offsets = [0]
        for digit, base in zip(digits, folds, strict=True):
            offsets = [offset * base + d for offset in offsets for d in (range(base) if digit is None else (digit,))]
        return [self.units[row][offset] for offset in offsets]

    def marks(self, units: Iterable[Unit]) -> dict[str, Any]:
        """Return where in the rows something is: the offsets by row, and how much is in no row for want of parameters."""
        found: dict[int, list[int]] = {}
        unseen = 0
        for unit in units:
            place = self.places.get(unit)
            if place is None:
                unseen += 1
            else:
                found.setdefault(place[0], []).append(place[1])
        return {"rows": {row: sorted(offsets) for row, offsets in found.items()}, "unseen": unseen}

    def _add(self, row: Row, units: list[Unit]) -> int:
        number = len(self.rows)
        self.rows.append(row)
        self.units.append(units)
        assert len(units) == math.prod(self.folds(number))
        self.places.update({unit: (number, offset) for offset, unit in enumerate(units)})
        return number

    def _grow(self, above: int | None, numbers: list[str], module: nn.Module, names: list[str]) -> None:
        """Add a row for modules called ``names``, of which ``module`` is the first, and all rows below it."""
        roles = self.structure.get(names[0], ())
        kind, count = type(module).__name__, sum(parameter.numel() for parameter in module.parameters())
        own = [role.name for role in roles]
        row = self._add(Row(above, numbers, kind, _shape(module), own, count), [(name, None) for name in names])
        for role in roles:
            if role.rows is not None:
                part = Row(row, [role.name], span(role.rows).lstrip(", "), "", [role.name], 0, slice=True)
                self._add(part, [(name, role.name) for name in names])
        for group in folded(module):
            for alike in self._alike(names[0], module, group):
                below = [f"{name}.{number}" if name else number for name in names for number in alike]
                self._grow(row, alike, getattr(module, alike[0]), below)

    def _alike(self, name: str, module: nn.Module, group: list[str]) -> list[list[str]]:
        """Part modules of equal shape where their roles in the backbone differ."""

        def roles(number: str) -> list[tuple[Role, ...]]:
            path = f"{name}.{number}" if name else number
            return [
                self.structure.get(f"{path}.{inner}" if inner else path, ())
                for inner, _ in getattr(module, number).named_modules()
            ]

        result, before = [[group[0]]], roles(group[0])
        for number in group[1:]:
            mine = roles(number)
            if mine == before:
                result[-1].append(number)
            else:
                result.append([number])
            before = mine
        return result


def _shape(module: nn.Module) -> str:
    dims = linear_dims(module)
    if dims:
        bias = " + bias" if getattr(module, "bias", None) is not None else ""
        return f"{dims[0]} → {dims[1]}{bias}"
    own = dict(module.named_parameters(recurse=False))
    if set(own) == {"weight"}:
        return " × ".join(map(str, own["weight"].shape))
    return ", ".join(f"{name} {' × '.join(map(str, parameter.shape))}" for name, parameter in own.items())
