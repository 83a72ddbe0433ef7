"""The hooks by which the layers of a delta join the forward pass of the modules that they hang on.

They are module-level functions bound to the *name* of the child that the layer is (see `deltaexp.surgery`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from deltaexp.errors import DeltaExpError
from deltaexp.lazy import Layer
from deltaexp.structure import Rows
from deltaexp.targets import linear_weight, replaced, taken


def add_parallel(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any, *, name: str, rows: Rows | None) -> Any:
    """Forward hook: add what the layer makes of the module's input to the module's output."""
    layer, x = getattr(module, name), first_input(args, kwargs)
    return _on_first(output, layer, rows, lambda h, x: h + layer(_as(layer, x)).to(h.dtype), x)


def add_sequential(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any, *, name: str, rows: Rows | None) -> Any:
    """Forward hook: replace the module's output by what the layer makes of it."""
    layer = getattr(module, name)
    return _on_first(output, layer, rows, lambda h: layer(_as(layer, h)).to(h.dtype))


def add_weighted(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any, *, name: str, rows: Rows | None) -> Any:
    """Forward hook: replace the module's output by what the layer makes of input, output and the module's parameters."""
    layer, x = getattr(module, name), first_input(args, kwargs)
    bias: Any = getattr(module, "bias", None)
    parameters = linear_weight(module, rows), None if bias is None else taken(bias, rows)
    return _on_first(output, layer, rows, lambda h, x: layer(_as(layer, x), _as(layer, h), *parameters).to(h.dtype), x)


def add_input(module: nn.Module, args: tuple, kwargs: dict[str, Any], *, name: str) -> tuple[tuple, dict[str, Any]]:
    """Forward pre-hook: replace the module's input by what the layer makes of it."""
    layer = getattr(module, name)
    x = first_input(args, kwargs)
    changed = on_batch_rows(layer, lambda x: layer(_as(layer, x)).to(x.dtype), x)
    if args:
        return (changed, *args[1:]), kwargs
    return args, {**kwargs, next(iter(kwargs)): changed}


OUTPUT_HOOKS: dict[str, Callable[..., Any]] = {
    "parallel": add_parallel,
    "sequential": add_sequential,
    "weighted": add_weighted,
}
"""The ways in which a layer may join the forward pass after its module (see `deltaexp.lazy.Layer`)."""


def first_input(args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
    """Return what a module is called with: its first argument, also where the caller names it."""
    return args[0] if args else next(iter(kwargs.values()))


def on_batch_rows(layer: Layer, change: Callable[..., torch.Tensor], h: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
    """Apply ``change(h, *inputs)`` to the rows of the batch that the layer is for, which are all of them as a rule."""
    if layer.batch_rows is None:
        return change(h, *inputs)
    rows = layer.batch_rows.of(h)
    if not len(rows):
        return h
    return h.index_copy(0, rows, change(h[rows], *(x[rows] for x in inputs)))


def _on_first(output: Any, layer: Layer, rows: Rows | None, change: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> Any:
    """Apply ``change`` to the hidden states of an output, which is a tensor or a tuple that starts with them."""

    def changed(h: torch.Tensor) -> torch.Tensor:
        return replaced(h, rows, on_batch_rows(layer, change, taken(h, rows), *inputs))

    if isinstance(output, torch.Tensor):
        return changed(output)
    if isinstance(output, tuple) and output and isinstance(output[0], torch.Tensor):
        rest = (changed(output[0]), *output[1:])
        return type(output)(*rest) if hasattr(output, "_fields") else rest
    if isinstance(output, list) and output and isinstance(output[0], torch.Tensor):
        return [changed(output[0]), *output[1:]]
    if isinstance(output, OrderedDict) and output and isinstance(first := next(iter(output.values())), torch.Tensor):
        output[next(iter(output))] = changed(first)  # transformers' ModelOutput
        return output
    raise DeltaExpError(
        f"A delta hangs on a module that returns {type(output).__name__}, where a tensor or a tuple that starts with "
        "one was expected. Name a module inside it in modified_modules."
    )


def _as(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Return ``x`` in the dtype in which a layer computes: a half-precision backbone may carry float32 deltas."""
    parameter = next(layer.parameters(), x)
    return x.to(parameter.dtype) if x.is_floating_point() else x
