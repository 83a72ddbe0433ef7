"""Folders of runs for tests of the report, each grown from a run that was really trained."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from deltaexp.lab.tasks import metrics

Study = Callable[..., Path]
ROWS = 200
"""Rows of the final split of a grown run."""


def grown(
    real: Path,
    folder: Path,
    delta_type: str,
    seed: int,
    wrong: Sequence[int],
    validation: float | None = None,
    *,
    rows: int = ROWS,
    metric: str = "accuracy",
    trainable: int = 1000,
    config: dict[str, Any] | None = None,
    answers: bool = True,
) -> Path:
    """Copy a real run, and make another one of it that answers some rows wrong.

    Args:
        real: The folder of the run that was trained.
        folder: Where the copy goes.
        delta_type: Of the other run.
        seed: Its seed.
        wrong: Numbers of the rows that it answers wrong.
        validation: Its score on the validation split; that on the test split where it is None.
        rows: How many rows there are.
        metric: The first metric of the task.
        trainable: How many parameters it trains.
        config: Further keys of its config, by dots.
        answers: Whether it kept its answers.
    """
    shutil.copytree(real, folder)
    path = folder / "delta" / "results.json"
    results = json.loads(path.read_text())
    references = [row % 2 for row in range(rows)]
    given = [1 - label if row in set(wrong) else label for row, label in enumerate(references)]
    score = metrics.compute([metric], given, references, labels=["bad", "good"])[metric]
    results["config"] |= {"delta_type": delta_type, "seed": seed}
    results["config"]["task"]["metrics"] = [metric]
    for key, value in (config or {}).items():
        section = results["config"]
        *parts, last = key.split(".")
        for part in parts:
            section = section.setdefault(part, {})
        section[last] = value
    results["seeds"] = dict.fromkeys(("init", "data", "dropout"), seed)
    results["task_metric"] = metric
    results["labels"] = ["bad", "good"]
    results["metrics"] = {
        "before": {metric: 0.5},
        "after": {metric: score},
        "validation": {metric: score if validation is None else validation},
    }
    results["parameters"]["trainable"] = trainable
    path.write_text(json.dumps(results))
    lines = [
        {"row": row, "prediction": ["bad", "good"][answer], "prediction_number": answer}
        | {"reference": ["bad", "good"][label], "reference_number": label}
        for row, (answer, label) in enumerate(zip(given, references, strict=True))
    ]
    (folder / "predictions.jsonl").unlink()
    if answers:
        (folder / "predictions.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return folder


def comparison(real: Path, folder: Path) -> Path:
    """Write a study of three delta types with three seeds, of which two are alike and one is worse, with both baselines."""
    for seed in (1, 2, 3):
        grown(real, folder / f"lora-{seed}", "lora", seed, range(seed, 10 + seed), trainable=2000)
        grown(real, folder / f"adapter-{seed}", "adapter", seed, range(40 + seed, 51 + seed), trainable=4000)
        grown(real, folder / f"bitfit-{seed}", "bitfit", seed, range(60 + seed), trainable=500)
    grown(real, folder / "none-1", "none", 1, range(100), trainable=0)
    grown(real, folder / "full-1", "full", 1, range(150, 158), trainable=100_000)
    return folder
