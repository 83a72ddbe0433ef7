"""Files that are written whole or not at all. Nothing in this module imports torch."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any


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


def sync(path: Path) -> None:
    """Have a file, or the names in a folder, written to the disk itself."""
    if path.is_dir() and os.name == "nt":
        return  # folders cannot be opened there
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)  # Windows syncs only what may be written
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
