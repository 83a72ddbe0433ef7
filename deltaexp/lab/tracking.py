"""Trackers: where metrics go besides the folder of a run. The only module that imports wandb."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from transformers import TrainerCallback

from deltaexp.errors import ConfigError
from deltaexp.lab.config import TrackerConfig


class Tracker:
    """Keeps nothing; the trackers that do are derived from it."""

    id: str | None = None
    """The tracker's name for the run, under which an interrupted one is continued."""

    def callbacks(self) -> list[TrainerCallback]:
        """Return the Trainer's callbacks that log while training."""
        return []

    def summarise(self, results: dict[str, Any]) -> None:
        """Take the final results."""

    def finish(self, failed: bool = False) -> None:
        """Close the tracker."""


class _LogCallback(TrainerCallback):
    """Hands what the Trainer logs to W&B."""

    def __init__(self, run: Any) -> None:
        self.run = run

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        """Log one entry under ``train/`` or ``eval/``."""
        entry = {}
        for name, value in (logs or {}).items():
            # The evaluations before and after training are not part of the curve; `summarise` has them.
            if not name.startswith("x_"):
                entry[f"eval/{name[5:]}" if name.startswith("eval_") else f"train/{name}"] = value
        if entry:
            self.run.log(entry, step=state.global_step)


class WandbTracker(Tracker):
    """Weights & Biases: config, training curve and final results, never a token."""

    def __init__(self, config: TrackerConfig, run_config: dict[str, Any], folder: Path, continued: str | None) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError('tracker=wandb needs the package wandb: pip install "deltaexp[wandb]".') from error
        self._wandb = wandb
        self.run = wandb.init(
            project=config.project,
            entity=config.entity,
            group=config.group,
            mode=cast(Any, config.mode),  # checked with the config
            tags=config.tags or None,
            name="-".join((run_config["delta_type"], run_config["backbone"]["name"], run_config["task"]["name"])),
            config=run_config,
            dir=str(folder),
            id=continued,
            resume="allow" if continued else None,
        )
        self.id = self.run.id

    def callbacks(self) -> list[TrainerCallback]:
        """Return the callback that logs the training curve."""
        return [_LogCallback(self.run)]

    def summarise(self, results: dict[str, Any]) -> None:
        """Log the metrics before and after as a table, and the numbers into the run's summary."""
        before, after = results["metrics"].get("before", {}), results["metrics"]["after"]
        table = self._wandb.Table(columns=["metric", "before", "after"], data=[[k, before.get(k), after[k]] for k in after])
        self.run.log({"results": table})
        self.run.summary.update({f"after/{name}": value for name, value in after.items()})
        self.run.summary.update({f"parameters/{name}": value for name, value in results["parameters"].items()})

    def finish(self, failed: bool = False) -> None:
        """Close the run, marked as failed where it is."""
        self.run.finish(exit_code=1 if failed else 0)


def start(config: TrackerConfig, run_config: dict[str, Any], folder: Path, continued: str | None = None) -> Tracker:
    """Start the tracker that a config names.

    Args:
        config: Which one.
        run_config: The whole config of the run.
        folder: The run's folder.
        continued: The tracker's own name for a run that is continued.
    """
    return WandbTracker(config, run_config, folder, continued) if config.name == "wandb" else Tracker()
