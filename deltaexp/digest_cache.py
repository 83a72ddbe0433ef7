"""Digests of a backbone's tensors, remembered for the checkpoint from which it was loaded.

A digest tells a tensor from every other that anybody could make, and takes long. Whether a tensor is still what it was when its
digest was computed is told by the operating system, where its memory is mapped from the file and was not written to
(`deltaexp.mapped`), and needs no reading. Elsewhere a quick hash tells it (XXH3, 128 bits, limited by the memory and not by the
processor), which nobody but chance has to be feared for: what a third party can exchange are the files, and what is remembered
is remembered for their identity (place, size, times, inode). A file that was written to is another one, and all of it is hashed
anew.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import nn

from deltaexp.checksum import ALGORITHM, SMALL, TensorDigest, computing, dtype_name, tensor_bytes, tensor_digests
from deltaexp.mapped import MappedFiles

RUN = 1 << 25
"""Bytes of tensors that are hashed and remembered together."""
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def cache_dir() -> Path:
    """Return the folder for what is kept between runs: ``DELTAEXP_CACHE``, or a folder in the user's cache."""
    root = os.environ.get("DELTAEXP_CACHE")
    return Path(root) if root else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deltaexp"


class Remembered:
    """What is known of the tensors that were loaded from a checkpoint.

    Args:
        files: The files of the checkpoint.
    """

    def __init__(self, files: list[Path]) -> None:
        self.files = files
        self.identity = _identity(files)
        self.record = cache_dir() / "digests" / f"{self.identity}.json"
        self.mapped = MappedFiles(files)
        self.known: dict[str, list[str]] = {}
        """The values of the digests of runs of tensors, under the algorithm and either their layouts and their place in a file,
        or a quick hash of their layouts and bytes."""
        self.learnt = False
        # A record that cannot be read is none.
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            data = json.loads(self.record.read_text(encoding="utf-8"))
            self.known = {key: list(map(str, values)) for key, values in data.items()}

    def digests(self, run: Sequence[torch.Tensor], algorithm: str) -> list[TensorDigest]:
        """Return the digests of tensors that lie one after the other, and keep them."""
        layouts = [(dtype_name(tensor), tuple(tensor.shape)) for tensor in run]
        quick = xxhash.xxh3_128(repr(layouts).encode())
        place = self.mapped.place(run[0].data_ptr(), sum(t.nbytes for t in run)) if _plain(run[0]) else None
        if place is not None:
            quick.update(f"{self.files.index(place[0])} {place[1]}".encode())
        else:
            quick.update(_joined(run))
        key = f"{algorithm} {'of the file' if place else 'of the memory'} {quick.hexdigest()}"
        values = self.known.get(key)
        if values is not None and len(values) == len(run):
            return [TensorDigest(*layout, value, algorithm) for layout, value in zip(layouts, values, strict=True)]
        found = tensor_digests(run, algorithm)
        self.known[key] = [digest.value for digest in found]
        self.learnt = True
        return found

    def write(self) -> None:
        """Keep what was learnt, unless the files have changed since; that this fails is nobody's trouble."""
        with contextlib.suppress(OSError):
            if not self.learnt or _identity(self.files) != self.identity:
                return
            self.record.parent.mkdir(parents=True, exist_ok=True)
            handle, stage = tempfile.mkstemp(dir=self.record.parent)
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(self.known, file, sort_keys=True)
            os.replace(stage, self.record)


@contextlib.contextmanager
def digesting(
    backbone: nn.Module, tensors: Mapping[str, torch.Tensor], algorithm: str = ALGORITHM
) -> Iterator[Callable[[], dict[str, TensorDigest]]]:
    """Have other threads compute digests of a backbone's tensors from now on, as they are now; yield what returns them.

    Meanwhile a tensor may be given other data (``tensor.data = ...``), but its memory may not be written to.

    Args:
        backbone: The model, whose config tells where it was loaded from.
        tensors: Some of its tensors, by their names in it.
        algorithm: Which of `deltaexp.checksum.ALGORITHMS`.
    """
    now = {name: tensor.detach() for name, tensor in tensors.items()}
    files = _files_of(backbone) if sum(tensor.nbytes for tensor in now.values()) > SMALL else []
    remembered = Remembered(files) if files else None
    names, runs = _runs(now)
    compute = tensor_digests if remembered is None else remembered.digests
    with computing(runs, partial(compute, algorithm=algorithm)) as result:
        yield lambda: dict(zip(names, result(), strict=True))
    if remembered is not None:
        remembered.write()


def model_digests(
    backbone: nn.Module, tensors: Mapping[str, torch.Tensor], algorithm: str = ALGORITHM
) -> dict[str, TensorDigest]:
    """Return what `deltaexp.checksum.digests` does, for tensors of a backbone.

    Args:
        backbone: The model, whose config tells where it was loaded from.
        tensors: Some of its tensors, by their names in it.
        algorithm: Which of `deltaexp.checksum.ALGORITHMS`.
    """
    with digesting(backbone, tensors, algorithm) as result:
        return result()


def _runs(tensors: Mapping[str, torch.Tensor]) -> tuple[list[str], list[list[torch.Tensor]]]:
    """Return tensors in the order in which they lie in memory, and their names in the same order.

    Those that lie one after the other, as those do that are mapped from one file, are joined into runs of at least `RUN` bytes.
    A thread hashes a run without the interpreter lock, for which it would have to wait longer than it takes to hash a tensor.
    """
    names = sorted(tensors, key=lambda name: tensors[name].data_ptr())
    runs: list[list[torch.Tensor]] = []
    end, size = -1, 0
    for name in names:
        tensor = tensors[name]
        plain = _plain(tensor)
        if size >= RUN or not plain or tensor.data_ptr() != end:
            runs.append([])
            size = 0
        runs[-1].append(tensor)
        size += tensor.nbytes
        end = tensor.data_ptr() + tensor.nbytes if plain else -1
    return names, runs


def _plain(tensor: torch.Tensor) -> bool:
    """Say whether a tensor's bytes lie in memory as they are hashed."""
    return tensor.device.type == "cpu" and tensor.is_contiguous()


def _joined(run: Sequence[torch.Tensor]) -> Any:
    """Return the bytes of tensors that lie one after the other."""
    if len(run) == 1:
        return tensor_bytes(run[0])
    size = sum(tensor.nbytes for tensor in run)
    return (ctypes.c_uint8 * size).from_address(run[0].data_ptr())


def _files_of(backbone: nn.Module) -> list[Path]:
    """Return the files from which a model was loaded, as far as they can be found here."""
    config: Any = getattr(backbone, "config", None)
    place = getattr(config, "_name_or_path", None)
    if not isinstance(place, str) or not place:
        return []
    if Path(place).is_dir():
        return _in_folder(Path(place))
    from huggingface_hub import try_to_load_from_cache

    with contextlib.suppress(ValueError, OSError):  # what is no name of a repository
        for name in (SINGLE, INDEX):
            found = try_to_load_from_cache(place, name, revision=getattr(config, "_commit_hash", None))
            if isinstance(found, str):
                return _in_folder(Path(found).parent)
    return []


def _in_folder(folder: Path) -> list[Path]:
    names = {SINGLE} if (folder / SINGLE).is_file() else set()
    # Whatever is wrong with the files of a backbone, it is not what this is about.
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        if not names and (folder / INDEX).is_file():
            names = set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
    paths = [folder / name for name in sorted(names)]
    return paths if all(path.is_file() for path in paths) else []


def _identity(files: list[Path]) -> str:
    """Return what tells these files from all others, and from themselves once they are written to."""
    found = []
    for path in files:
        status = path.resolve().stat()
        times = (status.st_mtime_ns, status.st_ctime_ns)
        found.append([str(path.resolve()), status.st_size, *times, status.st_ino, status.st_dev])
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()
