"""Metrics by name, from the libraries that the benchmarks themselves use, on plain answers and references."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from deltaexp.errors import ConfigError, unknown
from deltaexp.lab.tasks.columns import function


@dataclass
class Measured:
    """What a metric is given."""

    answers: Sequence[Any]
    """One for each row: the number of a label, a number, a text, or a list of tags."""
    references: Sequence[Any]
    """What each is compared with; for texts also a list of texts that are all right."""
    groups: Sequence[Any] | None = None
    """By what rows belong together."""
    labels: Sequence[str] = field(default_factory=list)
    """Names of the classes."""


Metric = Callable[[Measured], Mapping[str, float]]
METRICS: dict[str, Metric] = {}
"""The metrics by name; the first number of each bears the metric's own name."""
LOWER_IS_BETTER = {"mse", "perplexity", "loss", "bits_per_byte"}


def metric(function: Metric) -> Metric:
    """Add a function to the table of metrics, under its own name; used as a decorator."""
    METRICS[function.__name__] = function
    return function


def main(names: Sequence[str]) -> str:
    """Return the name of the number that the first of these metrics is known by."""
    if not names:
        return "loss"
    return names[0].rpartition(":")[2]


def greater_is_better(name: str) -> bool:
    """Say whether a higher value is better."""
    return name not in LOWER_IS_BETTER


def compute(
    names: Sequence[str],
    answers: Sequence[Any],
    references: Sequence[Any],
    *,
    groups: Sequence[Any] | None = None,
    labels: Sequence[str] = (),
) -> dict[str, float]:
    """Return the numbers of several metrics by name.

    Args:
        names: Names in the table, or ``package.module:function`` for a function from `Measured` to numbers by name.
        answers: One for each row.
        references: What they are compared with.
        groups: By what rows belong together.
        labels: Names of the classes.

    Raises:
        ConfigError: If there is no such metric.
        TaskError: If a metric cannot make anything of the answers.
    """
    measured = Measured(answers, references, groups, labels)
    found: dict[str, float] = {}
    for name in names:
        chosen = function(name, "task.metrics") if ":" in name else METRICS.get(name)
        if chosen is None:
            raise ConfigError(unknown("metric", name, METRICS))
        values = chosen(measured)
        if not isinstance(values, Mapping):
            values = {main([name]): values}
        for key, value in values.items():
            found[key] = float(value)
    return found


@metric
def accuracy(measured: Measured) -> dict[str, float]:
    """Return the part of the answers that are right."""
    right = [answer == reference for answer, reference in zip(measured.answers, measured.references, strict=True)]
    return {"accuracy": float(np.mean(right))}


@metric
def f1(measured: Measured) -> dict[str, float]:
    """Return F1: of the class with number 1 where there are two, else the mean over the classes."""
    from sklearn.metrics import f1_score

    average = "binary" if len(measured.labels) == 2 else "macro"
    return {"f1": float(f1_score(measured.references, measured.answers, average=average, zero_division=0))}


@metric
def matthews_correlation(measured: Measured) -> dict[str, float]:
    """Return Matthews' correlation."""
    from sklearn.metrics import matthews_corrcoef

    return {"matthews_correlation": float(matthews_corrcoef(measured.references, measured.answers))}


@metric
def pearson(measured: Measured) -> dict[str, float]:
    """Return Pearson's correlation; 0 where the answers are all the same, of which it knows nothing."""
    return {"pearson": _correlation("pearsonr", measured)}


@metric
def spearman(measured: Measured) -> dict[str, float]:
    """Return Spearman's correlation of ranks; 0 where the answers are all the same."""
    return {"spearman": _correlation("spearmanr", measured)}


def _correlation(name: str, measured: Measured) -> float:
    from scipy import stats

    if len(measured.answers) < 2 or np.ptp(measured.answers) == 0 or np.ptp(measured.references) == 0:
        return 0.0
    return float(getattr(stats, name)(measured.answers, measured.references).statistic)


@metric
def mse(measured: Measured) -> dict[str, float]:
    """Return the mean squared error."""
    return {"mse": float(np.mean((np.asarray(measured.answers) - np.asarray(measured.references)) ** 2))}


@metric
def exact_match(measured: Measured) -> dict[str, float]:
    """Return the part of the answers that equal a reference, up to white space at the ends."""
    return {"exact_match": float(np.mean([_among(a, r) for a, r in zip(measured.answers, measured.references, strict=True)]))}


def _among(answer: str, reference: Any) -> bool:
    right = [reference] if isinstance(reference, str) else list(reference)
    return answer.strip() in [text.strip() for text in right]
