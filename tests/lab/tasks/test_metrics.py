"""Metrics equal their definitions."""

import numpy as np
import pytest

from deltaexp.errors import ConfigError, TaskError
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


ANSWERS = ["The cat sat on the mat.", "A dog barked loudly at night.", "the cats are here"]
REFERENCES = [["The cat is sitting on the mat.", "A cat sat on a mat."], ["A dog barked at night."], ["The cat is here"]]


def test_bleu_and_chrf_are_sacrebleus_over_all_references_of_a_group() -> None:
    import sacrebleu

    rows = [
        (group, answer, text) for group, (answer, texts) in enumerate(zip(ANSWERS, REFERENCES, strict=True)) for text in texts
    ]
    groups, answers, references = (list(column) for column in zip(*rows, strict=True))
    grouped = metrics.compute(["bleu", "chrf"], answers, references, groups=groups)
    streams = [[texts[0] for texts in REFERENCES], ["A cat sat on a mat.", None, None]]
    assert grouped["bleu"] == pytest.approx(sacrebleu.corpus_bleu(ANSWERS, streams).score)
    assert grouped["chrf"] == pytest.approx(sacrebleu.corpus_chrf(ANSWERS, streams).score)
    assert metrics.compute(["bleu", "chrf"], ANSWERS, REFERENCES) == grouped  # the same as lists
    first = metrics.compute(["bleu"], ANSWERS, streams[0])["bleu"]
    assert first == pytest.approx(sacrebleu.corpus_bleu(ANSWERS, streams[:1]).score)
    assert first != pytest.approx(grouped["bleu"])


def test_rouge_is_rouge_scores() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    found = metrics.compute(["rouge"], ANSWERS, REFERENCES)
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL", "rougeLsum"], use_stemmer=True)
    for name in ("rouge1", "rouge2", "rougeL", "rougeLsum"):
        each = [max(scorer.score(text, a)[name].fmeasure for text in t) for a, t in zip(ANSWERS, REFERENCES, strict=True)]
        assert found[name] == pytest.approx(np.mean(each))
    assert found["rouge"] == found["rougeL"] < 1


def test_seqeval_counts_whole_entities() -> None:
    from seqeval.metrics import f1_score, precision_score, recall_score

    references = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "B-ORG", "I-ORG"]]
    answers = [["B-PER", "I-PER", "O", "O"], ["B-LOC", "B-ORG", "O"]]
    found = metrics.compute(["seqeval", "token_accuracy"], answers, references)
    assert found["seqeval_precision"] == pytest.approx(1 / 3) == precision_score(references, answers)
    assert found["seqeval_recall"] == pytest.approx(1 / 3) == recall_score(references, answers)
    assert found["seqeval"] == pytest.approx(1 / 3) == f1_score(references, answers)
    assert found["token_accuracy"] == pytest.approx(4 / 7)
    assert metrics.compute(["seqeval"], [["O"]], [["O"]])["seqeval"] == 0.0  # there is nothing to find
    with pytest.raises(TaskError, match="'NOUN' is no tag like B-PER"):
        metrics.compute(["seqeval"], [["NOUN"]], [["NOUN"]])


@pytest.mark.parametrize(
    ("answer", "references", "exact", "f1"),
    [
        ("The  Broncos!", ["Denver Broncos", "Broncos"], 1, 1),
        ("the Denver Broncos of Denver", ["denver broncos"], 0, 2 * 2 / (4 + 2)),
        ("Santa Clara, California", ["in Santa Clara"], 0, 2 * 2 / (3 + 3)),
        ("", [], 1, 1),
        ("something", [], 0, 0),
        ("", ["something"], 0, 0),
        ("an", ["the"], 1, 1),  # nothing is left of either
    ],
)
def test_squad_and_record_follow_the_official_normalisation(answer: str, references: list, exact: int, f1: float) -> None:
    for name in ("squad", "record"):
        found = metrics.compute([name], [answer], [references])
        assert found == {name: pytest.approx(f1), f"{name}_exact_match": exact}


def test_gsm8k_compares_the_numbers_behind_the_marks() -> None:
    references = ["1 + 1 = <<1+1=2>>2\n#### 2", "#### 1,234", "#### -3", "#### 5", "#### 7"]
    answers = ["so #### 2", "it is\n#### 1234", "#### 3", "the answer is 5", "#### 7 apples\n#### 8"]
    assert metrics.compute(["gsm8k"], answers, references)["gsm8k"] == pytest.approx(3 / 5)


def test_multirc_measures_answers_and_questions() -> None:
    found = metrics.compute(["multirc"], [1, 0, 1, 1, 0], [1, 0, 1, 0, 0], groups=["a", "a", "b", "b", "c"])
    assert found["multirc_f1"] == pytest.approx(2 * 2 / (2 * 2 + 1))  # two true positives, a false one
    assert found["multirc_exact_match"] == pytest.approx(2 / 3)
    assert found["multirc"] == pytest.approx((0.8 + 2 / 3) / 2)
    with pytest.raises(TaskError, match="set task.group"):
        metrics.compute(["multirc"], [1], [1])


def test_perplexity_weighs_every_token_alike() -> None:
    found = metrics.compute(["perplexity", "bits_per_byte"], [[10.0, 4], [2.0, 2]], [20, 4])
    assert found["perplexity"] == pytest.approx(np.exp(12 / 6))
    assert found["bits_per_byte"] == pytest.approx(12 / np.log(2) / 24)
    assert metrics.compute(["perplexity"], [[1e6, 1]], [1])["perplexity"] == np.inf
    with pytest.raises(TaskError, match="of the kind causal_lm"):
        metrics.compute(["perplexity"], ["a"], ["b"])


def test_metrics_are_checked_before_anything_is_trained() -> None:
    metrics.check(["accuracy", "bleu", "gsm8k"])
    with pytest.raises(ConfigError, match="Did you mean 'rouge'"):
        metrics.check(["rogue"])
