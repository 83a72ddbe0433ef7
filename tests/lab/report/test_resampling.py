"""Metrics on resampled rows are what the task's own metric says of these rows."""

import json
from pathlib import Path

import numpy as np
import pytest

from deltaexp.errors import TaskError
from deltaexp.lab.report import resampling
from deltaexp.lab.report.resampling import Answers
from deltaexp.lab.tasks import metrics

RNG = np.random.default_rng(0)
TEXTS = [
    "the cat sat on the mat",
    "a dog ran home today",
    "it rains in the old town",
    "she reads the book at night",
    "#### 42",
    "",
]


def classes(count: int, rows: int = 60) -> Answers:
    """Answers of a classifier that is right most of the time."""
    references = RNG.integers(0, count, size=rows).tolist()
    answers = [label if RNG.random() < 0.7 else int(RNG.integers(0, count)) for label in references]
    return Answers(answers, references, labels=[str(number) for number in range(count)])


def texts(rows: int = 40, groups: int = 0) -> Answers:
    """Answers that share words with their references."""
    numbers = RNG.integers(0, groups, size=rows).tolist() if groups else None
    references = [f"{TEXTS[int(RNG.integers(0, 4))]} {RNG.integers(0, 3)}" for _ in range(rows)]
    own = [f"{TEXTS[int(RNG.integers(0, 4))]} {RNG.integers(0, 3)}" for _ in range(rows)]
    answers = [reference if RNG.random() < 0.4 else other for reference, other in zip(references, own, strict=True)]
    if numbers is not None:  # rows of a group ask the same, so they are answered the same
        answers = [answers[number] for number in numbers]
    return Answers(answers, references, numbers)


def tags(rows: int = 30) -> Answers:
    """Tags of words."""
    names = ["O", "B-PER", "I-PER", "B-LOC"]
    references = [[names[n] for n in RNG.integers(0, 4, size=5)] for _ in range(rows)]
    answers = [[tag if RNG.random() < 0.8 else "O" for tag in row] for row in references]
    return Answers(answers, references)


def numbers(rows: int = 50) -> Answers:
    """Answers of a regression."""
    references = RNG.random(rows)
    return Answers((references + RNG.normal(0, 0.3, rows)).tolist(), references.tolist())


def windows(rows: int = 20) -> Answers:
    """Negative log-likelihoods and numbers of tokens of windows."""
    counts = RNG.integers(20, 30, size=rows)
    return Answers([(float(RNG.random() * n), int(n)) for n in counts], [0] * rows)


def questions(rows: int = 60) -> Answers:
    """Answers to questions, several for each."""
    run = classes(2, rows)
    return Answers(run.answers, run.references, [f"{number // 4}" for number in range(rows)], run.labels)


CASES = {
    "accuracy": classes(3),
    "f1": classes(2),
    "f1 of several": classes(4),
    "matthews_correlation": classes(2),
    "matthews_correlation of several": classes(5),
    "pearson": numbers(),
    "mse": numbers(),
    "exact_match": texts(),
    "bleu": texts(),
    "bleu of groups": texts(groups=12),
    "chrf": texts(),
    "rouge": texts(),
    "rouge of groups": texts(groups=12),
    "squad": texts(),
    "seqeval": tags(),
    "token_accuracy": tags(),
    "perplexity": windows(),
    "multirc": questions(),
}
PACKAGES = {"bleu": "sacrebleu", "chrf": "sacrebleu", "rouge": "rouge_score", "seqeval": "seqeval"}


@pytest.mark.parametrize("case", CASES)
def test_sums_give_what_the_metric_says(case: str) -> None:
    """On the rows as they are, and on rows of which some came several times and others not."""
    metric, run = case.split(" ")[0], CASES[case]
    if metric in PACKAGES:
        pytest.importorskip(PACKAGES[metric], reason=f"{PACKAGES[metric]} is not installed")
    units = run.units()
    summed = resampling.decomposed(run, metric, units)
    assert summed is not None
    whole = metrics.compute([metric], run.answers, run.references, groups=run.groups, labels=run.labels)[metric]
    assert resampling.score(run, metric, metric) == pytest.approx(whole, rel=1e-9)
    counts = next(resampling.draws(len(units), 5, np.random.default_rng(1)))
    found = summed.score(counts.astype(float) @ summed.parts)
    for drawn, score in zip(counts, found, strict=True):
        taken = [unit for unit, times in zip(units, drawn, strict=True) for _ in range(times)]
        rows = [row for unit in taken for row in unit]
        groups = [copy for copy, unit in enumerate(taken) for _ in unit] if run.groups is not None else None
        again = run.taken(rows, groups)
        expected = metrics.compute([metric], again.answers, again.references, groups=groups, labels=run.labels)
        assert score == pytest.approx(expected[metric], rel=1e-9)


def test_the_resamples_are_the_same_for_all_runs() -> None:
    run = classes(3)
    found = resampling.scores([run, run], "accuracy", "accuracy", np.random.default_rng(0))
    assert found.shape == (2, resampling.RESAMPLES)
    assert (found[0] == found[1]).all()
    right = np.mean(np.array(run.answers) == np.array(run.references))
    assert found.mean() == pytest.approx(right, abs=0.01)
    assert found[0].std() == pytest.approx(np.sqrt(right * (1 - right) / 60), rel=0.1)


def test_rows_are_drawn_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resampling, "CELLS", 2000)
    parts = list(resampling.draws(1000, 3, np.random.default_rng(0)))
    assert [part.shape[0] for part in parts] == [2, 1]
    assert all((part.sum(axis=1) == 1000).all() for part in parts)


def test_what_is_no_sum_is_computed_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = numbers()
    found = resampling.scores([run], "spearman", "spearman", np.random.default_rng(0))
    assert found.shape == (1, resampling.ANEW)
    assert resampling.score(run, "spearman", "spearman") == pytest.approx(found.mean(), abs=0.05)
    (tmp_path / "own.py").write_text("def half(measured):\n    return {'half': sum(measured.answers) / 2, 'other': 1.0}\n")
    monkeypatch.chdir(tmp_path)
    run = questions()
    assert resampling.score(run, "half", "own.py:half") == sum(run.answers) / 2
    assert resampling.scores([run], "half", "own.py:half", np.random.default_rng(0)).std() > 0


def test_answers_are_read_as_they_were_stored(tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    lines = [
        {"row": 0, "prediction": "good", "prediction_number": 1, "reference": "bad", "reference_number": 0, "group": "a"},
        {"row": 1, "prediction": "bad", "prediction_number": 0, "reference": "bad", "reference_number": 0, "group": "b"},
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    found = resampling.read(path, ["bad", "good"])
    assert (found.answers, found.references, found.groups) == ([1, 0], [0, 0], ["a", "b"])
    path.write_text(json.dumps({"window": 0, "prediction": {"negative_log_likelihood": 2.5, "tokens": 3}}))
    assert resampling.read(path).answers == [(2.5, 3)]
    for text in ('{"row": 0}', "no json", "[1]", '{"prediction": "a"}'):
        path.write_text(text)
        with pytest.raises(TaskError, match="predictions"):
            resampling.read(path)


def test_a_loss_is_not_to_be_had_from_texts() -> None:
    with pytest.raises(TaskError, match="loss"):
        resampling.score(texts(), "loss", "loss")
