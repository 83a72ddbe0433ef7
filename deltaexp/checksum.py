"""Digests of tensors, models and files, and what differs between two models.

Nothing is ever taken from a repr: a tensor is identified by name, dtype, shape and bytes, so that the digest of a
model is the same under every version of torch and transformers, on every device, attached to whatever else.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

CHUNK = 1 << 22


@dataclass(frozen=True)
class TensorDigest:
    """What identifies the value of a tensor."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str
    """sha256 of the elements' little-endian bytes in row-major order."""

    def to_dict(self) -> dict[str, object]:
        """Return a dict for JSON."""
        return {**asdict(self), "shape": list(self.shape)}

    @classmethod
    def from_dict(cls, values: Mapping) -> TensorDigest:
        """Read what `to_dict` returned."""
        return cls(str(values["dtype"]), tuple(int(size) for size in values["shape"]), str(values["sha256"]))


def tensor_digest(tensor: torch.Tensor) -> TensorDigest:
    """Return the digest of one tensor, wherever it lives."""
    return TensorDigest(_dtype(tensor), tuple(tensor.shape), hashlib.sha256(_bytes(tensor)).hexdigest())


def quick_hash(tensor: torch.Tensor) -> str:
    """Return what tells a tensor from others that came about by chance, many times faster than a digest."""
    return f"{_dtype(tensor)} {list(tensor.shape)} {xxhash.xxh3_128_hexdigest(_bytes(tensor))}"


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _bytes(tensor: torch.Tensor) -> Any:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def digests(tensors: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]]) -> dict[str, TensorDigest]:
    """Return the digest of every tensor under its name; hashing releases the interpreter lock, so it uses all cores."""
    found = dict(tensors)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        begun = {name: pool.submit(tensor_digest, found[name]) for name in largest_first(found)}
        return {name: begun[name].result() for name in found}


def largest_first(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Return the names of tensors in an order in which several threads are done with them at about the same time."""
    return sorted(tensors, key=lambda name: -tensors[name].nbytes)


def model_md5(tensors: Mapping[str, TensorDigest]) -> str:
    """Return the md5 of a model: over name, dtype, shape and byte digest of every tensor, in the order of names."""
    return hashlib.md5(_lines(tensors), usedforsecurity=False).hexdigest()


def model_sha256(tensors: Mapping[str, TensorDigest]) -> str:
    """Return the sha256 over the same as `model_md5`."""
    return hashlib.sha256(_lines(tensors)).hexdigest()


def _lines(tensors: Mapping[str, TensorDigest]) -> bytes:
    found = ((name, tensors[name]) for name in sorted(tensors))
    return "".join(f"{name}\t{d.dtype}\t{','.join(map(str, d.shape))}\t{d.sha256}\n" for name, d in found).encode()


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file's bytes."""
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            sha256.update(chunk)
    return sha256.hexdigest()


@dataclass
class Difference:
    """How the tensors found differ from those recorded."""

    missing: list[str]
    extra: list[str]
    shape: list[str]
    dtype: list[str]
    value: list[str]

    def __bool__(self) -> bool:
        return bool(self.names)

    @property
    def names(self) -> list[str]:
        """All names that differ."""
        return [*self.missing, *self.extra, *self.shape, *self.dtype, *self.value]

    @property
    def dtype_only(self) -> bool:
        """Whether every difference is one of dtype."""
        return bool(self.dtype) and len(self.dtype) == len(self.names)


def compare(recorded: Mapping[str, TensorDigest], found: Mapping[str, TensorDigest]) -> Difference:
    """Say in what ``found`` differs from ``recorded``; a tensor is listed once, under the first thing that differs."""
    both = [name for name in recorded if name in found]
    shape = [name for name in both if recorded[name].shape != found[name].shape]
    dtype = [name for name in both if name not in set(shape) and recorded[name].dtype != found[name].dtype]
    done = {*shape, *dtype}
    return Difference(
        missing=[name for name in recorded if name not in found],
        extra=[name for name in found if name not in recorded],
        shape=shape,
        dtype=dtype,
        value=[name for name in both if name not in done and recorded[name].sha256 != found[name].sha256],
    )
