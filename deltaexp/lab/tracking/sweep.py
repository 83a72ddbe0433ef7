"""The runs of a sweep as one table, for trackers. Nothing in this module imports torch."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deltaexp.checksum import file_sha256
from deltaexp.errors import RunError
from deltaexp.lab.config import TrackerConfig
from deltaexp.lab.recovery import DELTA, RECORD, Record
from deltaexp.lab.tracking.base import flat, numbers

SWEEP, RESULTS, WEIGHTS = "sweep.json", "results.json", "delta_model.safetensors"


def tracker(folder: Path) -> TrackerConfig:
    """Return what the newest run of a sweep says of trackers; that none is wanted where there is no run."""
    records: list[Record] = []
    for path in folder.rglob(RECORD):
        with contextlib.suppress(RunError):
            record = Record.read(path.parent)
            records += [record] if record else []
    newest = max(records, key=lambda record: record.started, default=None)
    known = {field.name for field in dataclasses.fields(TrackerConfig)}  # another version may have had others
    return TrackerConfig(**{key: value for key, value in newest.config["tracker"].items() if key in known} if newest else {})


def table(folder: Path) -> list[dict[str, Any]]:
    """Return a row for every run of a sweep, all with the same columns: first what differs between the runs, then its numbers.

    A run that did not finish has no numbers.
    """
    runs = {path.parent.parent: json.loads(path.read_text(encoding="utf-8")) for path in folder.rglob(f"{DELTA}/{RESULTS}")}
    configs = {place: flat(results["config"]) for place, results in runs.items()}
    keys = list(dict.fromkeys(key for config in configs.values() for key in config))
    swept = [key for key in keys if len({json.dumps(config[key]) for config in configs.values() if key in config}) > 1]
    always = ["delta_type", "seed", "trainer.learning_rate"]
    rows = []
    for place, results in sorted(runs.items()):
        config = configs[place]
        row: dict[str, Any] = {"run": place.relative_to(folder).as_posix(), "status": "finished"}
        row |= {key: _cell(config.get(key)) for key in dict.fromkeys([*always, *swept])}
        row |= {"metric": results["task_metric"], "score": results["metrics"]["after"][results["task_metric"]]}
        weights = place / DELTA / WEIGHTS
        row |= {**numbers(results), "saved_bytes": weights.stat().st_size, "delta_sha256": file_sha256(weights)}
        rows.append(row)
    rows += [{"run": job["folder"], "status": job["status"]} for job in _jobs(folder) if folder / job["folder"] not in runs]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return [{name: row.get(name) for name in columns} for row in rows]


def _cell(value: Any) -> Any:
    return value if value is None or isinstance(value, (bool, int, float, str)) else json.dumps(value)


def _jobs(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield what a sweep noted of its jobs."""
    with contextlib.suppress(FileNotFoundError):
        yield from json.loads((folder / SWEEP).read_text(encoding="utf-8"))["jobs"]
