"""Files that are written whole or not at all, and by one process at a time. Nothing in this module imports torch."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

from deltaexp.errors import DeltaExpError


def write_whole(path: Path, fill: Callable[[IO[str]], Any]) -> None:
    """Write a text file, all of it or nothing; its folder is made if it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, stage = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            fill(file)
            file.flush()
            os.fsync(handle)
        Path(stage).chmod(0o644)
        os.replace(stage, path)
    except BaseException:
        Path(stage).unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextlib.contextmanager
def locked(path: Path, otherwise: DeltaExpError | None = None) -> Iterator[None]:
    """Hold a lock within this context, which the system releases when the process ends, however it ends.

    On a file system that has no locks nothing is held.

    Args:
        path: The lock's file, whose folder must be there.
        otherwise: What to raise where another process holds it; if not given, wait for that one.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(NotImplementedError):
            try:
                stack.enter_context(FileLock(path, timeout=-1 if otherwise is None else 0))
            except Timeout:
                assert otherwise is not None
                raise otherwise from None
        yield


def sync(path: Path) -> None:
    """Have a file, or the names in a folder, written to the disk itself."""
    if path.is_dir() and os.name == "nt":
        return  # folders cannot be opened there
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)  # Windows syncs only what may be written
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
