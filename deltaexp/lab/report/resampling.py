"""A run's metric on resampled rows, from the answers that it stored.

Most metrics are functions of sums over rows: accuracy of the right answers, F1 and Matthews' correlation of how often each
class was right, answered and true, Pearson's correlation of five moments, BLEU of counts of n-grams. With what every row brings
to the sums, a resample is a vector of how often each row was drawn, and thousands of them are one product of matrices. What is
no such function is computed anew, by the task's own metric, on fewer resamples.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from deltaexp.errors import TaskError
from deltaexp.lab.tasks import metrics

RESAMPLES, ANEW = 2000, 200
"""How often rows are resampled; and where a metric is computed anew each time."""
CELLS = 2**23
"""How many counts of rows are held at once."""
MEANS = ("accuracy", "exact_match", "mse", "squad", "record", "gsm8k")
"""Metrics that are the mean of their values for single rows."""


@dataclass
class Answers:
    """What a run answered, row by row."""

    answers: list[Any]
    references: list[Any]
    groups: list[Any] | None = None
    labels: list[str] = field(default_factory=list)

    def taken(self, rows: Sequence[int], groups: list[Any] | None) -> metrics.Measured:
        """Return some of the rows, with other names of their groups."""
        return metrics.Measured([self.answers[n] for n in rows], [self.references[n] for n in rows], groups, self.labels)

    def units(self) -> list[list[int]]:
        """Return the rows that belong together: what is resampled as one."""
        if self.groups is None:
            return [[row] for row in range(len(self.answers))]
        found: dict[str, list[int]] = {}
        for row, group in enumerate(self.groups):
            found.setdefault(str(group), []).append(row)
        return list(found.values())


@dataclass
class Summed:
    """A metric as a function of sums over units, which are rows or groups of them."""

    parts: np.ndarray
    """``(units, features)``: what each brings to the sums."""
    score: Callable[[np.ndarray], np.ndarray]
    """From sums ``(resamples, features)`` to scores ``(resamples,)``."""


def read(path: Path, labels: Sequence[str] = ()) -> Answers:
    """Read the answers that a run stored.

    Raises:
        TaskError: If a line is none of an answer and what it is compared with.
    """
    answers, references, groups = [], [], []
    try:
        with path.open(encoding="utf-8") as file:
            for text in file:
                line = json.loads(text)
                answers.append(line.get("prediction_number", line["prediction"]))
                references.append(line.get("reference_number", line.get("reference")))
                groups.append(line.get("group"))
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise TaskError(f"{path.parent.name}/{path.name} cannot be read ({type(error).__name__}: {error})") from error
    if answers and isinstance(answers[0], dict):  # a text that was measured in windows
        answers = [(answer["negative_log_likelihood"], answer["tokens"]) for answer in answers]
    elif None in references:
        raise TaskError(f"{path.parent.name}/{path.name} holds answers without what they are compared with")
    return Answers(answers, references, groups if any(group is not None for group in groups) else None, list(labels))


def draws(units: int, resamples: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Yield, in parts, how often each of the units is drawn in each resample: ``(some resamples, units)``."""
    left = resamples
    while left:
        some = min(left, max(1, CELLS // units))
        drawn = rng.integers(0, units, size=(some, units))
        drawn += np.arange(some)[:, None] * units
        yield np.bincount(drawn.ravel(), minlength=some * units).reshape(some, units)
        left -= some


def scores(runs: Sequence[Answers], metric: str, entry: str, rng: np.random.Generator) -> np.ndarray:
    """Return the metric of several runs on the same resamples.

    Args:
        runs: Answers to the same rows.
        metric: The name of the number.
        entry: The metric that it comes from, as ``task.metrics`` has it.
        rng: Draws the rows.

    Returns:
        ``(runs, resamples)``
    """
    units = runs[0].units()
    summed = [decomposed(run, metric, units) for run in runs]
    sums = [one for one in summed if one is not None]
    if len(sums) < len(runs):
        return _anew(runs, metric, entry, units, rng)
    found = []
    for counts in draws(len(units), RESAMPLES, rng):
        weights = counts.astype(np.float64)
        found.append(np.stack([one.score(weights @ one.parts) for one in sums]))
    return np.concatenate(found, axis=1)


def score(run: Answers, metric: str, entry: str) -> float:
    """Return the metric of a run on its rows as they are, in the way in which `scores` computes it."""
    summed = decomposed(run, metric, run.units())
    if summed is not None:
        return float(summed.score(summed.parts.sum(axis=0, keepdims=True))[0])
    return _computed(entry, metric, run.taken(range(len(run.answers)), run.groups))


def _anew(runs: Sequence[Answers], metric: str, entry: str, units: list[list[int]], rng: np.random.Generator) -> np.ndarray:
    """Return what `scores` does, by computing the metric on every resample."""
    found = np.empty((len(runs), ANEW))
    for number in range(ANEW):
        drawn = [units[unit] for unit in rng.integers(0, len(units), size=len(units))]
        rows = [row for unit in drawn for row in unit]
        groups = [copy for copy, unit in enumerate(drawn) for _ in unit] if runs[0].groups is not None else None
        for place, run in enumerate(runs):
            found[place, number] = _computed(entry, metric, run.taken(rows, groups))
    return found


def _computed(entry: str, metric: str, taken: metrics.Measured) -> float:
    found = metrics.compute([entry], taken.answers, taken.references, groups=taken.groups, labels=taken.labels)
    return found[metric]


def decomposed(run: Answers, metric: str, units: list[list[int]]) -> Summed | None:
    """Return a metric of a run as a function of sums; None where it is not known to be one."""
    if metric in MEANS or metric == "rouge":
        values = [_computed(metric, metric, run.taken(unit, [0] * len(unit) if run.groups else None)) for unit in units]
        # Rows of a group count one by one, but for ROUGE, which knows of sources with several references.
        weights = [1 if metric == "rouge" else len(unit) for unit in units]
        return Summed(np.array([[value * weight, weight] for value, weight in zip(values, weights, strict=True)]), _ratio)
    form = FORMS.get(metric)
    return None if form is None else form(run, units)


def _ratio(sums: np.ndarray) -> np.ndarray:
    """Return the first sum divided by the second, 0 where there is none."""
    return np.divide(sums[:, 0], sums[:, 1], out=np.zeros(len(sums)), where=sums[:, 1] != 0)


def _by_unit(rows: np.ndarray, units: list[list[int]]) -> np.ndarray:
    """Return sums over the rows of each unit."""
    if len(units) == len(rows):
        return rows
    return np.stack([rows[unit].sum(axis=0) for unit in units])


def _classes(run: Answers, units: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Return for each class of each row whether it was right, answered and true, ``(units, 3 classes)``, and the classes."""
    known, numbers = np.unique(np.array([*run.answers, *run.references]), return_inverse=True)
    answers, references = numbers[: len(run.answers)], numbers[len(run.answers) :]
    table = np.zeros((len(answers), 3, len(known)))
    rows = np.arange(len(answers))
    table[rows, 1, answers] = table[rows, 2, references] = 1
    table[rows, 0, answers] = answers == references
    return _by_unit(table.reshape(len(rows), -1), units), known


def _f1(run: Answers, units: list[list[int]]) -> Summed:
    """F1 = 2 right / (answered + true): of the class with number 1 where the task has two, else the mean over the classes."""
    parts, known = _classes(run, units)
    binary = len(run.labels) == 2

    def score(sums: np.ndarray) -> np.ndarray:
        right, answered, true = sums.reshape(len(sums), 3, -1).transpose(1, 0, 2)
        whole = answered + true
        values = np.divide(2 * right, whole, out=np.zeros_like(right), where=whole > 0)
        if binary:
            return values[:, known == 1].sum(axis=1)
        return values.sum(axis=1) / np.maximum(1, (whole > 0).sum(axis=1))

    return Summed(parts, score)


def _matthews(run: Answers, units: list[list[int]]) -> Summed:
    """Matthews' correlation for several classes (Gorodkin, 2004): (c s - t p) / sqrt((s^2 - p p) (s^2 - t t))."""
    parts, _ = _classes(run, units)

    def score(sums: np.ndarray) -> np.ndarray:
        right, answered, true = sums.reshape(len(sums), 3, -1).transpose(1, 0, 2)
        rows = true.sum(axis=1)
        above = right.sum(axis=1) * rows - (true * answered).sum(axis=1)
        below = np.sqrt((rows**2 - (answered**2).sum(axis=1)) * (rows**2 - (true**2).sum(axis=1)))
        return np.divide(above, below, out=np.zeros(len(sums)), where=below > 0)

    return Summed(parts, score)


def _pearson(run: Answers, units: list[list[int]]) -> Summed:
    """Pearson's correlation, of the moments of centred values."""
    x, y = (np.asarray(values, dtype=np.float64) for values in (run.answers, run.references))
    x, y = x - x.mean(), y - y.mean()
    parts = _by_unit(np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], axis=1), units)

    def score(sums: np.ndarray) -> np.ndarray:
        n, sx, sy, sxx, syy, sxy = sums.T
        vx, vy = n * sxx - sx**2, n * syy - sy**2
        spread = (vx > 1e-12 * n * sxx) & (vy > 1e-12 * n * syy)
        return np.divide(n * sxy - sx * sy, np.sqrt(np.abs(vx * vy)), out=np.zeros(len(sums)), where=spread)

    return Summed(parts, score)


def _corpus(name: str) -> Callable[[Answers, list[list[int]]], Summed]:
    """Return the form of a metric of sacrebleu, of its own counts for every source, as its own bootstrap takes them."""

    def form(run: Answers, units: list[list[int]]) -> Summed:
        from sacrebleu import metrics as corpus

        measure = getattr(corpus, name)()
        answers = [run.answers[unit[0]] for unit in units]
        texts = [[text for row in unit for text in metrics.alternatives(run.references[row])] for unit in units]
        parts = np.array(measure._extract_corpus_statistics(answers, metrics.streams(texts)), dtype=np.float64)

        def score(sums: np.ndarray) -> np.ndarray:
            return np.array([measure._compute_score_from_stats([int(value) for value in row]).score for row in np.rint(sums)])

        return Summed(parts, score)

    return form


def _seqeval(run: Answers, units: list[list[int]]) -> Summed:
    """F1 of whole entities (micro average): 2 right / (answered + true)."""
    from seqeval.metrics.sequence_labeling import get_entities

    table = []
    for answer, reference in zip(run.answers, run.references, strict=True):
        found, true = set(get_entities(list(answer))), set(get_entities(list(reference)))
        table.append([2 * len(found & true), len(found) + len(true)])
    return Summed(_by_unit(np.array(table, dtype=np.float64), units), _ratio)


def _token_accuracy(run: Answers, units: list[list[int]]) -> Summed:
    pairs = zip(run.answers, run.references, strict=True)
    table = [[sum(a == r for a, r in zip(answer, true, strict=True)), len(true)] for answer, true in pairs]
    return Summed(_by_unit(np.array(table, dtype=np.float64), units), _ratio)


def _multirc(run: Answers, units: list[list[int]]) -> Summed:
    """The mean of F1 over answers, of which 1 says that they are right, and of exact match over questions."""
    table = []
    for unit in units:
        counts = Counter((run.answers[row], run.references[row]) for row in unit)
        right = sum(count for (answer, reference), count in counts.items() if answer == reference)
        answered = sum(count for (answer, _), count in counts.items() if answer == 1)
        true = sum(count for (_, reference), count in counts.items() if reference == 1)
        table.append([2 * counts[1, 1], answered + true, right == len(unit), 1])

    def score(sums: np.ndarray) -> np.ndarray:
        return (_ratio(sums[:, :2]) + _ratio(sums[:, 2:])) / 2

    return Summed(np.array(table, dtype=np.float64), score)


def _mean_loss(run: Answers, units: list[list[int]]) -> Summed:
    """The mean negative log-likelihood of tokens, of windows.

    Raises:
        TaskError: If the answers are none of windows.
    """
    if not all(isinstance(answer, tuple) for answer in run.answers):
        raise TaskError("the loss is not to be had from answers")
    return Summed(np.array(run.answers, dtype=np.float64), _ratio)


def _perplexity(run: Answers, units: list[list[int]]) -> Summed:
    def score(sums: np.ndarray) -> np.ndarray:
        means = _ratio(sums)
        return np.where(means < 700, np.exp(np.minimum(means, 700)), math.inf)

    return Summed(_mean_loss(run, units).parts, score)


FORMS: dict[str, Callable[[Answers, list[list[int]]], Summed]] = {
    "f1": _f1,
    "matthews_correlation": _matthews,
    "pearson": _pearson,
    "bleu": _corpus("BLEU"),
    "chrf": _corpus("CHRF"),
    "seqeval": _seqeval,
    "token_accuracy": _token_accuracy,
    "multirc": _multirc,
    "perplexity": _perplexity,
    "loss": _mean_loss,
}
"""Metrics of sums that are no mean of the values for single rows."""
