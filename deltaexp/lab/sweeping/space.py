"""What a search may try: Hydra's ``choice``, ``range`` and ``interval`` as distributions of Optuna."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep

from deltaexp.errors import ConfigError, unknown

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

TAGS = ("log", "relative")


def distribution(override: Override, value: Any) -> BaseDistribution:
    """Return the distribution that a sweep of one key's values stands for.

    ``interval(a, b)`` is continuous, or whole numbers for a key that has one; ``range(start, stop, step)`` has steps and ends
    before ``stop``; the choices of ``choice(...)`` and ``a,b`` are kept as they are written. ``tag(log, ...)`` samples the
    logarithm evenly. ``tag(relative, interval(0.1, 10))`` means times what the config says otherwise.

    Args:
        override: The sweep.
        value: What the config says of the key without it.

    Raises:
        ConfigError: If it cannot be searched.
    """
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    key, sweep, text = override.key_or_group, override.value(), override.input_line
    if not isinstance(sweep, (IntervalSweep, RangeSweep)):
        return CategoricalDistribution(list(dict.fromkeys(map(str, override.sweep_string_iterator()))))
    for tag in sorted(sweep.tags):
        if tag not in TAGS:
            raise ConfigError(unknown(f"tag of {key}", tag, TAGS))
    log, factor = "log" in sweep.tags, 1.0
    if "relative" in sweep.tags:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
            raise ConfigError(f"{text!r} is relative to what the config says, and it says {key}={value}, which is no size.")
        factor = float(value)
    try:
        if isinstance(sweep, RangeSweep):
            steps = [float(step) for step in (sweep.start, sweep.stop, sweep.step)]  # type: ignore[arg-type]
            values = [number * factor for number in sweep.range()]
            if not values or log:
                raise ValueError("there is nothing in it" if not values else "a range has steps, which are not logarithmic")
            low, high, step = min(values), max(values), abs(steps[2]) * factor
            if all(float(one).is_integer() for one in (*values, step)):
                return IntDistribution(int(low), int(high), step=int(step))
            return FloatDistribution(float(low), float(high), step=float(step))
        low, high = sweep.start * factor, sweep.end * factor  # type: ignore[operator]
        if not low < high or not math.isfinite(low + high):
            raise ValueError("the first end has to be below the second")
        whole = isinstance(sweep.start, int) or (isinstance(value, int) and not isinstance(value, bool))
        if whole and float(low).is_integer() and float(high).is_integer():
            return IntDistribution(int(low), int(high), log=log)
        return FloatDistribution(float(low), float(high), log=log)
    except ValueError as error:
        raise ConfigError(f"{text!r} cannot be searched: {error}.") from error


def words(params: Mapping[str, Any]) -> list[str]:
    """Return the overrides that some values stand for."""
    return [f"{key}={value!r}" if isinstance(value, float) else f"{key}={value}" for key, value in params.items()]


def default(space: Mapping[str, BaseDistribution], values: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what the config says of the searched keys, None where that is not all within what is searched.

    Args:
        space: What is searched, by key.
        values: What the config says of each key without a search.
    """
    from optuna.distributions import CategoricalDistribution

    found: dict[str, Any] = {}
    for key, one in space.items():
        value = values.get(key)
        if isinstance(one, CategoricalDistribution):
            same = [choice for choice in one.choices if _spelled(choice) == _spelled(value)]
            if not same:
                return None
            found[key] = same[0]
        elif isinstance(value, bool) or not isinstance(value, (int, float)) or not one._contains(value):
            return None
        else:
            found[key] = value
    return found


def _spelled(value: Any) -> str:
    """Return a value as it would be written without spaces and quotes, to compare what is typed with what the config holds."""
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(_spelled, value))}]"
    if isinstance(value, str):
        try:
            return repr(float(value))
        except ValueError:
            text = value.replace(" ", "").replace("'", "").replace('"', "")
            return {"true": "true", "false": "false", "none": "null"}.get(text.lower(), text)
    if isinstance(value, bool) or value is None:
        return str(value).lower() if value is not None else "null"
    return repr(float(value)) if isinstance(value, (int, float)) else str(value)
