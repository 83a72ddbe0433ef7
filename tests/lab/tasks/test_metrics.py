"""Metrics equal their definitions."""

import numpy as np
import pytest

from deltaexp.errors import ConfigError
from deltaexp.lab.tasks import metrics


def test_classification_metrics_equal_their_definitions() -> None:
    found = metrics.compute(["accuracy", "f1", "matthews_correlation"], [0, 1, 1, 1], [0, 1, 1, 0], labels=["a", "b"])
    # True positives 2, false positives 1, false negatives 0, true negatives 1.
    assert found["accuracy"] == 0.75
    assert found["f1"] == pytest.approx(2 * 2 / (2 * 2 + 1))
    assert found["matthews_correlation"] == pytest.approx((2 * 1 - 0) / np.sqrt(3 * 2 * 2 * 1))


def test_f1_of_three_classes_is_their_mean() -> None:
    found = metrics.compute(["f1"], [0, 1, 2, 2], [0, 1, 1, 2], labels=["a", "b", "c"])
    assert found["f1"] == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)


def test_correlations_equal_numpy() -> None:
    answers, references = [0.1, 2.0, 2.5, 4.0, 3.0], [0.0, 2.0, 3.0, 5.0, 2.5]
    found = metrics.compute(["pearson", "spearman", "mse"], answers, references)
    assert found["pearson"] == pytest.approx(np.corrcoef(answers, references)[0, 1])
    ranks = [np.argsort(np.argsort(values)) for values in (answers, references)]
    assert found["spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert found["mse"] == pytest.approx(np.mean(np.subtract(answers, references) ** 2))
    assert metrics.compute(["pearson"], [1.0, 1.0], [0.0, 1.0])["pearson"] == 0.0  # which a constant has none of


def test_exact_match_takes_any_of_several_references() -> None:
    assert metrics.compute(["exact_match"], ["a ", "b", "c"], ["a", ["x", "b"], "d"])["exact_match"] == pytest.approx(2 / 3)


def test_a_metric_of_ones_own(tmp_path) -> None:
    (tmp_path / "mine.py").write_text("def short(measured):\n    return sum(len(a) < 3 for a in measured.answers)\n")
    assert metrics.compute([f"{tmp_path}/mine.py:short"], ["a", "abcd"], ["", ""]) == {"short": 1.0}
    with pytest.raises(ConfigError, match="Did you mean 'short'"):
        metrics.compute([f"{tmp_path}/mine.py:shrt"], ["a"], [""])
    with pytest.raises(ConfigError, match="There is no metric 'acuracy'. Did you mean 'accuracy'"):
        metrics.compute(["acuracy"], [1], [1])
