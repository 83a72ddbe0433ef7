"""The kinds of tasks: how rows become tensors, and how a model's answers become a metric."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import DatasetDict
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding

from deltaexp.lab.config import TaskConfig
from deltaexp.lab.tasks.data import TaskData, cached

IGNORED = -100
"""Label of a token that the loss leaves out."""


class Kind:
    """One kind of task for one config and tokenizer."""

    metric = ""
    """The metric that runs are compared by; higher is better."""
    generates = False
    """Whether an evaluation generates text."""

    def __init__(self, task: TaskConfig, tokenizer: Any) -> None:
        self.task, self.tokenizer = task, tokenizer

    def features(self, batch: dict[str, list]) -> dict[str, list]:
        """Turn a batch of rows into token ids and labels."""
        encoded = self.tokenizer(batch["text"], batch.get("text_pair"), truncation=True, max_length=self.task.max_source_length)
        return {**encoded, "labels": batch["target"]}

    def collator(self, model: Any) -> Any:
        """Return what makes padded batches."""
        raise TypeError(f"{type(self).__name__} has no collator.")

    def metrics(self, predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Measure predictions against labels."""
        raise TypeError(f"{type(self).__name__} has no metrics.")

    def tokenised(self, data: TaskData) -> DatasetDict:
        """Tokenise every split, once: the result is cached under the data, the tokenizer and the lengths."""
        vocabulary = repr(sorted(self.tokenizer.get_vocab().items()))
        key = {
            "data": data.fingerprint,
            "tokenizer": [type(self.tokenizer).__name__, hashlib.sha256(vocabulary.encode()).hexdigest()],
            "kind": type(self).__name__,
            "lengths": [self.task.max_source_length, self.task.max_target_length],
        }
        splits = cached(key, lambda: self._tokenise(data))
        data.truncated = {split: int(sum(rows["truncated"])) for split, rows in splits.items()}
        return splits.remove_columns("truncated")

    def _tokenise(self, data: TaskData) -> DatasetDict:
        def features(batch: dict[str, list]) -> dict[str, list]:
            result = self.features(batch)
            whole = self.tokenizer(batch["text"], batch.get("text_pair"), verbose=False)["input_ids"]
            result["truncated"] = [len(ids) > self.task.max_source_length for ids in whole]
            return result

        return DatasetDict(
            {
                # A fingerprint of our own: Hugging Face's would try to hash the tokenizer, and `cached` keeps the result.
                split: rows.map(
                    features, batched=True, remove_columns=rows.column_names, keep_in_memory=True, load_from_cache_file=False
                )
                for split, rows in data.splits.items()
            }
        )


class Classification(Kind):
    """One of several labels for a text or a pair of texts."""

    metric = "accuracy"

    def collator(self, model: Any) -> Any:
        """Pad a batch to its longest text."""
        return DataCollatorWithPadding(self.tokenizer)

    def metrics(self, predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Return accuracy, F1 (of class 1 where there are two, else macro) and Matthews' correlation."""
        answers = np.argmax(predictions[0] if isinstance(predictions, tuple) else predictions, axis=-1)
        average = "binary" if len(self.task.labels) == 2 else "macro"
        return {
            "accuracy": float(accuracy_score(labels, answers)),
            "f1": float(f1_score(labels, answers, average=average, zero_division=0)),
            "matthews_correlation": float(matthews_corrcoef(labels, answers)),
        }


class Seq2Seq(Kind):
    """Text to text."""

    metric = "exact_match"
    generates = True

    def features(self, batch: dict[str, list]) -> dict[str, list]:
        """Turn sources and targets into token ids."""
        targets = self.tokenizer(text_target=batch["target"], truncation=True, max_length=self.task.max_target_length)
        return {**super().features(batch), "labels": targets["input_ids"]}

    def collator(self, model: Any) -> Any:
        """Pad a batch to its longest source and target; padding of a target does not count in the loss."""
        return DataCollatorForSeq2Seq(self.tokenizer, model=model, label_pad_token_id=IGNORED)

    def metrics(self, predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Return the part of the answers that equal their targets, up to white space at the ends."""
        answers, targets = self.texts(predictions), self.texts(labels)
        return {"exact_match": float(np.mean([a == t for a, t in zip(answers, targets, strict=True)]))}

    def texts(self, ids: np.ndarray) -> Sequence[str]:
        """Decode token ids, without padding and special tokens."""
        padded = np.where(ids < 0, self.tokenizer.pad_token_id, ids)
        return [text.strip() for text in self.tokenizer.batch_decode(padded, skip_special_tokens=True)]


KINDS = {"classification": Classification, "seq2seq": Seq2Seq}
"""The kinds by the names that ``task.kind`` takes."""
