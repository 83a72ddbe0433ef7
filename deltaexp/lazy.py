"""PyTorch on demand, so that one file can hold a delta's config and its torch module.

The command line reads every delta's config dataclass to check what the user typed, and must do that without the
second and more that ``import torch`` takes. A file of `deltaexp.deltas` therefore writes

    from deltaexp.lazy import Layer, nn, torch

and is then ordinary PyTorch code: `torch` and `nn` are imported at their first use, and `Layer` becomes a subclass
of `torch.nn.Module` when the first layer is built. A delta type in a package of its own may subclass `Layer` after
a plain ``import torch`` just as well.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

__all__ = ["Layer", "nn", "torch"]

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


class Layer(_Pending):
    """Base of every torch module that a delta puts into a backbone; whatever lies below a `Layer` is delta.

    A subclass maps the input ``x`` of the module it hangs on, shape ``(..., in_dim)``, or that module's output,
    shape ``(..., out_dim)``, to a tensor of shape ``(..., out_dim)``; its config's `insertion` says which.
    """

    def __new__(cls, *args: object, **kwargs: object) -> Layer:
        """Make `Layer` a `torch.nn.Module` before the first instance exists, unpickled ones included."""
        if Layer.__bases__ == (_Pending,):
            # Assigning the base keeps the identity of every subclass, which isinstance, pickle and deepcopy rely on.
            Layer.__bases__ = (importlib.import_module("torch.nn").Module,)
        return super().__new__(cls)
