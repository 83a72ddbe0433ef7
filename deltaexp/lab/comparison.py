"""The runs below a folder, side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from deltaexp.checkpoint import RESULTS
from deltaexp.errors import CheckpointError

COLUMNS = ("delta_type", "validation", "test", "trainable", "saved KiB", "training s", "memory MiB", "learning rate", "seed")


def collect(folder: str | Path) -> list[dict[str, Any]]:
    """Return one row for every finished run below a folder.

    Raises:
        CheckpointError: If there is none.
    """
    folder = Path(folder)
    rows = []
    for path in sorted(folder.rglob(f"delta/{RESULTS}")):
        found = json.loads(path.read_text(encoding="utf-8"))
        config, metrics = found["config"], found["metrics"]
        # A type that stands for many, such as peft, is told apart by its own first key.
        name = config["delta_type"]
        method = (config.get(name) or {}).get("peft_type") if isinstance(config.get(name), dict) else None
        memory = found["peak_memory_bytes"]
        rows.append(
            {
                "delta_type": f"{name}:{method}" if method else name,
                "metric": found["task_metric"],
                "better": 1.0 if found.get("greater_is_better", True) else -1.0,
                "validation": metrics.get("validation", metrics["after"])[found["task_metric"]],
                "test": metrics["after"][found["task_metric"]],
                "trainable": found["parameters"]["trainable"],
                "saved KiB": (path.parent / "delta_model.safetensors").stat().st_size / 1024,
                "training s": found["seconds"]["train"],
                "memory MiB": memory.get("cuda", memory.get("training", memory.get("process", 0))) / 2**20,
                "learning rate": config["trainer"]["learning_rate"],
                "seed": config["seed"],
            }
        )
    if not rows:
        raise CheckpointError(f"Below {str(folder)!r} there is no finished run: none of its folders holds delta/{RESULTS}.")
    return rows


def best(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Keep of every delta type the run that is best on the validation split, the test split having no say; best first."""
    chosen: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["delta_type"] not in chosen or _score(row, "validation") > _score(chosen[row["delta_type"]], "validation"):
            chosen[row["delta_type"]] = row
    return sorted(chosen.values(), key=_rank)


def _score(row: dict[str, Any], split: str) -> float:
    """Return a run's metric, or its negative where a lower one is better."""
    return row["better"] * row[split]


def _rank(row: dict[str, Any]) -> tuple[float, int]:
    return -_score(row, "test"), row["trainable"]


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Return rows as a table of Markdown."""
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{' --- |' * len(COLUMNS)}"]
    return "\n".join([*lines, *(f"| {' | '.join(_texts(row))} |" for row in rows)]) + "\n"


def show(folder: str | Path, only_best: bool = False, console: Console | None = None) -> Path:
    """Print the runs below a folder, the best first, and write them to ``comparison.md`` there; return its path."""
    rows = collect(folder)
    rows = best(rows) if only_best else sorted(rows, key=_rank)
    metrics = " / ".join(sorted({row["metric"] for row in rows}))
    table = Table(
        title=f"{metrics} of {len(rows)} runs, {'the best on validation of each type' if only_best else 'best first'}"
    )
    for name in COLUMNS:
        table.add_column(name, justify="left" if name == "delta_type" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*_texts(row))
    console = console or Console()
    if not console.is_terminal:
        console = Console(file=console.file, width=120)  # a file is as wide as the table needs
    console.print(table)
    target = Path(folder) / ("best.md" if only_best else "comparison.md")
    target.write_text(markdown(rows), encoding="utf-8")
    return target


def _texts(row: dict[str, Any]) -> list[str]:
    forms = {"validation": "{:.3f}", "test": "{:.3f}", "trainable": "{:,}", "saved KiB": "{:,.1f}", "training s": "{:.1f}"}
    forms |= {"memory MiB": "{:,.0f}", "learning rate": "{:g}"}
    return [forms.get(name, "{}").format(row[name]) for name in COLUMNS]
