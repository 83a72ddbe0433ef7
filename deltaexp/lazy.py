"""PyTorch on demand, so that one file can hold a delta's config and its torch module.

The command line reads every delta's config dataclass to check what the user typed, and must do that without the
second and more that ``import torch`` takes. A file of `deltaexp.deltas` therefore writes

    from deltaexp.lazy import Layer, nn, torch

and is then ordinary PyTorch code: `torch` and `nn` are imported at their first use, and `Layer` becomes a subclass
of `torch.nn.Module` when the first layer is built. A delta type in a package of its own may subclass `Layer` after
a plain ``import torch`` just as well.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any

__all__ = ["Layer", "imports", "nn", "torch"]

if TYPE_CHECKING:
    import torch
    from torch import nn

    class _Pending(nn.Module):
        """What a type checker sees: a layer is a module."""

else:

    class _OnDemand(ModuleType):
        """A module that is imported when one of its attributes is read for the first time."""

        def __getattr__(self, name: str) -> Any:
            value = getattr(importlib.import_module(self.__name__), name)
            setattr(self, name, value)  # the next access does not come here
            return value

    class _Pending:
        """The base of `Layer` until PyTorch is imported."""

    torch = _OnDemand("torch")
    nn = _OnDemand("torch.nn")


@contextlib.contextmanager
def imports() -> Iterator[None]:
    """Within this context torch and its like are imported, which Python's garbage collector leaves alone from then on.

    They bring along half a million objects that stay to the end. To look through them for garbage, again and again, took a
    sixth of the time of importing them, and a fifth of a second whenever a run had garbage collected. Where torch has been
    imported before, the collector is left as it is: what others have made may become garbage.
    """
    if "torch" in sys.modules:
        yield
        return
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()


class Layer(_Pending):
    """Base of every torch module that a delta puts into a backbone; whatever lies below a `Layer` is delta.

    `insertion` says how it joins the forward pass of the module that it hangs on, and with that what its ``forward`` is given
    and returns. ``x`` is the first input of the module, shape ``(..., in_dim)``, and ``h`` its output (the first part of it,
    where that is a tuple), shape ``(..., out_dim)``:

    - ``"parallel"``: ``forward(x)``, which is added to ``h``;
    - ``"sequential"``: ``forward(h)``, which takes the place of ``h``;
    - ``"input"``: ``forward(x)``, which takes the place of ``x``;
    - ``"weighted"``: ``forward(x, h, weight, bias)``, which takes the place of ``h``; ``weight`` has shape
      ``(out_dim, in_dim)`` whatever the module's own layout is.

    Where a delta goes on some rows of a fused projection only, ``h``, ``weight`` and ``bias`` are those rows. A layer that
    joins in a way of its own defines ``connect(module, name)``, which returns objects with a method ``remove()``.

    Its parameters are trained; its buffers are fixed. Both are saved. A layer that can be folded into a linear map defines
    ``merged(weight, bias)``, which returns the two as they are with the delta.
    """

    insertion = "parallel"
    order = 0
    """Of two layers on one module the one with the lower number computes first; `deltaexp.surgery` counts."""
    batch_rows: Any = None
    """The rows of the batch that the layer is for, where rows use different deltas; None means all."""
    tokenwise = False
    """Whether what it makes of a token depends on this token alone, so that it may be given only some of them."""
    connect: Any = None
    keeps_rows: Any = False
    """Whether a layer with a ``connect`` of its own keeps to `batch_rows`, as all others do."""
    merged: Any = None

    def __new__(cls, *args: object, **kwargs: object) -> Layer:
        """Make `Layer` a `torch.nn.Module` before the first instance exists, unpickled ones included."""
        if Layer.__bases__ == (_Pending,):
            # Assigning the base keeps the identity of every subclass, which isinstance, pickle and deepcopy rely on.
            Layer.__bases__ = (importlib.import_module("torch.nn").Module,)
        return super().__new__(cls)
