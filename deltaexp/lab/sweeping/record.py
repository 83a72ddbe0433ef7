"""``sweep.json``: what a sweep consists of and how far it is, for people, for the report and for who continues it.

Every job writes its own entry when it begins and when it ends, from whatever process or machine it is on. What counts for
going on are the folders of the runs themselves; only that a job failed is known from here alone.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltaexp.errors import RunError
from deltaexp.lab.writing import locked, write_whole

FILE, LOCK = "sweep.json", ".sweep.lock"
FORMAT = 1
STATUSES = ("waiting", "running", "finished", "failed", "pruned")


@dataclass(frozen=True)
class Entry:
    """A job of a sweep."""

    folder: str
    """Its folder, relative to the sweep's."""
    identity: str
    overrides: Mapping[str, Any]
    status: str = "waiting"
    """One of `STATUSES`. One that is ``running`` may have been killed: its lock tells."""
    error: str | None = None
    seconds: float | None = None


def read(folder: str | Path) -> dict[str, Entry]:
    """Return the jobs of the sweep in a folder by identity, in their order; none where there is no ``sweep.json``.

    Raises:
        RunError: If it cannot be understood.
    """
    path = Path(folder, FILE)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["format"] != FORMAT:
            raise ValueError("another format")
        return {job["identity"]: Entry(**job) for job in values["jobs"]}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{str(path)!r} is no record of a sweep that this version can read ({error}). Nothing was changed; name another "
            "folder with hydra.sweep.dir, or move this one away."
        ) from error


def begin(folder: str | Path, command: str, overrides: Iterable[str], jobs: Iterable[Entry]) -> dict[str, Entry]:
    """Write down the jobs of a sweep, what is known of them already kept; return them by identity.

    Raises:
        RunError: If there is a record that cannot be understood.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    with locked(Path(folder, LOCK)):
        for stage in Path(folder).glob(f".{FILE}.*"):  # of a process that was killed while it wrote
            stage.unlink(missing_ok=True)
        old = read(folder)
        entries = {job.identity: dataclasses.replace(old.get(job.identity, job), folder=job.folder) for job in jobs}
        _write(folder, {"command": command, "overrides": list(overrides)}, entries)
    return entries


def update(folder: str | Path, entry: Entry) -> None:
    """Write down what is known of one job now."""
    with locked(Path(folder, LOCK)):
        path = Path(folder, FILE)
        head = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"command": "", "overrides": []}
        _write(folder, {key: head[key] for key in ("command", "overrides")}, {**read(folder), entry.identity: entry})


def _write(folder: str | Path, head: Mapping[str, Any], entries: Mapping[str, Entry]) -> None:
    values = {"format": FORMAT, **head, "jobs": [dataclasses.asdict(entry) for entry in entries.values()]}
    text = json.dumps(values, indent=2, ensure_ascii=False, default=str) + "\n"
    write_whole(Path(folder, FILE), lambda file: file.write(text))
