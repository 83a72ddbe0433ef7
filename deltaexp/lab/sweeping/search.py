"""A search from top to bottom: the studies that it consists of, their trials as jobs, and the runs of what was chosen.

Trials are compared on the validation split, and the test split is no part of their data. Only what a search chose at the end
is measured on it, over seeds of its own (``hydra.sweeper.final_seeds``).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from deltaexp.errors import ConfigError, RunError, SweepError, listing, unknown
from deltaexp.lab import recovery, schema
from deltaexp.lab.sweeping import design, grid, record, space, sweep
from deltaexp.lab.sweeping.job import Job
from deltaexp.lab.sweeping.study import Method, Study, Trial, place
from deltaexp.lab.writing import locked, write_whole

SUMMARY, TRIALS, FINAL, LOCK = "search.json", "trials", "final", ".search.lock"


@dataclass(frozen=True)
class Options:
    """What ``hydra.sweeper`` of a search says."""

    n_trials: int
    n_jobs: int
    per: tuple[str, ...]
    method: Method
    storage: str | None
    start_from_config: bool
    final_seeds: tuple[int, ...]

    def __post_init__(self) -> None:
        for name in ("n_trials", "n_jobs"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"hydra.sweeper.{name} is {value!r}; it must be a whole number from 1.")


def search(config: DictConfig, launcher: Any, arguments: Sequence[str], options: Options) -> None:
    """Do what is left to do of a search; what the sweeper calls.

    Args:
        config: The root config.
        launcher: Who executes trials.
        arguments: The overrides, apart from those of Hydra.
        options: What ``hydra.sweeper`` says.

    Raises:
        ConfigError: If something cannot be searched; nothing has begun then.
        SweepError: If a study ended without a trial that went to the end, or one of the final runs failed.
        RunError: If another process is at the same search.
    """
    search_path = sweep.searched(config)
    own = [word for word in config.hydra.overrides.hydra if word != "hydra.mode=MULTIRUN"]  # which -m adds
    asked = grid.asked_for([*own, *arguments], config)
    given, words = asked.given, asked.words
    for key in options.per:
        if key in given and given[key].is_sweep_override() and not given[key].is_discrete_sweep():
            raise ConfigError(f"There is one study for each value of {key}, so give values, not a range.")
    planned, notes = design.plan(asked, options.per, search_path)
    folder = grid.folder(config, design.name(planned, given))
    console = Console(highlight=False, soft_wrap=True)
    for note in notes:
        console.print(note, markup=False)
    command = grid.as_typed(words, search_path)
    folder.mkdir(parents=True, exist_ok=True)
    elsewhere = RunError(f"The search in {str(folder)!r} is still going on, in another process.")
    with locked(folder / LOCK, elsewhere):  # two processes could not share the trials
        _search(planned, folder, launcher, console, command, words, options, search_path)


def _search(
    planned: Sequence[design.Planned], folder: Path, launcher: Any, console: Console, command: str, words: Sequence[str],
    options: Options, search_path: Sequence[str],
) -> None:  # fmt: skip
    """Do what is left to do of planned studies, and of what follows from them."""
    studies = [_Searched(one, folder, options, search_path, command) for one in planned]
    for one in studies:
        if one.planned.first is None and options.start_from_config:
            console.print(f"{one.label}: what the config says lies outside of what is searched; no trial begins with it")
    if options.method.pruner != "none" and not _evaluates(planned[0].base):
        console.print("no trial is pruned: there is no evaluation while training (trainer.eval_every)")
    going = _Trials(folder / TRIALS, launcher, console, command, words)
    stopped = going.go(studies, options.n_jobs)
    if any(one.study.best() for one in studies):
        sweep.show(folder / TRIALS, console)
    _tell(studies, folder, console)
    if stopped:
        raise SweepError("The search stopped at a trial that failed, for fail_fast=true.")
    spent = [one.label for one in studies if one.study.best() is None]
    if spent:
        raise SweepError(f"No trial of {listing(spent)} went to the end. What failed is in {str(folder / TRIALS)!r}.")
    if options.final_seeds:
        _measure(studies, options.final_seeds, folder / FINAL, launcher, console, command, words)
    else:
        console.print("To measure what was chosen on the test split, over seeds, add hydra.sweeper.final_seeds=[1,2,3].")


def _evaluates(job: Job) -> bool:
    trainer = job.run.trainer
    return bool(trainer.eval_every or trainer.early_stopping_patience or trainer.restore_best)


class _Searched:
    """A study on its way, whose trials are jobs."""

    def __init__(
        self, planned: design.Planned, folder: Path, options: Options, search_path: Sequence[str], command: str
    ) -> None:
        self.planned, self.label, self.search_path = planned, planned.label, search_path
        self.folder, self.command = folder / TRIALS, command
        self.metric, maximise = _metric(planned.base)
        first = planned.first if options.start_from_config else None
        about = {"metric": self.metric, "config": recovery.that_matter(recovery.describe(planned.base.run, planned.base.delta))}
        self.study = Study(
            f"{folder.name}/{self.label}", place(options.storage, folder), options.method, planned.space, options.n_trials,
            maximise, first, about,
        )  # fmt: skip
        if planned.base.run.retry:
            self.study.retry()

    def next(self, count: int) -> list[Trial]:
        """Return what is to be executed now: trials that were begun before, then new ones."""
        trials = self.study.unfinished()[:count]
        while len(trials) < count and (asked := self.study.ask()) is not None:
            trials.append(asked)
        return trials

    def job(self, params: Mapping[str, Any]) -> Job:
        """Return the job of a trial."""
        job = grid.job([*self.planned.words, *design.OF_TRIALS, *space.words(params)], self.search_path)
        return _placed(job, self.folder, self.command)

    def final(self, seed: int, folder: Path) -> Job:
        """Return the job of the best trial's values with another seed, which is measured on the test split."""
        best = self.study.best()
        assert best is not None
        job = grid.job([*self.planned.words, *space.words(best.params), f"seed={seed}"], self.search_path)
        return _placed(job, folder, self.command)

    def settle(self, number: int, job: Job, entry: record.Entry) -> bool:
        """Note what came of a trial, and say whether anything did."""
        found = recovery.Record.read(job.path)
        if (job.path / recovery.DELTA).exists():
            measured = _results(job)["metrics"]["after"]  # on the validation split
            if self.metric not in measured:
                raise ConfigError(unknown("trainer.metric", self.metric, measured))
            self.study.tell(number, "complete", measured[self.metric])
        elif found is not None and found.pruned:
            self.study.tell(number, "pruned", found.pruned["value"])
        elif entry.status == "failed":
            self.study.tell(number, "fail")
        else:
            return False
        return True


def _placed(job: Job, folder: Path, command: str) -> Job:
    """Return a job with its place, and trackers that do not mix it with the trials, or final runs, of other searches."""
    group = job.run.tracker.group or f"{folder.parent.name}-{folder.name}"
    run = dataclasses.replace(job.run, tracker=dataclasses.replace(job.run.tracker, group=group))
    return dataclasses.replace(job, run=run, sweep=str(folder), again=command)


def _metric(job: Job) -> tuple[str, bool]:
    """Return the number on the validation split that trials are compared by, and whether a higher one is better."""
    from deltaexp.lab import backbones
    from deltaexp.lab.tasks import metrics
    from deltaexp.lab.tasks.kinds import choose

    run = job.run
    kind = choose(run.task, backbones.settings_of(run.backbone), run.backbone.name)
    name = run.trainer.metric or metrics.main(run.task.metrics or kind.usual_metrics)
    return name, metrics.greater_is_better(name)


class _Trials:
    """The trials of all studies, executed as the jobs of one sweep."""

    def __init__(self, folder: Path, launcher: Any, console: Console, command: str, words: Sequence[str]) -> None:
        self.folder, self.launcher, self.console, self.command, self.words = folder, launcher, console, command, words
        self.entries = {entry.identity: entry for entry in record.read(folder).values()}

    def go(self, studies: Sequence[_Searched], n_jobs: int) -> bool:
        """Spend the budgets of all studies, in turns; say whether that ended early, at a failure."""
        while batch := [(one, trial) for one in studies for trial in one.next(n_jobs)]:
            jobs = [one.job(trial.params) for one, trial in batch]
            for (one, trial), job in zip(batch, jobs, strict=True):
                if not (job.path / recovery.DELTA).exists():
                    one.study.hand_out(trial.number, job.path, one.metric)
                values = " ".join(f"{key}={_short(value)}" for key, value in trial.params.items())
                place = [begun.number for begun in one.study.trials].index(trial.number) + 1
                self.console.print(f"{one.label}: trial {place} of {one.study.budget}: {values}", markup=False)
            distinct = list({job.identity: job for job in jobs}.values())  # two trials may try the same
            for job in distinct:
                self.entries.setdefault(job.identity, record.Entry(job.folder, job.identity, job.overrides))
            record.begin(self.folder, self.command, self.words, self.entries.values())
            going = sweep.Going(distinct, self.folder, self.console)
            going.go(self.launcher)
            self.entries = record.read(self.folder)
            told = [
                one.settle(trial.number, job, self.entries[job.identity]) for (one, trial), job in zip(batch, jobs, strict=True)
            ]
            if going.stopped:
                return True
            if not all(told):
                raise RunError(
                    f"Not all trials came to an end; see {str(self.folder / record.FILE)!r}. Start the search again."
                )
        return False


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _tell(studies: Sequence[_Searched], folder: Path, console: Console) -> None:
    """Print what each study came to, and write it down."""
    table = Table(title="the best trial of each study, on the validation split")
    for name in ("study", "trials", "pruned", "failed", "metric", "best", "trial", "with"):
        table.add_column(name, justify="left" if name in ("study", "metric", "with") else "right")
    rows = []
    for one in studies:
        trials, best = one.study.trials, one.study.best()
        states = [trial.state for trial in trials]
        words = [] if best is None else space.words(best.params)
        shown = "" if best is None else ", ".join(f"{key}={_short(value)}" for key, value in best.params.items())
        rows.append(
            {
                "study": one.label, "metric": one.metric, "greater_is_better": one.study.maximise, "trials": len(trials),
                "pruned": states.count("pruned"), "failed": states.count("fail"),
                "best": None if best is None else {**dataclasses.asdict(best), "folder": one.job(best.params).folder},
                "overrides": [*one.planned.words, *words],
            }
        )  # fmt: skip
        value = "" if best is None else f"{best.value:.4f}"
        number = "" if best is None else str(best.number + 1)
        counts = (str(len(trials)), str(states.count("pruned")), str(states.count("fail")))
        table.add_row(one.label, *counts, one.metric, value, number, shown)
    (console if console.is_terminal else Console(file=console.file, width=160)).print(table)
    text = json.dumps({"format": 1, "studies": rows}, indent=2, ensure_ascii=False) + "\n"
    write_whole(folder / SUMMARY, lambda file: file.write(text))


def _measure(
    studies: Sequence[_Searched], seeds: Sequence[int], folder: Path, launcher: Any, console: Console, command: str,
    words: Sequence[str],
) -> None:  # fmt: skip
    """Run what each study chose once for each seed, measured on the test split.

    Raises:
        SweepError: If one of these runs failed.
    """
    jobs = [(one, one.final(seed, folder)) for one in studies for seed in seeds]
    entries = [record.Entry(job.folder, job.identity, job.overrides) for _, job in jobs]
    record.begin(folder, command, words, entries)
    going = sweep.Going([job for _, job in jobs], folder, console)
    going.go(launcher)
    going.finish()
    for one in studies:
        found = [_results(job) for other, job in jobs if other is one]
        metric, split = found[0]["task_metric"], found[0]["evaluated_on"]
        scores = [results["metrics"]["after"][metric] for results in found]
        spread = f" ± {stdev(scores):.4f}" if len(scores) > 1 else ""
        console.print(f"{one.label}: {metric} {fmean(scores):.4f}{spread} on {split} over {len(scores)} seeds", markup=False)


def _results(job: Job) -> dict[str, Any]:
    from deltaexp.checkpoint import RESULTS

    return json.loads((job.path / recovery.DELTA / RESULTS).read_text(encoding="utf-8"))


def options_of(values: Mapping[str, Any]) -> Options:
    """Return the options that ``hydra.sweeper`` gives a search.

    Raises:
        ConfigError: If one of them cannot be.
    """
    method = Method(**{key: values[key] for key in ("sampler", "sampler_options", "pruner", "pruner_options", "seed")})
    per, seeds = values["per"], values["final_seeds"]
    for key in per:
        if key not in schema.GROUPS and not key.replace(".", "").isidentifier():
            raise ConfigError(unknown("hydra.sweeper.per", key, schema.GROUPS))
    if any(not isinstance(seed, int) or seed < 0 for seed in seeds) or len(set(seeds)) < len(seeds):
        raise ConfigError(f"hydra.sweeper.final_seeds is {list(seeds)}; it takes different whole numbers from 0, as [1,2,3].")
    return Options(
        values["n_trials"], values["n_jobs"], tuple(per), method, values["storage"], values["start_from_config"], tuple(seeds)
    )
