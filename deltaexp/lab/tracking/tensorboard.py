"""TensorBoard: curves, hyperparameters with the final metrics, and the config as text. The only module that imports it."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import summary

from deltaexp.lab.tracking.base import Tracker, flat, numbers

FOLDER = "tensorboard"


class TensorBoardTracker(Tracker):
    """Writes the events of a run into ``tensorboard`` in its folder, each before `write` returns.

    torch's SummaryWriter writes in a thread of its own, where a full disk ends the thread and is not told of.

    Args:
        described: The run's config.
        folder: The run's folder.
        step: The optimizer steps after which the run goes on; what was logged of later ones is taken back.
    """

    def __init__(self, described: Mapping[str, Any], folder: Path, step: int) -> None:
        super().__init__()
        place = folder / FOLDER
        place.mkdir(exist_ok=True)
        sessions = len(list(place.glob("*.tfevents.*")))
        # TensorBoard reads the files of a run in the order of their names.
        path = place / f"events.out.tfevents.{int(time.time()):010d}.{sessions:03d}"
        self.described = described
        self.file = RecordWriter(path.open("xb"))
        self._write(file_version="brain.Event:2")
        if sessions:
            self._write(step=step + 1 if step else 0, session_log=SessionLog(status=SessionLog.START))
        if sessions and step:
            self.told = {"train": step, "eval": step}
        else:
            text = yaml.safe_dump(dict(described), sort_keys=False, allow_unicode=True)
            self._write(step=0, summary=summary.text("config", f"```yaml\n{text}```"))

    def write(self, part: str, values: Mapping[str, float], step: int) -> None:
        """Write a point of each curve."""
        for name, value in values.items():
            self._write(step=step, summary=summary.scalar(f"{part}/{name}", value))

    def summarise(self, results: Mapping[str, Any], delta: Path) -> None:
        """Write the final numbers, beside the config as the hyperparameters that made them."""
        hyperparameters = {
            name: value if isinstance(value, (bool, int, float, str)) else json.dumps(value)
            for name, value in flat(self.described).items()
        }
        final = {name: float(value) for name, value in numbers(results).items()}
        for one in summary.hparams(hyperparameters, final):
            self._write(step=results["steps"], summary=one)
        for name, value in final.items():
            self._write(step=results["steps"], summary=summary.scalar(name, value))
        before, after = results["metrics"].get("before", {}), results["metrics"]["after"]
        lines = [f"| {name} | {before.get(name, '')} | {value} |" for name, value in after.items()]
        head = [f"| on {results['evaluated_on']} | backbone as it is | with the delta |", "| --- | --- | --- |"]
        self._write(step=results["steps"], summary=summary.text("results", "\n".join([*head, *lines])))

    def finish(self, failed: bool) -> None:
        """Close the file."""
        self.file.close()

    def _write(self, **event: Any) -> None:
        self.file.write(Event(wall_time=time.time(), **event).SerializeToString())
        self.file.flush()
