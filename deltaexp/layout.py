"""Which part of a fused projection's output is the query's, the key's, the value's, the gate's.

Shapes do not tell: the same 3 x 4 x 8 outputs are [q | k | v] in GPT-2, and [q | k | v] head by head in BLOOM. The module
that owns the projection does: its method that calls the projection is followed statement by statement, with the projection's
output replaced by the numbers 0, 1, 2, ... . As soon as variables called after the roles (``query_states``, ``k``, ``gate``)
hold disjoint parts of these numbers, the parts are the answer. No weight is read and nothing is computed but views and
splits of one vector; statements that need more than that are passed over. Whatever stays uncertain is answered with None.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Rows:
    """The elements of a fused projection's output that belong to one role.

    The output, of size ``groups * size``, is seen as ``(groups, size)``; of each group, ``width`` elements from ``start``.
    """

    groups: int
    size: int
    start: int
    width: int

    def indices(self) -> torch.Tensor:
        """Return the numbers of these elements in the output."""
        return torch.arange(self.groups * self.size).view(self.groups, -1)[:, self.start : self.start + self.width].flatten()


VARIABLES = {
    "q": re.compile(r"(mixed_)?(q|query|queries)(_(states?|layer|nope|pass|c))?"),
    "k": re.compile(r"(mixed_)?(k|key|keys)(_(states?|layer|nope|pass|c))?"),
    "v": re.compile(r"(mixed_)?(v|value|values)(_(states?|layer|c))?"),
    "gate": re.compile(r"gate(_states?)?"),
    "w1": re.compile(r"up(_states?)?"),
}
"""What modelling code calls the parts."""


def fused_rows(owner: nn.Module, attribute: str, dims: tuple[int, int], parts: tuple[str, ...]) -> dict[str, Rows] | None:
    """Return the rows of each part of a fused projection; None where its owner's code does not tell for certain.

    Args:
        owner: The module whose code calls the projection.
        attribute: The projection's name there.
        dims: The projection's ``(in_dim, out_dim)``.
        parts: What is fused: of "q", "k", "v", "gate", "w1".
    """
    for method in _methods(type(owner), attribute):  # type: ignore[arg-type]
        for leading in ((1, 1), (1,), (1, 1, 1)):
            found = _follow(owner, attribute, method, dims, leading, parts)
            if found:
                return found
    return None


@dataclass(frozen=True)
class _Method:
    parameters: tuple[inspect.Parameter, ...]
    body: tuple[ast.stmt, ...]
    space: dict[str, Any]


@functools.cache
def _methods(owner: type, attribute: str) -> tuple[_Method, ...]:
    """Return the methods of a class that call ``self.<attribute>(...)``."""
    found = []
    for name, function in inspect.getmembers(owner, inspect.isfunction):
        try:
            source = inspect.getsource(inspect.unwrap(function))
        except (OSError, TypeError):
            continue
        if name != "__init__" and f"self.{attribute}(" in source and not function.__module__.startswith("torch."):
            definition = ast.parse(textwrap.dedent(source)).body[0]
            parameters = tuple(inspect.signature(function).parameters.values())[1:]
            if isinstance(definition, ast.FunctionDef):
                found.append(_Method(parameters, tuple(definition.body), vars(sys.modules[function.__module__])))
    return tuple(found)


class _Owner:
    """Stands for the module that owns the projection: its attributes, with every child replaced."""

    def __init__(self, module: nn.Module, attribute: str, out_dim: int) -> None:
        self.__dict__.update(_module=module, _attribute=attribute, _out_dim=out_dim)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        if name == self._attribute:
            return lambda x, *_, **__: torch.arange(self._out_dim).expand(*x.shape[:-1], -1)
        if isinstance(value, nn.Linear):
            return lambda x, *_, **__: torch.zeros(*x.shape[:-1], value.out_features)
        return (lambda x, *_, **__: x) if isinstance(value, nn.Module) else value


def _follow(
    owner: nn.Module, attribute: str, method: _Method, dims: tuple[int, int], leading: tuple[int, ...], parts: tuple[str, ...]
) -> dict[str, Rows] | None:
    """Follow a method whose input has the shape ``(*leading, in_dim)`` until the parts are told apart."""
    space: dict[str, Any] = {"self": _Owner(owner, attribute, dims[1])}
    for number, parameter in enumerate(method.parameters):
        # A projection of keys and values alone reads what cross-attention looks at, so that is given as well.
        other = "q" not in parts and re.search("hidden_states|^key_value", parameter.name)
        if number == 0 or other:
            space[parameter.name] = torch.zeros(*leading, dims[0])
        elif parameter.kind is parameter.VAR_KEYWORD:
            space[parameter.name] = {}
        elif parameter.default is not parameter.empty:
            space[parameter.name] = parameter.default
    scope = {**method.space, **space}
    for statement in _taken(method.body, scope):
        with torch.no_grad():
            try:
                exec(_compiled(statement), scope)
            except Exception:  # what cannot run on one vector has nothing to do with how it is split
                continue
        found = _parts(scope, method.space, dims[1], parts)
        if found:
            return found
    return None


@functools.cache
def _compiled(statement: ast.stmt) -> CodeType:
    return compile(ast.Module([statement], []), "<fused projection>", "exec")


@functools.cache
def _condition(test: ast.expr) -> CodeType:
    return compile(ast.Expression(test), "<fused projection>", "eval")


def _taken(body: tuple[ast.stmt, ...] | list[ast.stmt], scope: dict[str, Any]) -> Iterator[ast.stmt]:
    """Yield a method's assignments in order, within the branches that the module's own flags choose."""
    for statement in body:
        if isinstance(statement, ast.If):
            try:
                chosen = bool(eval(_condition(statement.test), scope))
            except Exception:
                continue
            yield from _taken(statement.body if chosen else statement.orelse, scope)
        elif isinstance(statement, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
            yield statement


def _parts(scope: dict[str, Any], outside: dict[str, Any], size: int, parts: tuple[str, ...]) -> dict[str, Rows] | None:
    """Return the rows of the parts if variables hold all of them, disjoint, and nothing of the output is unaccounted for."""
    held = {
        name: value
        for name, value in scope.items()
        if isinstance(value, torch.Tensor) and value.dtype == torch.int64 and value.numel() > 0 and name not in outside
    }
    result: dict[str, Rows] = {}
    counted = torch.zeros(size, dtype=torch.int64)
    for part in parts:
        names = [name for name in held if VARIABLES[part].fullmatch(name)]
        rows = _rows(held.pop(names[-1]), size) if names else None
        if rows is None:
            return None
        result[part] = rows
        counted[rows.indices()] += 1
    # The rest, such as an output gate's part, must be held by variables too.
    for value in held.values():
        rows = _rows(value, size)
        if rows is not None and not counted[rows.indices()].any():
            counted[rows.indices()] += 1
    return result if bool((counted == 1).all()) else None


def _rows(held: torch.Tensor, size: int) -> Rows | None:
    """Return the numbers in ``held`` as rows; None where they are not regular."""
    numbers = held.unique()  # sorted; keys and values that several queries share may have been repeated for them
    starts = [0, *(int(i) + 1 for i in (numbers.diff() != 1).nonzero())]
    groups = len(starts)
    if size % groups or len(numbers) % groups or int(numbers[0]) < 0:
        return None
    rows = Rows(groups, size // groups, int(numbers[0]), len(numbers) // groups)
    if rows.start + rows.width > rows.size or int(numbers[-1]) >= size or not torch.equal(rows.indices(), numbers):
        return None
    return rows
