"""One gradient for an input that several linear maps take, such as that of queries, keys and values, or of gate and up.

Each map makes a gradient of its own of ``x``, and autograd adds them up, in a pass over memory each. Here the maps take ``x``
through one function, and add their gradients up themselves, by the very products that make them: ``grad += g W`` costs hardly
more than ``g W``. They hand autograd nothing, and the function, which comes after them in the backward pass, hands it the sum.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

_entered = WeakTensorKeyDictionary()
"""For an input that is alive: what it was when maps took it first, how they take it, and the sum of its gradients."""


class InputGradient:
    """The sum of the gradients of one input, during a backward pass."""

    def __init__(self) -> None:
        self._pass = -1
        self._sum: torch.Tensor | None = None
        self._later: list[tuple[torch.Tensor, torch.Tensor]] = []

    def add(self, g: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Add ``g W`` to the sum, and return it, shape ``(rows, in_dim)``; what is added to that in place counts as well."""
        self._begin()
        self._sum = g @ weight if self._sum is None else self._sum.addmm_(g, weight)
        return self._sum

    def add_later(self, u: torch.Tensor, down: torch.Tensor) -> None:
        """Add ``u A`` to the sum, ``u`` of shape ``(rows, r)``, in one product with those of the other maps."""
        self._later.append((u, down))

    def take(self) -> torch.Tensor | None:
        """Return the sum, of which nothing is left."""
        self._begin()
        found, later = self._sum, self._later
        self._sum, self._later = None, []
        if found is not None and later:
            found.addmm_(torch.cat([u for u, _ in later], dim=1), torch.cat([down for _, down in later]))
        return found

    def _begin(self) -> None:
        """Forget what another backward pass has left, which did not need the sum."""
        current = torch._C._current_graph_task_id()
        if self._pass != current:
            self._pass, self._sum, self._later = current, None, []


class _Entry(torch.autograd.Function):
    """The input as its maps take it."""

    @staticmethod
    def forward(ctx: Any, x: Any, gradient: InputGradient) -> Any:
        ctx.gradient, ctx.shape = gradient, x.shape
        ctx.set_materialize_grads(False)
        return x.detach()

    @staticmethod
    def backward(ctx: Any, g: Any) -> Any:
        found = ctx.gradient.take()
        if found is None:
            return g, None
        found = found.view(ctx.shape)
        return found if g is None else found.add_(g), None


def shared(x: torch.Tensor) -> tuple[torch.Tensor, InputGradient | None]:
    """Return an input as maps take it that share its gradient, and that; the input itself and None where they do not.

    They do not where there is no gradient, and where ``x`` is a leaf: what is kept for it would lead back to it.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or type(x) is not torch.Tensor or x.grad_fn is None:
        return x, None
    state = x._version, torch.cuda.current_stream(x.device) if x.is_cuda else None
    found = _entered.get(x)
    if found is None or found[0] != state:
        gradient = InputGradient()
        found = _entered[x] = state, _Entry.apply(x, gradient), gradient
    return found[1:]
