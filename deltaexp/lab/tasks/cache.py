"""Tokenised data on disk, by what they were made of: made once, and shared by all runs that need the same.

They lie in ``tokenised`` in deltaexp's cache folder (``DELTAEXP_CACHE``, or ``~/.cache/deltaexp``). What no run has used for
`UNUSED` seconds is removed when new data are kept.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, DatasetDict

from deltaexp.digest_cache import cache_dir

STALE = 86_400
"""Seconds after which half-made data are nobody's."""
UNUSED = 30 * 86_400
"""Seconds without use after which data are removed."""
LARGE = 2**25
"""Bytes of rows from which on what is made of them goes into a file instead of memory."""


def cached(key: Mapping[str, Any], make: Callable[[], DatasetDict]) -> DatasetDict:
    """Return what ``make`` makes, kept under a digest of ``key``.

    Any number of processes may ask for the same at once: each that finds nothing makes it, and the first to finish keeps it.
    Data that cannot be read are made anew.

    Args:
        key: All that the data depend on, as JSON.
        make: Makes the data.
    """
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    folder = cache_dir() / "tokenised" / digest
    found = _read(folder)
    if found is not None:
        return found
    folder.parent.mkdir(parents=True, exist_ok=True)
    _clear(folder.parent)
    stage = Path(tempfile.mkdtemp(prefix=".making-", dir=folder.parent))
    try:
        make().save_to_disk(str(stage / "data"))
        if _read(folder) is None:  # another process may have been faster
            with contextlib.suppress(OSError):  # one that fails: another process did the same in this moment
                if folder.exists():
                    folder.rename(stage / "unreadable")
                (stage / "data").rename(folder)
        # Data that could not be put there are still the right ones.
        return _read(folder) or _in_memory(stage / "data")
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def mapped(rows: Dataset, function: Callable[..., Any], **options: Any) -> Dataset:
    """Return what `Dataset.map` makes of rows: in memory if they are few, else in a file (see `in_file`).

    Args:
        rows: The rows.
        function: As for `Dataset.map`.
        options: As for `Dataset.map`.
    """
    if rows.data.nbytes * len(rows) <= LARGE * rows.data.num_rows:  # of a table of which some rows are chosen, their part
        return rows.map(function, keep_in_memory=True, load_from_cache_file=False, **options)
    return in_file(lambda name: rows.map(function, cache_file_name=name, load_from_cache_file=False, **options))


def in_file(make: Callable[[str], Dataset]) -> Dataset:
    """Return rows that lie in a file which is mapped into memory.

    The file has lost its name when this returns, so that its room on the disk is free when nobody uses the rows any more.

    Args:
        make: Writes rows into a file of the name that it is given, and returns them.
    """
    folder = _working(cache_dir() / "tokenised")
    folder.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(suffix=".arrow", dir=folder)
    os.close(handle)
    made = make(name)
    with contextlib.suppress(OSError):  # a system on which an open file keeps its name removes it when the process ends
        os.unlink(name)
    return made


@functools.cache
def _working(parent: Path) -> Path:
    """Return a folder of this process; what killed ones leave is removed with half-made data."""
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".making-", dir=parent))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _read(folder: Path) -> DatasetDict | None:
    """Return the data in a folder, marked as used now; None where there are none or they cannot be read."""
    if not folder.exists():
        return None
    try:
        found = datasets.load_from_disk(str(folder))
        for rows in found.values():
            # Opening maps the files into memory: that the last row can be read tells that they are whole.
            if len(rows):
                rows[len(rows) - 1]
    except Exception:  # whatever pyarrow and `datasets` make of a damaged file
        return None
    with contextlib.suppress(OSError):
        os.utime(folder)
    return found


def _in_memory(folder: Path) -> DatasetDict:
    return datasets.load_from_disk(str(folder), keep_in_memory=True)


def _clear(parent: Path) -> None:
    """Remove half-made data of processes that were killed, and what nobody uses; who has them open keeps them."""
    now = time.time()
    for old in parent.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another one clears up too
            age = now - old.stat().st_mtime
            if age > (STALE if old.name.startswith(".making-") else UNUSED):
                shutil.rmtree(old, ignore_errors=True)
