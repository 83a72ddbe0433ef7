"""Answers as JSON lines, one for each row, and files that are written whole or not at all."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from datasets import Dataset

from deltaexp.lab.tasks.kinds import Kind
from deltaexp.lab.writing import write_whole

PREDICTIONS = "predictions.jsonl"
METRICS_ONLY = ("target", "references", "group")
"""Columns of a task's rows that are no part of the input."""


def described(kind: Kind, answer: Any) -> dict[str, Any]:
    """Return an answer as people read it, ``prediction``, and where that is another thing ``prediction_number``."""
    shown = kind.shown(answer)
    return {"prediction": shown} | ({"prediction_number": answer} if isinstance(answer, int) and shown != answer else {})


def lines(kind: Kind, rows: Dataset, answers: Sequence[Any]) -> Iterator[dict[str, Any]]:
    """Yield for every row of a split its number, input, answer and what that was compared with.

    Args:
        kind: How the answers were made.
        rows: The rows, with the columns of ``kind.columns``.
        answers: One for each row.
    """
    if len(answers) != len(rows):  # the split is measured as one text, in windows
        yield from ({"window": number, **described(kind, answer)} for number, answer in enumerate(answers))
        return
    inputs = [name for name in rows.column_names if name not in METRICS_ONLY]
    measured = {"target", "references"} & set(rows.column_names)
    references = kind.references(rows) if measured else [None] * len(rows)
    for number, (answer, reference) in enumerate(zip(answers, references, strict=True)):
        row = rows[number]
        line = {"row": number, "inputs": {name: row[name] for name in inputs if _is_text(row[name])}}
        line |= described(kind, answer)
        if measured:
            shown = reference if "references" in rows.column_names else kind.shown(reference)
            line |= {"reference": shown}
            line |= {"reference_number": reference} if isinstance(reference, int) and shown != reference else {}
            line |= {"group": row["group"]} if "group" in rows.column_names else {}
        yield line


def dumped(line: Mapping[str, Any]) -> str:
    """Return a line of JSON, without its end; what JSON does not know is written as text."""
    return json.dumps(line, ensure_ascii=False, default=_as_text)


def _is_text(value: Any) -> bool:
    """Say whether a value is one that JSON knows, unlike an image."""
    if isinstance(value, Mapping):
        return all(map(_is_text, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(_is_text, value))
    return value is None or isinstance(value, (str, int, float, datetime.date, datetime.time))


def _as_text(value: Any) -> Any:
    if isinstance(value, bytes):
        return f"{len(value):,} bytes"
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def write(path: Path, kind: Kind, rows: Dataset, answers: Sequence[Any]) -> None:
    """Write the answers to a split, all of them or nothing."""
    write_lines(path, map(dumped, lines(kind, rows, answers)))


def write_lines(path: Path, texts: Iterable[str]) -> None:
    """Write lines into a file, all of them or nothing."""

    def fill(file: IO[str]) -> None:
        for text in texts:
            file.write(text + "\n")

    write_whole(path, fill)
