"""Plain text for decoders: learnt row by row or in packed blocks, measured over the whole text of a split."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
import transformers
from datasets import Dataset, DatasetDict, Features, List, Value
from torch import nn

from deltaexp.errors import TaskError
from deltaexp.lab.taskconfig import TaskConfig
from deltaexp.lab.tasks.cache import mapped
from deltaexp.lab.tasks.columns import Spec
from deltaexp.lab.tasks.data import TaskData
from deltaexp.lab.tasks.kinds.base import IGNORED, ROW, Kind
from deltaexp.lab.tasks.kinds.text import likelihood, padded_sequences

END = "{eos}"
"""What stands in ``task.separator`` for the tokenizer's end of a text."""
LOGITS = 2**27
"""How many logits are computed at once where likelihoods are measured, at most: half a gibibyte in float32."""


class CausalLM(Kind):
    """Plain text, by a decoder.

    Rows are joined by ``task.separator`` into one text where they are packed and where they are measured; a row that ends in
    the separator gets no second one. Measured are windows of the backbone's length that overlap by one token, so that every
    token of the text is predicted exactly once, the first of a window from its neighbour alone (as lm-evaluation-harness's
    rolling log-likelihood does).
    """

    usual_metrics = ("perplexity", "bits_per_byte")
    extra: ClassVar[tuple[str, ...]] = (ROW,)

    @classmethod
    def auto_class(cls) -> Any:
        """Return the class of decoders."""
        return transformers.AutoModelForCausalLM

    @classmethod
    def columns(cls, task: TaskConfig) -> dict[str, Spec]:
        """Return the text."""
        return {"text": task.inputs[0]}

    @classmethod
    def labelled(cls, splits: dict[str, Dataset], task: TaskConfig) -> tuple[dict[str, Dataset], list[str], list[str]]:
        """Check that there is text, and say which rows are left out."""
        notes = []
        for split, rows in splits.items():
            texts = (text for batch in rows.select_columns("text").iter(1000) for text in batch["text"])
            empty = 0
            for number, text in enumerate(texts):
                if not isinstance(text, str):
                    raise TaskError(f"Row {number} of the split {split!r} of task {task.name!r} is no text: {text!r:.80}.")
                empty += not text
            if empty == len(rows):
                raise TaskError(f"All {empty} rows of the split {split!r} of task {task.name!r} are empty.")
            if empty and split == "train" and not task.packing:
                notes.append(f"{empty:,} empty rows of the training split are left out; task.packing=true keeps them")
        return splits, [], notes

    def text(self, rows: Iterable[str]) -> str:
        """Return rows joined by the separator."""
        separator = self.task.separator.replace(END, self.processor.eos_token or "")
        parts: list[str] = []
        for row in rows:
            if parts and separator and not parts[-1].endswith(separator):
                parts[-1] += separator
            parts.append(row)
        return "".join(parts)

    def stream(self, rows: Iterable[str]) -> np.ndarray:
        """Return the tokens of a whole text, after one that begins it, shape ``(tokens + 1,)``."""
        ids = self.processor(self.text(rows), add_special_tokens=False, verbose=False)["input_ids"]
        return np.asarray([self.begin, *ids], dtype=np.int32)

    @property
    def begin(self) -> int:
        """The token from which the first of a text is predicted."""
        begins = self.processor.bos_token_id
        return begins if begins is not None else self.processor.eos_token_id

    def features(self, batch: dict[str, list], training: bool) -> dict[str, list]:
        """Turn rows into token ids, each a text of its own; what is trained on ends with the end of a text."""
        rows, cut = [], []
        end = [self.processor.eos_token_id] if training else []
        numbers = [n for n, text in enumerate(batch["text"]) if text or not training]
        encoded = self.processor([batch["text"][n] for n in numbers], add_special_tokens=False, verbose=False)["input_ids"]
        for ids in encoded:
            whole = [self.begin, *ids, *end]
            rows.append(whole[: self.source_length])
            cut.append(len(whole) > self.source_length)
        return {"input_ids": rows, "labels": rows, "truncated": cut, ROW: numbers}

    def _features(self, data: TaskData) -> DatasetDict:
        made: dict[str, Dataset] = {}
        plain = {split: rows for split, rows in data.splits.items() if split == "train" and not self.task.packing}
        if plain:
            made |= super()._features(TaskData(plain, data.fingerprint))
        for split, rows in data.splits.items():
            if split in plain:
                continue
            if split == "train":
                made[split] = blocks(rows, functools.partial(self._piece, len(rows)), self.source_length, self.task.name)
            else:
                windows = overlapping(self.stream(rows["text"]), self.source_length)
                made[split] = Dataset.from_dict({"input_ids": windows, "labels": windows, ROW: list(range(len(windows)))})
        return DatasetDict({split: made[split] for split in data.splits})

    def _piece(self, count: int, batch: dict[str, list], numbers: list[int]) -> dict[str, np.ndarray]:
        """Return the tokens of some of the ``count`` rows of a text, each to be predicted."""
        # A piece ends in the separator where another follows.
        more = [""] if numbers[-1] + 1 < count else []
        stream = self.stream([*batch["text"], *more])[0 if numbers[0] == 0 else 1 :]
        return {"input_ids": stream, "labels": stream}

    def collator(self, model: nn.Module) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """Pad a batch to its longest row, at the ends."""
        return lambda rows: padded_sequences(rows, self.processor.pad_token_id)

    def predict(self, model: nn.Module, batch: dict[str, Any]) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Return no loss (`measure` has that of the whole text), and log-likelihood and tokens, shape ``(rows, 2)``."""
        inputs = self.inputs(batch)
        labels = inputs.pop("labels")
        settings: Any = model.config
        vocabulary = getattr(settings, "text_config", None) or settings
        rows: int = max(1, LOGITS // (self.source_length * vocabulary.vocab_size))
        found = []
        for start in range(0, len(labels), rows):
            part = {name: value[start : start + rows] for name, value in inputs.items()}
            total, tokens = likelihood(model(**part)["logits"], labels[start : start + rows], shifted=True)
            found.append(torch.stack([-total, tokens.float()], dim=-1))
        return None, torch.cat(found)

    def answers(self, predictions: np.ndarray, rows: Dataset, numbers: np.ndarray) -> list[Any]:
        """Return for every window of the text its negative log-likelihood, in nats, and the number of its tokens."""
        return [[float(total), int(tokens)] for total, tokens in predictions]

    def shown(self, answer: Any) -> Any:
        """Return the negative log-likelihood in nats and the number of tokens by name."""
        return {"negative_log_likelihood": answer[0], "tokens": answer[1]}

    def references(self, rows: Dataset) -> list[Any]:
        """Return the length of the text in bytes."""
        return [len(self.text(rows["text"]).encode())]

    def measure(self, answers: Sequence[Any], rows: Dataset) -> dict[str, float]:
        """Return the mean loss of all tokens, and the metrics."""
        total, tokens = np.sum(np.asarray(answers, dtype=np.float64), axis=0)
        return {"loss": float(total / tokens), **super().measure(answers, rows)}


def overlapping(stream: np.ndarray, length: int) -> list[np.ndarray]:
    """Return windows of at most ``length`` tokens, each beginning with the last token of the one before."""
    step: int = max(1, length - 1)
    return [stream[start : start + step + 1] for start in range(0, len(stream) - 1, step)]


def blocks(
    rows: Dataset, columns: Callable[[dict[str, list], list[int]], dict[str, np.ndarray]], length: int, name: str
) -> Dataset:
    """Return rows joined into one long sequence and cut into blocks of equal length; the rest is left out.

    A thousand rows are made into tokens at a time, so that the set may be larger than memory. What of them is shorter than a
    block begins the next one.

    Args:
        rows: The rows.
        columns: Makes of some rows, of which it gets the columns and the numbers, ``input_ids`` and ``labels`` of every token.
        length: Of a block, in tokens.
        name: The task's name, for an error.

    Raises:
        TaskError: If there are fewer tokens than in one block.
    """
    left: dict[str, np.ndarray] = {}
    tokens = 0

    def cut(batch: dict[str, list], numbers: list[int]) -> dict[str, list]:
        nonlocal left, tokens
        new = columns(batch, numbers)
        tokens += len(new["input_ids"])
        whole = {column: np.concatenate([left[column], values]) if left else values for column, values in new.items()}
        end = len(whole["input_ids"]) // length * length
        left = {column: values[end:].copy() for column, values in whole.items()}
        made = {column: values[:end].reshape(-1, length) for column, values in whole.items()}
        learnt = (made["labels"] != IGNORED).any(axis=1)  # a block without anything to learn would only cost time
        return {column: list(values[learnt]) for column, values in made.items()}

    made = mapped(
        rows, cut, batched=True, with_indices=True, remove_columns=rows.column_names, desc="packing",
        features=Features({column: List(Value("int32")) for column in ("input_ids", "labels")}),
    )  # fmt: skip
    if tokens < length:
        raise TaskError(
            f"The training split of task {name!r} has {tokens} tokens, fewer than one block of {length}. Make "
            "task.max_source_length smaller, or set task.packing=false."
        )
    return made
