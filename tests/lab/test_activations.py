"""Activations on disk: found by a text's tokens, made once, whole or not at all, within their bounds."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset

from deltaexp.lab.activations import FILE, Folder, Known, Texts, computed

ROWS = [[5, 6, 7], [5, 6], [8, 9, 5, 6], [5, 6], [7]]


def texts() -> Texts:
    return Texts.of(Dataset.from_dict({"input_ids": ROWS, "token_type_ids": [[0] * len(row) for row in ROWS]}))


def sums(tokens: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return for every token its id and its place."""
    ids = tokens["input_ids"]
    return torch.stack([ids.float(), torch.arange(ids.shape[1]).expand_as(ids).float()], dim=-1)


def known() -> Known:
    result, found = Known(), texts()
    values = torch.empty(found.tokens, 2)
    for start, part in computed(found, sums, torch.device("cpu")):
        values[start : start + len(part)] = part
    result.add(found, values)
    return result


def inputs(*rows: list[int], left: bool = False) -> dict[str, torch.Tensor]:
    longest = max(map(len, rows))
    pad = [[0] * (longest - len(row)) for row in rows]
    ids = torch.tensor([p + row if left else row + p for row, p in zip(rows, pad, strict=True)])
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "token_type_ids": torch.zeros_like(ids)}


def test_texts_are_there_once_and_in_order() -> None:
    found = texts()
    assert [row[0].tolist() for row in found.rows] == [[5, 6, 7], [5, 6], [8, 9, 5, 6], [7]]
    assert found.tokens == 10
    assert found.digest() == texts().digest()
    assert found.digest() != Texts.of(Dataset.from_dict({"input_ids": ROWS})).digest()
    several = Texts.of(Dataset.from_dict({"input_ids": [[[1, 2], [3]], [[3], [4]]]}))
    assert [row[0].tolist() for row in several.rows] == [[1, 2], [3], [4]]


def test_a_batch_is_found_whatever_its_padding() -> None:
    store = known()
    for rows in ([[7], [5, 6]], [[5, 6], [8, 9, 5, 6], [7]]):
        batch = inputs(*rows)
        found = store.find(batch)
        assert found is not None
        assert torch.equal(found, sums(batch) * batch["attention_mask"][..., None])
    whole = inputs([5, 6])
    assert store.find({name: whole[name] for name in ("input_ids", "token_type_ids")}) is not None


def test_what_is_not_known_is_not_found() -> None:
    store = known()
    assert store.find(inputs([5, 6], [6, 5])) is None
    assert store.find(inputs([5, 6], [5, 6, 7], left=True)) is None
    batch = inputs([5, 6])
    assert store.find({**batch, "token_type_ids": torch.ones_like(batch["input_ids"])}) is None
    assert store.find({"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}) is None
    assert store.find({**batch, "attention_mask": batch["attention_mask"][:, None]}) is None


def test_batches_are_of_similar_length_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deltaexp.lab.activations.BATCH_TOKENS", 4)
    shapes = []

    def compute(tokens: dict[str, torch.Tensor]) -> torch.Tensor:
        shapes.append(tuple(tokens["input_ids"].shape))
        return sums(tokens)

    assert sorted(start for start, _ in computed(texts(), compute, torch.device("cpu"))) == [0, 3, 5, 9]
    assert shapes == [(2, 2), (1, 3), (1, 4)]


def parts(calls: list[int]) -> Iterator[tuple[int, torch.Tensor]]:
    calls.append(1)
    yield 2, torch.ones(2, 3)
    yield 0, torch.zeros(2, 3)


def test_are_made_once(tmp_path: Path) -> None:
    folder, calls = Folder(10**6, tmp_path), []
    for _ in range(2):
        values = folder.get({"a": 1}, (4, 3), torch.float32, lambda: parts(calls))
        assert values[:, 0].tolist() == [0.0, 0.0, 1.0, 1.0]
    assert len(calls) == 1
    place = next(tmp_path.glob(f"*/{FILE}"))
    place.write_bytes(place.read_bytes()[:8])  # what is not whole is made anew
    folder.get({"a": 1}, (4, 3), torch.float32, lambda: parts(calls))
    folder.get({"a": 2}, (4, 3), torch.bfloat16, lambda: parts(calls))
    assert len(calls) == 3
    with pytest.raises(RuntimeError, match="half"):
        folder.get({"a": 3}, (4, 3), torch.float32, lambda: broken())
    assert len(list(tmp_path.glob(f"*/{FILE}"))) == 2
    assert not list(tmp_path.glob(".making*"))


def broken() -> Iterator[tuple[int, torch.Tensor]]:
    yield 0, torch.zeros(2, 3)
    raise RuntimeError("half")


def test_the_longest_unused_make_room(tmp_path: Path) -> None:
    for number in range(3):
        Folder(10**6, tmp_path).get({"a": number}, (4, 3), torch.float32, lambda: parts([]))
    ages = dict(zip(sorted(p.parent.name for p in tmp_path.glob(f"*/{FILE}")), (300, 100, 200), strict=True))
    for name, age in ages.items():
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    folder = Folder(3 * 48, tmp_path)
    values = folder.get({"a": 9}, (4, 3), torch.float32, lambda: parts([]))
    left = {path.parent.name for path in tmp_path.glob(f"*/{FILE}")}
    assert {name for name, age in ages.items() if age < 300} < left
    assert len(left) == 3
    # What a run uses itself stays, and who has it open keeps it.
    folder.get({"a": 10}, (12, 3), torch.float32, lambda: parts([]))
    assert len(list(tmp_path.glob(f"*/{FILE}"))) == 2
    assert np.array_equal(values[:, 0], [0, 0, 1, 1])
