"""What can be said of a difference between two methods, from scores by seed and from answers by row.

A method is trained with several seeds, and each of its runs answers the same rows. Both are samples: of the seeds that might
have been drawn, and of the rows that might have been asked. A difference counts as one only if it is larger than what either
would bring about by chance.

Sources: Student (1908) and Welch (1947) for few seeds; Efron and Tibshirani (1993), An Introduction to the Bootstrap, for the
paired bootstrap; Koehn (2004), Statistical Significance Tests for Machine Translation Evaluation, for its use on metrics of a
whole corpus; Rao and Wu (1988), Resampling Inference with Complex Survey Data, for drawing n - 1 of n; Owen (2007), The
Pigeonhole Bootstrap, for resampling both; Holm (1979), A Simple Sequentially Rejective Multiple Test Procedure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special  # scipy.stats takes ten times as long to import

LEVEL = 0.95
"""Of confidence intervals; what is left to 1 is the level at which methods are told apart."""


@dataclass(frozen=True)
class Difference:
    """The difference of two methods' mean scores, the first less the second."""

    estimate: float
    low: float
    high: float
    """Ends of the confidence interval, for this pair alone."""
    p: float
    """Of a difference as large or larger where there is none, in either direction; for this pair alone."""


def t_interval(values: Sequence[float], level: float = LEVEL) -> tuple[float, float] | None:
    """Return the confidence interval of the mean of a few values by Student's t: mean +- t(n - 1) s / sqrt(n).

    Args:
        values: One for each seed.
        level: How often such an interval holds the true mean.

    Returns:
        Its ends; None for fewer than two values, which tell nothing of how much they spread.
    """
    count = len(values)
    if count < 2:
        return None
    mean, error = float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(count)
    half = float(special.stdtrit(count - 1, (1 + level) / 2)) * error
    return mean - half, mean + half


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values for many comparisons at once, by Holm: each times the number of those that are not smaller.

    The chance that any difference is claimed where there is none stays below the level, however the comparisons depend on
    each other.
    """
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    adjusted = np.minimum(1.0, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    found = np.empty_like(adjusted)
    found[order] = adjusted
    return found.tolist()


def resampled_means(scores: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return a method's mean score in every resample, its seeds being drawn anew too.

    Of n seeds n - 1 are drawn with replacement: the mean of these has the variance s^2 / n of the mean of n seeds, without
    bias, while drawing n would make it (n - 1) / n of that, too little by far for two or three (Rao and Wu, 1988). One stays.

    Args:
        scores: ``(n seeds, resamples)``: of each run on the rows of each resample.
        rng: Draws the seeds.

    Returns:
        ``(resamples,)``
    """
    count, resamples = scores.shape
    if count == 1:
        return scores[0]
    drawn = rng.integers(0, count, size=(count - 1, resamples))
    return np.take_along_axis(scores, drawn, axis=0).mean(axis=0)


def compare(
    first: Sequence[float],
    second: Sequence[float],
    resampled: tuple[np.ndarray, np.ndarray] | None = None,
    units: int = 0,
    level: float = LEVEL,
    rng: np.random.Generator | None = None,
) -> Difference | None:
    """Compare two methods by their scores, and where there are some by those on resampled rows.

    With resamples the variance of the difference is v_rows + v_seeds - v_own: of resampling rows alone; s^2 / n of either
    method's seeds; and of what a seed does on one row and on no other, which both of these hold. Resampling rows and seeds
    together gives v_rows + v_seeds + v_own (Owen, 2007), from which v_own is found. Without resamples it is Welch's, v_seeds.

    Few seeds know little of their own spread, so the interval takes Student's t with the degrees of freedom of Welch and
    Satterthwaite, V^2 / sum(v_i^2 / d_i), over the parts v_i of the variance V with d_i degrees of freedom: either method's
    s^2 / n with n - 1, and the rest, which the rows bring, with one less than there are rows.

    Args:
        first: Scores of the one method, one for each seed.
        second: Scores of the other.
        resampled: For each method the scores on resampled rows, ``(n seeds, resamples)``, paired by resample.
        units: How many rows, or groups of rows, were resampled.
        level: Of the interval.
        rng: Draws the seeds; a fixed one where none is given.

    Returns:
        The difference; None where nothing is known of chance: one seed each, and no rows.
    """
    rng = rng or np.random.default_rng(0)
    estimate = float(np.mean(first) - np.mean(second))
    parts = [(_variance(scores) / len(scores), len(scores) - 1) for scores in (first, second) if len(scores) > 1]
    of_seeds = sum(variance for variance, _ in parts)
    if resampled is None:
        if len(parts) < 2:
            return None
        variance = of_seeds
    else:
        of_rows = _variance(resampled[0].mean(axis=0) - resampled[1].mean(axis=0))
        of_both = _variance(resampled_means(resampled[0], rng) - resampled_means(resampled[1], rng))
        variance = max(2 * (of_rows + of_seeds) - of_both, of_rows, of_seeds)
        parts.append((variance - of_seeds, max(1, units - 1)))
    if variance <= 1e-24 * max(1.0, estimate**2):
        # Every row and every seed says the same. If that is chance, each row fell to the same side: 2^(1 - rows).
        p = 1.0 if estimate == 0 else 2.0 ** (1 - max(1, units if resampled is not None else len(first)))
        return Difference(estimate, estimate, estimate, p)
    freedom = variance**2 / sum(part**2 / degrees for part, degrees in parts if part > 0)
    error = math.sqrt(variance)
    half = float(special.stdtrit(freedom, (1 + level) / 2)) * error
    p = float(2 * special.stdtr(freedom, -abs(estimate) / error))
    return Difference(estimate, estimate - half, estimate + half, p)


def _variance(values: Sequence[float] | np.ndarray) -> float:
    return float(np.var(values, ddof=1))
