"""Jobs of a sweep in several processes, on a cluster by Slurm, or on a cluster of Ray's.

Each function yields jobs with their results as these come in. A job that takes its process down with it, or is cancelled, is
one that failed, and the others go on. On this machine a process may be given several jobs that are trained in one
(`deltaexp.lab.sweeping.team`). Nothing here imports torch: the processes that execute jobs do.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from importlib.util import find_spec
from typing import Any

from deltaexp.errors import ConfigError
from deltaexp.lab.sweeping import record, team
from deltaexp.lab.sweeping.job import Job, Result, execute, quiet

Results = Iterator[tuple[Job, Result]]
LOOK, ASK = 0.5, 10.0
"""Seconds between two looks for results of a cluster, and between two questions to Slurm."""
UNDER_WAY = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SUSPENDED",
             "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING", "SPECIAL_EXIT", "RESV_DEL_HOLD", "PREEMPTED")  # fmt: skip
"""States of Slurm in which a job may still come to an end of its own; one that is preempted goes back into the queue."""


def need(launcher: str, package: str, extra: str) -> None:
    """Check that a launcher's package is installed.

    Raises:
        ConfigError: If it is not.
    """
    if find_spec(package) is None:
        raise ConfigError(f'hydra/launcher={launcher} needs the package {package}: pip install "deltaexp[{extra}]".')


def lost(job: Job, why: str) -> tuple[Job, Result]:
    """Return what became of a job that could not say it itself, and note it in the sweep's record."""
    record.update(job.sweep, record.Entry(job.folder, job.identity, job.overrides, "failed", why))
    return job, Result("failed", error=why)


def in_processes(jobs: Sequence[Job], n_jobs: int) -> Results:
    """Execute jobs in several processes of this machine, by joblib.

    Args:
        jobs: What to execute.
        n_jobs: The number of processes; -1 is one for each core.

    Raises:
        ConfigError: If it is none.
    """
    if not isinstance(n_jobs, int) or (n_jobs < 1 and n_jobs != -1):
        raise ConfigError(
            f"hydra.launcher.n_jobs is {n_jobs!r}; it must be a whole number from 1, or -1 for one for each core."
        )
    from joblib import Parallel, cpu_count, delayed

    processes = cpu_count() if n_jobs == -1 else n_jobs
    waiting, suspects = dict(enumerate(team.formed(jobs, processes))), list[int]()
    numbers = itertools.count(len(waiting))
    while waiting:
        # Where a process died, each job that was being executed may be why: they go on one by one, so that it shows.
        batch = suspects[:1] or list(waiting)
        count = 1 if suspects else processes
        # One process alone would be this one, so there are two, and one job at a time.
        pool = Parallel(n_jobs=max(2, count), backend="loky", return_as="generator_unordered", batch_size=1, pre_dispatch=count)
        results = pool(delayed(_in_silence)(number, waiting[number]) for number in batch)
        try:
            with contextlib.closing(results):
                for number, found in results:
                    yield from zip(waiting.pop(number), found, strict=True)
            suspects = suspects[1:]
        except BrokenProcessPool as error:
            if suspects:
                suspects = suspects[1:]
                (job,) = waiting.pop(batch[0])
                yield lost(job, f"Its process was killed, by the system or by somebody ({_short(error)}).")
            else:
                began = [number for number in batch if any(map(_began, waiting.get(number, ())))]
                if not began:
                    raise
                apart = {next(numbers): [job] for number in began for job in waiting.pop(number)}
                waiting, suspects = {**apart, **waiting}, list(apart)


def _in_silence(number: int, jobs: Sequence[Job]) -> tuple[int, list[Result]]:
    """Execute jobs that may be trained in one, whose logs hold what they print; what is warned of goes beside the first's."""
    jobs[0].path.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        warned = stack.enter_context(open(jobs[0].path / "stderr.log", "a", encoding="utf-8"))
        stack.enter_context(contextlib.redirect_stderr(warned))
        return number, _execute(jobs)


def _execute(jobs: Sequence[Job]) -> list[Result]:
    """Execute jobs that may be trained in one, and return their results in the same order."""
    found = {job.identity: result for job, result in team.execute_together([quiet(job) for job in jobs])}
    return [found[job.identity] for job in jobs]


def _began(job: Job) -> bool:
    entry = record.read(job.sweep).get(job.identity)
    return entry is not None and entry.status == "running"


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) < 200 else f"{text[:200]}..."


class Resumable:
    """What is submitted to a cluster: a job that goes on from its checkpoint wherever it is begun again, or several in one."""

    def __call__(self, jobs: Sequence[Job]) -> list[Result]:
        """Execute the jobs, or what is left of them."""
        return _execute(jobs)

    def checkpoint(self, jobs: Sequence[Job]) -> Any:
        """Return what is to be done when the time that the cluster gave is over, or the job is preempted: the same."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, jobs)


def by_submitit(
    jobs: Sequence[Job], cluster: str, folder: str | None, at_once: int | None, options: Mapping[str, Any]
) -> Results:
    """Execute jobs by submitit: on a cluster by Slurm, or as processes of their own on this machine.

    Args:
        jobs: What to execute.
        cluster: ``slurm`` or ``local``.
        folder: Where submitit keeps its files; a cluster's machines must share it. ``%j`` stands for a job's number, and None
            for ``.submitit/%j`` in the sweep's folder.
        at_once: How many may be executed at the same time.
        options: submitit's parameters for one job.

    Raises:
        ConfigError: If submitit knows one of these not, or there is no Slurm.
    """
    import submitit

    if cluster == "slurm" and not all(map(shutil.which, ("sbatch", "srun", "squeue", "scancel"))):
        raise ConfigError(
            "hydra/launcher=submitit_slurm needs Slurm's commands (sbatch, srun, squeue, scancel) on this machine."
        )
    options = {key: value for key, value in options.items() if value is not None}
    generic = submitit.AutoExecutor._typed_parameters()
    own = {key if key in generic else f"{cluster}_{key}": value for key, value in options.items()}
    retries = {f"{cluster}_max_num_timeout": own.pop(f"{cluster}_max_num_timeout", 0)}
    try:
        place = folder or f"{jobs[0].sweep}/.submitit/%j"
        executor = submitit.AutoExecutor(folder=place, cluster=cluster, **retries)
        executor.update_parameters(**own)
    except (NameError, ValueError, AssertionError, TypeError, RuntimeError) as error:
        raise ConfigError(f"hydra.launcher is not as submitit wants it: {error}") from error
    processes = at_once or os.cpu_count() or 1
    waiting = [[job] for job in jobs] if cluster == "slurm" else team.formed(jobs, processes)
    begun, look = dict[Any, list[Job]](), _Slurm() if cluster == "slurm" else _Local()

    def ended(together: list[Job], found: list[Result] | str) -> Results:
        if not isinstance(found, str):
            yield from zip(together, found, strict=True)
        elif len(together) == 1:
            yield lost(together[0], found)
        else:
            waiting.extend([job] for job in together)  # each may be why

    try:
        while waiting or begun:
            # Slurm takes them all, as an array with a limit of its own; on this machine the limit is kept here.
            room = len(waiting) if cluster == "slurm" else processes - len(begun)
            now, waiting = waiting[: max(0, room)], waiting[max(0, room) :]
            if now:
                begun |= zip(executor.map_array(Resumable(), now), now, strict=True)
            for submitted in list(begun):
                if _has_result(submitted):
                    yield from ended(begun.pop(submitted), _results(submitted))
            for submitted, why in look.gone(begun).items():
                yield from ended(begun.pop(submitted), why)
            time.sleep(LOOK if begun else 0)
    finally:
        for submitted in begun:
            submitted.cancel(check=False)


def _has_result(submitted: Any) -> bool:
    path = submitted.paths.result_pickle
    with contextlib.suppress(OSError):
        path.parent.chmod(path.parent.stat().st_mode)  # has a network file system look again
    return path.exists()


def _results(submitted: Any) -> list[Result] | str:
    """Return what the jobs that were submitted in one came to, or why there is nothing."""
    from submitit.core.utils import FailedJobError, UncompletedJobError

    try:
        return submitted.result()
    except (FailedJobError, UncompletedJobError) as error:
        trace = re.split("-{20,}", str(error))  # submitit puts the traceback between two lines
        return f"{_last(trace[min(1, len(trace) - 1)])} Its output is in {str(submitted.paths.stderr)!r}."


def _last(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip(" -")]
    return (lines[-1] if lines else "It ended without a result").rstrip(".") + "."


class _Local:
    """Which processes of this machine have ended without a result."""

    def gone(self, begun: Mapping[Any, Sequence[Job]]) -> dict[Any, str]:
        ended = [one for one in begun if one.done() and not _has_result(one)]
        return {one: f"Its process ended without a result; its output is in {str(one.paths.stderr)!r}." for one in ended}


class _Slurm:
    """Which of the jobs that Slurm was given have ended without a result: cancelled, out of memory, or with their node.

    squeue says it on every cluster, where sacct, which submitit asks, needs a database of accounts.
    """

    def __init__(self) -> None:
        self.asked, self.missing = time.monotonic(), dict[str, str]()

    def gone(self, begun: Mapping[Any, Sequence[Job]]) -> dict[Any, str]:
        if not begun or time.monotonic() < self.asked + ASK:
            return {}
        self.asked = time.monotonic()
        command = ["squeue", "--me", "--array", "--noheader", "--states=all", "--format=%i %T"]
        answer = subprocess.run(command, capture_output=True, text=True)
        if answer.returncode:
            return {}  # the controller is not there for now
        states = dict(line.split(maxsplit=1) for line in answer.stdout.splitlines() if " " in line.strip())
        ended = {one: states.get(one.job_id, "no longer known to Slurm").strip() for one in begun}
        ended = {one: state for one, state in ended.items() if state not in UNDER_WAY}
        # What a node wrote may be seen later than that it ended: only who is missing twice is gone.
        twice = {one: state for one, state in ended.items() if self.missing.get(one.job_id) == state}
        self.missing = {one.job_id: state for one, state in ended.items()}
        return {
            one: f"Slurm's job {one.job_id} is {state} and left no result; its output is in {str(one.paths.stderr)!r}."
            for one, state in twice.items()
            if not _has_result(one)
        }


def by_ray(jobs: Sequence[Job], init: Mapping[str, Any], remote: Mapping[str, Any]) -> Results:
    """Execute jobs on a cluster of Ray's, or on this machine as one.

    Args:
        jobs: What to execute.
        init: Arguments of ``ray.init``, such as the ``address`` of a cluster.
        remote: What a job needs, as in ``ray.remote``, such as ``num_gpus``.

    Raises:
        ConfigError: If Ray does not know one of these, or there is no cluster at that address.
    """
    import ray

    ours = not ray.is_initialized()
    try:
        if ours:
            ray.init(**{"logging_level": logging.WARNING, **init})
        function = ray.remote(**remote)(execute) if remote else ray.remote(execute)
    except (TypeError, ValueError, RuntimeError, ConnectionError) as error:
        raise ConfigError(f"hydra.launcher is not as Ray wants it: {error}") from error
    begun: dict[Any, Job] = {}
    try:
        begun = {function.remote(quiet(job)): job for job in jobs}
        while begun:
            (ready,), _ = ray.wait(list(begun))
            job = begun.pop(ready)
            try:
                yield job, ray.get(ready)
            except ray.exceptions.RayError as error:
                yield lost(job, f"Ray gave it up: {_last(str(error))}")
    finally:
        for one in begun:
            ray.cancel(one, force=True)
        if ours:
            ray.shutdown()
