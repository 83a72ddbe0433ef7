"""What a tracker can do."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Tracker:
    """A place where a run is logged to, besides its folder; this one keeps nothing."""

    def __init__(self) -> None:
        self.told: dict[str, int] = {}
        """The last step of each part that it has; a run that is continued says some things again, which are left out."""

    def log(self, part: str, values: Mapping[str, float], step: int) -> None:
        """Take an entry of the training log, unless it is there already.

        Args:
            part: ``train`` or ``eval``.
            values: The numbers, by name.
            step: The optimizer steps until then.
        """
        if step > self.told.get(part, -1):
            self.write(part, values, step)
            self.told[part] = step

    def write(self, part: str, values: Mapping[str, float], step: int) -> None:
        """Write an entry of the training log."""

    def summarise(self, results: Mapping[str, Any], delta: Path) -> None:
        """Take the final results, those of ``results.json``, and the folder of the delta."""

    def finish(self, failed: bool) -> None:
        """Close what is open."""


def numbers(results: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers that runs are compared by: metrics of each evaluation, parameters, seconds, bytes of memory."""
    parts = {**results["metrics"], "parameters": results["parameters"], "seconds": results["seconds"]}
    parts["peak_memory_bytes"] = results["peak_memory_bytes"]
    return {f"{part}/{name}": value for part, values in parts.items() for name, value in values.items()}


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a config with dots in its keys, without what only says where results go."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if name not in ("hub", "tracker"):
            found |= flat(value, f"{name}.") if isinstance(value, Mapping) and value else {name: value}
    return found


def title(config: Mapping[str, Any]) -> str:
    """Return a name for a run: delta type, backbone, task and seed."""
    return "-".join((config["delta_type"], config["backbone"]["name"], config["task"]["name"], f"seed{config['seed']}"))
