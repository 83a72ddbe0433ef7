"""Writing a folder whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from deltaexp.errors import CheckpointError, ConfigError


@contextlib.contextmanager
def new_folder(target: str | Path) -> Iterator[Path]:
    """Give a folder to write into, which becomes ``target`` at the end, or disappears where anything goes wrong.

    Raises:
        ConfigError: If ``target`` exists.
        CheckpointError: If the disk refuses.
    """
    target = Path(target)
    check_new(target)
    stage: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        yield stage
        for path in (path for path in stage.rglob("*") if path.is_file()):
            path.chmod(0o644)  # safetensors' files are private
            with path.open("rb") as file:
                os.fsync(file.fileno())
        stage.chmod(0o755)  # mkdtemp's folders are private
        check_new(target)  # renaming would take the place of an empty folder without a word
        stage.rename(target)
    except OSError as error:
        raise CheckpointError(
            f"{str(target)!r} could not be written: {error.strerror or error}. Nothing was left behind; make room or name "
            "another folder, and try again."
        ) from error
    finally:
        if stage is not None:
            shutil.rmtree(stage, ignore_errors=True)


def check_new(target: str | Path) -> None:
    """Raise a `ConfigError` if something is there already."""
    if os.path.lexists(target):
        raise ConfigError(f"{str(target)!r} exists already, and nothing is ever written over. Name another folder with out=.")
