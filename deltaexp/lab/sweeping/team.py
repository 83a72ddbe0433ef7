"""Which jobs of a sweep may be trained in one (``sweep.joint=auto``), and how they are executed then."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial

from rich.console import Console

from deltaexp.lab.config import RunConfig, SeedsConfig, TrainerConfig
from deltaexp.lab.sweeping.job import Job, Result, execute
from deltaexp.lab.sweeping.launching import quiet
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


def formed(jobs: Sequence[Job]) -> list[list[Job]]:
    """Return jobs in teams that may be trained in one, each in the place of its first; alone where nothing goes with it."""
    teams: list[list[Job]] = []
    open_teams: dict[str, list[Job]] = {}
    for job in jobs:
        size = min(MOST, ROWS // job.run.trainer.batch_size) if _may(job.run) else 1
        key = repr(_common(job.run))
        team = open_teams.get(key)
        if size > 1 and team is not None and len(team) < size:
            team.append(job)
            continue
        teams.append([job])
        open_teams[key] = teams[-1]
    return teams


def _may(run: RunConfig) -> bool:
    """Say whether a run may be trained together with others, as far as its config tells."""
    trainer, backbone = run.trainer, run.backbone
    special = trainer.compile or trainer.sharding or trainer.gradient_checkpointing or trainer.speed != "off"
    placed = backbone.quantization or backbone.device_map or backbone.trust_remote_code
    # W&B follows one run of a process at a time.
    return run.sweep.joint == "auto" and not special and not placed and "wandb" not in run.tracker.names


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

    # One progress bar is enough: each has one step where another has one.
    runs = [partial(execute, job if number == 0 else quiet(job)) for number, job in enumerate(jobs)]
    team = joint.Team(runs, sharing.OF_PROCESS, lambda line: console.print(line, markup=False))
    for number, result in team.go():
        yield jobs[number], result
