"""Metrics and batches of the kinds of tasks."""

import numpy as np
import pytest
from transformers import ByT5Tokenizer

from deltaexp.lab.config import TaskConfig
from deltaexp.lab.tasks.kinds import KINDS


@pytest.fixture
def seq2seq():
    task = TaskConfig(kind="seq2seq", inputs=["source"], target="target", max_source_length=6, max_target_length=8)
    return KINDS["seq2seq"](task, ByT5Tokenizer())


def test_exact_match_counts_whole_answers(seq2seq) -> None:
    tokenizer = seq2seq.tokenizer
    labels = np.array(tokenizer(["12h05", "ab"], padding=True)["input_ids"])
    labels[labels == tokenizer.pad_token_id] = -100
    answers = np.array(tokenizer(["12h05", "abc"], padding=True)["input_ids"])
    assert seq2seq.metrics(answers, labels) == {"exact_match": 0.5}


def test_padding_of_targets_is_ignored_by_the_loss(seq2seq) -> None:
    rows = seq2seq.features({"text": ["abc", "a long source"], "target": ["x", "yyy"]})
    assert [len(ids) for ids in rows["input_ids"]] == [4, 6]  # three bytes and the end; cut to the maximum
    batch = seq2seq.collator(None)([{key: value[i] for key, value in rows.items()} for i in range(2)])
    assert (batch["labels"][0] == -100).sum() == 2


def test_classification_metrics_equal_their_definitions() -> None:
    task = TaskConfig(kind="classification", inputs=["s"], target="l", labels=["a", "b"])
    logits = np.array([[2.0, 1.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    found = KINDS["classification"](task, ByT5Tokenizer()).metrics(logits, np.array([0, 1, 1, 0]))
    # True positives 2, false positives 1, false negatives 0, true negatives 1.
    assert found["accuracy"] == 0.75
    assert found["f1"] == pytest.approx(2 * 2 / (2 * 2 + 1))
    assert found["matthews_correlation"] == pytest.approx((2 * 1 - 0) / np.sqrt(3 * 2 * 2 * 1))
