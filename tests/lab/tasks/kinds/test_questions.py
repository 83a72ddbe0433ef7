"""Answers that stand in a text: windows, spans and their characters, and the same as text."""

from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from small import byte_tokenizer, table, trained
from transformers import BertConfig, BertTokenizerFast, ByT5Tokenizer, GPT2Config

from deltaexp.errors import ConfigError, TaskError
from deltaexp.lab.taskconfig import TaskConfig
from deltaexp.lab.tasks.kinds.base import IGNORED
from deltaexp.lab.tasks.kinds.questions import Answer, DecoderAnswer, Span, starts_of, texts_of

CONTEXT = "the plot was poor , the film was great , a good film"
ROWS = {
    "question": ["was the film great", "was the plot awful"],
    "context": [CONTEXT, CONTEXT],
    "target": [{"text": ["great", "good"], "answer_start": [33, 43]}, {"text": [], "answer_start": []}],
}


@pytest.fixture
def tokenizer(small_bert: Path) -> BertTokenizerFast:
    return BertTokenizerFast.from_pretrained(small_bert)


def task(**changes: object) -> TaskConfig:
    values = {"name": "t", "kind": "extractive_qa", "inputs": ["question", "context"], "target": "answers", "data": "d"}
    return TaskConfig(**{**values, "max_source_length": 16, "doc_stride": 2, **changes})  # type: ignore[arg-type]


def test_a_long_context_is_cut_into_windows_that_overlap(tokenizer: BertTokenizerFast) -> None:
    kind = Span(task(), tokenizer, BertConfig())
    found = kind.features(ROWS, training=False)
    assert found["row"] == [0, 0, 1, 1]
    assert not any(found["truncated"])
    seen = []
    for first, last in zip(found["first"], found["last"], strict=True):
        spans = [(start, end) for start, end in zip(first, last, strict=True) if start >= 0]
        seen.append([CONTEXT[start:end] for start, end in spans])
    assert seen[0] + seen[1][2:] == CONTEXT.split()
    assert seen[0][-2:] == seen[1][:2]
    for window, (start, end) in enumerate(zip(found["start_positions"], found["end_positions"], strict=True)):
        answer = CONTEXT[found["first"][window][start] : found["last"][window][end]] if start else ""
        assert answer == ("great" if window < 2 and "great" in seen[window] else "")
    assert set(kind.features(ROWS, training=True)).isdisjoint({"first", "last"})
    without = kind.features({name: ROWS[name] for name in ("question", "context")}, training=False)
    assert "start_positions" not in without


def test_a_question_takes_half_of_the_room_at_most(tokenizer: BertTokenizerFast) -> None:
    kind = Span(task(), tokenizer, BertConfig())
    found = kind.features({"question": ["the film " * 20], "context": [CONTEXT]}, training=False)
    assert max(map(len, found["input_ids"])) <= 16
    assert sum(found["truncated"]) == 1
    with pytest.raises(ConfigError, match="at least 16"):
        Span(task(max_source_length=8), tokenizer, BertConfig())
    with pytest.raises(ConfigError, match=r"\(ByT5Tokenizer\) cannot tell where in the text"):
        Span(task(), ByT5Tokenizer(), BertConfig())


class Pointer(torch.nn.Module):
    """Scores the words of an answer as its beginning and end; the first token by a number."""

    def __init__(self, start: int, end: int, none: float) -> None:
        super().__init__()
        self.start, self.end, self.none = start, end, none

    def forward(self, input_ids: torch.Tensor, **_: torch.Tensor) -> dict[str, torch.Tensor]:
        scores = [5.0 * (input_ids == token) + torch.arange(input_ids.shape[1]) * 0.01 for token in (self.start, self.end)]
        for score in scores:
            score[:, 0] = self.none
        return {"start_logits": scores[0], "end_logits": scores[1]}


@pytest.mark.parametrize(
    ("none", "longest", "expected"), [(0.0, 9, ["poor , the film was great"] * 2), (6.0, 9, [""] * 2), (0.0, 4, ["great"] * 2)]
)
def test_the_best_span_of_all_windows_is_the_answer(
    tokenizer: BertTokenizerFast, none: float, longest: int, expected: list[str]
) -> None:
    kind = Span(task(max_source_length=32, max_target_length=longest), tokenizer, BertConfig())
    found = kind.features(ROWS, training=False)
    found.pop("truncated")
    batch = kind.collator(torch.nn.Module())([{k: v[n] for k, v in found.items()} for n in range(len(found["row"]))])
    start, end = tokenizer.convert_tokens_to_ids(["poor" if longest == 9 else "great", "great"])
    _, predictions = kind.predict(Pointer(start, end, none), {**batch})
    rows = Dataset.from_dict(ROWS)
    answers = kind.answers(predictions.numpy(), rows, np.array(found["row"]))
    assert answers == expected
    assert kind.references(rows) == [["great", "good"], []]
    # Without the knowledge that some questions have no answer, each gets one.
    assert "" not in kind.answers(predictions.numpy(), rows.remove_columns("target"), np.array(found["row"]))


def test_a_window_scores_against_the_others(tokenizer: BertTokenizerFast) -> None:
    kind = Span(task(), tokenizer, BertConfig())
    rows = Dataset.from_dict({"context": ["abcdef"]})
    predictions = np.array([[0, 2, 3.0, 9.0], [2, 4, 5.0, 9.0], [4, 6, 4.0, 9.0]])
    assert kind.answers(predictions, rows, np.zeros(3, dtype=int)) == ["cd"]


def test_answers_have_several_forms() -> None:
    assert texts_of([{"text": "a", "answer_start": 3}]) == ["a"]
    assert starts_of([{"text": "a", "answer_start": 3}]) == [3]
    assert texts_of("a") == texts_of(["a"]) == texts_of({"text": ["a"]}) == ["a"]
    assert starts_of("a") is None
    assert texts_of([]) == []


def test_answers_that_do_not_stand_where_the_data_say_are_refused() -> None:
    def rows(target: object) -> dict[str, Dataset]:
        return {"train": Dataset.from_list([{"question": "q", "context": "some text", "target": target}])}

    with pytest.raises(TaskError, match="at character 4, its context says ' tex'"):
        Span.labelled(rows({"text": ["text"], "answer_start": [4]}), task())
    with pytest.raises(TaskError, match="take a backbone with a decoder"):
        Span.labelled(rows(["text"]), task())


def test_as_text_the_first_answer_is_written() -> None:
    assert Answer.columns(task())["text"] == "question: {question} context: {context}"
    tokenizer = byte_tokenizer()
    kind = DecoderAnswer(task(max_source_length=100), tokenizer, GPT2Config())
    found = kind.features({"text": ["q", "r"], "target": ROWS["target"]}, training=True)
    learnt = [tokenizer.decode([n for n in labels if n != IGNORED]) for labels in found["labels"]]
    assert learnt == ["great</s>", "</s>"]


@pytest.mark.parametrize("backbone", ["bert", "gpt2", "t5"])
def test_a_run(backbone: str, backbone_folders: dict[str, Path], tmp_path: Path) -> None:
    names = ("question", "context", "target")
    rows = [dict(zip(names, values, strict=True)) for values in zip(*ROWS.values(), strict=True)] * 4
    words = ["task.kind=extractive_qa", "task.inputs=[question,context]", "task.target=target", "task.doc_stride=2"]
    data = table(tmp_path / "data", rows)
    results = trained(tmp_path / "run", backbone_folders[backbone], data, *words, "task.max_source_length=20")
    assert results["task_metric"] == "squad"
    assert results["rows"] == {"train": 8, "validation": 4, "test": 4}
