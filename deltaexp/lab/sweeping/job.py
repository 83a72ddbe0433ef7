"""One run of a sweep, as it is handed to whatever executes it: another process, or another machine.

How a launcher runs jobs: it pickles each `Job`, calls `execute` with it wherever it likes, and gets a `Result` that is pickled
back. Nothing is raised for a run that fails, and nothing in this module imports torch before a job is executed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import sys
import time
import traceback
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from rich.console import Console

from deltaexp.errors import DeltaExpError, PrunedRunError, RunningElsewhereError
from deltaexp.lab.config import RunConfig
from deltaexp.lab.sweeping import record
from deltaexp.lazy import imports
from deltaexp.redaction import guard_logs, redact
from deltaexp.registry import DeltaConfig

if TYPE_CHECKING:
    from deltaexp.lab.sharing import Shared

LOGGED: ContextVar[IO[str] | None] = ContextVar("LOGGED", default=None)
"""The log of the job that is at work; jobs that are trained in one have a context each (`deltaexp.lab.turns`)."""
LOG = "deltaexp.log"
"""The log of a job, in its folder; Hydra's logging writes to a file of this name, too."""


@dataclass(frozen=True)
class Job:
    """One run of a sweep."""

    run: RunConfig
    delta: DeltaConfig
    identity: str
    """sha256 of its config and of the code."""
    folder: str
    """Its folder, below the sweep's."""
    words: tuple[str, ...] = ()
    """The overrides that make it, as they would be typed."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """The same, by key."""
    sweep: str = ""
    """The sweep's folder, with all of its path."""
    again: str = ""
    """The command that continues the sweep."""

    @property
    def path(self) -> Path:
        """Its folder, with all of its path."""
        return Path(self.sweep, self.folder)

    @property
    def name(self) -> str:
        """What tells it from others, in words."""
        return " ".join(f"{key}={value}" for key, value in self.overrides.items()) or "defaults"


@dataclass(frozen=True)
class Result:
    """What came of a job."""

    status: str
    """``finished``, ``failed``, ``pruned`` where a search gave it up, or ``running`` where another process is at it."""
    score: float | None = None
    """The task's metric after training."""
    error: str | None = None
    """What went wrong, in whole sentences."""
    seconds: float | None = None


def quiet(job: Job) -> Job:
    """Return a job without progress bars, which would be drawn over those of others."""
    trainer = dataclasses.replace(job.run.trainer, progress=False)
    return dataclasses.replace(job, run=dataclasses.replace(job.run, trainer=trainer))


def execute(job: Job, shared: Shared | None = None) -> Result:
    """Do a job, or what is left of it, and note in the sweep's record what came of it.

    Args:
        job: The job.
        shared: What it shares with others; by default with all of this process.

    Raises:
        KeyboardInterrupt: If somebody stops it; it can be continued.
    """
    start = time.perf_counter()
    job.path.mkdir(parents=True, exist_ok=True)
    entry = record.Entry(job.folder, job.identity, job.overrides, "running")
    record.update(job.sweep, entry)
    with open(job.path / LOG, "a", encoding="utf-8") as log, _logging_to(log):
        try:
            with imports():
                from deltaexp.lab import sharing  # torch and transformers are imported here, not earlier
                from deltaexp.lab.run import run

            tracker = dataclasses.replace(job.run.tracker, group=job.run.tracker.group or Path(job.sweep).name or None)
            config = dataclasses.replace(job.run, resume=True, tracker=tracker)
            outcome = run(config, job.delta, job.path, _Both(log), again=job.again, shared=shared or sharing.OF_PROCESS)
            result = Result("finished", outcome.score, seconds=time.perf_counter() - start)
        except PrunedRunError as error:
            result = Result("pruned", error=str(error), seconds=time.perf_counter() - start)
        except RunningElsewhereError:
            return Result("running")
        except KeyboardInterrupt:
            record.update(job.sweep, dataclasses.replace(entry, status="waiting"))
            raise
        except Exception as error:
            known = isinstance(error, DeltaExpError)
            text = redact(str(error) if known else f"{type(error).__name__}: {error}")
            log.write(f"{text}\n" if known else redact(traceback.format_exc()))
            result = Result("failed", error=text, seconds=time.perf_counter() - start)
    record.update(job.sweep, dataclasses.replace(entry, status=result.status, error=result.error, seconds=result.seconds))
    return result


@contextlib.contextmanager
def _logging_to(log: IO[str]) -> Iterator[None]:
    """Have Python's log written to a job's, unless Hydra has done so already."""
    root, handler = logging.getLogger(), logging.StreamHandler(log)
    handler.addFilter(lambda _: LOGGED.get() is log)
    handler.setFormatter(logging.Formatter("[%(asctime)s][%(name)s][%(levelname)s] - %(message)s"))
    needed = not any(isinstance(other, logging.FileHandler) for other in root.handlers)
    if needed:
        root.addHandler(handler)
    guard_logs()
    token = LOGGED.set(log)
    try:
        yield
    finally:
        LOGGED.reset(token)
        root.removeHandler(handler)


def forget() -> None:
    """Keep nothing any more that jobs of this process have shared."""
    if "deltaexp.lab.sharing" in sys.modules:  # it imports torch
        from deltaexp.lab import sharing

        sharing.OF_PROCESS.clear()


class _Both(Console):
    """Standard output, and a log that holds the same without colours."""

    def __init__(self, log: IO[str]) -> None:
        super().__init__(highlight=False, soft_wrap=True)
        self._log = Console(file=log, highlight=False, soft_wrap=True, width=120, color_system=None)

    def print(self, *objects: Any, **options: Any) -> None:
        """Print to both."""
        super().print(*objects, **options)
        self._log.print(*objects, **options)
        self._log.file.flush()
