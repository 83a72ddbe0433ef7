"""Rows of files of every format, batches of them, and what is said of those that cannot be read."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from datasets import Dataset

from deltaexp.errors import ConfigError, TaskError
from deltaexp.lab import reading

ROWS = [{"text": 'say "hi"', "more": "1"}, {"text": "über, all", "more": "2"}, {"text": "c", "more": "3"}]


def write(path: Path) -> Path:
    match path.suffix:
        case ".parquet":
            Dataset.from_list(ROWS).to_parquet(str(path))
        case ".csv":
            Dataset.from_list(ROWS).to_csv(str(path))
        case ".tsv":
            path.write_text("\n".join("\t".join(row) for row in [["text", "more"], *(row.values() for row in ROWS)]), "utf-8")
        case ".json":
            path.write_text("\n " + json.dumps(ROWS), "utf-8")
        case ".jsonl":
            path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS), "utf-8")
        case ".txt":
            path.write_text("\n".join(row["text"] for row in ROWS) + "\n", "utf-8")
    return path


@pytest.mark.parametrize("suffix", reading.FORMATS)
def test_every_format(suffix: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"rows{suffix}")
    reading.check(str(path))
    found = list(reading.rows(str(path), "text", size=2))
    assert found == ([{"text": row["text"]} for row in ROWS] if suffix == ".txt" else ROWS)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": \n', "Line 2 of .*is no JSON"),
        ("a.jsonl", '{"text": "a"}\n["b"]\n', "Line 2 of .*is no object with columns"),
        ("a.json", '[{"text": "a"}, 5]', "Entry 2 of"),
        ("a.json", "[1, 2", "is no JSON"),
        ("a.csv", "text,more\na,b,c\n", r"Line 2 of .* has more fields than there are columns \(text, more\)"),
        ("a.tsv", "text\tmore\na\tb\nc\n", "Line 3 of .* has fewer fields"),
        ("a.parquet", "text", "is no parquet file"),
    ],
)
def test_what_cannot_be_read(name: str, text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(TaskError, match=says):
        list(reading.rows(str(tmp_path / name)))


def test_places_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "a.xlsx").touch()
    (tmp_path / "a.txt").touch()
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "\xff"}')
    with pytest.raises(ConfigError, match="There is no file"):
        reading.check(str(tmp_path / "b.csv"))
    with pytest.raises(ConfigError, match=r"not of a known format; known are \.csv"):
        reading.check(str(tmp_path / "a.xlsx"))
    with pytest.raises(ConfigError, match="more than one column"):
        list(reading.rows(str(tmp_path / "a.txt")))
    with pytest.raises(TaskError, match="no text in UTF-8"):
        list(reading.rows(str(tmp_path / "a.jsonl")))


def test_no_more_is_read_than_is_looked_at() -> None:
    read = []

    def source() -> Iterator[dict]:
        for number in range(10):
            read.append(number)
            yield {"n": number}

    found = reading.batches(source(), 4)
    assert [row["n"] for row in next(found)] == [0, 1, 2, 3]
    assert len(read) == 4
    assert [len(batch) for batch in found] == [4, 2]


@pytest.mark.parametrize("waiting", [False, True])
def test_rows_before_one_that_cannot_be_read_are_there(waiting: bool) -> None:
    def source() -> Iterator[dict]:
        yield {"n": 0}
        raise TaskError("no row")

    found = reading.batches(source(), 4, waiting)
    assert next(found) == [{"n": 0}]
    with pytest.raises(TaskError, match="no row"):
        next(found)


def test_what_arrives_does_not_wait_for_a_full_batch() -> None:
    asked = threading.Event()

    def source() -> Iterator[dict]:
        yield {"n": 0}
        assert asked.wait(60)  # nothing more comes until the first row has been answered
        yield from ({"n": number} for number in range(1, 6))

    found = reading.batches(source(), 3, waiting=True)
    assert next(found) == [{"n": 0}]
    asked.set()
    assert [row["n"] for batch in found for row in batch] == [1, 2, 3, 4, 5]
