"""Trackers: where a run and a sweep are logged to, besides their folders.

``results.json`` stays the truth. A tracker that fails is told of in a sentence and left out from then on; the run goes on.
Nothing in this module imports torch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from deltaexp.lab.config import TrackerConfig
from deltaexp.lab.tracking.base import Tracker
from deltaexp.redaction import redact

TIMINGS = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
"""What the Trainer adds to the metrics of an evaluation."""
TITLES = {"wandb": "Weights & Biases", "tensorboard": "TensorBoard"}


class Trackers:
    """The trackers of a run together, none of which can stop it.

    Args:
        say: Prints a sentence.
    """

    def __init__(self, say: Callable[[str], None] = print) -> None:
        self.say = say
        self.active: dict[str, Tracker] = {}

    def start(self, config: TrackerConfig, described: Mapping[str, Any], folder: Path, step: int) -> None:
        """Start the trackers that a config names.

        Args:
            config: Which.
            described: The whole config of the run, as others may see it.
            folder: The run's folder.
            step: The optimizer steps after which the run goes on; 0 for one that begins.
        """
        for name in config.names:
            with self._guarded(name):
                if name == "wandb":
                    from deltaexp.lab.tracking.wandb import WandbTracker

                    self.active[name] = WandbTracker(config, described, folder, self.say)
                else:
                    from deltaexp.lab.tracking.tensorboard import TensorBoardTracker

                    self.active[name] = TensorBoardTracker(described, folder, step)

    def log(self, entry: Mapping[str, float], step: int) -> None:
        """Hand an entry of the Trainer's log to each; the evaluations before and after training are no part of the curves."""
        if "train_runtime" in entry or any(name.startswith("x_") for name in entry):
            return
        part = "eval" if any(name.startswith("eval_") for name in entry) else "train"
        named = {name: value for name, value in entry.items() if name != "step" and not name.endswith(TIMINGS)}
        values = {name.removeprefix("eval_"): value for name, value in named.items()}
        self._each(lambda tracker: tracker.log(part, values, step))

    def summarise(self, results: Mapping[str, Any], delta: Path) -> None:
        """Hand the final results to each, and what it lacks of the training log."""
        for entry in results["training_log"]:
            self.log(entry, entry["step"])
        self._each(lambda tracker: tracker.summarise(results, delta))

    def finish(self, failed: bool) -> None:
        """Close each."""
        self._each(lambda tracker: tracker.finish(failed))
        self.active.clear()

    def _each(self, act: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self.active.items()):
            with self._guarded(name):
                act(tracker)

    @contextlib.contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        """Leave a tracker out as soon as it fails, and say so."""
        try:
            yield
        except Exception as error:
            broken = self.active.pop(name, Tracker())
            with contextlib.suppress(Exception):  # what it has until now is kept if it can be
                broken.finish(failed=True)
            reason = redact(" ".join(str(error).split()) or type(error).__name__).rstrip(".")
            self.say(f"{TITLES[name]} failed and is left out from here on: {reason}. The results are in the run's folder.")


def summarise_sweep(folder: str | Path, say: Callable[[str], None] = print) -> None:
    """Log a sweep's runs as one table, where they were logged to Weights & Biases; TensorBoard puts them side by side itself.

    Args:
        folder: The sweep's folder.
        say: Prints a sentence.
    """
    from deltaexp.lab.tracking import sweep

    config = sweep.tracker(Path(folder))
    if "wandb" in config.names:
        trackers = Trackers(say)
        with trackers._guarded("wandb"):
            from deltaexp.lab.tracking.wandb import log_sweep

            log_sweep(config, Path(folder), sweep.table(Path(folder)), say)
