"""Instructions and conversations, rendered by a chat template; learnt is what the assistant says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from torch import nn

from deltaexp.errors import TaskError, unknown
from deltaexp.lab.taskconfig import TaskConfig
from deltaexp.lab.tasks.cache import mapped
from deltaexp.lab.tasks.columns import Spec
from deltaexp.lab.tasks.data import TaskData
from deltaexp.lab.tasks.kinds.base import IGNORED, Kind, extras
from deltaexp.lab.tasks.kinds.language import blocks
from deltaexp.lab.tasks.kinds.text import DecoderText, Text

TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}{{ message['content'] + '\n\n' }}"
    "{%- elif message['role'] == 'user' -%}{{ '### Instruction:\n' + message['content'] + '\n\n' }}"
    "{%- else -%}{{ '### Response:\n' + message['content'] + eos_token }}"
    "{%- if not loop.last -%}{{ '\n\n' }}{%- endif -%}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '### Response:\n' }}{%- endif -%}"
)
"""The chat template where a tokenizer has none, in the manner of Alpaca (Taori et al., 2023)."""
ROLES = ("system", "user", "assistant")
NAMES = {"human": "user", "gpt": "assistant"}
"""Other names of roles, in data of the form of ShareGPT, whose keys are ``from`` and ``value``."""
Message = dict[str, str]


@dataclass
class Part:
    """A piece of a rendered conversation."""

    text: str
    answer: bool
    """Whether the assistant says it."""


class Chat(Kind):
    """What both architectures do with conversations: rows to messages, messages to text."""

    @classmethod
    def columns(cls, task: TaskConfig) -> dict[str, Spec]:
        """Return the messages; or instruction, input and target."""
        if not task.inputs:
            return {"messages": task.target, **extras(task)}
        found: dict[str, Spec] = dict(zip(("text", "text_pair"), task.inputs, strict=False))
        return {**found, "target": task.target, **extras(task)}

    @classmethod
    def labelled(cls, splits: dict[str, Dataset], task: TaskConfig) -> tuple[dict[str, Dataset], list[str], list[str]]:
        """Check that every row has an answer to learn."""
        notes, found = [], {}
        for split, rows in splits.items():
            later = 0
            for number, row in enumerate(rows):
                try:
                    turns = conversation(row)
                except ValueError as error:
                    raise TaskError(f"Row {number} of the split {split!r} of task {task.name!r}: {error}") from error
                if not _answered(turns):
                    raise TaskError(
                        f"Row {number} of the split {split!r} of task {task.name!r} has nothing that the assistant says, so "
                        "there is nothing to learn from it. Take such rows out, by a function in task.prepare."
                    )
                later += len(turns) > len(_answered(turns))
            if later:
                notes.append(f"{later:,} rows of {split} go on after the last answer, which is left out")
                rows = mapped(
                    rows, lambda row: {"turns": _answered(conversation(row))}, remove_columns="messages", desc="messages"
                ).rename_column("turns", "messages")
            found[split] = rows
        return found, [], notes

    def parts(self, turns: Sequence[Message]) -> list[Part]:
        """Return a conversation as text, in pieces; where its last turn is no answer, the answer is to come.

        Raises:
            TaskError: If the chat template refuses it, or writes it in a way that does not tell where an answer begins.
        """
        text = self.rendered(turns, prompt=turns[-1]["role"] != "assistant")
        found, place = [], 0
        for number, turn in enumerate(turns):
            if turn["role"] != "assistant":
                continue
            before = self.rendered(turns[:number], prompt=True)
            alone = self.rendered(turns[: number + 1], prompt=False)
            end = len(alone)
            if not text.startswith(alone) or not alone.startswith(before):
                # Some templates write an answer otherwise once more turns follow (Qwen 3 drops what was thought): then it is
                # the content with what the template puts behind it.
                content = turn["content"].strip()
                at = alone.rfind(content)
                closed = content + alone[at + len(content) :]
                end = len(before) + len(closed)
                if at < 0 or not text.startswith(before + closed):
                    raise TaskError(
                        f"The chat template of the backbone's tokenizer ({type(self.processor).__name__}) writes a turn "
                        "otherwise once more turns follow, so that it does not tell where an answer begins and ends. Split "
                        "conversations into rows of one answer each, by a function in task.prepare, or take another tokenizer."
                    )
            found += [Part(text[place : len(before)], False), Part(text[len(before) : end], True)]
            place = end
        return [*found, Part(text[place:], False)] if place < len(text) else found

    def rendered(self, messages: Sequence[Message], prompt: bool) -> str:
        """Return a conversation as one text, with the beginning of an answer if ``prompt``."""
        own = None if self.processor.chat_template else TEMPLATE
        try:
            text = self.processor.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=prompt, chat_template=own
            )
        except Exception as error:  # templates raise what they like, such as for turns that do not alternate
            if not messages:
                return ""
            raise TaskError(
                f"The chat template of the backbone's tokenizer refuses a conversation with the turns "
                f"{', '.join(message['role'] for message in messages)}: {error}"
            ) from error
        return str(text)

    def references(self, rows: Dataset) -> list[Any]:
        """Return the last answer of every row, or its references."""
        if "references" in rows.column_names:
            return list(rows["references"])
        return [next(m["content"] for m in reversed(conversation(row)) if m["role"] == "assistant") for row in rows]


def conversation(row: dict[str, Any]) -> list[Message]:
    """Return a row as messages.

    Raises:
        ValueError: If it has none, or one without a known role or without text.
    """
    if "text" in row:
        asked = [text for text in (row["text"], row.get("text_pair")) if text]
        answer = [{"role": "assistant", "content": str(row["target"])}] if row.get("target") is not None else []
        return [{"role": "user", "content": "\n\n".join(asked)}, *answer]
    messages = row["messages"]
    if isinstance(messages, dict):  # as some versions of `datasets` keep a list of structs
        messages = [dict(zip(messages, values, strict=True)) for values in zip(*messages.values(), strict=True)]
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        raise ValueError(f"it has no list of messages with role and content: {messages!r:.120}")
    found = []
    for message in messages:
        role = message.get("role") or message.get("from")
        role = NAMES.get(str(role), str(role))
        content = message.get("content", message.get("value"))
        if role not in ROLES:
            raise ValueError(unknown("role of a message", role, ROLES))
        if not isinstance(content, str):
            raise ValueError(f"a message has no text: {message!r:.120}")
        found.append({"role": role, "content": content})
    return found


def _answered(turns: list[Message]) -> list[Message]:
    """Return a conversation up to its last answer."""
    last = max((number for number, turn in enumerate(turns) if turn["role"] == "assistant"), default=-1)
    return turns[: last + 1]


def _joined(batch: dict[str, list], numbers: list[int]) -> dict[str, np.ndarray]:
    """Return what belongs to every token of some rows, one row after the other."""
    return {name: np.concatenate([np.asarray(ids, np.int32) for ids in batch[name]]) for name in ("input_ids", "labels")}


def rows_of(batch: dict[str, list]) -> list[dict[str, Any]]:
    """Return a batch as rows."""
    return [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]


class Instruction(Chat, DecoderText):
    """Conversations, by a decoder: the loss on all that the assistant says, evaluated by writing the last answer."""

    usual_metrics = ()

    def features(self, batch: dict[str, list], training: bool) -> dict[str, list]:
        """Turn conversations into token ids; of one that is too long the beginning is cut off."""
        found: dict[str, list] = {"input_ids": [], "labels": [], "truncated": []}
        prompts = []
        answered = True
        for row in rows_of(batch):
            turns = conversation(row)
            ids: list[int] = []
            labels: list[int] = []
            pieces = self.parts(turns)
            answered &= pieces[-1].answer
            starts: int | None = None
            cut = False
            for number, part in enumerate(pieces):
                tokens = self.processor(part.text, add_special_tokens=False, verbose=False)["input_ids"]
                if number == 0:
                    tokens = [*self.beginning(), *tokens]
                if number == len(pieces) - 1 and part.answer:
                    starts, cut = len(ids), len(tokens) > self.task.max_target_length
                    tokens = tokens[: self.task.max_target_length]
                ids += tokens
                labels += tokens if part.answer else [IGNORED] * len(tokens)
            starts = len(ids) if starts is None else starts
            over = max(0, starts - self.source_length)
            found["input_ids"].append(ids[over:])
            found["labels"].append(labels[over:])
            found["truncated"].append(cut or over > 0)
            prompts.append(ids[over:starts])
        if not answered:
            found.pop("labels")
        return found if training else {**found, "prompt_ids": prompts}

    def beginning(self) -> list[int]:
        """Return what the tokenizer puts before every text, where no chat template of its own does."""
        if self.processor.chat_template:
            return []
        ids = self.processor("")["input_ids"]
        return ids[:1] if ids and ids[0] == self.processor.bos_token_id != self.processor.eos_token_id else []

    def _features(self, data: TaskData) -> DatasetDict:
        made = super()._features(data)
        if not self.task.packing or "train" not in made:
            return made
        return DatasetDict({**made, "train": blocks(made["train"], _joined, self.source_length, self.task.name)})

    def predict(self, model: nn.Module, batch: dict[str, Any]) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Return the loss on what the assistant says, and the tokens of a generated last answer."""
        if self.metrics or self.task.save_predictions or "labels" not in batch:
            return super().predict(model, batch)
        # Nobody asked for the answers, which take far longer than the loss.
        return model(**self.inputs(batch))["loss"], batch["prompt_ids"][:, :0]

    def ends(self, settings: Any) -> list[int]:
        """Return the tokens that end an answer: the model's own, the tokenizer's, and what the template ends a turn with."""
        found = super().ends(settings)
        content = "The answer."
        shown = self.parts([{"role": "user", "content": "A question?"}, {"role": "assistant", "content": content}])[-1].text
        tail = self.processor(shown[shown.rfind(content) + len(content) :], add_special_tokens=False)["input_ids"]
        return sorted({*found, *(token for token in tail[:1] if token in self.processor.all_special_ids)})


class InstructionText(Chat, Text):
    """Conversations, by an encoder-decoder: all before the last answer in, the last answer out."""

    usual_metrics = ()

    def features(self, batch: dict[str, list], training: bool) -> dict[str, list]:
        """Turn conversations into sources and targets."""
        sources, targets = [], []
        for row in rows_of(batch):
            turns = conversation(row)
            if turns[-1]["role"] == "assistant":
                targets.append(turns.pop()["content"])
            sources.append(self.rendered(turns, prompt=True))
        return self.encode(sources, targets if len(targets) == len(sources) else None)
