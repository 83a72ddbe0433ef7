"""Locks of files; that files are written whole is tested where they are."""

from pathlib import Path

import pytest
from filelock import FileLock

from deltaexp.errors import RunError
from deltaexp.lab.writing import locked


def test_a_lock_is_held_by_one(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    with locked(path), pytest.raises(RunError, match="elsewhere"), locked(path, RunError("It is elsewhere.")):
        raise AssertionError("both hold it")
    with locked(path, RunError("It is elsewhere.")):
        pass


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def acquire(self: FileLock, *arguments: object, **options: object) -> None:
        raise NotImplementedError

    monkeypatch.setattr(FileLock, "acquire", acquire)
    done = []
    with locked(tmp_path / ".lock"):
        done.append(1)
    assert done == [1]
    with pytest.raises(NotImplementedError), locked(tmp_path / ".lock"):  # what happens within is not hidden
        raise NotImplementedError
