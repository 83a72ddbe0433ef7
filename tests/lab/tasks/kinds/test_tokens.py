"""Tags of words: where they are learnt, how they are read back, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from small import WORDS, byte_tokenizer, table, trained
from transformers import BertTokenizerFast, ByT5Tokenizer, GPT2Config

from deltaexp.errors import ConfigError, TaskError
from deltaexp.lab.taskconfig import TaskConfig
from deltaexp.lab.tasks.kinds.base import IGNORED
from deltaexp.lab.tasks.kinds.tokens import TokenClassification

LABELS = ["O", "B-ADJ", "I-ADJ"]
SETTINGS = GPT2Config()
ROWS = {"tokens": [["the", "good", "goodfilm", "was"], ["film", "", "bad"]], "target": [[0, 1, 2, 0], [0, 0, 1]]}


def task(**changes: object) -> TaskConfig:
    values = {"name": "t", "kind": "token_classification", "inputs": ["tokens"], "target": "tags", "data": "d"}
    return TaskConfig(**{**values, "labels": LABELS, **changes})  # type: ignore[arg-type]


@pytest.fixture
def pieces(tmp_path: Path) -> BertTokenizerFast:
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, "##film"]))
    return BertTokenizerFast(vocab=str(vocabulary))


def test_a_tag_is_learnt_on_the_first_token_of_its_word(pieces: BertTokenizerFast) -> None:
    kind = TokenClassification(task(), pieces, SETTINGS)
    features = kind.features(ROWS, training=False)
    # [CLS] the good good ##film was [SEP]
    assert features["labels"][0] == [IGNORED, 0, 1, 2, IGNORED, 0, IGNORED]
    assert features["words"][0] == [-1, 0, 1, 2, -1, 3, -1]
    assert features["words"][1] == [-1, 0, 2, -1]  # the empty word has no token
    assert features["truncated"] == [False, False]
    assert "words" not in kind.features(ROWS, training=True)
    batch = kind.collator(torch.nn.Module())([{k: v[n] for k, v in features.items() if k != "truncated"} for n in range(2)])
    assert batch["labels"][1].tolist() == [IGNORED, 0, 1, *[IGNORED] * 4]
    assert set(kind.inputs(batch)) == {"input_ids", "attention_mask", "token_type_ids", "labels"}


def test_a_word_that_no_token_stands_for_is_outside(pieces: BertTokenizerFast) -> None:
    kind = TokenClassification(task(max_source_length=4), pieces, SETTINGS)
    features = kind.features(ROWS, training=False)
    assert features["truncated"] == [True, False]
    # Everything is said to be the beginning of an adjective.
    predictions = np.array([[[1, word] for word in words] for words in features["words"]])
    rows = Dataset.from_dict(ROWS)
    answers = kind.answers(predictions, rows, np.arange(2))
    assert answers == [["B-ADJ", "B-ADJ", "O", "O"], ["B-ADJ", "O", "B-ADJ"]]
    measured = kind.measure(answers, rows)
    assert measured["seqeval_recall"] == 1 / 2  # good goodfilm is one entity, and half of it was cut off
    assert kind.references(rows)[0] == ["O", "B-ADJ", "I-ADJ", "O"]


def test_a_byte_level_tokenizer_sees_the_spaces_between_words() -> None:
    tokenizer = byte_tokenizer()
    kind = TokenClassification(task(max_source_length=64), tokenizer, SETTINGS)
    features = kind.features({"tokens": [["a", "good", "film"]], "target": [[0, 1, 2]]}, training=True)
    assert tokenizer.decode(features["input_ids"][0]) == "a good film"
    assert [n for n in features["labels"][0] if n != IGNORED] == [0, 1, 2]


def test_what_cannot_be_tagged_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"\(ByT5Tokenizer\) cannot tell which word"):
        TokenClassification(task(), ByT5Tokenizer(), SETTINGS)
    short = {"train": Dataset.from_dict({"tokens": [["a", "b"]], "target": [["O"]]})}
    with pytest.raises(TaskError, match="a list of words with a tag for each"):
        TokenClassification.labelled(short, task())
    numbers = {"train": Dataset.from_dict({"tokens": [["a", "b"]], "target": [[0, 1]]})}
    with pytest.raises(TaskError, match="the tag '0' of task 't' is none like B-PER or O. Where the data have numbers"):
        TokenClassification.labelled(numbers, task(labels=[]))
    assert TokenClassification.labelled(numbers, task(labels=[], metrics=["token_accuracy"]))[1] == ["0", "1"]


@pytest.mark.parametrize("backbone", ["bert", "gpt2", "t5"])
def test_a_run(backbone: str, backbone_folders: dict[str, Path], tmp_path: Path) -> None:
    adjectives = WORDS[1:7]
    rows = [{"tokens": ["the", "film", "was", w], "tags": ["O", "O", "O", "B-ADJ"]} for w in adjectives * 2]
    data = table(tmp_path / "data", rows)
    words = ["task.kind=token_classification", "task.inputs=[tokens]", "task.target=tags"]
    results = trained(tmp_path / "run", backbone_folders[backbone], data, *words)
    assert results["labels"] == ["B-ADJ", "O"]
    assert results["task_metric"] == "seqeval"
    assert results["new_parameters"]
    assert results["backbone"]["class"].endswith("ForTokenClassification")
