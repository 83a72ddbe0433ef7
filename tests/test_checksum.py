"""Digests: what changes them, what does not, and what is said to differ."""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaexp import checksum
from deltaexp.checksum import TensorDigest, compare, digests, file_sha256, model_md5, tensor_digest


@pytest.mark.parametrize(("algorithm", "library"), [("blake3", blake3), ("sha256", hashlib.sha256)])
def test_a_digest_is_that_of_the_bytes(algorithm: str, library: Callable) -> None:
    tensor, data = torch.tensor([[1.0, -2.5], [0.0, 3.0]]), struct.pack("<4f", 1, -2.5, 0, 3)
    digest = tensor_digest(tensor, algorithm)
    assert digest == TensorDigest("float32", (2, 2), library(data).hexdigest(), algorithm)
    assert digest.to_dict() == {"dtype": "float32", "shape": [2, 2], algorithm: library(data).hexdigest()}
    assert TensorDigest.from_dict(digest.to_dict()) == digest
    with pytest.raises(KeyError):
        TensorDigest.from_dict({"dtype": "float32", "shape": [2, 2], "md5": "ab"})
    large = torch.randn(3, checksum.SMALL // 8)  # several threads hash it
    tensors = {"large": large, "part": large[1], "small": tensor}
    assert digests(tensors, algorithm) == {name: tensor_digest(value, algorithm) for name, value in tensors.items()}
    assert digests(tensors, algorithm)["part"].value == library(large[1].numpy().tobytes()).hexdigest()
    assert compare(digests(tensors), digests(tensors, algorithm)).value == ([] if algorithm == "blake3" else list(tensors))


@pytest.mark.parametrize("cores", [None, 1, 5])
def test_any_number_of_cores(cores: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {str(number): torch.randn(checksum.SMALL // 8) for number in range(3)}
    expected = {name: tensor_digest(value) for name, value in tensors.items()}
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert digests(tensors) == expected


def test_what_goes_wrong_in_another_thread_is_raised() -> None:
    meta = torch.zeros(checksum.SMALL, device="meta")
    with pytest.raises((RuntimeError, NotImplementedError)):
        digests({"meta": meta, "other": torch.zeros(checksum.SMALL)})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool, torch.uint8])
def test_dtypes(dtype: torch.dtype) -> None:
    value = torch.tensor([0, 1, 1]).to(dtype)
    assert tensor_digest(value).dtype == str(dtype).removeprefix("torch.")
    assert tensor_digest(value) == tensor_digest(value.clone())
    assert tensor_digest(value) != tensor_digest(torch.tensor([0, 1, 0]).to(dtype))
    assert tensor_digest(value) != tensor_digest(torch.tensor([0, 1, 1]).to(torch.float32))


def test_only_the_value_counts() -> None:
    value = torch.arange(12.0).reshape(3, 4)
    view = torch.arange(24.0).reshape(3, 8)[:, :4].clone().T.contiguous().T
    assert not view.is_contiguous()
    value = view.contiguous()
    assert tensor_digest(view) == tensor_digest(value) == tensor_digest(torch.nn.Parameter(value))
    assert tensor_digest(value.reshape(4, 3)) != tensor_digest(value)
    assert tensor_digest(value.T) != tensor_digest(value)
    assert tensor_digest(torch.tensor(0.0)) != tensor_digest(torch.tensor(-0.0))
    assert tensor_digest(torch.tensor(float("nan"))) == tensor_digest(torch.tensor(float("nan")))
    assert tensor_digest(torch.zeros(0, 3)) != tensor_digest(torch.zeros(3, 0))
    assert tensor_digest(torch.tensor(1.0)).shape == ()


def test_the_md5_of_a_model() -> None:
    tensors = {"b": torch.ones(2), "a": torch.zeros(3, dtype=torch.bfloat16)}
    found = digests(tensors)
    lines = [f"{name}\t{d.dtype}\t{','.join(map(str, d.shape))}\t{d.value}\n" for name, d in sorted(found.items())]
    assert model_md5(found) == hashlib.md5("".join(lines).encode()).hexdigest()
    assert model_md5(digests(dict(reversed(tensors.items())))) == model_md5(found)
    assert model_md5(digests(iter(tensors.items()))) == model_md5(found)
    assert model_md5(digests({"b": tensors["b"], "c": tensors["a"]})) != model_md5(found)
    assert model_md5(digests({"b": tensors["b"]})) != model_md5(found)
    assert model_md5({}) == hashlib.md5(b"").hexdigest()


def test_the_md5_never_changes() -> None:
    """Saved deltas of all times hold it; a change here would refuse every one of them."""
    tensors = {"x": torch.arange(4.0), "y": torch.tensor(True)}
    assert model_md5(digests(tensors, "sha256")) == "ed045979b7a1e2d396866e49d33f38c0"
    assert model_md5(digests(tensors, "blake3")) == "a7262acb34683de769a246cc3e1ee960"


@settings(max_examples=60)
@given(st.lists(st.floats(width=32), min_size=1, max_size=6), st.data())
def test_one_bit_changes_it(numbers: list[float], data: st.DataObject) -> None:
    value = torch.tensor(numbers, dtype=torch.float32)
    flipped = value.clone()
    bits = flipped.view(torch.uint8)
    position = data.draw(st.integers(0, len(bits) - 1))
    bits[position] ^= 1 << data.draw(st.integers(0, 7))
    assert tensor_digest(flipped) != tensor_digest(value)
    assert compare({"x": tensor_digest(value)}, {"x": tensor_digest(flipped)}).names == ["x"]


def test_a_file(tmp_path: Path) -> None:
    data = bytes(range(256)) * 20_000  # more than is read at once
    (tmp_path / "file").write_bytes(data)
    assert file_sha256(tmp_path / "file") == hashlib.sha256(data).hexdigest()


def test_a_difference_is_listed_once_under_the_first_thing_that_differs() -> None:
    zeros = torch.zeros(2, 2)
    recorded = digests({"gone": zeros, "shape": zeros, "dtype": zeros, "value": zeros, "same": zeros})
    found = digests(
        {
            "same": zeros,
            "shape": torch.ones(4, dtype=torch.float64),
            "dtype": zeros.double() + 1,
            "value": zeros + 1,
            "new": zeros,
        }
    )
    difference = compare(recorded, found)
    assert difference.names == ["gone", "new", "shape", "dtype", "value"]
    assert (difference.missing, difference.extra, difference.shape) == (["gone"], ["new"], ["shape"])
    assert (difference.dtype, difference.value) == (["dtype"], ["value"])
    assert difference
    assert not difference.dtype_only
    assert not compare(recorded, recorded)
    assert not compare(recorded, recorded).dtype_only
    assert compare({"a": recorded["dtype"]}, {"a": found["dtype"]}).dtype_only
