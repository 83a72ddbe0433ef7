"""Rows of a file one after the other, as dicts, with no more of the file in memory than is being looked at.

csv and tsv are read as text, tsv without quotes, as GLUE's is; json is a list of objects, or one object a line. Nothing in this
module imports torch.
"""

from __future__ import annotations

import csv
import json
import os
import queue
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from deltaexp.errors import ConfigError, TaskError, listing

Row = dict[str, Any]
FORMATS = (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".txt")
STDIN = "-"
PATIENCE = 0.05
"""Seconds for which a batch that has a row waits for the next one of standard input."""
LONGEST = 16 * 1024 * 1024
"""Characters of the longest field of csv."""


def check(place: str) -> None:
    """Check that rows can be read from a place.

    Raises:
        ConfigError: If there is no such file, or it is not of a known format.
    """
    if place == STDIN:
        return
    path = Path(place).expanduser()
    if not path.is_file():
        raise ConfigError(f"There is no file {place!r} to read rows from; input=- reads JSON lines from standard input.")
    if path.suffix not in FORMATS:
        raise ConfigError(f"input={place!r} is not of a known format; known are {listing(FORMATS)}, and - for standard input.")


def rows(place: str, column: str | None = None, size: int = 1000) -> Iterator[Row]:
    """Yield the rows of a file, or of standard input.

    Args:
        place: The file, or ``-`` for JSON lines from standard input.
        column: The column that a line of a txt file is.
        size: How many rows of a parquet file are read at once.

    Raises:
        ConfigError: If a txt file is given and it is not known which column its lines are.
        TaskError: If a row cannot be read.
    """
    if place == STDIN:
        yield from _json_lines(_stdin(), "standard input")
        return
    path = Path(place).expanduser()
    if path.suffix == ".parquet":
        yield from _parquet(path, size)
        return
    if path.suffix == ".txt" and column is None:
        raise ConfigError(
            "A txt file has one text a line, and the task's input is more than one column. Take csv or JSON lines."
        )
    with path.open(encoding="utf-8-sig", newline="" if path.suffix in (".csv", ".tsv") else None) as file:
        try:
            if path.suffix == ".txt":
                for line in file:
                    yield {str(column): line.rstrip("\n")}
            elif path.suffix in (".csv", ".tsv"):
                yield from _csv(file, place, path.suffix == ".tsv")
            else:
                yield from _json(file, place)
        except UnicodeDecodeError as error:
            raise TaskError(f"{place!r} is no text in UTF-8: {error.reason} at byte {error.start}.") from error


def _stdin() -> TextIO:
    """Return standard input under a handle of its own: a thread may still be reading from it when Python ends."""
    try:
        return os.fdopen(os.dup(sys.stdin.fileno()), encoding="utf-8")
    except OSError:  # it is no file, as in a notebook
        return sys.stdin


def _csv(file: TextIO, place: str, tabs: bool) -> Iterator[Row]:
    csv.field_size_limit(LONGEST)
    reader = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE) if tabs else csv.DictReader(file)
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise TaskError(f"Line {reader.line_num} of {place!r} cannot be read: {error}.") from error
        if row is None:
            return
        if None in row or None in row.values():
            raise TaskError(
                f"Line {reader.line_num} of {place!r} has {'more' if None in row else 'fewer'} fields than there are columns "
                f"({listing(reader.fieldnames or [])})."
            )
        yield dict(row)


def _json(file: TextIO, place: str) -> Iterator[Row]:
    start = file.read(1)
    while start.isspace():
        start = file.read(1)
    file.seek(0)
    if start != "[":
        yield from _json_lines(file, repr(place))
        return
    try:
        values = json.load(file)  # a list of JSON is one value, which is read whole
    except ValueError as error:
        raise TaskError(f"{place!r} is no JSON: {error}.") from error
    for number, value in enumerate(values, 1):
        yield _object(value, f"Entry {number} of {place!r}")


def _json_lines(file: TextIO, name: str) -> Iterator[Row]:
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                value = json.loads(line)
            except ValueError as error:
                raise TaskError(f"Line {number} of {name} is no JSON: {error}.") from error
            yield _object(value, f"Line {number} of {name}")


def _object(value: Any, what: str) -> Row:
    if not isinstance(value, dict):
        raise TaskError(f'{what} is no object with columns, which looks like {{"column": "text"}}.')
    return value


def _parquet(path: Path, size: int) -> Iterator[Row]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=size):
                yield from batch.to_pylist()
    except pa.ArrowInvalid as error:
        raise TaskError(f"{str(path)!r} is no parquet file that can be read: {error}.") from error


def batches(source: Iterator[Row], size: int, waiting: bool = False) -> Iterator[list[Row]]:
    """Yield rows in batches, none of them empty.

    Args:
        source: The rows.
        size: Rows in a batch.
        waiting: Whether rows come when somebody sends them: then a batch does not wait to be full.

    Raises:
        TaskError: If a row cannot be read, after the batches before it.
    """
    if waiting:
        yield from _arriving(source, size)
        return
    batch: list[Row] = []
    fault: list[BaseException] = []
    for row in _until_fault(source, fault):
        batch.append(row)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
    if fault:
        raise fault[0]


def _until_fault(source: Iterator[Row], fault: list[BaseException]) -> Iterator[Row]:
    """Yield rows up to one that cannot be read: those before it are answered first."""
    try:
        yield from source
    except TaskError as error:
        fault.append(error)


def _arriving(source: Iterator[Row], size: int) -> Iterator[list[Row]]:
    """Yield batches of what has arrived, read by a thread of its own."""
    arrived: queue.Queue[tuple[Row | None, BaseException | None]] = queue.Queue(maxsize=2 * size)

    def take() -> None:
        fault: BaseException | None = None
        try:
            for row in source:
                arrived.put((row, None))
        except BaseException as error:
            fault = error
        arrived.put((None, fault))

    threading.Thread(target=take, daemon=True).start()
    ended = False
    while not ended:
        batch: list[Row] = []
        fault: BaseException | None = None
        while len(batch) < size and not ended:
            try:
                row, fault = arrived.get(timeout=PATIENCE if batch else None)
            except queue.Empty:
                break
            if row is None:
                ended = True
            else:
                batch.append(row)
        if batch:
            yield batch
        if fault is not None:
            raise fault
