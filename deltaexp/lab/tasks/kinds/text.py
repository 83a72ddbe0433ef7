"""Kinds that a language model answers as text: text to text, and labels or choices of which the likeliest is taken."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
import transformers
from datasets import Dataset
from torch import nn
from torch.nn import functional
from transformers import DataCollatorForSeq2Seq
from transformers.modeling_outputs import BaseModelOutput

from deltaexp.errors import ConfigError
from deltaexp.lab import taskconfig
from deltaexp.lab.taskconfig import TaskConfig
from deltaexp.lab.tasks.columns import Spec
from deltaexp.lab.tasks.kinds.base import IGNORED, ROW, Kind, extras
from deltaexp.lab.tasks.kinds.labels import numbered

Batch = dict[str, torch.Tensor]


def prompt(task: TaskConfig, named: bool = False) -> str:
    """Return the template of a task's input as one text.

    Args:
        task: The task.
        named: Whether to write the task's name, and each column's before its text, as the T5 paper does.
    """
    if task.prompt is not None:
        return task.prompt
    parts = []
    for spec in task.inputs:
        plain = not taskconfig.fields_of(spec)
        parts.append((f"{spec}: " if named and plain else "") + (f"{{{spec}}}" if plain else spec))
    return " ".join([*([task.name] if named else []), *parts])


def likelihood(logits: torch.Tensor, labels: torch.Tensor, shifted: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the log-likelihood of each row's labels and how many there are, shapes ``(rows,)``.

    Args:
        logits: Shape ``(rows, length, vocabulary)``.
        labels: Shape ``(rows, length)``; what is `IGNORED` does not count.
        shifted: Whether the logits at a position are those of the token after it, as in decoders.
    """
    if shifted:
        logits, labels = logits[:, :-1], labels[:, 1:]
    losses = functional.cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
    return -losses.sum(-1), (labels != IGNORED).sum(-1)


class Text(Kind):
    """Text to text, by an encoder-decoder."""

    usual_metrics: ClassVar[tuple[str, ...]] = ("exact_match",)
    extra: ClassVar[tuple[str, ...]] = (ROW,)
    shifted: ClassVar[bool] = False
    """Whether labels are the input itself, moved by one."""

    @classmethod
    def auto_class(cls) -> Any:
        """Return the class of encoder-decoders."""
        return transformers.AutoModelForSeq2SeqLM

    @classmethod
    def columns(cls, task: TaskConfig) -> dict[str, Spec]:
        """Return the prompt as one text, and the target."""
        plain = task.inputs[0] if len(task.inputs) == 1 and task.prompt is None else prompt(task)
        return {"text": plain, "target": task.target, **extras(task)}

    def encode(self, texts: Sequence[str], targets: Sequence[str] | None) -> dict[str, list]:
        """Return the features of sources with their targets, where there are any."""
        encoded = self.processor(list(texts), truncation=True, max_length=self.source_length)
        whole = self.processor(list(texts), verbose=False)["input_ids"]
        result = {
            "input_ids": encoded["input_ids"],
            "attention_mask": encoded["attention_mask"],
            "truncated": [len(ids) > self.source_length for ids in whole],
        }
        if targets is not None:
            ends = self.processor(text_target=list(targets), truncation=True, max_length=self.task.max_target_length)
            result["labels"] = ends["input_ids"]
        return result

    def features(self, batch: dict[str, list], training: bool) -> dict[str, list]:
        """Turn sources and targets into token ids."""
        return self.encode(batch["text"], [str(target) for target in batch["target"]] if "target" in batch else None)

    def collator(self, model: nn.Module) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """Pad a batch to its longest source and target; padding of a target does not count in the loss."""
        return DataCollatorForSeq2Seq(self.processor, model=model, label_pad_token_id=IGNORED)

    def predict(self, model: nn.Module, batch: dict[str, Any]) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Return the loss, and the tokens of a generated answer for every row."""
        inputs = self.inputs(batch)
        source: dict[str, Any] = {name: value for name, value in inputs.items() if name in ("input_ids", "attention_mask")}
        if "labels" not in inputs:
            return None, self.generate(model, source)
        outputs = model(**inputs)
        loss, encoded = outputs.get("loss"), outputs.get("encoder_last_hidden_state")
        # It need not be computed again, but where a decoder asks which experts the encoder has taken.
        if encoded is not None and not hasattr(outputs, "encoder_router_logits"):
            source["encoder_outputs"] = BaseModelOutput(last_hidden_state=encoded)
        del outputs, encoded
        return loss, self.generate(model, source)

    def ends(self, settings: Any) -> list[int]:
        """Return the tokens that end an answer: the model's own, else the tokenizer's.

        Args:
            settings: The model's generation config.
        """
        own = settings.eos_token_id if settings.eos_token_id is not None else self.processor.eos_token_id
        return list(own) if isinstance(own, (list, tuple)) else [own]

    def generate(self, model: nn.Module, source: Mapping[str, Any]) -> torch.Tensor:
        """Return generated tokens, shape ``(rows, length)``."""
        plain: Any = getattr(model, "module", model)  # of a model that is wrapped for several processes
        settings = copy.deepcopy(plain.generation_config)
        settings.update(
            max_new_tokens=self.task.max_target_length, max_length=None, num_beams=self.task.num_beams, do_sample=False,
            temperature=None, top_k=None, top_p=None, pad_token_id=self.processor.pad_token_id,
            eos_token_id=self.ends(settings),
        )  # fmt: skip
        return plain.generate(**source, generation_config=settings)

    def answers(self, predictions: np.ndarray, rows: Dataset, numbers: np.ndarray) -> list[Any]:
        """Return the generated texts, without padding and special tokens."""
        padded = np.where(predictions < 0, self.processor.pad_token_id, predictions)
        return [text.strip() for text in self.processor.batch_decode(padded, skip_special_tokens=True)]


class DecoderText(Text):
    """Text to text, by a decoder: the source, the separator and the target in one sequence, the loss on the target only."""

    shifted = True
    extra: ClassVar[tuple[str, ...]] = (ROW, "prompt_ids", "prompt_mask")

    def __init__(self, task: TaskConfig, processor: Any, settings: Any, reserved: int = 0) -> None:
        super().__init__(task, processor, settings, reserved + task.max_target_length)
        if self.source_length < 1:
            raise ConfigError(
                f"The backbone takes {self.source_length + task.max_target_length} tokens, which task.max_target_length="
                f"{task.max_target_length} uses up; make it smaller."
            )

    @classmethod
    def auto_class(cls) -> Any:
        """Return the class of decoders."""
        return transformers.AutoModelForCausalLM

    def source(self, texts: Sequence[str]) -> tuple[list[list[int]], list[bool]]:
        """Return the tokens of sources with the separator behind them, and whether they were cut for it."""
        tokenizer = self.processor
        ends = tokenizer(self.task.separator, add_special_tokens=False)["input_ids"] if self.task.separator else []
        found, cut = [], []
        for ids in tokenizer(list(texts), verbose=False)["input_ids"]:
            # Some tokenizers end each text; the answer is still to come.
            kept = ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids
            cut.append(len(kept) + len(ends) > self.source_length)
            found.append(kept[: max(0, self.source_length - len(ends))] + ends)
        return found, cut

    def end(self, text: str) -> list[int]:
        """Return the tokens of an answer, with the one that ends it."""
        ids = self.processor(text, add_special_tokens=False)["input_ids"]
        return [*ids[: self.task.max_target_length - 1], self.processor.eos_token_id]

    def encode(self, texts: Sequence[str], targets: Sequence[str] | None) -> dict[str, list]:
        """Return the features of sources with their targets, where there are any."""
        sources, cut = self.source(texts)
        if targets is None:
            return {"input_ids": sources, "truncated": cut}
        ends = [self.end(target) for target in targets]
        return {
            "input_ids": [source + end for source, end in zip(sources, ends, strict=True)],
            "labels": [[IGNORED] * len(source) + end for source, end in zip(sources, ends, strict=True)],
            "truncated": cut,
        }

    def features(self, batch: dict[str, list], training: bool) -> dict[str, list]:
        """Turn sources and targets into token ids; rows to measure also have the source alone."""
        result = super().features(batch, training)
        if not training:
            result["prompt_ids"] = self.source(batch["text"])[0]
        return result

    def collator(self, model: nn.Module) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """Pad a batch at the ends; sources alone at their beginnings, as what is generated goes on from their ends."""
        pad = self.processor.pad_token_id

        def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
            batch = padded_sequences(rows, pad)
            if "prompt_ids" in rows[0]:
                batch["prompt_ids"] = padded([row["prompt_ids"] for row in rows], pad, left=True)
                ones = [[1] * len(row["prompt_ids"]) for row in rows]
                batch["prompt_mask"] = padded(ones, 0, left=True)
            return batch

        return collate

    def predict(self, model: nn.Module, batch: dict[str, Any]) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Return the loss, and the tokens of a generated answer for every row."""
        inputs = self.inputs(batch)
        loss = model(**inputs).get("loss") if "labels" in inputs else None
        length = batch["prompt_ids"].shape[1]
        source = {"input_ids": batch["prompt_ids"], "attention_mask": batch["prompt_mask"]}
        return loss, self.generate(model, source)[:, length:]


def padded(rows: Sequence[Sequence[int]], value: int, left: bool = False) -> torch.Tensor:
    """Return lists as one tensor, shape ``(rows, longest)``."""
    longest = max(map(len, rows))
    filled = [
        [value] * (longest - len(row)) + list(row) if left else list(row) + [value] * (longest - len(row)) for row in rows
    ]
    return torch.tensor(filled, dtype=torch.long)


def padded_sequences(rows: Sequence[dict[str, Any]], pad: int) -> dict[str, Any]:
    """Return a batch of token ids and labels, padded at the ends, with the mask of what is no padding."""
    batch: dict[str, Any] = {"input_ids": padded([row["input_ids"] for row in rows], pad)}
    batch["attention_mask"] = padded([[1] * len(row["input_ids"]) for row in rows], 0)
    if "labels" in rows[0]:
        batch["labels"] = padded([row["labels"] for row in rows], IGNORED)
    if ROW in rows[0]:
        batch[ROW] = torch.tensor([row[ROW] for row in rows])
    return batch


class Ranking(Kind):
    """Answers to choose from, of which the likeliest is taken; trained on the right one as text to text."""

    extra: ClassVar[tuple[str, ...]] = (ROW, "counts", "right")
    per_token: ClassVar[bool] = False
    """Whether likelihoods are divided by the number of tokens, so that short answers are not preferred."""

    def candidates(self, batch: dict[str, list]) -> list[list[str]]:
        """Return the answers that each row has to choose from."""
        raise NotImplementedError

    def right(self, batch: dict[str, list]) -> list[int]:
        """Return the number of each row's right answer."""
        return batch["target"]

    def features(self, batch: dict[str, list], training: bool) -> dict[str, list]:
        """Turn sources with the right answer, or with each of the answers, into token ids."""
        text: Any = self  # which is a Text as well
        choices = self.candidates(batch)
        if training:
            targets = [options[right] for options, right in zip(choices, self.right(batch), strict=True)]
            return text.encode(batch["text"], targets)
        counts = [len(options) for options in choices]
        sources = [source for source, count in zip(batch["text"], counts, strict=True) for _ in range(count)]
        flat = text.encode(sources, [option for options in choices for option in options])
        starts = np.cumsum([0, *counts])
        result = {name: [values[start:end] for start, end in itertools.pairwise(starts)] for name, values in flat.items()}
        result["truncated"] = [any(cut) for cut in result["truncated"]]
        return {**result, "right": self.right(batch)} if "target" in batch else result

    def collator(self, model: nn.Module) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """Pad a batch, in which a row to measure stands once for each of its answers."""
        plain = super().collator(model)
        per_row = ("right", ROW)

        def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
            if not isinstance(rows[0]["input_ids"][0], (list, tuple)):
                return plain(rows)
            names = [name for name in rows[0] if name not in per_row]
            flat = [{name: row[name][n] for name in names} for row in rows for n in range(len(row["input_ids"]))]
            batch = dict(plain(flat))
            batch["counts"] = torch.tensor([len(row["input_ids"]) for row in rows])
            return batch | {name: torch.tensor([row[name] for row in rows]) for name in per_row if name in rows[0]}

        return collate

    def predict(self, model: nn.Module, batch: dict[str, Any]) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Return the loss of the right answers, and the number of the likeliest answer of every row, shape ``(rows,)``."""
        text: Any = self
        inputs = self.inputs(batch)
        total, tokens = likelihood(model(**inputs)["logits"], inputs["labels"], text.shifted)
        scores = (total / tokens.clamp(min=1) if self.per_token else total).split(batch["counts"].tolist())
        chosen = torch.stack([row.argmax() for row in scores])
        if "right" not in batch:
            return None, chosen
        starts = batch["counts"].cumsum(0) - batch["counts"]
        right = starts + batch["right"]
        return -total[right].sum() / tokens[right].sum(), chosen

    def answers(self, predictions: np.ndarray, rows: Dataset, numbers: np.ndarray) -> list[Any]:
        """Return the number of the likeliest answer of every row."""
        return [int(number) for number in predictions]


class Labels(Ranking, Text):
    """One of several labels, each by a word, by an encoder-decoder."""

    usual_metrics = ("accuracy", "f1", "matthews_correlation")

    @classmethod
    def columns(cls, task: TaskConfig) -> dict[str, Spec]:
        """Return the prompt, with names of task and columns if the task has no template, and the label."""
        return {"text": prompt(task, named=True), "target": task.target, **extras(task)}

    @classmethod
    def labelled(cls, splits: dict[str, Dataset], task: TaskConfig) -> tuple[dict[str, Dataset], list[str], list[str]]:
        """Make numbers of labels."""
        splits, labels, notes = numbered(splits, task)
        if task.verbalizer and len(task.verbalizer) != len(labels):
            raise ConfigError(f"task.verbalizer has {len(task.verbalizer)} words, and the data have {len(labels)} labels.")
        return splits, labels, notes

    def candidates(self, batch: dict[str, list]) -> list[list[str]]:
        """Return the word for each label."""
        words = list(self.task.verbalizer or self.task.labels)
        return [words] * len(batch["text"])

    def shown(self, answer: Any) -> Any:
        """Return the label's name."""
        return self.task.labels[answer]


class DecoderLabels(Labels, DecoderText):
    """One of several labels, each by a word, by a decoder."""
