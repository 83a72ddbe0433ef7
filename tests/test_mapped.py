"""What the operating system tells of files in memory, on files that are written to in every way."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import pytest

from deltaexp.mapped import MappedFiles

pytestmark = pytest.mark.skipif(not Path("/proc/self/pagemap").exists(), reason="only Linux tells this")
PAGE = mmap.PAGESIZE


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "a file with spaces"
    path.write_bytes(bytes(range(256)) * (PAGE // 64))  # four pages
    return path


def place(array: np.ndarray, *files: Path) -> tuple[Path, int] | None:
    return MappedFiles(files).place(array.ctypes.data, array.nbytes)


def mapped(file: Path, mode: str = "c") -> np.ndarray:
    return np.memmap(file, np.uint8, mode=mode)  # type: ignore[call-overload]


def test_what_was_not_written_to_is_the_file(file: Path, tmp_path: Path) -> None:
    array = mapped(file)
    assert place(array, tmp_path, file) == (file, 0)  # not a byte of it is in memory
    assert int(array.sum())
    assert place(array, file) == (file, 0)
    assert place(array[PAGE + 5 : 3 * PAGE], file) == (file, PAGE + 5)
    assert place(array[:0], file) == (file, 0)
    part = np.memmap(file, np.uint8, mode="c", offset=2 * PAGE)
    assert place(part[7:], file) == (file, 2 * PAGE + 7)


def test_what_was_written_to_is_not(file: Path) -> None:
    array = mapped(file)
    array[PAGE] = array[PAGE]  # the same value: a copy all the same
    assert place(array, file) is None
    assert place(array[: PAGE + 1], file) is None
    assert place(array[:PAGE], file) == (file, 0)
    assert place(array[2 * PAGE :], file) == (file, 2 * PAGE)


def test_other_memory_is_not(file: Path, tmp_path: Path) -> None:
    assert place(np.fromfile(file, np.uint8), file) is None
    other = tmp_path / "other"
    other.write_bytes(file.read_bytes())
    assert place(mapped(other), file) is None
    assert place(mapped(file, "r+"), file) is None, "whoever writes to it writes to the file"
    array = mapped(file)
    assert MappedFiles([file]).place(array.ctypes.data, array.nbytes + PAGE) is None, "more than the file"


def test_a_file_that_was_replaced_is_another(file: Path, tmp_path: Path) -> None:
    array = mapped(file)
    new = tmp_path / "new"
    new.write_bytes(file.read_bytes())
    new.replace(file)
    assert place(array, file) is None
    array = mapped(file)
    file.unlink()
    assert place(array, file) is None


def test_through_a_link(file: Path, tmp_path: Path) -> None:
    """Files of the Hub's cache are links."""
    link = tmp_path / "link"
    link.symlink_to(file)
    assert place(mapped(link), link) == (link, 0)
