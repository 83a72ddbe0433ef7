"""What an optimizer is given: which parameters, with which learning rate, and on which of them weight decay acts."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from deltaexp import addressing
from deltaexp.errors import ConfigError, listing, nearest
from deltaexp.model import DeltaModel

DELTAS = "deltas"


def groups(
    delta_model: DeltaModel, rate: float, rates: Mapping[str, float], weight_decay: float, matrices: Collection[str]
) -> list[dict[str, Any]]:
    """Return the parameter groups of an optimizer, in an order that depends on the parameters' names only.

    Args:
        delta_model: What is trained, frozen as it should be.
        rate: The learning rate of what no pattern means.
        rates: Learning rates by pattern (``trainer.learning_rates``).
        weight_decay: The weight decay of matrices.
        matrices: Names of the parameters of the backbone on which weight decay acts, as transformers sees it.

    Raises:
        ConfigError: If a pattern means no trained parameter, or two mean the same one.
    """
    trained = delta_model.trainable_parameters()
    chosen = named_rates(delta_model, rates)
    factors = delta_model.learning_rate_factors()
    decaying = decays(delta_model, matrices)
    found: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in trained.items():
        own = chosen.get(name, rate) * factors.get(parameter, 1.0)
        found.setdefault((own, name in decaying), []).append(parameter)
    return [
        {"params": parameters, "lr": own, "weight_decay": weight_decay if decay else 0.0}
        for (own, decay), parameters in found.items()
    ]


def decays(delta_model: DeltaModel, matrices: Collection[str]) -> set[str]:
    """Return the names of the trained parameters on which weight decay acts.

    Of the backbone these are matrices that belong to no normalisation, whose vectors and biases have a scale and an origin of
    their own. Of a delta's layers, wherever they hang, they are those that the delta's type names: a vector that multiplies,
    which leaves things as they are where it is one, is not to be drawn to zero.
    """
    layers = {id(p) for attachment in delta_model.attachments for p in attachment.layer.parameters()}
    saved = {id(tensor): name for name, tensor in delta_model.delta_tensors().items()}
    result = set()
    for name, parameter in delta_model.trainable_parameters().items():
        if id(parameter) in layers:
            decay = delta_model.config.decays(saved.get(id(parameter), name), parameter.dim())
        else:
            decay = parameter.dim() > 1 and name in matrices
        if decay:
            result.add(name)
    return result


def named_rates(delta_model: DeltaModel, rates: Mapping[str, float]) -> dict[str, float]:
    """Return the learning rates that patterns give to trained parameters, by the parameters' names.

    Raises:
        ConfigError: If a pattern means no trained parameter, or two mean the same one.
    """
    if not rates:
        return {}
    trained = delta_model.trainable_parameters()
    layers = {id(p) for attachment in delta_model.attachments for p in attachment.layer.parameters()}
    result: dict[str, tuple[str, float]] = {}
    for pattern, rate in rates.items():
        if pattern == DELTAS:
            names = [name for name, parameter in trained.items() if id(parameter) in layers]
        else:
            names = [name for name in trained if addressing.covers(pattern, name)]
        if not names:
            raise ConfigError(
                f"The pattern {pattern!r} in trainer.learning_rates means no trained parameter.{_hint(pattern, trained)}"
            )
        for name in names:
            if name in result:
                raise ConfigError(
                    f"The patterns {result[name][0]!r} and {pattern!r} in trainer.learning_rates both mean {name!r}. Give each "
                    "parameter one learning rate."
                )
            result[name] = pattern, rate
    return {name: rate for name, (_, rate) in result.items()}


def _hint(pattern: str, names: Collection[str]) -> str:
    """Name the nearest modules and parameters to a pattern that means none."""
    length = pattern.count(".") + 1
    parts = (name.split(".") for name in names)
    inside = {".".join(p[start : start + length]) for p in parts for start in range(len(p) - length + 1)}
    close = nearest(pattern, sorted(inside))
    if close:
        return f" The nearest names are {listing(map(repr, close))}."
    return f" Trained are: {listing(names, 5)}."
