"""Tokenised data on disk: made once, whole or not at all, shared by runs, cleared when nobody uses it."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict, load_from_disk
from small import byte_tokenizer
from transformers import T5Config

from deltaexp.lab.taskconfig import TaskConfig
from deltaexp.lab.tasks import cache
from deltaexp.lab.tasks.kinds import base
from deltaexp.lab.tasks.kinds.text import DecoderText, Text


def make(values: int = 3) -> DatasetDict:
    return DatasetDict(train=Dataset.from_dict({"x": list(range(values))}))


def test_who_makes_the_same_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELTAEXP_CACHE", str(tmp_path))
    together = threading.Barrier(3)

    def slowly() -> DatasetDict:
        together.wait(timeout=60)  # all three find nothing, and are done at the same time
        return make()

    def ask(number: int) -> list[int]:
        return cache.cached({"a": 1}, slowly)["train"]["x"][:]

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(ask, range(3))) == [[0, 1, 2]] * 3
    assert len(list((tmp_path / "tokenised").iterdir())) == 1


def test_what_cannot_be_read_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELTAEXP_CACHE", str(tmp_path))
    cache.cached({"a": 1}, make)
    (kept,) = (tmp_path / "tokenised").iterdir()
    (file,) = kept.glob("train/*.arrow")
    file.write_bytes(file.read_bytes()[:100])
    assert cache.cached({"a": 1}, make)["train"]["x"][:] == [0, 1, 2]
    assert [path.name for path in (tmp_path / "tokenised").iterdir()] == [kept.name]
    assert cache.cached({"a": 1}, lambda: pytest.fail("it is there"))["train"]["x"][:] == [0, 1, 2]


def test_what_nobody_uses_is_cleared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELTAEXP_CACHE", str(tmp_path))
    held = cache.cached({"a": 1}, make)
    (kept,) = (tmp_path / "tokenised").iterdir()
    os.utime(kept, (1e9, 1e9))
    cache.cached({"a": 1}, make)  # used again
    cache.cached({"a": 2}, make)
    assert kept.exists()
    os.utime(kept, (1e9, 1e9))
    cache.cached({"a": 3}, make)
    assert not kept.exists()
    assert held["train"]["x"][:] == [0, 1, 2]  # who has it open keeps it


def test_what_is_made_of_many_rows_lies_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELTAEXP_CACHE", str(tmp_path))
    rows = Dataset.from_dict({"x": list(range(2500))})
    few = rows.select(range(10))
    monkeypatch.setattr(cache, "LARGE", rows.data.nbytes - 1)

    def double(batch: dict[str, list]) -> dict[str, list]:
        return {"y": [2 * x for x in batch["x"]]}

    small, large = (cache.mapped(part, double, batched=True, remove_columns="x") for part in (few, rows))
    assert not small.cache_files
    assert large.cache_files
    assert not any(path.is_file() for path in tmp_path.rglob("*"))  # its room is free when nobody uses it any more
    assert small["y"][:] == list(range(0, 20, 2))
    assert large["y"][:] == list(range(0, 5000, 2))
    # What one does with rows works, though their file has no name.
    assert sorted(large.shuffle(seed=0).select(range(2500))["y"]) == large["y"][:]
    again = cache.mapped(large, lambda batch: {"z": batch["y"]}, batched=True)
    large.save_to_disk(str(tmp_path / "saved"))
    assert again["z"][:] == load_from_disk(str(tmp_path / "saved"))["y"][:] == large["y"][:]


def test_the_key_tells_tokenizers_and_code_apart() -> None:
    first, second = byte_tokenizer(), byte_tokenizer()
    plain = base.fingerprint(first)
    first(["abc", "d"], truncation=True, max_length=2, padding=True)
    assert base.fingerprint(first) == base.fingerprint(second) == plain  # how it was called last does not matter
    second.truncation_side = "left"
    assert base.fingerprint(second) != plain
    assert base.fingerprint(byte_tokenizer(ends=True)) != plain
    assert base.fingerprint(byte_tokenizer(chat=True)) != plain
    lengths = [
        Text(TaskConfig(name="t", kind="seq2seq", inputs=["a"], target="b", data="d", **change), first, T5Config()).cache_key()
        for change in ({}, {"max_source_length": 5}, {"max_target_length": 5}, {"labels": ["a"]}, {"separator": ""})
    ]
    assert len({repr(key) for key in lengths}) == len(lengths)
    assert base.code(Text) == base.code(DecoderText)  # of one module
    from deltaexp.lab.tasks.kinds.heads import Classification

    assert base.code(Text) != base.code(Classification)
