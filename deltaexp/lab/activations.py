"""Activations below the lowest delta, on disk: computed once for every text, and shared by all runs that need them.

They lie in ``activations`` in deltaexp's cache folder (``DELTAEXP_CACHE``, or ``~/.cache/deltaexp``), one folder for each
split, backbone, depth, precision and whatever else they depend on to the last bit. A file is mapped into memory: what is
read of it, and no more, is held by the system while it has room. A text is kept without padding, and found by its tokens.
Texts are computed in the same batches every time, of those of similar length: whoever makes the file makes the same one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deltaexp.digest_cache import cache_dir
from deltaexp.frozen import TOKENS
from deltaexp.lab import writing
from deltaexp.lab.tasks.cache import STALE, UNUSED

FILE = "activations.bin"
BATCH_TOKENS = 8192
"""Tokens of a batch in which activations are computed, padding included."""


@dataclass
class Texts:
    """The texts of a split, each once, in their order."""

    rows: list[tuple[np.ndarray, ...]]
    """For every text the numbers of its tokens: their ids, and what else `names` tells."""
    names: tuple[str, ...]
    """What of `TOKENS` there is."""
    keys: list[bytes] = field(default_factory=list)
    """What every text is found by."""

    @property
    def tokens(self) -> int:
        """The number of tokens of all texts."""
        return sum(len(row[0]) for row in self.rows)

    @classmethod
    def of(cls, features: Any) -> Texts:
        """Return the texts of a split's features; a row may be several of them, such as a question with each of its answers."""
        names = tuple(name for name in TOKENS if name in features.column_names)
        found = cls([], names)
        seen: set[bytes] = set()
        for batch in features.select_columns(list(names)).iter(1000):
            for columns in zip(*(batch[name] for name in names), strict=True):
                several = bool(columns[0]) and isinstance(columns[0][0], list)
                for row in zip(*columns, strict=True) if several else (columns,):
                    values = tuple(np.asarray(part, dtype=np.int32) for part in row)
                    name = key(values)
                    if name not in seen and len(values[0]):
                        seen.add(name)
                        found.rows.append(values)
                        found.keys.append(name)
        return found

    def digest(self) -> str:
        """Return a digest of all texts in their order."""
        return hashlib.sha256(json.dumps(self.names).encode() + b"".join(self.keys)).hexdigest()

    def batch(self, numbers: Iterable[int], device: torch.device) -> dict[str, torch.Tensor]:
        """Return some of the texts as inputs of a model, padded at their ends."""
        rows = [self.rows[number] for number in numbers]
        longest = max(len(row[0]) for row in rows)
        batch = {name: np.zeros((len(rows), longest), dtype=np.int64) for name in (*self.names, "attention_mask")}
        for place, row in enumerate(rows):
            for name, values in zip(self.names, row, strict=True):
                batch[name][place, : len(values)] = values
            batch["attention_mask"][place, : len(row[0])] = 1
        return {name: torch.from_numpy(values).to(device) for name, values in batch.items()}


def key(row: tuple[np.ndarray, ...]) -> bytes:
    """Return what a text is found by: a digest of the numbers of its tokens, each an array of int32."""
    made = hashlib.blake2b(digest_size=16)
    for values in row:
        made.update(values.tobytes())
        made.update(b"|")
    return made.digest()


class Known:
    """Activations of texts, found by their tokens."""

    def __init__(self) -> None:
        self._places: dict[bytes, tuple[torch.Tensor, int]] = {}

    def add(self, texts: Texts, values: torch.Tensor) -> None:
        """Add the activations of a split's texts, shape ``(tokens, dim)``; those of a text that is known stay."""
        start = 0
        for name, row in zip(texts.keys, texts.rows, strict=True):
            self._places.setdefault(name, (values, start))
            start += len(row[0])

    def find(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        """Return the activations of a batch, shape ``(rows, length, dim)``, with zeros for padding; None if any is unknown.

        Args:
            inputs: What the model is given, by name; padding must be at the ends.
        """
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        if ids.dim() != 2 or (mask is not None and mask.shape != ids.shape):
            return None
        count, longest = ids.shape
        arrays = [inputs[name].to("cpu", torch.int32).numpy() for name in TOKENS if name in inputs]
        lengths = np.full(count, longest)
        if mask is not None:
            real = mask.cpu().numpy() != 0
            lengths = real.sum(1)
            if not np.array_equal(real, np.arange(longest) < lengths[:, None]):
                return None
        places = [self._places.get(key(tuple(values[row, :n] for values in arrays))) for row, n in enumerate(lengths)]
        if not all(places):
            return None
        first = places[0][0]  # type: ignore[index]
        result = torch.zeros(count, longest, first.shape[1], dtype=first.dtype, pin_memory=ids.is_cuda)
        for row, (place, n) in enumerate(zip(places, lengths.tolist(), strict=True)):
            values, start = place  # type: ignore[misc]
            result[row, :n] = values[start : start + n]
        return result.to(ids.device, non_blocking=True)


def computed(
    texts: Texts, compute: Callable[[dict[str, torch.Tensor]], torch.Tensor], device: torch.device
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield the activations of every text, shape ``(tokens, dim)``, each with the number of its first token among all.

    Args:
        texts: The texts.
        compute: Returns the activations of a batch, shape ``(rows, length, dim)``.
        device: Where the model is.
    """
    lengths = [len(row[0]) for row in texts.rows]
    starts = np.cumsum([0, *lengths])
    batch: list[int] = []
    order = sorted(range(len(lengths)), key=lambda number: (lengths[number], number))
    for place, number in enumerate(order):
        batch.append(number)
        following = lengths[order[place + 1]] if place + 1 < len(order) else 0
        if not following or following * (len(batch) + 1) > BATCH_TOKENS:
            values = compute(texts.batch(batch, device)).cpu()
            for row, one in enumerate(batch):
                yield int(starts[one]), values[row, : lengths[one]]
            batch = []


@dataclass
class Folder:
    """Where activations are kept, and how much of it.

    Args:
        limit: The most bytes that they may take, all together.
    """

    limit: int
    path: Path = field(default_factory=lambda: cache_dir() / "activations")
    used: set[str] = field(default_factory=set)
    """The names of those that this run uses, which make room for no others."""

    def get(
        self, name: Mapping[str, Any], shape: tuple[int, int], dtype: torch.dtype,
        values: Callable[[], Iterator[tuple[int, torch.Tensor]]],
    ) -> torch.Tensor:  # fmt: skip
        """Return activations that are kept under a name, made now where there are none.

        Of several processes that want the same at once, one makes them while the others wait.

        Args:
            name: All that they depend on, for JSON.
            shape: Their shape, ``(tokens, dim)``.
            dtype: Their dtype.
            values: Yields parts of them, each with the number of its first token.

        Raises:
            OSError: If there is no room on the disk.
        """
        digest = hashlib.sha256(json.dumps(name, sort_keys=True).encode()).hexdigest()
        self.used.add(digest)
        place = self.path / digest / FILE
        size = shape[0] * shape[1] * dtype.itemsize
        self.path.mkdir(parents=True, exist_ok=True)
        with writing.locked(self.path / f".{digest}.lock"):
            if not (place.is_file() and place.stat().st_size == size):
                self._make(place, size, shape, dtype, values)
            with contextlib.suppress(OSError):
                os.utime(place.parent)
            return _mapped(place, shape, dtype)

    def _make(self, place: Path, size: int, shape: Any, dtype: torch.dtype, values: Callable[[], Iterator[Any]]) -> None:
        self._clear(size)
        stage = Path(tempfile.mkdtemp(prefix=".making-", dir=self.path))
        try:
            with open(stage / FILE, "wb") as file:
                # A mapped file that the disk has no room for would end the process when it is written to.
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, size)
                else:
                    file.truncate(size)
            target = _mapped(stage / FILE, shape, dtype, write=True)
            for start, part in values():
                target[start : start + len(part)] = part
            del target
            writing.sync(stage / FILE)
            shutil.rmtree(place.parent, ignore_errors=True)  # one that is not whole
            stage.rename(place.parent)
        finally:
            shutil.rmtree(stage, ignore_errors=True)

    def _clear(self, wanted: int) -> None:
        """Make room: remove what nobody uses, and the longest unused of the rest; who has it open keeps it."""
        kept = []
        for old in self.path.iterdir():
            with contextlib.suppress(OSError):  # another process clears up, too
                age = time.time() - old.stat().st_mtime
                if age > (STALE if old.name.startswith(".") else UNUSED):
                    shutil.rmtree(old, ignore_errors=True) if old.is_dir() else old.unlink()
                elif (old / FILE).is_file() and not old.name.startswith("."):
                    kept.append((age, old, (old / FILE).stat().st_size))
        total = sum(size for _, _, size in kept) + wanted
        for _, old, size in sorted(kept, reverse=True):
            if total > self.limit and old.name not in self.used:
                shutil.rmtree(old, ignore_errors=True)
                total -= size


def _mapped(path: Path, shape: tuple[int, int], dtype: torch.dtype, write: bool = False) -> torch.Tensor:
    """Return a file's numbers, mapped into memory; what is written to them goes to the file only with ``write``."""
    return torch.from_numpy(np.memmap(path, dtype=np.uint8, mode="r+" if write else "c")).view(dtype).view(shape)
