"""Digests of a backbone's tensors, remembered for the checkpoint from which it was loaded.

A sha256 tells a tensor from every other that anybody could make, and takes long. Whether a tensor is still what it was when its
sha256 was computed is told by a quick hash (XXH3, 128 bits), which nobody but chance has to be feared for: what a third
party can exchange are the files, and what is remembered is remembered for their identity (place, size, times, inode). A file
that was written to is another one, whose tensors are hashed anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from deltaexp.checksum import TensorDigest, largest_first, quick_hash, tensor_digest

SMALLEST = 1 << 20
"""Bytes of a model below which hashing takes less time than looking anything up."""
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
        self.known: dict[str, TensorDigest] = {}
        """The digests, under the dtype, the shape and the quick hash of the tensor."""
        self.learnt = False
        # A record that cannot be read is none.
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            data = json.loads(self.record.read_text(encoding="utf-8"))
            self.known = {str(key): TensorDigest.from_dict(value) for key, value in data.items()}

    def digest(self, tensor: torch.Tensor) -> TensorDigest:
        """Return the digest of a tensor, and keep it."""
        key = quick_hash(tensor)
        found = self.known.get(key)
        if found is None:
            found = self.known[key] = tensor_digest(tensor)
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
                json.dump({key: digest.to_dict() for key, digest in sorted(self.known.items())}, file)
            os.replace(stage, self.record)
            self.learnt = False


@contextlib.contextmanager
def digesting(backbone: nn.Module, tensors: Mapping[str, torch.Tensor]) -> Iterator[Callable[[], dict[str, TensorDigest]]]:
    """Have other threads compute digests of a backbone's tensors from now on, as they are now; yield what returns them.

    Meanwhile a tensor may be given other data (``tensor.data = ...``), but its memory may not be written to.

    Args:
        backbone: The model, whose config tells where it was loaded from.
        tensors: Some of its tensors, by their names in it.
    """
    small = sum(tensor.nbytes for tensor in tensors.values()) < SMALLEST
    files = [] if small else _files_of(backbone)
    remembered = Remembered(files) if files else None
    now = {name: tensor.detach() for name, tensor in tensors.items()}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        compute = tensor_digest if remembered is None else remembered.digest
        begun = {name: pool.submit(compute, now[name]) for name in largest_first(now)}

        def result() -> dict[str, TensorDigest]:
            found = {name: begun[name].result() for name in now}
            if remembered is not None:
                remembered.write()
            return found

        try:
            yield result
        finally:
            pool.shutdown(cancel_futures=True)


def model_digests(backbone: nn.Module, tensors: Mapping[str, torch.Tensor]) -> dict[str, TensorDigest]:
    """Return what `deltaexp.checksum.digests` does, for tensors of a backbone.

    Args:
        backbone: The model, whose config tells where it was loaded from.
        tensors: Some of its tensors, by their names in it.
    """
    with digesting(backbone, tensors) as result:
        return result()


@contextlib.contextmanager
def read_ahead(folder: str | Path, dtype: torch.dtype | None = None) -> Iterator[None]:
    """Within this context, while a model is loaded from a folder, the digests of its files are computed beside it.

    Args:
        folder: The folder of the checkpoint; anything else does nothing.
        dtype: The dtype in which the model will hold its weights; None is that of the file.
    """
    files = _in_folder(Path(folder))
    remembered = Remembered(files) if files else None
    if remembered is None or remembered.known:
        yield
        return

    def learn(path: Path, name: str) -> None:
        with safe_open(path, framework="pt") as file:
            tensor = file.get_tensor(name)
        remembered.digest(tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for path in files:
            with contextlib.suppress(Exception), safe_open(path, framework="pt") as file:  # loading will say what is wrong
                for name in file.keys():  # noqa: SIM118 - it is no dict
                    pool.submit(learn, path, name)
        yield
    remembered.write()


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
