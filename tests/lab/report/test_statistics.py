"""The statistics say what scipy and statsmodels say."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from deltaexp.lab.report import statistics

FIRST = [0.912, 0.931, 0.905]
SECOND = [0.873, 0.899, 0.881, 0.868]


def test_the_interval_of_few_seeds_is_students() -> None:
    expected = stats.ttest_1samp(FIRST, 0.0).confidence_interval(0.95)
    assert statistics.t_interval(FIRST) == pytest.approx((expected.low, expected.high), rel=1e-12)
    expected = stats.ttest_1samp(SECOND, 0.0).confidence_interval(0.9)
    assert statistics.t_interval(SECOND, level=0.9) == pytest.approx((expected.low, expected.high), rel=1e-12)
    assert statistics.t_interval([0.9]) is None
    assert statistics.t_interval([]) is None


def test_holms_correction() -> None:
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([0.6, 0.5]) == [1.0, 1.0]
    assert statistics.holm([]) == []


@pytest.mark.slow  # statsmodels takes seconds to import
@given(st.lists(st.floats(0, 1), max_size=12))
@settings(max_examples=40)
def test_holms_correction_is_that_of_statsmodels(p_values: list[float]) -> None:
    multitest = pytest.importorskip("statsmodels.stats.multitest", reason="statsmodels is not installed")
    expected = multitest.multipletests(p_values, method="holm")[1] if p_values else []
    assert statistics.holm(p_values) == pytest.approx(list(expected), abs=1e-12)


def test_without_rows_it_is_welchs_test() -> None:
    found = statistics.compare(FIRST, SECOND)
    expected = stats.ttest_ind(FIRST, SECOND, equal_var=False)
    interval = expected.confidence_interval(0.95)
    assert found is not None
    assert found.p == pytest.approx(expected.pvalue, rel=1e-9)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-9)
    assert found.estimate == pytest.approx(np.mean(FIRST) - np.mean(SECOND))


def test_one_seed_each_and_no_rows_says_nothing() -> None:
    assert statistics.compare([0.9], [0.5]) is None
    assert statistics.compare([0.9, 0.8], [0.5]) is None


def resampled(right: np.ndarray, resamples: int, seed: int = 5) -> np.ndarray:
    """Return the accuracy of runs ``(runs, rows)`` on the same resampled rows."""
    rows = right.shape[1]
    return right @ np.random.default_rng(seed).multinomial(rows, np.full(rows, 1 / rows), size=resamples).T / rows


def test_single_runs_are_compared_as_by_the_paired_bootstrap() -> None:
    right = (np.random.default_rng(1).random((2, 400)) < [[0.9], [0.87]]).astype(float)
    scores = resampled(right, 4000)
    found = statistics.compare([right[0].mean()], [right[1].mean()], (scores[:1], scores[1:]), units=400)
    assert found is not None
    expected = stats.bootstrap(
        (right[0], right[1]), lambda a, b, axis: (a - b).mean(axis=axis), paired=True, n_resamples=4000, method="percentile",
        rng=np.random.default_rng(2),
    )  # fmt: skip
    interval = expected.confidence_interval
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), abs=0.06 * (interval.high - interval.low))
    # For a mean of many rows, that is the paired t-test.
    assert found.p == pytest.approx(stats.ttest_rel(right[0], right[1]).pvalue, rel=0.15)


def test_scipys_resamples_give_scipys_standard_error() -> None:
    rng = np.random.default_rng(3)
    right = (rng.random((2, 300)) < [[0.8], [0.7]]).astype(float)
    expected = stats.bootstrap(
        (right[0] - right[1],), np.mean, n_resamples=3000, vectorized=True, method="percentile", rng=np.random.default_rng(7)
    )
    half = expected.bootstrap_distribution
    first = half + right[1].mean()
    found = statistics.compare(
        [right[0].mean()], [right[1].mean()], (first[None], np.full((1, 3000), right[1].mean())), units=300
    )
    assert found is not None
    t = stats.t.ppf(0.975, 299)
    assert (found.high - found.low) / 2 == pytest.approx(t * expected.standard_error, rel=1e-9)


def parts(right: np.ndarray) -> tuple[float, float, float]:
    """Return by the analysis of variance what seeds, rows, and both of them together, bring to the variance of the mean."""
    seeds, rows = right.shape
    left = right - right.mean(axis=0) - right.mean(axis=1, keepdims=True) + right.mean()
    own = (left**2).sum() / (seeds - 1) / (rows - 1) / seeds / rows
    return right.mean(axis=1).var(ddof=1) / seeds, right.mean(axis=0).var(ddof=1) / rows, own


@pytest.mark.parametrize("skills", [(0.95, 0.80, 0.88, 0.70, 0.72, 0.68), (0.90, 0.90, 0.90, 0.88, 0.88, 0.88)])
def test_the_variance_is_that_of_the_analysis_of_variance(skills: tuple[float, ...]) -> None:
    right = (np.random.default_rng(4).random((6, 500)) < np.array(skills)[:, None]).astype(float)
    scores, resamples = right.mean(axis=1), resampled(right, 8000)
    found = statistics.compare(scores[:3], scores[3:], (resamples[:3], resamples[3:]), units=500)
    assert found is not None
    of_seeds, _, own = np.add(parts(right[:3]), parts(right[3:]))
    of_rows = (right[:3].mean(axis=0) - right[3:].mean(axis=0)).var(ddof=1) / 500  # the same rows for both
    variance = max(of_rows + of_seeds - own, of_rows, of_seeds)
    one, other = (scores[place].var(ddof=1) / 3 for place in (slice(0, 3), slice(3, 6)))
    freedom = variance**2 / (one**2 / 2 + other**2 / 2 + (variance - of_seeds) ** 2 / 499)
    half = stats.t.ppf(0.975, freedom) * np.sqrt(variance)
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.1)


def test_drawing_one_seed_less_keeps_the_variance_of_the_mean() -> None:
    values = np.array([0.9, 0.7, 0.8])
    means = statistics.resampled_means(np.repeat(values[:, None], 200_000, axis=1), np.random.default_rng(0))
    assert means.mean() == pytest.approx(values.mean(), abs=1e-3)
    assert means.var() == pytest.approx(values.var(ddof=1) / 3, rel=0.02)
    alone = np.linspace(0, 1, 7)[None]
    assert statistics.resampled_means(alone, np.random.default_rng(0)).tolist() == alone[0].tolist()


def test_what_never_differs() -> None:
    same = np.full((1, 50), 0.5)
    found = statistics.compare([0.5], [0.5], (same, same), units=20)
    assert found is not None
    assert (found.estimate, found.p) == (0.0, 1.0)
    # All of twenty rows fell to the one side, as heads do twenty times, or tails.
    found = statistics.compare([1.0], [0.0], (same + 0.5, same - 0.5), units=20)
    assert found is not None
    assert found.p == 2.0**-19


@pytest.mark.slow
def test_it_claims_as_seldom_as_it_says() -> None:
    """Of methods that are alike in truth, about five in a hundred are told apart at 95 %, before any correction."""
    rng = np.random.default_rng(11)
    p_values = []
    for trial in range(250):
        ease, skill = rng.beta(4, 1, size=150), rng.normal(0, 0.04, size=6)
        right = (rng.random((6, 150)) < np.clip(ease + skill[:, None], 0, 1)).astype(float)
        scores, means = resampled(right, 300, seed=trial), right.mean(axis=1)
        found = statistics.compare(means[:3], means[3:], (scores[:3], scores[3:]), units=150, rng=rng)
        assert found is not None
        p_values.append(found.p)
    assert np.mean(np.array(p_values) < 0.05) < 0.08
