"""A tag for every word: names, parts of speech, chunks."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
import transformers
from datasets import Dataset
from torch import nn

from deltaexp.errors import ConfigError, TaskError
from deltaexp.lab.taskconfig import TaskConfig
from deltaexp.lab.tasks.columns import Spec
from deltaexp.lab.tasks.kinds.base import IGNORED, ROW, Kind, extras
from deltaexp.lab.tasks.kinds.heads import Classification
from deltaexp.lab.tasks.kinds.labels import numbered
from deltaexp.lab.tasks.kinds.text import padded

OUTSIDE = "O"
"""The tag of a word that belongs to no entity."""
ENTITY = re.compile(r"O|[BIES]|[BIES]-.+")
"""What tags of entities look like."""


class TokenClassification(Kind):
    """One of several tags for each word of a row, by a head; learnt and read on the first token of each word."""

    usual_metrics = ("seqeval",)
    extra: ClassVar[tuple[str, ...]] = (ROW, "words")

    def __init__(self, task: TaskConfig, processor: Any, settings: Any, reserved: int = 0) -> None:
        super().__init__(task, processor, settings, reserved)
        if not getattr(processor, "is_fast", False):
            raise ConfigError(
                f"The task {task.name!r} tags words, and the tokenizer of the backbone ({type(processor).__name__}) cannot "
                "tell which word a token comes from; only those of the library tokenizers can. Choose another "
                "backbone, or another tokenizer with backbone.tokenizer=..."
            )

    @classmethod
    def auto_class(cls) -> Any:
        """Return the class with a head on every token."""
        return transformers.AutoModelForTokenClassification

    @classmethod
    def model_options(cls, task: TaskConfig) -> dict[str, Any]:
        """Return the tags' names and numbers."""
        return Classification.model_options(task)

    @classmethod
    def columns(cls, task: TaskConfig) -> dict[str, Spec]:
        """Return the words, and the tags."""
        return {"tokens": task.inputs[0], "target": task.target, **extras(task)}

    @classmethod
    def labelled(cls, splits: dict[str, Dataset], task: TaskConfig) -> tuple[dict[str, Dataset], list[str], list[str]]:
        """Make numbers of tags, and check that every word has one."""
        for split, rows in splits.items():
            for number, (words, tags) in enumerate(zip(rows["tokens"], rows["target"], strict=True)):
                if isinstance(words, str) or not isinstance(tags, (list, tuple)) or len(words) != len(tags):
                    raise TaskError(
                        f"Row {number} of the split {split!r} of task {task.name!r} does not have a list of words with a "
                        f"tag for each of them, as task.inputs and task.target say: {words!r:.120} and {tags!r:.120}."
                    )
        splits, labels, notes = numbered(splits, task, nested=True)
        odd = [name for name in labels if not ENTITY.fullmatch(name)]
        if odd and "seqeval" in (task.metrics or cls.usual_metrics):
            raise TaskError(
                f"The metric seqeval counts entities, and the tag {odd[0]!r} of task {task.name!r} is none like B-PER or O. "
                "Where the data have numbers, name the tags in task.labels; for tags of other kinds take "
                "task.metrics=[token_accuracy]."
            )
        return splits, labels, notes

    def features(self, batch: dict[str, list], training: bool) -> dict[str, list]:
        """Turn words into token ids, with the tag of each word at its first token."""
        # Byte-level tokenizers tell the beginning of a word by the space before it.
        spaced = not getattr(self.processor, "add_prefix_space", True)
        rows = [[" " + word if number and spaced else word for number, word in enumerate(words)] for words in batch["tokens"]]
        encoded = self.processor(rows, is_split_into_words=True, truncation=True, max_length=self.source_length)
        whole = self.processor(rows, is_split_into_words=True, verbose=False)["input_ids"]
        places = [_firsts(encoded.word_ids(number)) for number in range(len(rows))]
        result = {**encoded, "truncated": [len(ids) > self.source_length for ids in whole]}
        if "target" in batch:
            tags = zip(places, batch["target"], strict=True)
            result["labels"] = [[IGNORED if word < 0 else row[word] for word in words] for words, row in tags]
        return result if training else {**result, "words": places}

    def collator(self, model: nn.Module) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """Pad a batch to its longest row."""
        return lambda rows: padded_inputs(self.processor, rows, {"labels": IGNORED, "words": -1})

    def predict(self, model: nn.Module, batch: dict[str, Any]) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Return the loss, and for every token its likeliest tag and its word's number, shape ``(rows, length, 2)``."""
        outputs = model(**self.inputs(batch))
        return outputs.get("loss"), torch.stack([outputs["logits"].argmax(-1), batch["words"]], dim=-1)

    def answers(self, predictions: np.ndarray, rows: Dataset, numbers: np.ndarray) -> list[Any]:
        """Return a list of tags for every row; a word that was cut off, or that no token stands for, is outside of entities."""
        outside = OUTSIDE if OUTSIDE in self.task.labels else self.task.labels[0]
        found = []
        for words, tokens in zip(rows["tokens"], predictions, strict=True):
            tags = [outside] * len(words)
            for label, word in tokens[tokens[:, 1] >= 0]:
                tags[word] = self.task.labels[label]
            found.append(tags)
        return found

    def references(self, rows: Dataset) -> list[Any]:
        """Return the right tags of every row."""
        return [[self.task.labels[number] for number in tags] for tags in rows["target"]]


def _firsts(words: Sequence[int | None]) -> list[int]:
    """Return for every token the number of its word where it is the word's first, else -1."""
    previous = [None, *words]
    return [-1 if word is None or word == before else word for word, before in zip(words, previous, strict=False)]


def padded_inputs(processor: Any, rows: Sequence[dict[str, Any]], columns: dict[str, int]) -> dict[str, Any]:
    """Return a batch of what a tokenizer made, padded on its side.

    Args:
        processor: The tokenizer.
        rows: The features.
        columns: Further columns with a number for each token, and what they are filled up with.
    """
    names = {"input_ids", "attention_mask", "token_type_ids"}
    batch = dict(processor.pad([{n: v for n, v in row.items() if n in names} for row in rows], return_tensors="pt"))
    for name, value in columns.items():
        if name in rows[0]:
            batch[name] = padded([row[name] for row in rows], value, left=processor.padding_side == "left")
    if ROW in rows[0]:
        batch[ROW] = torch.tensor([row[ROW] for row in rows])
    return batch
