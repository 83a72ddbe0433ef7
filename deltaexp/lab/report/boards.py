"""Runs put together: methods over seeds, the methods of a task side by side, what is chosen, what is on a front."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from deltaexp.errors import DeltaExpError, TaskError
from deltaexp.lab.report import pscp, resampling, statistics
from deltaexp.lab.report.runs import PREDICTIONS, Run, tells_apart
from deltaexp.lab.report.statistics import LEVEL, Difference
from deltaexp.lab.tasks import metrics

BASELINES = ("none", "full")
"""Delta types that others are measured by: the backbone as it is, and all of it trained."""
MANY = 30
"""Methods of a board of which not every two are compared."""
COSTS: dict[str, Callable[[Method], float | None]] = {
    "trainable parameters": lambda method: method.mean("trainable"),
    "peak memory": lambda method: method.mean("memory"),
    "training seconds": lambda method: method.mean("seconds"),
    "file size": lambda method: method.mean("size"),
}
"""What a score is held against; less is better of each."""


@dataclass
class Method:
    """A delta type with its keys, trained with one or more seeds."""

    label: str
    delta_type: str
    keys: dict[str, Any]
    """Those that tell it from other methods of its delta type."""
    runs: list[Run]
    """One for each seed."""
    fronts: list[str] = field(default_factory=list)
    """Of the `COSTS`, those for which no other method has a better score for less."""
    best: bool = False
    """Whether it is the best of its delta type on the validation split."""

    @cached_property
    def scores(self) -> list[float]:
        """The scores of its runs."""
        return [run.score for run in self.runs]

    @property
    def score(self) -> float:
        """Their mean."""
        return float(np.mean(self.scores))

    @property
    def spread(self) -> float | None:
        """Their standard deviation; None of one run."""
        return float(np.std(self.scores, ddof=1)) if len(self.scores) > 1 else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """The confidence interval of their mean; None of one run."""
        return statistics.t_interval(self.scores)

    @property
    def validation(self) -> float:
        """The mean of the scores on the validation split."""
        return float(np.mean([run.validation for run in self.runs]))

    @property
    def baseline(self) -> bool:
        """Whether others are measured by it."""
        return self.delta_type in BASELINES

    def mean(self, what: str) -> float | None:
        """Return the mean over the runs of ``trainable``, ``memory``, ``seconds`` or ``size``; None where one is not known."""
        values = [getattr(run, what) for run in self.runs]
        return None if None in values else float(np.mean(values))

    @cached_property
    def pscp(self) -> pscp.Penalised | None:
        """The score with penalties for what it costs; None where an input was not measured."""
        return pscp.mean(self.runs)


@dataclass
class Pair:
    """Two methods compared."""

    first: Method
    second: Method
    difference: Difference | None
    basis: str
    """What the comparison rests on, or why there is none."""
    p: float | None = None
    """For all comparisons of the board at once, by Holm."""

    @property
    def separable(self) -> bool:
        """Whether the difference is more than chance."""
        return self.p is not None and self.p < 1 - LEVEL


@dataclass
class Board:
    """All methods on one task with one backbone."""

    task: str
    backbone: str
    metric: str
    greater_is_better: bool
    split: str
    """What the scores are of."""
    methods: list[Method]
    """The best first."""
    repeats: list[Run] = field(default_factory=list)
    """Runs that are no further seed of their method, and counted with none."""
    pairs: list[Pair] = field(default_factory=list)

    @property
    def title(self) -> str:
        """The task and the backbone."""
        return f"{self.task} with {self.backbone}"

    @property
    def runs(self) -> list[Run]:
        """All runs that count."""
        return [run for method in self.methods for run in method.runs]

    def best(self, methods: Iterable[Method] | None = None) -> Method:
        """Return the method that is best on the validation split; the test split has no say in choices.

        Args:
            methods: To choose from; where none are given all, without the baselines if there is anything else.
        """
        if methods is None:
            methods = [method for method in self.methods if not method.baseline] or self.methods
        return max(methods, key=lambda method: self.signed(method.validation))

    def signed(self, score: float) -> float:
        """Return a score so that more is better; what is no number is worst."""
        return -math.inf if math.isnan(score) else score if self.greater_is_better else -score


def boards(runs: Sequence[Run], only_best: bool = False) -> list[Board]:
    """Put runs together.

    Args:
        runs: The runs.
        only_best: Keep of each delta type the method that is best on the validation split.

    Returns:
        One board for every task, backbone, split and metric.
    """
    groups: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        place = (run.config["task.name"], run.config["backbone.name"], run.results.get("evaluated_on", "test"), run.metric)
        groups.setdefault(place, []).append(run)
    keys = _keys(groups.values())
    found = []
    for (task, backbone, split, metric), members in sorted(groups.items(), key=lambda item: item[0]):
        greater = bool(members[0].results.get("greater_is_better", metrics.greater_is_better(metric)))
        board = Board(task, backbone, metric, greater, split, [])
        _gather(board, members, keys)
        for delta_type in {method.delta_type for method in board.methods}:
            board.best(method for method in board.methods if method.delta_type == delta_type).best = True
        if only_best:
            board.methods = [method for method in board.methods if method.best]
        for name, cost in COSTS.items():
            for method in front(board.methods, cost, lambda method: board.signed(method.score)):  # noqa: B023
                method.fronts.append(name)
        board.pairs = _pairs(board)
        found.append(board)
    return found


def _keys(groups: Iterable[Sequence[Run]]) -> dict[str, list[str]]:
    """Return for every delta type the keys in which its runs differ on some board."""
    found: dict[str, set[str]] = {}
    for runs in groups:
        by_type: dict[str, dict[str, set[str]]] = {}
        for run in runs:
            values = by_type.setdefault(run.delta_type, {})
            for key, value in run.config.items():
                if tells_apart(key):
                    values.setdefault(key, set()).add(json.dumps(value, sort_keys=True))
        for delta_type, values in by_type.items():
            count = sum(run.delta_type == delta_type for run in runs)
            for key, different in values.items():
                there = sum(run.delta_type == delta_type and key in run.config for run in runs)
                if len(different) > 1 or there < count:
                    found.setdefault(delta_type, set()).add(key)
    return {delta_type: sorted(keys) for delta_type, keys in found.items()}


def _gather(board: Board, runs: Sequence[Run], keys: dict[str, list[str]]) -> None:
    """Put the runs of a board together by method."""
    methods: dict[str, Method] = {}
    for run in sorted(runs, key=lambda run: (run.config.get("seed", 0), run.name)):
        mine = {key: run.config.get(key) for key in keys.get(run.delta_type, [])}
        label = " · ".join([run.delta_type, *(f"{_short(key, mine)}={_shown(value)}" for key, value in mine.items())])
        method = methods.setdefault(label, Method(label, run.delta_type, mine, []))
        # The same config with the same seeds is no further sample, whether it came to the same delta or not.
        if any(other.seed == run.seed for other in method.runs):
            board.repeats.append(run)
        else:
            method.runs.append(run)
    board.methods = sorted(methods.values(), key=lambda method: (-board.signed(method.score), method.mean("trainable")))


def _short(key: str, keys: Iterable[str]) -> str:
    """Return the last part of a key, where that is enough to know it from others."""
    last = key.rpartition(".")[2]
    return last if sum(other.rpartition(".")[2] == last for other in keys) == 1 else key


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else json.dumps(value)


def front(methods: Iterable[Method], cost: Callable[[Method], float | None], score: Callable[[Method], float]) -> list[Method]:
    """Return the methods on the Pareto front: no other one scores as well or better for less, or better for as much."""
    known = [(cost(method), score(method), method) for method in methods]
    points = [(float(price), value, method) for price, value, method in known if price is not None and math.isfinite(value)]

    def beaten(price: float, value: float) -> bool:
        return any(p <= price and v >= value and (p < price or v > value) for p, v, _ in points)

    return [method for price, value, method in sorted(points, key=lambda point: point[:2]) if not beaten(price, value)]


@dataclass
class _Rows:
    """A run's scores on resampled rows."""

    scores: np.ndarray
    """``(resamples,)``"""
    units: int
    """How many were resampled."""
    asked: int
    """The number of the set of rows that it was asked; only runs of the same are paired."""


def _pairs(board: Board) -> list[Pair]:
    """Compare every two methods of a board; of many each with the chosen one, and the best of every delta type."""
    rows, missing = _resampled(board)
    rng = np.random.default_rng(0)
    pairs = []
    chosen, many = board.best(), len(board.methods) > MANY
    for place, first in enumerate(board.methods):
        for second in board.methods[place + 1 :]:
            if many and chosen not in (first, second) and not (first.best and second.best):
                continue
            runs = [*first.runs, *second.runs]
            without = next((missing[run.folder] for run in runs if run.folder in missing), "")
            other = next(
                (run for run in runs[1:] if not without and rows[run.folder].asked != rows[runs[0].folder].asked), None
            )
            if other is not None:
                without = f"{other.name} was asked other rows than {runs[0].name}"
            resampled, units = None, 0
            if not without:
                units = rows[runs[0].folder].units
                resampled = _stacked(first, rows), _stacked(second, rows)
            odd = next((run for run in runs if not math.isfinite(run.score)), None)
            difference = None
            if odd is None:
                difference = statistics.compare(first.scores, second.scores, resampled, units, rng=rng)
            else:
                without = f"{board.metric} of {odd.name} is no finite number"
            pairs.append(Pair(first, second, difference, _basis(first, second, units, without, difference is not None)))
    compared = [pair for pair in pairs if pair.difference is not None]
    for pair, p in zip(compared, statistics.holm([pair.difference.p for pair in compared if pair.difference]), strict=True):
        pair.p = p
    return pairs


def _stacked(method: Method, rows: dict[Path, _Rows]) -> np.ndarray:
    return np.stack([rows[run.folder].scores for run in method.runs])


def _basis(first: Method, second: Method, units: int, without: str, compared: bool) -> str:
    """Say what a comparison rests on."""
    if not compared:
        return f"cannot be compared: {without}"
    seeds = " and ".join(f"{len(method.runs)} seed{'s' * (len(method.runs) != 1)}" for method in (first, second))
    if without:
        return f"{seeds}, no rows: {without}"
    few = "; one seed says nothing of others" if 1 in (len(first.runs), len(second.runs)) else ""
    return f"{units:,} rows, {seeds}{few}"


def _resampled(board: Board) -> tuple[dict[Path, _Rows], dict[Path, str]]:
    """Return the scores of runs on resampled rows, the same for all that were asked the same; and why some have none."""
    sets: list[tuple[list[Run], list[resampling.Answers]]] = []
    missing: dict[Path, str] = {}
    for run in board.runs:
        try:
            answers = _answers(run)
        except (DeltaExpError, ImportError, KeyError, TypeError, ValueError, IndexError) as error:
            missing[run.folder] = str(error) if isinstance(error, DeltaExpError) else _failed(run, error)
            continue
        for runs, known in sets:
            if (known[0].references, known[0].groups) == (answers.references, answers.groups):
                runs.append(run)
                known.append(answers)
                break
        else:
            sets.append(([run], [answers]))
    found: dict[Path, _Rows] = {}
    for number, (runs, known) in enumerate(sets):
        try:
            scores = resampling.scores(known, board.metric, _entry(runs[0]), np.random.default_rng(0))
        except (DeltaExpError, ValueError, ZeroDivisionError) as error:
            missing |= {run.folder: _failed(run, error) for run in runs}
            continue
        units = len(known[0].units())
        found |= {run.folder: _Rows(one, units, number) for run, one in zip(runs, scores, strict=True)}
    return found, missing


def _failed(run: Run, error: Exception) -> str:
    return f"{run.metric} of {run.name} cannot be computed from its answers ({error})"


def _answers(run: Run) -> resampling.Answers:
    """Return what a run answered.

    Raises:
        TaskError: If it kept no answers, or they are not those that were scored.
    """
    path = run.folder / PREDICTIONS
    if not path.exists():
        raise TaskError(f"{run.name} kept no answers (task.save_predictions=true)")
    answers = resampling.read(path, run.results.get("labels") or ())
    again = resampling.score(answers, run.metric, _entry(run))
    if not math.isclose(again, run.score, rel_tol=1e-6, abs_tol=1e-9):
        raise TaskError(f"the answers of {run.name} give {run.metric} {again:.6g} and not the run's {run.score:.6g}")
    return answers


def _entry(run: Run) -> str:
    """Return the metric that a run's number comes from, as ``task.metrics`` has it."""
    listed = run.config.get("task.metrics") or []
    return next((name for name in listed if metrics.main([name]) == run.metric), run.metric)
