"""Which jobs of a sweep may be trained in one (``sweep.joint=auto``), and how they are executed then."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial

from rich.console import Console

from deltaexp.lab.config import RunConfig, SeedsConfig, TrainerConfig
from deltaexp.lab.sweeping.job import LOG, Job, Result, execute, quiet
from deltaexp.lazy import imports

ROWS = 64
"""Rows that a joint batch has at most: of more, a step of all is hardly faster than one of each."""
MOST = 8
"""Jobs that are trained in one at most."""
OPTIMIZER = (
    "learning_rate", "learning_rates", "optimizer", "adam_beta1", "adam_beta2", "adam_epsilon", "momentum", "lr_scheduler",
    "scheduler_options", "warmup_ratio", "warmup_steps", "weight_decay", "label_smoothing", "max_grad_norm", "epochs",
    "max_steps",
)  # fmt: skip
"""Fields of `TrainerConfig` in which jobs that are trained in one may differ."""


def formed(jobs: Sequence[Job], processes: int = 1) -> list[list[Job]]:
    """Return jobs in teams that may be trained in one, each in the place of its first; alone where nothing goes with it.

    Args:
        jobs: The jobs.
        processes: How many processes share the teams, which are as large as they can be while the busiest of these has as few
            jobs as possible.
    """
    may = [job.run.sweep.joint == "auto" and not hindrances(job.run) for job in jobs]
    keys = [repr(_common(job.run)) if one else None for job, one in zip(jobs, may, strict=True)]

    def of_size(most: int) -> list[list[Job]]:
        teams: list[list[Job]] = []
        open_teams: dict[str | None, list[Job]] = {}
        for job, key in zip(jobs, keys, strict=True):
            team = open_teams.get(key)
            if key is not None and team is not None and len(team) < min(most, ROWS // job.run.trainer.batch_size):
                team.append(job)
                continue
            teams.append([job])
            open_teams[key] = teams[-1]
        return teams

    def longest(teams: list[list[Job]]) -> int:
        loads = [0] * processes
        for team in teams:
            loads[loads.index(min(loads))] += len(team)
        return max(loads)

    return min(map(of_size, range(MOST, 0, -1) if processes > 1 else [MOST]), key=longest)


def hindrances(run: RunConfig) -> list[str]:
    """Return the keys, as they are typed, for which a run is not trained together with others, as far as its config tells."""
    trainer, backbone = run.trainer, run.backbone
    values = {
        "trainer.compile": trainer.compile, "trainer.sharding": trainer.sharding,
        "trainer.gradient_checkpointing": trainer.gradient_checkpointing, "backbone.quantization": backbone.quantization,
        "backbone.device_map": backbone.device_map, "backbone.trust_remote_code": backbone.trust_remote_code,
    }  # fmt: skip
    found = [f"{key}={str(value).lower()}" for key, value in values.items() if value]
    if trainer.speed != "off":
        found.append(f"trainer.speed={trainer.speed}")
    if 2 * trainer.batch_size > ROWS:
        found.append(f"trainer.batch_size={trainer.batch_size}")
    # W&B follows one run of a process at a time.
    return found + ["tracker=wandb"] * ("wandb" in run.tracker.names)


def _common(run: RunConfig) -> RunConfig:
    """Return what the configs of jobs that are trained in one have in common."""
    usual = TrainerConfig()
    trainer = dataclasses.replace(run.trainer, **{name: getattr(usual, name) for name in OPTIMIZER})
    return dataclasses.replace(run, trainer=trainer, seed=0, seeds=SeedsConfig())


def execute_together(jobs: Sequence[Job]) -> Iterator[tuple[Job, Result]]:
    """Execute jobs that are trained in one where that measures faster, and yield each with its result when it is over."""
    if len(jobs) == 1:
        yield jobs[0], execute(jobs[0])
        return
    with imports():
        from deltaexp.lab import joint, sharing
    console = Console(highlight=False, soft_wrap=True)

    def say(line: str) -> None:
        console.print(line, markup=False)
        for job in jobs:
            with open(job.path / LOG, "a", encoding="utf-8") as log:
                log.write(f"{line}\n")

    # One progress bar is enough: each has one step where another has one.
    runs = [partial(execute, job if number == 0 else quiet(job)) for number, job in enumerate(jobs)]
    left = list(jobs)
    try:
        for number, result in joint.Team(runs, sharing.OF_PROCESS, say).go():
            left.remove(jobs[number])
            yield jobs[number], result
    except Exception as error:  # of a step of all, such as too little memory: what a run raises is in its result
        say(f"{len(left)} runs go on one by one: {(str(error) or type(error).__name__).splitlines()[0]}")
    for job in left:
        yield job, execute(job)
