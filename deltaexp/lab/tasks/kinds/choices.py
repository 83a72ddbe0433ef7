"""Multiple choice: the answers stand in the row, by a head that scores each or by their likelihood as text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
import transformers
from datasets import Dataset
from torch import nn

from deltaexp.errors import TaskError
from deltaexp.lab.taskconfig import TaskConfig
from deltaexp.lab.tasks.columns import Spec
from deltaexp.lab.tasks.kinds.base import Kind, extras
from deltaexp.lab.tasks.kinds.text import DecoderText, Ranking, Text, prompt
from deltaexp.lab.tasks.kinds.tokens import padded_inputs


def columns(task: TaskConfig, named: bool) -> dict[str, Spec]:
    """Return the question as one text, the answers to choose from, and the target."""
    alone = len(task.choices) == 1
    return {
        "text": prompt(task, named=named),
        "choices": task.choices[0] if alone else list(task.choices),
        "target": task.target,
        **extras(task),
    }


def placed(splits: dict[str, Dataset], task: TaskConfig, fixed: bool) -> dict[str, Dataset]:
    """Return splits whose targets are the places of the right answers, from 0.

    A target may be a place from 0, one of ``task.labels``, a letter from A, or the right answer itself.

    Args:
        splits: The rows, with ``choices`` and ``target``.
        task: The task.
        fixed: Whether all rows must have the same number of answers.

    Raises:
        TaskError: If a row has no list of answers, another number of them, or a target that is none of them.
    """
    count: int | None = None

    def place(row: dict[str, Any], number: int, split: str) -> dict[str, int]:
        nonlocal count
        choices, target = row["choices"], row["target"]
        which = f"Row {number} of the split {split!r} of task {task.name!r}"
        if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(choice, str) for choice in choices):
            raise TaskError(
                f"{which} does not have a list of at least two texts to choose from: {choices!r:.200}. task.choices names a "
                "column for each answer, or one column that holds a list."
            )
        count = count or len(choices)
        if fixed and len(choices) != count:
            raise TaskError(
                f"{which} has {len(choices)} answers to choose from, and others have {count}. An encoder needs the same number "
                "in all rows; take a backbone with a decoder, which ranks any number of answers."
            )
        found = _place(target, choices, task.labels)
        if found is None:
            raise TaskError(
                f"{which} has the target {target!r}, which is none of its {len(choices)} answers: a number from 0, one of "
                "task.labels, a letter from A, or the text of an answer."
            )
        return {"target": found}

    result = {}
    for split, rows in splits.items():
        targets = [place(row, number, split)["target"] for number, row in enumerate(rows)]
        result[split] = rows.remove_columns("target").add_column("target", targets)
    return result


def texts_of(answers: Sequence[int], rows: Dataset) -> list[Any]:
    """Return answers as their texts where metrics compare texts, of which several may be right, else as they are."""
    if "references" not in rows.column_names:
        return list(answers)
    return [choices[place] for choices, place in zip(rows["choices"], answers, strict=True)]


def _place(target: Any, choices: list[str], labels: list[str]) -> int | None:
    places = [str(label) for label in labels[: len(choices)]]
    letters = [chr(ord("A") + number) for number in range(min(26, len(choices)))]
    if isinstance(target, str):
        for names in (places, choices, letters):
            if target in names:
                return names.index(target)
        if not target.isdigit():
            return None
    if target is None or not float(target).is_integer():
        return None
    place = int(target)
    return place if 0 <= place < len(choices) else None


class Placed(Kind):
    """What both forms do with the places of answers."""

    usual_metrics: ClassVar[tuple[str, ...]] = ("accuracy",)

    def measure(self, answers: Sequence[Any], rows: Dataset) -> dict[str, float]:
        """Return the metrics, by the answers' texts where the task names references."""
        return super().measure(texts_of(answers, rows), rows)

    def shown(self, answer: Any) -> Any:
        """Return the answer's label, where the task has some."""
        return self.task.labels[answer] if self.task.labels else answer


class Choices(Placed):
    """One of the answers in a row, by a head that scores each together with the question."""

    @classmethod
    def auto_class(cls) -> Any:
        """Return the class with a head that scores pairs."""
        return transformers.AutoModelForMultipleChoice

    @classmethod
    def columns(cls, task: TaskConfig) -> dict[str, Spec]:
        """Return the question, the answers to choose from, and the target."""
        return columns(task, named=False)

    @classmethod
    def labelled(cls, splits: dict[str, Dataset], task: TaskConfig) -> tuple[dict[str, Dataset], list[str], list[str]]:
        """Make places of targets."""
        return placed(splits, task, fixed=True), list(task.labels), []

    def features(self, batch: dict[str, list], training: bool) -> dict[str, list]:
        """Turn every question with each of its answers into token ids; a pair that is too long loses from its longer text."""
        counts = [len(choices) for choices in batch["choices"]]
        texts = [text for text, count in zip(batch["text"], counts, strict=True) for _ in range(count)]
        flat = [choice for choices in batch["choices"] for choice in choices]
        encoded = self.processor(texts, flat, truncation=True, max_length=self.source_length)
        whole = self.processor(texts, flat, verbose=False)["input_ids"]
        encoded = {**encoded, "truncated": [len(ids) > self.source_length for ids in whole]}
        ends = np.cumsum(counts)
        spans = list(zip(ends - counts, ends, strict=True))
        result = {name: [values[start:end] for start, end in spans] for name, values in encoded.items()}
        result["truncated"] = [any(cut) for cut in result["truncated"]]
        return {**result, "labels": batch["target"]} if "target" in batch else result

    def collator(self, model: nn.Module) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """Pad a batch to its longest pair, shape ``(rows, answers, length)``."""

        def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
            single = [name for name in rows[0] if not isinstance(rows[0][name], list)]
            names = [name for name in rows[0] if name not in single]
            flat = [{name: row[name][n] for name in names} for row in rows for n in range(len(row["input_ids"]))]
            batch = padded_inputs(self.processor, flat, {})
            batch = {name: value.reshape(len(rows), -1, value.shape[-1]) for name, value in batch.items()}
            return batch | {name: torch.tensor([row[name] for row in rows]) for name in single}

        return collate

    def answers(self, predictions: np.ndarray, rows: Dataset, numbers: np.ndarray) -> list[Any]:
        """Return the place of the best answer of every row."""
        return [int(place) for place in np.argmax(predictions, axis=-1)]


class TextChoices(Placed, Ranking, Text):
    """One of the answers in a row, the likeliest per token, by an encoder-decoder."""

    per_token = True

    @classmethod
    def columns(cls, task: TaskConfig) -> dict[str, Spec]:
        """Return the prompt, with names of task and columns if the task has no template, the answers and the target."""
        return columns(task, named=True)

    @classmethod
    def labelled(cls, splits: dict[str, Dataset], task: TaskConfig) -> tuple[dict[str, Dataset], list[str], list[str]]:
        """Make places of targets."""
        return placed(splits, task, fixed=False), list(task.labels), []

    def candidates(self, batch: dict[str, list]) -> list[list[str]]:
        """Return the answers that each row has to choose from."""
        return batch["choices"]


class DecoderChoices(TextChoices, DecoderText):
    """One of the answers in a row, the likeliest per token, by a decoder."""
