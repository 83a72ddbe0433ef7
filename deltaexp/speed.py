"""Switches of how deltas are computed: what is faster on some machines, at some cost in memory or exactness.

What is set here is set for the whole process. By default everything is computed in the dtypes of backbone and delta, exact to
rounding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

from deltaexp.errors import ConfigError, unknown


@dataclass
class Speed:
    """The switches."""

    fused: bool = True
    """Compute a linear map and the low-rank updates on it in one (see `deltaexp.fused`); False leaves it to the hooks."""
    delta_in_backbone_dtype: bool = False
    """Cast a delta's low-rank factors to the dtype of a backbone in half precision, in place of casting its activations to
    float32. The parameters that are trained stay float32. Without it, half of the time of a step may go into casts."""
    recorded: bool = False
    """Operations are recorded, to be replayed: what counts is how long they take, however long it takes to call them."""


settings = Speed()
"""What holds at present."""


def configure(**switches: Any) -> Speed:
    """Set switches for the whole process, and return what held before.

    Raises:
        ConfigError: If there is no such switch, or one is given something else than True or False; then none is set.
    """
    before = replace(settings)
    names = [field.name for field in fields(Speed)]
    for name, value in switches.items():
        if name not in names:
            raise ConfigError(unknown("switch of deltaexp.speed", name, names))
        if not isinstance(value, bool):
            raise ConfigError(f"The switch {name} of deltaexp.speed is set to {value!r}; it is True or False.")
    for name, value in switches.items():
        setattr(settings, name, value)
    return before


@contextlib.contextmanager
def configured(**switches: Any) -> Iterator[None]:
    """Within this context the switches are set."""
    before = configure(**switches)
    try:
        yield
    finally:
        for field in fields(Speed):
            setattr(settings, field.name, getattr(before, field.name))
