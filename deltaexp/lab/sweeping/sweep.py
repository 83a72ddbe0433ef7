"""A sweep from top to bottom: what is done already, what is left, who does it, and what came of it all."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig
from rich.console import Console

from deltaexp.errors import CheckpointError, RunError, SweepError, listing
from deltaexp.lab import recovery, report, schema, tracking
from deltaexp.lab.sweeping import grid, record, team
from deltaexp.lab.sweeping.job import LOG, Job, Result, execute, forget

PATIENCE = 1.0
"""Seconds between two looks at jobs that another process is at work on."""


class Runs(Protocol):
    """What a launcher of deltaexp does (`plugins/hydra_plugins/deltaexp_sweeping.py`)."""

    at_once: int | None
    joins: bool

    def run(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, Result]]:
        """Execute jobs, and yield each with its result."""


def sweep(config: DictConfig, launcher: Any, arguments: Sequence[str], batch: int | None) -> None:
    """Do what is left to do of a sweep; what Hydra's sweeper calls.

    Args:
        config: The root config of the sweep.
        launcher: One of deltaexp's launchers, or another of Hydra's.
        arguments: The overrides, apart from those of Hydra.
        batch: How many jobs a launcher is given at once, at most.

    Raises:
        ConfigError: If a job cannot run; none has begun then.
        SweepError: If one failed.
    """
    own = [word for word in config.hydra.overrides.hydra if word != "hydra.mode=MULTIRUN"]  # which -m adds
    planned = grid.plan((*own, *arguments), tuple(searched(config)))
    assert planned is not None
    folder = grid.folder(config, planned.name)
    jobs = [dataclasses.replace(job, sweep=str(folder), again=planned.command) for job in planned.jobs]
    console = Console(highlight=False, soft_wrap=True)
    for note in planned.notes:
        console.print(note, markup=False)
    entries = [record.Entry(job.folder, job.identity, job.overrides) for job in jobs]
    before = [old for old in record.read(folder).values() if old.identity not in {entry.identity for entry in entries}]
    made = [entry.overrides for entry in entries]
    if others := sum(old.status == "finished" and old.overrides in made for old in before):
        console.print(f"{others} of these jobs were finished here by another version of the code, and are done anew")
    record.begin(folder, planned.command, planned.words, entries)
    going = Going(jobs, folder, console)
    try:
        going.go(launcher, batch)
        going.finish()
    finally:
        forget()


class Going:
    """The jobs of a sweep on their way."""

    def __init__(self, jobs: Sequence[Job], folder: Path, console: Console) -> None:
        self.jobs, self.folder, self.console = jobs, folder, console
        self.fail_fast, retry = jobs[0].run.fail_fast, jobs[0].run.retry
        known = record.read(folder)
        self.again = {job.identity for job in jobs if retry and known[job.identity].status == "failed"}
        """Jobs that failed before and are tried again; one that fails from now on is not."""
        self.stopped, self.start, self.executed = False, time.perf_counter(), 0
        for job in jobs:
            if (job.path / recovery.DELTA).exists():
                self._look_at_finished(job, known[job.identity], retry)

    def go(self, launcher: Any, batch: int | None = None) -> None:
        """Have all jobs done that are left to do.

        Args:
            launcher: One of deltaexp's launchers, or another of Hydra's.
            batch: How many jobs a launcher is given at once, at most.
        """
        runs: Any = launcher if hasattr(launcher, "run") else _Foreign(launcher)
        size = min([size for size in (batch, runs.at_once) if size], default=len(self.jobs))
        wanted = self.jobs[0].run.sweep.joint == "auto"
        if wanted and not runs.joins:
            self.console.print("sweep.joint=auto changes nothing: this launcher executes each job in a process of its own")
        elif wanted and (alone := [keys for job in self.jobs if (keys := team.hindrances(job.run))]):
            why = listing(dict.fromkeys(itertools.chain(*alone)))
            self.console.print(
                f"sweep.joint=auto: {len(alone)} of these jobs train by themselves, because of {why}", markup=False
            )
        left = self._left(self.jobs)
        self.console.print(f"{len(self.jobs)} jobs in {self.folder}, {len(left)} of them to do", markup=False)
        told = False
        while left and not self.stopped:
            ready = [job for job in left if not recovery.busy(job.path)]
            if ready:
                self._launch(runs, team.formed(ready)[0][:batch] if wanted and runs.joins and size == 1 else ready[:size])
            else:
                if not told:
                    what = f"{len(left)} jobs that another process is at work on"
                    self.console.print(f"waiting for {what}: {self._label(left[0])}, ...", markup=False)
                told = True
                time.sleep(PATIENCE)
            left = self._left(left)

    def finish(self) -> None:
        """Put the runs side by side, and tell of those that failed.

        Raises:
            SweepError: If one did.
        """
        entries = record.read(self.folder)
        for job in self.jobs:
            if entries[job.identity].status != "failed" and (job.path / recovery.DELTA).exists():
                entries[job.identity] = dataclasses.replace(entries[job.identity], status="finished")
                record.update(self.folder, entries[job.identity])
        states = [entries[job.identity].status for job in self.jobs]
        if "finished" in states:
            show(self.folder, self.console)
        failed = [job for job in self.jobs if entries[job.identity].status == "failed"]
        if failed:
            lines = [f"  {self._label(job)}: {entries[job.identity].error} ({job.path / LOG})" for job in failed]
            left = len(states) - len(failed) - states.count("finished")
            raise SweepError(
                "\n".join([f"{len(failed)} of {len(states)} jobs failed:", *lines])
                + (f"\n{left} were not begun, for fail_fast=true." if left else "")
                + f"\nTry them again with: {failed[0].again} retry=true"
            )

    def _left(self, jobs: Sequence[Job]) -> list[Job]:
        """Return the jobs that have neither finished nor failed."""
        known = record.read(self.folder)
        over = {identity for identity, entry in known.items() if entry.status in ("failed", "pruned")} - self.again
        return [job for job in jobs if job.identity not in over and not self._is_finished(job)]

    def _is_finished(self, job: Job) -> bool:
        """Say whether the delta of a job is complete, and pushed if it is to be."""
        found = recovery.Record.read(job.path) if job.run.hub.push else None
        return (job.path / recovery.DELTA).exists() and (not job.run.hub.push or (found is not None and bool(found.pushed)))

    def _look_at_finished(self, job: Job, entry: record.Entry, retry: bool) -> None:
        """Check the files of a delta that is there; one that is damaged counts as failed, or is put aside and made anew."""
        delta = job.path / recovery.DELTA
        fault = _fault(delta)
        if fault is not None and retry:
            os.replace(delta, _free(job.path / "damaged"))
        elif fault is not None:
            record.update(self.folder, dataclasses.replace(entry, status="failed", error=fault))

    def _launch(self, launcher: Runs, jobs: Sequence[Job]) -> None:
        """Have some jobs executed, and tell of each what came of it."""
        self.again -= {job.identity for job in jobs}
        if len(jobs) == 1 or launcher.at_once == 1:
            places = "\n    ".join(map(self._place, jobs))
            self.console.print(f"\n=== {places}{self._time_left()} ===", markup=False)
        results: Any = launcher.run(jobs)
        with contextlib.closing(results):
            for job, result in results:
                if result.status == "running":
                    self.console.print(f"{self._place(job)}: another process was faster and is at work on it", markup=False)
                    continue
                self.executed += 1
                told = {"finished": f"{result.score:.4f}" if result.score is not None else "", "pruned": result.error}
                what = told.get(result.status, f"failed: {result.error}")
                took = "" if result.seconds is None else f" ({result.seconds:.1f} s)"  # a job that was killed cannot say it
                self.console.print(f"{self._place(job)}: {what}{took}{self._time_left()}", markup=False)
                if result.status == "failed" and self.fail_fast:
                    self.stopped = True
                    return

    def _place(self, job: Job) -> str:
        return f"job {self.jobs.index(job) + 1} of {len(self.jobs)}: {self._label(job)}"

    def _label(self, job: Job) -> str:
        """Return what tells a job from the others."""
        told = {key: value for key, value in job.overrides.items() if any(o.overrides.get(key) != value for o in self.jobs)}
        return " ".join(f"{key}={value}" for key, value in told.items()) or job.folder

    def _time_left(self) -> str:
        """Say how long the jobs that are left would take at the pace of those that were executed."""
        left = len(self._left(self.jobs))
        if not self.executed or not left:
            return ""
        seconds = (time.perf_counter() - self.start) / self.executed * left
        return f", about {seconds:.0f} s left" if seconds < 90 else f", about {seconds / 60:.0f} min left"


def show(folder: Path, console: Console) -> None:
    """Put the finished runs of a sweep side by side, and tell the trackers of them."""
    report.write(folder, console)
    tracking.summarise_sweep(folder, lambda sentence: console.print(sentence, style="yellow", markup=False))


def _fault(delta: Path) -> str | None:
    """Return what is wrong with the files of a delta, None if they are those that were saved."""
    from deltaexp.manifest import MANIFEST, check_files, read_manifest  # imports torch, which a sweep's plan does without

    try:
        manifest = read_manifest(delta)
        if manifest is None:
            return f"The delta in {str(delta)!r} has no {MANIFEST}."
        check_files(delta, manifest, tuple(manifest.files))
    except CheckpointError as error:
        return str(error)
    return None


def _free(path: Path) -> Path:
    """Return a path like this one at which nothing is."""
    return next(p for n in itertools.count(1) if not (p := path.with_name(f"{path.name}-{n}")).exists())


class _Foreign:
    """Another launcher of Hydra's, which is given overrides and composes the jobs anew."""

    at_once, joins = None, False

    def __init__(self, launcher: Any) -> None:
        self.launcher = launcher

    def run(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, Result]]:
        """Have Hydra's launcher execute jobs."""
        words = [[*job.words, f"hydra.sweep.subdir={job.folder}"] for job in jobs]
        for job, returned in zip(jobs, self.launcher.launch(words, initial_job_idx=0), strict=True):
            value = returned._return_value
            yield job, value if isinstance(value, Result) else Result("failed", error=str(value))


def launch(launcher: Any, job_overrides: Sequence[Sequence[str]]) -> list[JobReturn]:
    """Do for a launcher of deltaexp what other sweepers ask for: run jobs given as overrides, and return their scores."""
    search_path = searched(launcher.config)
    words = [word for overrides in job_overrides for word in overrides]
    name = f"search-{hashlib.sha256(' '.join(sorted(words)).encode()).hexdigest()[:10]}"
    folder = grid.folder(launcher.config, name)
    jobs = [dataclasses.replace(grid.job(list(overrides), search_path), sweep=str(folder)) for overrides in job_overrides]
    found = {job.identity: result for job, result in launcher.run(jobs)}
    returns = []
    for job, overrides in zip(jobs, job_overrides, strict=True):
        result = found[job.identity]
        returned = JobReturn(overrides=list(overrides), working_dir=str(job.path))
        returned.return_value = result.score if result.status == "finished" else RunError(result.error or "It failed.")
        returned.status = JobStatus.COMPLETED if result.status == "finished" else JobStatus.FAILED
        returns.append(returned)
    return returns


def task(cfg: DictConfig) -> Result:
    """Do one job of a sweep: the function that Hydra's own launchers call, with a job's config.

    It is a function of a module, so that other processes can find it.
    """
    hydra = HydraConfig.get()
    run, delta = schema.split(cfg)
    folder = Path(hydra.runtime.output_dir)
    root = Path(hydra.sweep.dir).resolve()
    identity = recovery.identity(recovery.describe(run, delta))
    overrides = {o.key_or_group: o.value() for o in schema.parse(list(hydra.overrides.task))}
    return execute(Job(run, delta, identity, str(folder.relative_to(root)), (), overrides, str(root)))


def searched(config: DictConfig) -> list[str]:
    """Return the folders of configs that the user named, beside ``conf/``."""
    sources = config.hydra.runtime.config_sources
    return [str(source.path) for source in sources if source.schema == "file" and source.provider != "main"]
