"""Kinds that a new head on the backbone answers: classes and numbers for a text or a pair of texts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import transformers
from datasets import Dataset
from torch import nn
from transformers import DataCollatorWithPadding

from deltaexp.errors import TaskError
from deltaexp.lab.taskconfig import TaskConfig
from deltaexp.lab.tasks.kinds.base import Kind
from deltaexp.lab.tasks.kinds.labels import numbered


class Headed(Kind):
    """A text or a pair of texts, and a head on what the backbone makes of it."""

    @classmethod
    def auto_class(cls) -> Any:
        """Return the class with a head for one output or several."""
        return transformers.AutoModelForSequenceClassification

    def features(self, batch: dict[str, list], training: bool) -> dict[str, list]:
        """Turn texts into token ids."""
        pairs = (batch["text"], batch["text_pair"]) if "text_pair" in batch else (batch["text"],)
        encoded = self.processor(*pairs, truncation=True, max_length=self.source_length)
        whole = self.processor(*pairs, verbose=False)["input_ids"]
        cut = [len(ids) > self.source_length for ids in whole]
        labels = {"labels": batch["target"]} if "target" in batch else {}
        return {**encoded, **labels, "truncated": cut}

    def collator(self, model: nn.Module) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """Pad a batch to its longest text."""
        return DataCollatorWithPadding(self.processor)


class Classification(Headed):
    """One of several labels for a text or a pair of texts, by a head."""

    usual_metrics = ("accuracy", "f1", "matthews_correlation")

    @classmethod
    def model_options(cls, task: TaskConfig) -> dict[str, Any]:
        """Return the labels' names and numbers."""
        names = dict(enumerate(task.labels))
        return {"num_labels": len(names), "id2label": names, "label2id": {name: number for number, name in names.items()}}

    @classmethod
    def labelled(cls, splits: dict[str, Dataset], task: TaskConfig) -> tuple[dict[str, Dataset], list[str], list[str]]:
        """Make numbers of labels."""
        return numbered(splits, task)

    def answers(self, predictions: np.ndarray, rows: Dataset, numbers: np.ndarray) -> list[Any]:
        """Return the number of the likeliest label of every row."""
        return [int(label) for label in np.argmax(predictions, axis=-1)]

    def shown(self, answer: Any) -> Any:
        """Return the label's name."""
        return self.task.labels[answer]

    def scores(self, predictions: np.ndarray, numbers: np.ndarray) -> list[dict[str, float]] | None:
        """Return the probability of each label, by the softmax of the logits."""
        from scipy.special import softmax  # not needed to train

        probabilities = softmax(predictions.astype(np.float64), axis=-1)
        return [dict(zip(self.task.labels, map(float, row), strict=True)) for row in probabilities]


class Regression(Headed):
    """A number for a text or a pair of texts, by a head with one output and the squared error."""

    usual_metrics = ("pearson", "spearman", "mse")

    @classmethod
    def model_options(cls, task: TaskConfig) -> dict[str, Any]:
        """Return that there is one output, and it is a number."""
        return {"num_labels": 1, "problem_type": "regression"}

    @classmethod
    def labelled(cls, splits: dict[str, Dataset], task: TaskConfig) -> tuple[dict[str, Dataset], list[str], list[str]]:
        """Check that targets are finite numbers."""
        for split, rows in splits.items():
            for batch in rows.select_columns("target").iter(1000):
                try:
                    values = np.asarray(batch["target"], dtype=float)
                except (TypeError, ValueError) as error:
                    raise TaskError(
                        f"The split {split!r} of task {task.name!r} has targets that are no numbers: {error}."
                    ) from error
                if not np.isfinite(values).all():
                    raise TaskError(f"The split {split!r} of task {task.name!r} has targets that are missing or infinite.")
        return splits, [], []

    def features(self, batch: dict[str, list], training: bool) -> dict[str, list]:
        """Turn texts into token ids, and targets into numbers with a point."""
        result = super().features(batch, training)
        return {**result, "labels": [float(value) for value in batch["target"]]} if "target" in batch else result

    def answers(self, predictions: np.ndarray, rows: Dataset, numbers: np.ndarray) -> list[Any]:
        """Return the number for every row."""
        return [float(value) for value in np.asarray(predictions).reshape(len(numbers), -1)[:, 0]]
