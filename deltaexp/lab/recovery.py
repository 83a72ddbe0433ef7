"""Runs that were interrupted: what a run leaves so that it can go on, how it is found, and who may go on with it.

A run's folder holds ``run.json`` from its first moment on, checkpoints while it trains, and ``delta`` when all is done. The
last is given its name in one step, so a folder of that name is complete. Nothing in this module imports torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import hashlib
import inspect
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import deltaexp
from deltaexp import __version__, registry
from deltaexp.errors import CheckpointError, DeltaExpError, InterruptedRunError, RunError, RunningElsewhereError, listing
from deltaexp.lab.config import RunConfig
from deltaexp.lab.writing import locked, write_whole
from deltaexp.registry import DeltaConfig

RECORD, LOCK, DELTA, CHECKPOINTS = "run.json", ".run.lock", "delta", "checkpoints"
FORMAT = 1
NO_MATTER = (
    "hub", "tracker", "task.dataset", "task.language", "task.save_predictions",
    "trainer.progress", "trainer.save_every",
    "trainer.evaluate_before", "trainer.keep_checkpoints", "trainer.log_every",
)  # fmt: skip
"""Keys and sections that the trained delta does not depend on; a run may be continued with others."""
HOW_TO_GO_ON = ("resume", "retry", "fail_fast", "sweep")
"""Keys and sections that are about starting runs, and no part of a run's own config."""
NO_ROOM = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the quota of the disk is used up"}
NO_ROOM |= {errno.EFBIG: "a file would be larger than this process may write"}
NO_ROOM |= {errno.EROFS: "the disk may only be read", errno.EIO: "the disk reports a fault"}
NO_ROOM |= {errno.EACCES: "writing there is not permitted"}
LEFTOVERS = (f".{DELTA}.*", f"..{DELTA}.*", f".{RECORD}.*", f"{CHECKPOINTS}/.*")
"""What a killed run leaves half-written."""


@dataclass
class Record:
    """What ``run.json`` says of a run."""

    config: dict[str, Any]
    started: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat())
    versions: dict[str, str] = field(default_factory=lambda: _versions())
    sessions: int = 1
    """How often it was begun or continued."""
    pushed: str | None = None
    """Where it was pushed to."""
    code: str | None = None
    """The version of the code that it began with (see `code_version`)."""
    pruned: dict[str, Any] | None = None
    """Where a search gave it up: the ``step``, and the ``metric`` with its ``value`` there."""

    @property
    def fingerprint(self) -> str:
        """A digest of all in the config that the trained delta depends on."""
        return _digest(that_matter(self.config))

    def write(self, folder: Path) -> None:
        """Write ``run.json``, all of it or nothing."""
        values = {"format": FORMAT, **dataclasses.asdict(self)}
        text = json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        write_whole(folder / RECORD, lambda file: file.write(text))

    @classmethod
    def read(cls, folder: Path) -> Record | None:
        """Read ``run.json``; None where there is none.

        Raises:
            RunError: If it cannot be understood.
        """
        try:
            values = json.loads((folder / RECORD).read_text(encoding="utf-8"))
            if values.pop("format") != FORMAT:
                raise ValueError("another format")
            values.pop("tracker", None)  # which version 0.1 noted here
            return cls(**values)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunError(
                f"{str(folder / RECORD)!r} is no record of a run that this version can read ({error}). Nothing was changed; "
                "name another folder with hydra.run.dir, or move this one away."
            ) from error

    def changed_versions(self) -> list[str]:
        """Return, as "torch 2.10.0 -> 2.11.0", what is another version than when the run began."""
        now, code = _versions(), code_version(self.config["delta_type"])
        changed = [f"{name} {old} -> {now[name]}" for name, old in self.versions.items() if now.get(name, old) != old]
        return changed or ([f"code {self.code} -> {code}"] if self.code not in (None, code) else [])


@dataclass
class Claim:
    """A run's folder, in the hands of this process alone."""

    folder: Path
    record: Record
    continued: bool
    """Whether a run was there before."""
    finished: bool
    """Whether it is complete."""


def describe(config: RunConfig, delta_config: DeltaConfig) -> dict[str, Any]:
    """Return the whole config of a run as a flat dict for JSON; how it is continued, or swept, is no part of it."""
    values = {**dataclasses.asdict(config), **delta_config.to_dict()}
    for name in HOW_TO_GO_ON:
        del values[name]
    return json.loads(json.dumps(values))


def identity(config: Mapping[str, Any]) -> str:
    """Return what tells a run from all others: a sha256 of all that its delta depends on in the config, and of the code.

    Args:
        config: What `describe` returned.
    """
    return _digest({"config": that_matter(config), "code": code_version(config["delta_type"])})


def code_version(delta_type: str) -> str:
    """Return deltaexp's version with a digest of its source, and of the file of a delta type that is another package's."""
    return f"{__version__}+{_source_digest(delta_type)[:16]}"


@functools.cache
def _source_digest(delta_type: str) -> str:
    package = Path(deltaexp.__file__).parent
    files = {path.relative_to(package).as_posix(): path for path in package.rglob("*.py")}
    with contextlib.suppress(TypeError):  # of a type that was not written into a file
        own = Path(inspect.getfile(registry.get(delta_type)))
        files |= {own.name: own}
    return _digest({name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items() if path.is_file()})


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def claim(folder: Path, config: dict[str, Any], resume: bool) -> Iterator[Claim]:
    """Take a folder for a run, or for going on with the run that is in it, and clean up what a killed one left.

    Args:
        folder: The run's folder; made if it does not exist.
        config: What `describe` returned.
        resume: Whether a run that is there may be continued.

    Raises:
        RunError: If another process is at it, or the run there has another config.
        CheckpointError: If there is a finished delta and ``resume`` is off.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _lock(folder):
        target, old = folder / DELTA, Record.read(folder)
        if target.exists() and (old is None or not resume):
            hint = " With resume=true its results are shown." if old else ""
            raise CheckpointError(
                f"{str(target)!r} exists already; a run does not write over an earlier one. Name another folder.{hint}"
            )
        record = Record(config, code=code_version(config["delta_type"]))
        if old is not None:
            if old.fingerprint != record.fingerprint:
                raise RunError(
                    f"{str(folder)!r} holds a run with another config, which differs in {differences(old.config, config)}. "
                    "Continue it with its own config, or name another folder with hydra.run.dir (for a sweep hydra.sweep.dir)."
                )
            if not resume and any((folder / CHECKPOINTS).glob("checkpoint-*")):
                raise RunError(
                    f"{str(folder)!r} holds a run of this config that has not finished. Add resume=true to continue it, or "
                    "name another folder with hydra.run.dir."
                )
            # The sessions stay; hub and tracker may be others than before.
            record = dataclasses.replace(old, config=config, sessions=old.sessions + 1)
        for pattern in LEFTOVERS:
            for path in folder.glob(pattern):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        if not target.exists():
            record.write(folder)
        yield Claim(folder, record, continued=old is not None, finished=target.exists())


def _lock(folder: Path) -> contextlib.AbstractContextManager[None]:
    """Hold the lock of a run's folder."""
    text = f"The run in {str(folder)!r} is still going on, in another process. Wait for it, or start another run elsewhere."
    return locked(folder / LOCK, RunningElsewhereError(text))


def busy(folder: Path) -> bool:
    """Say whether a process is at work on the run in a folder."""
    if not (folder / LOCK).exists():
        return False
    try:
        with _lock(folder):
            return False
    except RunningElsewhereError:
        return True


def find(parent: Path, config: dict[str, Any]) -> tuple[Path | None, bool]:
    """Look for the newest run of a config, first among those that are not finished.

    Args:
        parent: The folder that holds the folders of runs.
        config: What `describe` returned.

    Returns:
        The run's folder, None where there is none, and whether the run is finished. One that is still going on in another
        process is left to it.
    """
    fingerprint = Record(config).fingerprint
    runs: list[tuple[bool, str, Path]] = []
    for path in parent.glob(f"*/{RECORD}"):
        with contextlib.suppress(RunError):  # what another version wrote is not continued by this one
            record = Record.read(path.parent)
            if record is not None and record.fingerprint == fingerprint:
                runs.append((not (path.parent / DELTA).exists(), record.started, path.parent))
    for unfinished, _, folder in sorted(runs, reverse=True):
        if not (unfinished and busy(folder)):
            return folder, not unfinished
    return None, False


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Say in which keys two configs differ, among those that matter."""
    before, after = that_matter(old), that_matter(new)
    keys = [key for key in sorted(before.keys() | after.keys()) if before.get(key) != after.get(key)]
    return listing((f"{key} ({before.get(key)!r}, now {after.get(key)!r})" for key in keys), 4)


def that_matter(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the keys of a config, with dots, that the trained delta depends on."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if name not in NO_MATTER:
            found |= that_matter(value, f"{name}.") if isinstance(value, Mapping) and value else {name: value}
    return found


def _versions() -> dict[str, str]:
    packages = ("torch", "transformers", "tokenizers", "safetensors")
    return {"deltaexp": __version__, **{package: version(package) for package in packages}}


class StoppedByKeyboard(KeyboardInterrupt):
    """Ctrl-C, with what the run in question says to it."""


@contextlib.contextmanager
def explained(folder: Path, again: str) -> Iterator[None]:
    """Say of what stops a run from outside (disk, memory, keyboard) what happened, what is kept and how to go on.

    Args:
        folder: The run's folder.
        again: The command that continues it.

    Raises:
        InterruptedRunError: Instead of errors of the disk and of memory.
        StoppedByKeyboard: Instead of `KeyboardInterrupt`.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        raise StoppedByKeyboard(f"stopped by the keyboard. {_kept(folder)} Continue with: {again}") from error
    except DeltaExpError as error:
        reason = disk_fault(error.__cause__)
        if reason is None:
            raise
        raise InterruptedRunError(f"{error} {_kept(folder)} Make room, then continue with: {again}") from error
    except Exception as error:
        disk, memory = disk_fault(error), _memory(error)
        if disk is not None:
            raise InterruptedRunError(
                f"The run in {str(folder)!r} could not write: {disk}. {_kept(folder)} Make room, then continue with: {again}"
            ) from error
        if memory is None:
            raise
        raise InterruptedRunError(
            f"The run in {str(folder)!r} needs more memory than there is: {memory}. {_kept(folder)} Free memory, then continue "
            f"with: {again} (a run that needs less is another one: halve trainer.batch_size or trainer.eval_batch_size, double "
            "trainer.gradient_accumulation_steps)"
        ) from error


def _kept(folder: Path) -> str:
    """Say what of a run is kept, after looking at it."""
    from deltaexp.lab.checkpoints import PREFIX, Checkpoints  # a run that is going on has torch imported

    if (folder / DELTA).exists():
        return f"The delta in {str(folder / DELTA)!r} is complete."
    try:
        newest, _ = Checkpoints(folder / CHECKPOINTS).newest()
    except MemoryError:  # there may be none to look with
        return f"Checkpoints are in {str(folder / CHECKPOINTS)!r}."
    if newest is None:
        return f"There is no checkpoint in {str(folder)!r} yet, so it will begin anew."
    return f"Kept: the checkpoint after step {int(newest.name.removeprefix(PREFIX)):,}, {str(newest)!r}."


def disk_fault(error: BaseException | None) -> str | None:
    """Return what the disk has to say, in words; None for an error of another kind."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None and type(error).__name__ == "SafetensorError":
        found = re.search(r"\(os error (\d+)\)", str(error))
        number = int(found.group(1)) if found else None
    if number not in NO_ROOM:
        return None
    name = getattr(error, "filename", None)
    return NO_ROOM[number] + (f" ({str(name)!r})" if name else "")


def _memory(error: BaseException) -> str | None:
    """Return what of memory is lacking; None for an error of another kind."""
    text = (str(error).splitlines() or [""])[0]
    if isinstance(error, MemoryError):
        return text or "Python could not allocate any"
    if type(error).__name__ == "OutOfMemoryError" or re.search(r"can't allocate memory|bad_alloc|out of memory", str(error)):
        found = re.search(r"allocate ([\d.]+ ?\w+)", str(error).split("can't allocate memory")[-1])
        return f"{found.group(1)} more could not be had" if found else text
    return None
