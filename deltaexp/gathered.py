"""Low-rank updates in half precision, gathered: what many small operations do, done in few.

Under autocast the factors of a low-rank update are cast and scaled in every step. Of a model with many maps these operations
take longer than what they compute, and so do queries, keys and values one by one. While `applied` is active,

- the factors of all maps are cast in one operation, ``A`` and ``s B`` side by side in one tensor, and so are their gradients,
  which is one function for autograd in the place of some for each map;
- maps that take the same input (queries, keys and values of an attention; gate and up) are one map, with the rows of all
  weights, the ``A`` of all, and their ``B`` as blocks. The first of them that is called computes all, and the others are given
  theirs when they are called with the same input.

Nothing of the model changes, and where anything else hangs on a map, or its input is not that of its neighbours, it is computed
by itself, as ever. How does not depend on the steps before, so that a run that is resumed goes on with the same bits. Casts of
factors are good for one forward pass and its backward pass: not every optimizer tells that it has changed a tensor.
"""

from __future__ import annotations

import contextlib
import functools
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses import FakeTensor
from torch.autograd.function import once_differentiable

from deltaexp.casting import cast, cast_all
from deltaexp.deltas._linear import LowRankDelta
from deltaexp.lazy import Layer
from deltaexp.low_rank import LowRankLinear, Update, low_rank_linear, simply, small
from deltaexp.structure import common_structure
from deltaexp.tree import parent, place

DTYPE = torch.bfloat16
MEMBER = "_deltaexp_gathered"
"""Attribute of a module: the unit that it belongs to, and its number in it."""
TOGETHER = ({"attn.q", "attn.k", "attn.v"}, {"ff.w1", "ff.gate"})
"""Roles of maps that take the same input, if they are parts of the same module."""
UPDATE = (Update(1.0, 0.0, None),)
ALIGNED = 32
"""Elements, at multiples of which a matrix begins."""


class Matrix(NamedTuple):
    """Where in the tensor of all casts a matrix lies."""

    size: tuple[int, int]
    stride: tuple[int, int]
    offset: int

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """Return the matrix."""
        return flat.as_strided(self.size, self.stride, self.offset)


class Unit:
    """Maps that are computed as one, or one alone.

    Args:
        model: The model that they are in.
        names: Their names in it.
        layers: The layer on each.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], layers: Sequence[LowRankDelta]) -> None:
        self.places = [place(model, name) for name in names]
        modules: list[Any] = [model.get_submodule(name) for name in names]
        self.modules, self.layers = modules, list(layers)
        self.sizes = [len(module.weight) for module in modules]
        self.factors = [tensor for layer in layers for tensor in layer.factors()]
        self._weights: tuple[Any, torch.Tensor, torch.Tensor | None] | None = None
        self.waiting: dict[int, torch.Tensor] = {}
        """Outputs that have been computed, by the numbers of the maps that have not been called."""
        self._input: Any = None

    def output(
        self, number: int, x: torch.Tensor, casts: Casts, layers_on: Callable[[nn.Module, torch.Tensor], Any]
    ) -> torch.Tensor | None:
        """Return the output of a map; None where it has to be computed by itself.

        Args:
            number: Its number in the unit.
            x: Its input, shape ``(..., in_dim)``.
            casts: The casts of all units.
            layers_on: Returns the layers on a module if nothing else is to be computed there.
        """
        if x.is_inference():
            return None
        state = x._version, torch.is_grad_enabled()
        if self.waiting:
            if self._input[0]() is x and self._input[1] == state and number in self.waiting:
                return self.waiting.pop(number)
            called = number in self.waiting
            self.waiting.clear()
            if called:
                return None
        for module, layer, (above, name) in zip(self.modules, self.layers, self.places, strict=True):
            found = layers_on(module, x)
            if len(found) != 1 or found[0] != (layer, None) or layer.batch_rows is not None or layer.drops:
                return None
            if above._modules.get(name) is not module:  # something stands in for it, and it is not going to be called
                return None
        given, weight, bias = self._cast(x)
        out = _computed(given, weight, bias, *casts.of(self))
        if len(self.sizes) == 1:
            return out
        self.waiting = dict(enumerate(torch.unsafe_split_with_sizes(out, self.sizes, -1)))
        self._input = weakref.ref(x), state
        return self.waiting.pop(number)

    def _cast(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return the input, the rows of all weights, and all biases, in half precision."""
        if len(self.modules) == 1:
            return cast_all(self.modules[0], x, DTYPE)
        weights, biases = [module.weight for module in self.modules], [module.bias for module in self.modules]
        state = [(tensor._version, tensor.data_ptr(), id(tensor)) for tensor in (*weights, *biases) if tensor is not None]
        if self._weights is None or self._weights[0] != state:
            bias = None
            with torch.no_grad():
                if any(one is not None for one in biases):
                    none = weights[0].new_zeros(max(self.sizes))
                    bias = torch.cat([none[:n] if b is None else b for n, b in zip(self.sizes, biases, strict=True)]).to(DTYPE)
                self._weights = state, torch.cat([weight.to(DTYPE) for weight in weights]), bias
        return cast(x, DTYPE, keep=True), *self._weights[1:]

    def kept(self) -> list[torch.Tensor]:
        """Return the casts of weights and biases that are kept here."""
        return [] if self._weights is None else [tensor for tensor in self._weights[1:] if tensor is not None]


def _computed(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, down: torch.Tensor, up: torch.Tensor
) -> torch.Tensor:
    if small(x, weight):
        return simply(x, weight, bias, UPDATE, down, up)
    if not torch.is_grad_enabled():
        return low_rank_linear(x, weight, bias, UPDATE, down, up)
    return LowRankLinear.apply(x, weight, bias, None, UPDATE, down, up)


class Casts:
    """The factors of all units, cast.

    Args:
        units: The units.
    """

    def __init__(self, units: Sequence[Unit]) -> None:
        self.units = {unit: number for number, unit in enumerate(units)}
        self.factors = [factor for unit in units for factor in unit.factors]
        """Of every layer ``A`` and ``B``."""
        self.scales = [layer.scale for unit in units for layer in unit.layers]
        self.matrices: list[Matrix] = []
        """Of every unit the ``A`` of all its layers, and their ``B`` as blocks."""
        self.parts: list[tuple[int, int, int]] = []
        """Of every factor the number of the matrix that it is in, and the row and the column that it begins at."""
        self.size = 0
        self._within = False
        self._made: tuple[bool, tuple[torch.Tensor, ...]] | None = None
        self._taken_out: dict[tuple[bool, ...], tuple[torch.Tensor, torch.Tensor]] = {}
        for unit in units:
            downs, ups = unit.factors[::2], unit.factors[1::2]
            rank = sum(len(down) for down in downs)
            first = len(self.matrices)
            self._add(rank, downs[0].shape[1])
            self._add(sum(unit.sizes), rank)
            row = column = 0
            for down, up in zip(downs, ups, strict=True):
                self.parts += [(first, column, 0), (first + 1, row, column)]
                row, column = row + len(up), column + len(down)

    def _add(self, rows: int, columns: int) -> None:
        self.matrices.append(Matrix((rows, columns), (columns, 1), self.size))
        self.size += -(-rows * columns // ALIGNED) * ALIGNED

    def begin(self, *_: Any) -> None:
        """Make them anew when they are needed, and keep them until `end`."""
        self._made, self._within = None, True

    def end(self, *_: Any) -> None:
        """Keep them for the backward pass only, which may compute parts of the model again; drop what nobody has fetched."""
        self._within = False
        for unit in self.units:
            unit.waiting.clear()

    def of(self, unit: Unit) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a unit's factors, with the scale in the second."""
        number, grad = 2 * self.units[unit], torch.is_grad_enabled()
        good = self._within or torch._C._current_graph_task_id() >= 0
        if not good or self._made is None or self._made[0] != grad:
            self._made = grad, _Cast.apply(self, *self.factors)
        return self._made[1][number], self._made[1][number + 1]

    @functools.cached_property
    def laid_out(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return where each element of the tensor of all casts is among those of all factors, and its scale.

        Between the matrices, and between blocks, is what follows the last element.
        """
        sizes = [factor.numel() for factor in self.factors]
        where = torch.full((self.size,), sum(sizes), dtype=torch.int32)
        scales = torch.ones(self.size)
        matrices = [[matrix.of(flat) for matrix in self.matrices] for flat in (where, scales)]
        for n, numbers in enumerate(torch.arange(sum(sizes), dtype=torch.int32).split(sizes)):
            self.piece(n, matrices[0]).copy_(numbers.view(self.factors[n].shape))
            if n % 2:
                self.piece(n, matrices[1]).fill_(self.scales[n // 2])
        return where.to(self.factors[0].device), scales.to(self.factors[0].device)

    def taken_out(self, turned: tuple[bool, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return where each element of all factors is among those of all matrices, and its scale.

        Args:
            turned: For every matrix, whether its columns lie one after another in memory, and not its rows.
        """
        if turned not in self._taken_out:
            sizes = [math.prod(matrix.size) for matrix in self.matrices]
            numbers = torch.arange(sum(sizes), dtype=torch.int32).split(sizes)
            shaped = [
                part.view(matrix.size[::-1]).T if turn else part.view(matrix.size)
                for part, matrix, turn in zip(numbers, self.matrices, turned, strict=True)
            ]
            where = torch.cat([self.piece(n, shaped).reshape(-1) for n in range(len(self.factors))])
            scales = torch.cat(
                [torch.full((f.numel(),), self.scales[n // 2] if n % 2 else 1.0) for n, f in enumerate(self.factors)]
            )
            self._taken_out[turned] = where.to(self.factors[0].device), scales.to(self.factors[0].device)
        return self._taken_out[turned]

    def piece(self, factor: int, matrices: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return where in the units' matrices a factor is."""
        (number, row, column), (rows, columns) = self.parts[factor], self.factors[factor].shape
        return matrices[number][row : row + rows, column : column + columns]


class _Cast(torch.autograd.Function):
    """All factors in half precision, those of each unit in two matrices."""

    @staticmethod
    def forward(ctx: Any, casts: Casts, *factors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.casts = casts
        ctx.set_materialize_grads(False)
        if factors[0].is_cuda:
            flat = _laid_out(casts, factors)
            return tuple(matrix.of(flat) for matrix in casts.matrices)
        flat = factors[0].new_zeros(casts.size, dtype=DTYPE)
        matrices = tuple(matrix.of(flat) for matrix in casts.matrices)
        scaled = [*factors]
        scaled[1::2] = torch._foreach_mul(factors[1::2], casts.scales)
        torch._foreach_copy_([casts.piece(n, matrices) for n in range(len(factors))], scaled)
        return matrices

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        casts, needs = ctx.casts, ctx.needs_input_grad[1:]
        if gradients[0] is not None and gradients[0].is_cuda and all(needs) and all(one is not None for one in gradients):
            return None, *_taken_out(casts, gradients)
        found: list[torch.Tensor | None] = [None] * len(casts.factors)
        there = [n for n, (matrix, _, _) in enumerate(casts.parts) if gradients[matrix] is not None and needs[n]]
        made = [torch.empty_like(casts.factors[n]) for n in there]
        torch._foreach_copy_(made, [casts.piece(n, gradients) for n in there])
        ups = [(one, casts.scales[n // 2]) for n, one in zip(there, made, strict=True) if n % 2]
        torch._foreach_mul_([one for one, _ in ups], [scale for _, scale in ups])
        for n, one in zip(there, made, strict=True):
            found[n] = one
        return None, *found


def _laid_out(casts: Casts, factors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the tensor of all casts, made in few operations, however many factors there are, as suits a GPU."""
    where, scales = casts.laid_out
    together = torch.cat([*(factor.reshape(-1) for factor in factors), factors[0].new_zeros(1)])
    return torch.mul(together.index_select(0, where), scales, out=together.new_empty(casts.size, dtype=DTYPE))


def _taken_out(casts: Casts, gradients: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the gradients of all factors from those of the matrices, in few operations."""
    turned = tuple(not one.is_contiguous() for one in gradients)
    where, scales = casts.taken_out(turned)
    flat = [(one.T if turn else one).reshape(-1) for one, turn in zip(gradients, turned, strict=True)]
    found = torch.cat(flat).index_select(0, where) * scales
    parts = found.split([factor.numel() for factor in casts.factors])
    return [part.view(factor.shape) for part, factor in zip(parts, casts.factors, strict=True)]


@contextlib.contextmanager
def applied(model: nn.Module) -> Iterator[list[Unit]]:
    """Within this context what can be gathered of a model's low-rank updates is; yield the units."""
    units = _units(model)
    casts = Casts(units)
    hooks = model.register_forward_pre_hook(casts.begin), model.register_forward_hook(casts.end, always_call=True)
    for unit in units:
        for number, module in enumerate(unit.modules):
            module.__dict__[MEMBER] = unit, number, casts
    try:
        yield units
    finally:
        for hook in hooks:
            hook.remove()
        for unit in units:
            for module in unit.modules:
                module.__dict__.pop(MEMBER, None)


def _units(model: nn.Module) -> list[Unit]:
    """Return the units of a model, groups first."""
    found: dict[str, tuple[Any, LowRankDelta]] = {}
    for name, module in model.named_modules():
        layers: list[Any] = [child for child in module.children() if isinstance(child, Layer)]
        if isinstance(module, nn.Linear) and len(layers) == 1 and _gathers(layers[0], module):
            found[name] = module, layers[0]
    groups: dict[tuple, list[str]] = {}
    for name, roles in common_structure(model).items():
        kinds = [number for number, together in enumerate(TOGETHER) if len(roles) == 1 and roles[0].name in together]
        if name in found and kinds:
            module = found[name][0]
            key = parent(name), kinds[0], module.in_features, module.weight.dtype, module.weight.device
            groups.setdefault(key, []).append(name)
    together = [names for names in groups.values() if len(names) > 1]
    alone = [[name] for name in found if not any(name in names for names in together)]
    return [Unit(model, names, [found[name][1] for name in names]) for names in [*together, *alone]]


def _gathers(layer: Any, module: nn.Linear) -> bool:
    """Say whether a layer's factors are its parameters, and those of a plain update of the whole of a linear map."""
    if not isinstance(layer, LowRankDelta) or layer.insertion != "parallel" or not layer.fusable or layer.target.kernel:
        return False
    down, up = layer.factors()
    plain = all(type(factor) in (nn.Parameter, FakeTensor) and factor.dtype == torch.float32 for factor in (down, up))
    # What is kept of a bias that is trained would be out of date: not every optimizer tells that it has changed a tensor.
    frozen = not any(parameter.requires_grad for parameter in module.parameters(recurse=False))
    return plain and frozen and (down.shape[1], len(up)) == (module.in_features, len(module.weight))


def kept(model: nn.Module) -> list[torch.Tensor]:
    """Return the casts of frozen weights that are kept for groups of maps."""
    units = {member[0]: None for module in model.modules() if (member := module.__dict__.get(MEMBER))}
    return [tensor for unit in units for tensor in unit.kept()]
