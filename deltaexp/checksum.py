"""Digests of tensors, models and files, and what differs between two models.

Nothing is ever taken from a repr: a tensor is identified by name, dtype, shape and bytes, so that the digest of a
model is the same under every version of torch and transformers, on every device, attached to whatever else.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from blake3 import blake3

from deltaexp.lazy import torch

CHUNK = 1 << 22
ALGORITHMS: dict[str, Callable[[Any], Any]] = {"blake3": blake3, "sha256": hashlib.sha256}
"""The hashes of 256 bits of which a tensor's digest may be: BLAKE3 (https://github.com/BLAKE3-team/BLAKE3-specs) is several
times faster than SHA-256 and as safe."""
ALGORITHM = "blake3"
"""The one that is recorded."""
FIRST = "sha256"
"""The one of deltas whose config names none."""
SMALL = 1 << 22
"""Bytes that are hashed in less time than starting threads for them takes."""


@dataclass(frozen=True)
class TensorDigest:
    """What identifies the value of a tensor."""

    dtype: str
    shape: tuple[int, ...]
    value: str
    """The hash of the elements' little-endian bytes in row-major order, in hexadecimal digits."""
    algorithm: str = ALGORITHM

    def to_dict(self) -> dict[str, object]:
        """Return a dict for JSON, with the value under the name of its algorithm."""
        return {"dtype": self.dtype, "shape": list(self.shape), self.algorithm: self.value}

    @classmethod
    def from_dict(cls, values: Mapping) -> TensorDigest:
        """Read what `to_dict` returned.

        Raises:
            KeyError: If it is not that.
        """
        algorithm = FIRST if FIRST in values else ALGORITHM
        return cls(str(values["dtype"]), tuple(int(size) for size in values["shape"]), str(values[algorithm]), algorithm)


def tensor_digest(tensor: torch.Tensor, algorithm: str = ALGORITHM) -> TensorDigest:
    """Return the digest of one tensor, wherever it lives."""
    value = ALGORITHMS[algorithm](tensor_bytes(tensor)).hexdigest()
    return TensorDigest(dtype_name(tensor), tuple(tensor.shape), value, algorithm)


def tensor_digests(tensors: Iterable[torch.Tensor], algorithm: str = ALGORITHM) -> list[TensorDigest]:
    """Return the digests of several tensors."""
    return [tensor_digest(tensor, algorithm) for tensor in tensors]


def dtype_name(tensor: torch.Tensor) -> str:
    """Return the name of a tensor's dtype without its library's."""
    return str(tensor.dtype).removeprefix("torch.")


def tensor_bytes(tensor: torch.Tensor) -> Any:
    """Return the elements' bytes in row-major order, where they lie if they lie so on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def digests(
    tensors: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]], algorithm: str = ALGORITHM
) -> dict[str, TensorDigest]:
    """Return the digest of every tensor under its name; hashing releases the interpreter lock, so it uses all cores."""
    found = dict(tensors)
    with computing([[tensor] for tensor in found.values()], partial(tensor_digests, algorithm=algorithm)) as result:
        return dict(zip(found, result(), strict=True))


@contextlib.contextmanager
def computing(
    runs: Sequence[Sequence[torch.Tensor]], compute: Callable[[Sequence[torch.Tensor]], list[TensorDigest]]
) -> Iterator[Callable[[], list[TensorDigest]]]:
    """Have other threads compute digests from now on, where that is worth it; yield what returns them, one after the other.

    Args:
        runs: Tensors that are given to ``compute`` together.
        compute: What returns the digests of such a run.
    """
    sizes = [sum(tensor.nbytes for tensor in run) for run in runs]
    # Every thread takes the next run when it is done with one, the largest first, so that all are done at about the same time.
    todo = iter(sorted(range(len(runs)), key=lambda number: -sizes[number]))
    found: dict[int, list[TensorDigest]] = {}

    def work() -> None:
        for number in todo:
            found[number] = compute(runs[number])

    # This thread, which has something else to do, helps in the end.
    count = 0 if sum(sizes) < SMALL else min((os.cpu_count() or 1) - 1, len(runs))
    with ThreadPoolExecutor(max(count, 1)) as pool:
        begun = [pool.submit(work) for _ in range(count)]

        def result() -> list[TensorDigest]:
            work()
            for thread in begun:
                thread.result()
            return [digest for number in range(len(runs)) for digest in found[number]]

        try:
            yield result
        finally:
            for _ in todo:  # nobody wants the rest
                pass


def model_md5(tensors: Mapping[str, TensorDigest]) -> str:
    """Return the md5 of a model: over name, dtype, shape and byte digest of every tensor, in the order of names."""
    return hashlib.md5(_lines(tensors), usedforsecurity=False).hexdigest()


def model_sha256(tensors: Mapping[str, TensorDigest]) -> str:
    """Return the sha256 over the same as `model_md5`."""
    return hashlib.sha256(_lines(tensors)).hexdigest()


def _lines(tensors: Mapping[str, TensorDigest]) -> bytes:
    found = ((name, tensors[name]) for name in sorted(tensors))
    return "".join(f"{name}\t{d.dtype}\t{','.join(map(str, d.shape))}\t{d.value}\n" for name, d in found).encode()


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
        value=[name for name in both if name not in done and recorded[name] != found[name]],
    )
