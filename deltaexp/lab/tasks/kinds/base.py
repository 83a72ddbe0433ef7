"""What every kind of task does: name its columns, make tensors of rows, and read answers from a model."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow
import pyarrow.compute
import tokenizers
import torch
import transformers
from datasets import Dataset, DatasetDict
from torch import nn

from deltaexp.lab.taskconfig import TaskConfig
from deltaexp.lab.tasks import metrics
from deltaexp.lab.tasks.cache import cached, mapped
from deltaexp.lab.tasks.columns import Spec
from deltaexp.lab.tasks.data import TaskData

IGNORED = -100
"""Label of a token that the loss leaves out."""
ROW = "row"
"""The column of a batch that says which rows of the split it holds; no model is given it."""


@dataclass
class Split:
    """One split of a task."""

    rows: Dataset
    """As the task has them, with the columns of `Kind.columns`."""
    features: Dataset
    """As the model is given them; in most kinds one for each row."""
    truncated: int
    """How many rows were cut to the longest length."""

    @functools.cached_property
    def lengths(self) -> list[int] | None:
        """How long each feature is, in tokens; None where features have no length."""
        if "input_ids" not in self.features.column_names:
            return None
        found: list[int] = []
        for batch in self.features.select_columns("input_ids").with_format("arrow").iter(1000):
            ids = batch["input_ids"].combine_chunks()
            if pyarrow.types.is_nested(ids.type.value_type):
                # Of a row that stands for several sequences, its first.
                found += [len(row[0]) if row else 0 for row in ids.to_pylist()]
            else:
                found += pyarrow.compute.list_value_length(ids).to_pylist()
        return found


class Kind:
    """One kind of task, for one task and one tokenizer.

    Args:
        task: The task, with the names of its labels where it has some.
        processor: The backbone's tokenizer, or its image processor.
        settings: The backbone's config.
        reserved: How many positions of the backbone the delta itself takes, as a soft prompt does.
    """

    usual_metrics: ClassVar[tuple[str, ...]] = ()
    """The metrics where the task names none; runs are compared by the first."""
    extra: ClassVar[tuple[str, ...]] = (ROW,)
    """What a batch holds that is not for the model's forward pass."""
    caches: ClassVar[bool] = True
    """Whether features are worth keeping on disk, or made when they are needed."""
    windows: ClassVar[bool] = False
    """Whether a row may become several features; then `features` also returns the column ``row``, counted within the batch."""
    processes: ClassVar[str] = "text"
    """What the backbone takes: ``text`` by a tokenizer or ``image`` by an image processor."""

    def __init__(self, task: TaskConfig, processor: Any, settings: Any, reserved: int = 0) -> None:
        self.task, self.processor, self.settings = task, processor, settings
        metrics.check(self.metrics)
        limit = position_limit(settings, processor)
        self.source_length = min(task.max_source_length, limit - reserved) if limit else task.max_source_length
        """Longest input in tokens, by the task or by the backbone, whichever is shorter."""

    @classmethod
    def auto_class(cls) -> Any:
        """Return the class of transformers that loads a backbone for this kind."""
        raise NotImplementedError

    @classmethod
    def model_options(cls, task: TaskConfig) -> dict[str, Any]:
        """Return what the backbone's config has to say for this task, such as the number of labels."""
        return {}

    @classmethod
    def columns(cls, task: TaskConfig) -> dict[str, Spec]:
        """Return the columns that rows have, each with the column or template that it is filled from."""
        found: dict[str, Spec] = dict(zip(("text", "text_pair"), task.inputs, strict=False))
        return {**found, "target": task.target, **extras(task)}

    @classmethod
    def asked(cls, task: TaskConfig) -> dict[str, Spec]:
        """Return the columns that an answer needs: those of `columns` without the target and what only metrics read."""
        return {name: spec for name, spec in cls.columns(task).items() if name not in ("target", "references", "group")}

    @classmethod
    def labelled(cls, splits: dict[str, Dataset], task: TaskConfig) -> tuple[dict[str, Dataset], list[str], list[str]]:
        """Check the targets; return the splits with classes as numbers, the classes' names, and sentences on what is odd."""
        return splits, list(task.labels), []

    @property
    def metric(self) -> str:
        """The name of the number that runs are compared by."""
        return metrics.main(self.metrics)

    @property
    def metrics(self) -> list[str]:
        """The names of the metrics."""
        return list(self.task.metrics or self.usual_metrics)

    @property
    def greater_is_better(self) -> bool:
        """Whether a higher value of the main metric is the better one."""
        return metrics.greater_is_better(self.metric)

    def features(self, batch: dict[str, list], training: bool) -> dict[str, list]:
        """Turn a batch of rows into what the model is given, and ``truncated``: whether a row was cut.

        Args:
            batch: Lists by column. Without the column ``target`` the rows are only to be answered, and get no labels.
            training: Whether the rows are trained on; rows to measure may need more.
        """
        raise NotImplementedError

    def collator(self, model: nn.Module) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """Return what makes a padded batch of features."""
        raise NotImplementedError

    def inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return the part of a batch that the model's forward pass takes."""
        return {name: value for name, value in batch.items() if name not in self.extra and value is not None}

    def predict(self, model: nn.Module, batch: dict[str, Any]) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Return the mean loss on a batch (None without targets), and what `answers` reads answers from, batch first."""
        outputs = model(**self.inputs(batch))
        return outputs.get("loss"), outputs["logits"]

    def answers(self, predictions: np.ndarray, rows: Dataset, numbers: np.ndarray) -> list[Any]:
        """Return one plain answer for each row: a number, a text or a list.

        Args:
            predictions: What `predict` returned, for all features.
            rows: The rows that they are about.
            numbers: For every prediction the number of its row.
        """
        raise NotImplementedError

    def references(self, rows: Dataset) -> list[Any]:
        """Return what answers are compared with, one for each row."""
        return list(rows["references" if "references" in rows.column_names else "target"])

    def shown(self, answer: Any) -> Any:
        """Return an answer as it is written for people, such as a label's name."""
        return answer

    def scores(self, predictions: np.ndarray, numbers: np.ndarray) -> list[dict[str, float]] | None:
        """Return for every row the probability of each answer by name; None where the kind knows of none.

        Args:
            predictions: As in `answers`.
            numbers: As in `answers`.
        """
        return None

    def measure(self, answers: Sequence[Any], rows: Dataset) -> dict[str, float]:
        """Return the metrics of answers to rows."""
        groups = list(rows["group"]) if "group" in rows.column_names else None
        return metrics.compute(self.metrics, answers, self.references(rows), groups=groups, labels=self.task.labels)

    def splits(self, data: TaskData) -> dict[str, Split]:
        """Return every split with its features, made once: they are cached under the data, the processor and the task."""
        key = {
            "data": data.fingerprint,
            "processor": fingerprint(self.processor),
            "kind": [type(self).__name__, code(type(self)), *sorted(data.splits)],
            "versions": [transformers.__version__, tokenizers.__version__],
            "task": self.cache_key(),
        }
        if self.caches:
            features: Mapping[str, Dataset] = cached(key, lambda: self._features(data))
        else:
            features = self._features(data)
        found = {}
        for split, rows in data.splits.items():
            table = features[split]
            cut = 0
            if "truncated" in table.column_names:
                cut = sum(sum(batch["truncated"]) for batch in table.select_columns("truncated").iter(1000))
            drop = ["truncated", *([ROW] if split == "train" else [])]
            found[split] = Split(rows, table.remove_columns([name for name in drop if name in table.column_names]), cut)
        return found

    def unlabelled(self, rows: Dataset) -> Split:
        """Return rows with the columns of `asked`, and their features, which are not kept anywhere."""
        made = self.features(rows[:], training=False)
        cut = int(np.sum(made.pop("truncated", 0)))
        made.setdefault(ROW, list(range(len(rows))))
        return Split(rows, Dataset.from_dict(made), cut)

    def cache_key(self) -> Any:
        """Return all of the task that features depend on."""
        task = self.task
        return [
            self.source_length, task.max_target_length, task.separator, task.labels, task.verbalizer, task.packing,
            task.doc_stride,
        ]  # fmt: skip

    def _features(self, data: TaskData) -> DatasetDict:
        made = {}
        for split, rows in data.splits.items():
            training = split == "train"

            def features(batch: dict[str, list], numbers: list[int], training: bool = training) -> dict[str, list]:
                result = self.features(batch, training)
                within = result.pop(ROW, range(len(numbers)))
                return {**result, ROW: [numbers[number] for number in within]}

            # A fingerprint of our own: Hugging Face's would try to hash the tokenizer, and `cached` keeps the result.
            made[split] = mapped(
                rows, features, batched=True, with_indices=True, remove_columns=rows.column_names, desc=f"tokenising {split}"
            )
        return DatasetDict(made)


def extras(task: TaskConfig) -> dict[str, Spec]:
    """Return the columns that only metrics read."""
    wanted = {"references": task.references, "group": task.group}
    return {name: spec for name, spec in wanted.items() if spec}


def fingerprint(processor: Any) -> list[str]:
    """Return what features depend on of a tokenizer or an image processor."""
    if hasattr(processor, "get_vocab"):
        state = [
            sorted(processor.get_vocab().items()), getattr(processor, "chat_template", None), processor.padding_side,
            processor.truncation_side, processor.special_tokens_map,
        ]  # fmt: skip
        backend = getattr(processor, "backend_tokenizer", None)
        if backend is not None:
            # Merges, normaliser, pre-tokenizer, special tokens around a text. How it pads and cuts is set by each call.
            whole = json.loads(backend.to_str())
            state.append({name: value for name, value in whole.items() if name not in ("padding", "truncation")})
        else:
            plain = (str, int, float, bool, type(None))
            state.append({name: value for name, value in processor.init_kwargs.items() if isinstance(value, plain)})
    else:
        state = processor.to_dict() if hasattr(processor, "to_dict") else vars(processor)
    return [type(processor).__name__, hashlib.sha256(json.dumps(state, sort_keys=True, default=repr).encode()).hexdigest()]


def code(kind: type) -> str:
    """Return a digest of the modules in which a kind and those it builds on are written: other code makes other features."""
    return _sources(tuple(sorted({base.__module__ for base in kind.__mro__ if base is not object})))


@functools.cache
def _sources(modules: tuple[str, ...]) -> str:
    return hashlib.sha256("\0".join(inspect.getsource(sys.modules[name]) for name in modules).encode()).hexdigest()


def position_limit(settings: Any, processor: Any = None) -> int | None:
    """Return how many tokens a backbone takes at most; None where its positions have no end.

    Args:
        settings: Its config.
        processor: Its tokenizer, which may know of a lower limit.
    """
    settings = getattr(settings, "text_config", None) or settings
    limits = []
    for name in ("max_position_embeddings", "n_positions"):
        found = getattr(settings, name, None)
        if isinstance(found, int) and found > 0:
            # The family of RoBERTa counts positions from behind the padding's number.
            offset = settings.pad_token_id + 1 if settings.model_type in COUNTED_FROM_PADDING else 0
            limits.append(found - offset)
    relative = hasattr(settings, "relative_attention_num_buckets") or getattr(settings, "relative_attention", False)
    if relative and settings.model_type not in ("mpnet",):
        limits = []  # positions are relative: the tokenizer's number is what it was trained on, not an end
    longest = getattr(processor, "model_max_length", None)
    if not relative and isinstance(longest, int) and 0 < longest < 1_000_000:
        limits.append(longest)
    return min(limits, default=None)


COUNTED_FROM_PADDING = ("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "longformer", "mpnet", "data2vec-text")
"""Model types whose first position has the number of the padding token plus one."""
