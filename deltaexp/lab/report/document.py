"""A report as plain values: what ``report.json`` holds, and what the page and the tables are made of."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

from deltaexp import __version__
from deltaexp.errors import listing
from deltaexp.lab.report.boards import Board, Method, Pair
from deltaexp.lab.report.runs import Found, Run
from deltaexp.lab.report.statistics import LEVEL

FORMAT = 1


def build(found: Found, boards: Sequence[Board], title: str) -> dict[str, Any]:
    """Return the whole report; what JSON has no number for, such as infinity, is null."""
    numbers = {run.folder: number for number, run in enumerate(found.runs)}
    values = {
        "format": FORMAT,
        "title": title,
        "made": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "deltaexp": __version__,
        "level": LEVEL,
        "commands": list(dict.fromkeys(found.commands)),
        "boards": [_board(board, numbers) for board in boards],
        "runs": [_run(run) for run in found.runs],
        "others": [vars(other) for other in found.others],
    }
    return _finite(values)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _board(board: Board, numbers: Mapping[Any, int]) -> dict[str, Any]:
    places = {id(method): place for place, method in enumerate(board.methods)}
    return {
        "task": board.task,
        "backbone": board.backbone,
        "metric": board.metric,
        "split": board.split,
        "greater_is_better": board.greater_is_better,
        "chosen": places[id(board.best())],
        "answer": answer(board),
        "methods": [_method(method, numbers) for method in board.methods],
        "pairs": [_pair(pair, places, board) for pair in board.pairs],
        "repeats": [numbers[run.folder] for run in board.repeats],
        "computed": _computed(board),
    }


def _computed(board: Board) -> dict[str, list[str]]:
    """Return for each way of leaving something out the methods of which a run was computed so."""
    found: dict[str, dict[str, None]] = {}
    for method in board.methods:
        for run in method.runs:
            for way in run.computed:
                found.setdefault(way, {})[method.label] = None
    return {way: list(labels) for way, labels in found.items()}


def _method(method: Method, numbers: Mapping[Any, int]) -> dict[str, Any]:
    low, high = method.interval or (None, None)
    penalised = method.pscp
    before = [run.before for run in method.runs]
    return {
        "label": method.label,
        "delta_type": method.delta_type,
        "keys": method.keys,
        "baseline": method.baseline,
        "best": method.best,
        "fronts": method.fronts,
        "runs": [numbers[run.folder] for run in method.runs],
        "seeds": len(method.runs),
        "mean": method.score,
        "sd": method.spread,
        "low": low,
        "high": high,
        "validation": method.validation,
        "before": None if None in before else sum(one or 0.0 for one in before) / len(before),
        "trainable": method.mean("trainable"),
        "memory": method.mean("memory"),
        "seconds": method.mean("seconds"),
        "size": method.mean("size"),
        "pscp": penalised and {**vars(penalised), "value": penalised.value},
    }


def _pair(pair: Pair, places: Mapping[int, int], board: Board) -> dict[str, Any]:
    difference = pair.difference
    return {
        "first": places[id(pair.first)],
        "second": places[id(pair.second)],
        "difference": difference and difference.estimate,
        "low": difference and difference.low,
        "high": difference and difference.high,
        "p": difference and difference.p,
        "p_holm": pair.p,
        "separable": pair.separable,
        "verdict": verdict(pair, board),
        "basis": pair.basis,
    }


def verdict(pair: Pair, board: Board) -> str:
    """Say in words what came of a comparison."""
    if pair.difference is None:
        return "not compared"
    if not pair.separable:
        return "not separable"
    ahead = pair.first if board.signed(pair.difference.estimate) > 0 else pair.second
    return f"{ahead.label} is better"


def answer(board: Board) -> dict[str, Any]:
    """Say which method is chosen, and how the others compare with it.

    Returns:
        ``chosen`` and lists of labels: ``better`` and ``worse`` than it, ``same`` for those it cannot be told from, and
        ``unknown`` for those it was not compared with, with one ``reason`` why.
    """
    chosen = board.best()
    found: dict[str, Any] = {"chosen": chosen.label, "better": [], "worse": [], "same": [], "unknown": [], "reason": None}
    for pair in board.pairs:
        if chosen not in (pair.first, pair.second):
            continue
        other = pair.second if chosen is pair.first else pair.first
        if pair.difference is None:
            found["unknown"].append(other.label)
            found["reason"] = pair.basis
        elif not pair.separable:
            found["same"].append(other.label)
        else:
            ahead = pair.first if board.signed(pair.difference.estimate) > 0 else pair.second
            found["worse" if ahead is chosen else "better"].append(other.label)
    return found


def sentences(board: Mapping[str, Any]) -> list[str]:
    """Return the answer of a board in words."""
    told, chosen = board["answer"], board["methods"][board["chosen"]]
    seeds = f"{chosen['seeds']} seed{'s' * (chosen['seeds'] != 1)}"
    lines = [
        f"Best on validation: {told['chosen']}, with {board['metric']} {number(chosen['mean'])} on {board['split']} ({seeds}), "
        f"for {whole(chosen['trainable'])} trainable parameters."
    ]
    if board["split"] == "validation":
        lines.append("The choice was made on the split that the score is of, so the score is on the high side.")
    for key, text in (
        ("same", "Not separable from it: {}."),
        ("worse", "Worse: {}."),
        ("better", "Better than it on {split}: {}."),
        ("unknown", "Not compared with it: {}."),
    ):
        if told[key]:
            lines.append(text.format(listing(told[key]), split=board["split"]))
    if told["reason"]:
        lines.append(f"A comparison {told['reason']}." if told["reason"].startswith("cannot") else told["reason"])
    for way, labels in board["computed"].items():
        of = "all" if len(labels) == len(board["methods"]) else listing(labels, 8)
        lines.append(f"Seconds and memory of {of}: with {way}.")
    return lines


def _run(run: Run) -> dict[str, Any]:
    results = run.results
    return {
        "name": run.name,
        "path": str(run.folder),
        "task": run.config["task.name"],
        "backbone": run.config["backbone.name"],
        "delta_type": run.delta_type,
        "seed": run.seed,
        "metric": run.metric,
        "split": results.get("evaluated_on", "test"),
        "score": run.score,
        "validation": run.validation,
        "before": run.before,
        "metrics": results["metrics"],
        "trainable": run.trainable,
        "memory": run.memory,
        "seconds": run.seconds,
        "computed": run.computed,
        "size": run.size,
        "steps": results.get("steps"),
        "digest": run.digest,
        "base_sha256": results.get("base_sha256"),
        "data_fingerprint": results.get("data_fingerprint"),
        "curves": run.curves,
        "overrides": run.overrides,
        "command": run.command,
        "loading_code": run.loading_code,
        "config": run.config,
        "versions": results.get("versions", {}),
    }


def number(value: float | None) -> str:
    """Return a score as people read it; a dash where there is none."""
    if value is None:
        return "–"
    # Adding zero makes of -0.0, which is what rounding may leave, 0.0.
    return f"{round(value, 3) + 0.0:.3f}" if abs(value) < 10 else f"{value:.2f}" if abs(value) < 1000 else f"{value:,.0f}"


def whole(value: float | None) -> str:
    """Return a count with commas."""
    return "–" if value is None else f"{value:,.0f}"


def p_value(value: float | None) -> str:
    """Return a p-value as people read it."""
    return "–" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"
