"""What W&B wrote, read back."""

import json
import time
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

from deltaexp.lab.tracking.wandb_file import earlier, records


class WandbLog:
    """What an offline run of W&B holds, once W&B's own process has written all of it."""

    def __init__(self, path: Path, complete: bool = True) -> None:
        self.path = path
        deadline = time.monotonic() + 30
        while complete and not any(record.HasField("exit") for record in records(path)):
            assert time.monotonic() < deadline, f"{path} has no end"
            time.sleep(0.1)
        self.records = list(records(path))
        self.run = next((record.run for record in self.records if record.HasField("run")), Record().run)
        self.artifacts = {record.artifact.name: record.artifact for record in self.records if record.HasField("artifact")}
        self.config = _values(self.run.config.update)
        self.history = [_values(record.history.item) for record in self.records if record.HasField("history")]
        self.summary: dict[str, Any] = {}
        for record in self.records:
            self.summary |= _values(record.summary.update)

    def points(self, name: str) -> list[tuple[int, float]]:
        """The points of a curve."""
        return [(row["_step"], row[name]) for row in self.history if name in row]

    def table(self, name: str) -> list[dict[str, Any]]:
        """Read a logged table from the file that the history names."""
        place = next(row[f"{name}.path"] for row in reversed(self.history) if f"{name}.path" in row)
        table = json.loads((self.path.parent / "files" / place).read_text(encoding="utf-8"))
        return [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]


def _values(items: Any) -> dict[str, Any]:
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


def wandb_logs(folder: Path, ended: int | None = None) -> list[WandbLog]:
    """Read all offline runs of W&B in a folder, in the order of their beginning, of which the last ``ended`` came to an end."""
    paths = [path for session in earlier(folder) for path in session.glob("*.wandb")]
    return [WandbLog(path, ended is None or number >= len(paths) - ended) for number, path in enumerate(paths)]
