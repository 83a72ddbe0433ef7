"""What the shipped tasks do to their rows before columns are chosen: functions for ``task.prepare``.

Each takes a `datasets.Dataset` and the task's config and returns a `datasets.Dataset`; a function of one's own, in a file named
as ``FILE.py:function``, does the same.
"""

from __future__ import annotations

import re
from typing import Any

from datasets import Dataset

from deltaexp.errors import TaskError
from deltaexp.lab.taskconfig import TaskConfig, fields_of
from deltaexp.lab.tasks.cache import mapped

STARTS = {
    "a", "an", "the", "this", "that", "these", "those", "he", "she", "it", "they", "we", "you", "his", "her", "its", "their",
    "my", "our", "your", "there", "someone", "somebody", "everyone",
}  # fmt: skip
"""Words that begin a sentence with a capital and have none inside of one."""


def nonempty(rows: Dataset, task: TaskConfig) -> Dataset:
    """Take out rows in which an input or the target is missing or nothing but white space."""
    wanted = [column for spec in (*task.inputs, task.target) if spec for column in fields_of(spec) or [spec]]
    columns = [column for column in wanted if column in rows.column_names]

    def filled(*values: Any) -> bool:
        return all(value is not None and (not isinstance(value, str) or bool(value.strip())) for value in values)

    return rows.filter(filled, input_columns=columns, **QUIET) if columns else rows


def wic(rows: Dataset, task: TaskConfig) -> Dataset:
    """Mark the word in both sentences of WiC with asterisks, where the data say that it stands."""

    def mark(row: dict[str, Any]) -> dict[str, Any]:
        return {
            f"sentence{n}": _marked(row[f"sentence{n}"], row[f"start{n}"], row[f"end{n}"], "*", "*") for n in (1, 2)
        }  # fmt: skip

    _need(rows, task, "sentence1", "sentence2", "start1", "end1", "start2", "end2")
    return mapped(rows, mark)


def wsc(rows: Dataset, task: TaskConfig) -> Dataset:
    """Mark the noun of a Winograd schema as ``* noun *`` and the pronoun as ``# pronoun #``.

    These are the marks of T5 (Raffel et al., 2020, section 2.3). The data count words between single spaces.
    """

    def mark(row: dict[str, Any]) -> dict[str, Any]:
        spans = [(row["span1_index"], row["span1_text"], "*"), (row["span2_index"], row["span2_text"], "#")]
        text = row["text"]
        for index, span, sign in sorted(spans, reverse=True):  # from behind, so that the first still stands where it stood
            start = _place_of_word(text, index)
            found = re.compile(re.escape(span), re.IGNORECASE).match(text, start)
            # Where the data's own words differ from the text, as many whole words.
            end = found.end() if found else _place_of_word(text, index + len(span.split())) - 1
            text = _marked(text, start, end, f"{sign} ", f" {sign}")
        return {"text": text}

    _need(rows, task, "text", "span1_index", "span1_text", "span2_index", "span2_text")
    return mapped(rows, mark)


def copa(rows: Dataset, task: TaskConfig) -> Dataset:
    """End the premise of COPA with "because" or "so", and begin the choices in small letters, as they go on from it."""

    def join(row: dict[str, Any]) -> dict[str, Any]:
        link = {"cause": "because", "effect": "so"}[row["question"]]
        return {
            "premise": f"{row['premise'].strip().rstrip('.')} {link}",
            "choice1": _inside(row["choice1"]),
            "choice2": _inside(row["choice2"]),
        }

    _need(rows, task, "premise", "choice1", "choice2", "question")
    return mapped(rows, join)


def record(rows: Dataset, task: TaskConfig) -> Dataset:
    """Add to each row of ReCoRD the column ``label``: which of its entities is an answer, the first of them if several are.

    Entities and answers are named once each. Rows without an answer among the entities, such as those of the test split, are
    taken out. Highlights, which follow the passage as ``@highlight`` and a line each, become sentences of it.
    """

    def number(row: dict[str, Any]) -> dict[str, Any]:
        entities = list(dict.fromkeys(row["entities"]))
        answers = list(dict.fromkeys(row["answers"]))
        places = [entities.index(answer) for answer in answers if answer in entities]
        ended = re.sub(r"(?<![.?!\"'])\n@highlight\n", ". ", row["passage"])
        return {
            "entities": entities,
            "answers": answers,
            "passage": ended.replace("\n@highlight\n", " "),
            "label": places[0] if places else -1,
        }

    _need(rows, task, "passage", "query", "entities", "answers")
    return mapped(rows, number).filter(lambda label: label >= 0, input_columns="label", **QUIET)


QUIET: dict[str, Any] = {"keep_in_memory": True, "load_from_cache_file": False}
"""Which rows are kept is noted in memory, eight bytes each."""


def _need(rows: Dataset, task: TaskConfig, *columns: str) -> None:
    missing = [column for column in columns if column not in rows.column_names]
    if missing:
        raise TaskError(
            f"{task.prepare} needs the columns {', '.join(columns)}; the data of task {task.name!r} lack {', '.join(missing)}. "
            "For other data, choose a function of your own or task.prepare=null."
        )


def _marked(text: str, start: int, end: int, before: str, after: str) -> str:
    return f"{text[:start]}{before}{text[start:end]}{after}{text[end:]}"


def _place_of_word(text: str, index: int) -> int:
    """Return where the word with this number begins, one behind the end of the text where there are no more."""
    return sum(len(word) + 1 for word in text.split(" ")[:index])


def _inside(sentence: str) -> str:
    first, _, _ = sentence.partition(" ")
    return sentence[:1].lower() + sentence[1:] if first.lower() in STARTS else sentence
