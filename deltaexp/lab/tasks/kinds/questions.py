"""Questions whose answers stand in a text: by a head that finds the span, or written as text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
import transformers
from datasets import Dataset
from torch import nn

from deltaexp.errors import ConfigError, TaskError
from deltaexp.lab.taskconfig import TaskConfig
from deltaexp.lab.tasks.columns import Spec
from deltaexp.lab.tasks.kinds.base import ROW, Kind, extras
from deltaexp.lab.tasks.kinds.text import DecoderText, Text, prompt
from deltaexp.lab.tasks.kinds.tokens import padded_inputs


def texts_of(answers: Any) -> list[str]:
    """Return the texts of a row's answers, in any of the forms that data have them in; none if it cannot be answered."""
    if isinstance(answers, str):
        return [answers]
    if isinstance(answers, dict):
        return list(answers.get("text") or [])
    return [answer if isinstance(answer, str) else answer["text"] for answer in answers or []]


def starts_of(answers: Any) -> list[int] | None:
    """Return where a row's answers begin in the context, in characters; None where the data do not tell."""
    if isinstance(answers, dict):
        return list(answers["answer_start"]) if "answer_start" in answers else None
    if isinstance(answers, (list, tuple)) and all(isinstance(one, dict) and "answer_start" in one for one in answers):
        return [one["answer_start"] for one in answers]
    return None


class Questions(Kind):
    """What both forms do with answers."""

    usual_metrics: ClassVar[tuple[str, ...]] = ("squad",)

    def references(self, rows: Dataset) -> list[Any]:
        """Return the texts of all right answers to every row."""
        return [texts_of(answers) for answers in rows["references" if "references" in rows.column_names else "target"]]


class Span(Questions):
    """A span of the context, by a head that scores where it begins and ends.

    A context that is too long is cut into windows that overlap by ``task.doc_stride`` tokens, and the best span of all windows
    is the answer (Devlin et al., 2019). Where a split has questions without an answer, as in SQuAD 2.0, the answer is "" if the
    first token scores higher than the best span in every window.
    """

    extra: ClassVar[tuple[str, ...]] = (ROW, "first", "last")
    windows = True

    def __init__(self, task: TaskConfig, processor: Any, settings: Any, reserved: int = 0) -> None:
        super().__init__(task, processor, settings, reserved)
        if not getattr(processor, "is_fast", False):
            raise ConfigError(
                f"The task {task.name!r} finds answers in a text, and the tokenizer of the backbone "
                f"({type(processor).__name__}) cannot tell where in the text a token stands. Choose another "
                "backbone, or another tokenizer with backbone.tokenizer=..."
            )
        if self.source_length < 16:
            raise ConfigError(
                f"Inputs of {self.source_length} tokens have no room for a question and a window of its context; make "
                "task.max_source_length at least 16."
            )

    @classmethod
    def auto_class(cls) -> Any:
        """Return the class with a head for spans."""
        return transformers.AutoModelForQuestionAnswering

    @classmethod
    def columns(cls, task: TaskConfig) -> dict[str, Spec]:
        """Return the question, the context and the answers."""
        return {"question": task.inputs[0], "context": task.inputs[1], "target": task.target, **extras(task)}

    @classmethod
    def labelled(cls, splits: dict[str, Dataset], task: TaskConfig) -> tuple[dict[str, Dataset], list[str], list[str]]:
        """Check that answers stand where the data say."""
        for split, rows in splits.items():
            for number, row in enumerate(rows):
                which = f"Row {number} of the split {split!r} of task {task.name!r}"
                texts, starts = texts_of(row["target"]), starts_of(row["target"])
                if starts is None and texts:
                    raise TaskError(
                        f"{which} does not tell where in the context its answer begins. An encoder needs answers like "
                        "{text: [...], answer_start: [...]}; take a backbone with a decoder, which writes answers as text."
                    )
                for text, start in zip(texts[:1], starts or [], strict=False):
                    if row["context"][start : start + len(text)] != text:
                        raise TaskError(
                            f"{which} has the answer {text!r}, and where it is to begin, at character {start}, its context "
                            f"says {row['context'][start : start + len(text)]!r}."
                        )
        return splits, [], []

    def features(self, batch: dict[str, list], training: bool) -> dict[str, list]:
        """Turn rows into windows, with the characters at which each of their tokens begins and ends, -1 outside the context."""
        longest = self.source_length // 2
        questions = self.processor(batch["question"], add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        # A question may take half of the room, so that there is always some for the context.
        asked = [
            text if len(spans) <= longest - 4 else text[: spans[longest - 5][1]]
            for text, spans in zip(batch["question"], questions["offset_mapping"], strict=True)
        ]
        encoded = self.processor(
            asked, batch["context"], truncation="only_second", max_length=self.source_length,
            stride=min(self.task.doc_stride, longest - 4), return_overflowing_tokens=True, return_offsets_mapping=True,
        )  # fmt: skip
        rows = encoded.pop("overflow_to_sample_mapping")
        offsets = encoded.pop("offset_mapping")
        places: dict[str, list] = {"first": [], "last": []}
        for number, spans in enumerate(offsets):
            inside = [sequence == 1 for sequence in encoded.sequence_ids(number)]
            places["first"].append([start if kept else -1 for (start, _), kept in zip(spans, inside, strict=True)])
            places["last"].append([end if kept else -1 for (_, end), kept in zip(spans, inside, strict=True)])
        result = {**encoded, ROW: rows}
        if "target" in batch:
            spans = [self._span(batch["target"][row], *ends) for row, *ends in zip(rows, *places.values(), strict=True)]
            result["start_positions"], result["end_positions"] = (list(column) for column in zip(*spans, strict=True))
        cut = {row for row, (old, new) in enumerate(zip(batch["question"], asked, strict=True)) if old != new}
        result["truncated"] = [row in cut and (number == 0 or rows[number - 1] != row) for number, row in enumerate(rows)]
        return result if training else {**result, **places}

    @staticmethod
    def _span(answers: Any, first: list[int], last: list[int]) -> tuple[int, int]:
        """Return the first and last token of the first answer; both 0, the very first, where it is not in the window."""
        texts, starts = texts_of(answers), starts_of(answers)
        if not texts or not starts:
            return 0, 0
        begin, end = starts[0], starts[0] + len(texts[0])
        inside = [n for n, start in enumerate(first) if start >= 0 and last[n] > begin and start < end]
        # Of an answer that a window cuts, nothing is learnt from that window.
        whole = bool(inside) and first[inside[0]] <= begin and last[inside[-1]] >= end
        return (inside[0], inside[-1]) if whole else (0, 0)

    def collator(self, model: nn.Module) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """Pad a batch to its longest window."""

        def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
            batch = padded_inputs(self.processor, rows, {"first": -1, "last": -1})
            names = [name for name in ("start_positions", "end_positions") if name in rows[0]]
            left = batch["input_ids"].shape[1] if self.processor.padding_side == "left" else 0
            for name in names:
                shifts = [max(0, left - len(row["input_ids"])) for row in rows]
                batch[name] = torch.tensor([row[name] + shift for row, shift in zip(rows, shifts, strict=True)])
            return batch

        return collate

    def predict(self, model: nn.Module, batch: dict[str, Any]) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Return the loss, and for every window its best span in characters, its score, and that of no answer.

        Returns:
            The loss, and numbers of shape ``(windows, 4)``.
        """
        outputs = model(**self.inputs(batch))
        starts, ends = outputs["start_logits"].float(), outputs["end_logits"].float()
        context = batch["first"] >= 0
        length = starts.shape[1]
        order = torch.ones(length, length, dtype=torch.bool, device=starts.device).triu()
        order &= order.tril(self.task.max_target_length - 1).bool()  # an answer has at most so many tokens
        allowed = order & context[:, :, None] & context[:, None, :]
        scores = (starts[:, :, None] + ends[:, None, :]).masked_fill(~allowed, -torch.inf).flatten(1)
        best = scores.argmax(-1)
        rows = torch.arange(len(best), device=best.device)
        begin, end = batch["first"][rows, best // length], batch["last"][rows, best % length]
        none = batch["attention_mask"].argmax(-1)  # the first token
        nothing = starts[rows, none] + ends[rows, none]
        return outputs.get("loss"), torch.stack([begin.float(), end.float(), scores[rows, best], nothing], dim=-1)

    def answers(self, predictions: np.ndarray, rows: Dataset, numbers: np.ndarray) -> list[Any]:
        """Return the text of the best span of all windows of every row; "" where that there is none scores higher."""
        unanswerable = "target" in rows.column_names and not all(texts_of(answers) for answers in rows["target"])
        best: list[tuple[float, int, int]] = [(-np.inf, 0, 0)] * len(rows)
        nothing = [np.inf] * len(rows)
        for number, (begin, end, score, none) in zip(numbers, predictions, strict=True):
            best[number] = max(best[number], (float(score), int(begin), int(end)))
            nothing[number] = min(nothing[number], float(none))
        return [
            "" if unanswerable and none > score else context[begin:end]
            for context, (score, begin, end), none in zip(rows["context"], best, nothing, strict=True)
        ]


class Answer(Questions, Text):
    """The answer as text, by an encoder-decoder; a question without an answer is answered by nothing."""

    @classmethod
    def columns(cls, task: TaskConfig) -> dict[str, Spec]:
        """Return the prompt, with the columns' names if the task has no template, and the answers."""
        asked = prompt(task, named=True).removeprefix(task.name).lstrip() if task.prompt is None else task.prompt
        return {"text": asked, "target": task.target, **extras(task)}

    def features(self, batch: dict[str, list], training: bool) -> dict[str, list]:
        """Turn questions and their first answers into token ids."""
        if "target" in batch:
            batch = {**batch, "target": [next(iter(texts_of(answers)), "") for answers in batch["target"]]}
        return super().features(batch, training)


class DecoderAnswer(Answer, DecoderText):
    """The answer as text, by a decoder; a question without an answer is answered by nothing."""
