"""The runs below folders, with all that a report tells of each, and what is there of those that came to no end."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from deltaexp.errors import CheckpointError, DeltaExpError, RunError, listing
from deltaexp.lab.recovery import CHECKPOINTS, DELTA, NO_MATTER, RECORD, Record, busy
from deltaexp.redaction import redact

SWEEP, RESULTS, WEIGHTS, PREDICTIONS = "sweep.json", "results.json", "delta_model.safetensors", "predictions.jsonl"
"""Names of files, which the modules that write them name, too; those need torch or more."""
ASIDE = (*NO_MATTER, "seed", "seeds", "delta_type", "task.name", "backbone.name")
"""Keys and sections of a config by which runs of one method may differ, or that a report has a column for."""


STATES = {"waiting": "it has not begun", "running": "a process is at work on it"}
"""What is to be said of jobs of a sweep that have no delta yet, by their status."""


@dataclass
class Run:
    """A finished run."""

    folder: Path
    name: str
    """Its folder as a report calls it: relative to what was reported on."""
    results: dict[str, Any]
    overrides: list[str] = field(default_factory=list)
    """What its config was composed of, as ``key=value``."""

    @cached_property
    def config(self) -> dict[str, Any]:
        """The config by keys with dots."""
        return flat(self.results["config"])

    @cached_property
    def delta_type(self) -> str:
        """The delta type; of one that stands for many, such as ``peft``, with its method behind a colon."""
        name = self.config["delta_type"]
        method = self.config.get(f"{name}.peft_type")
        return f"{name}:{method}" if method else name

    @property
    def seed(self) -> str:
        """The seed, or the seeds of initialisation, data and dropout where they differ."""
        seeds = self.results.get("seeds") or {"init": self.config.get("seed")}
        return "/".join(str(seed) for seed in dict.fromkeys(seeds.values()))

    @property
    def metric(self) -> str:
        """The name of the number that runs are compared by."""
        return self.results["task_metric"]

    @property
    def score(self) -> float:
        """That number, on the split of the final evaluation."""
        return float(self.results["metrics"]["after"][self.metric])

    @property
    def validation(self) -> float:
        """That number on the validation split, by which a choice between runs goes."""
        metrics = self.results["metrics"]
        return float(metrics.get("validation", metrics["after"])[self.metric])

    @property
    def before(self) -> float | None:
        """That number of the backbone as it is, where it was measured."""
        return self.results["metrics"].get("before", {}).get(self.metric)

    @property
    def trainable(self) -> int:
        """How many parameters were trained."""
        return self.results["parameters"]["trainable"]

    @property
    def seconds(self) -> float:
        """How long the training took."""
        return self.results["seconds"]["train"]

    @property
    def memory(self) -> float | None:
        """The peak of memory in training, in bytes: of the GPU, or else what the process took beyond what it held before."""
        found = self.results["peak_memory_bytes"]
        return next((found[name] for name in ("cuda", "training", "process") if name in found), None)

    @property
    def computed(self) -> list[str]:
        """What its seconds and its memory owe to not computing everything anew, or not for itself alone."""
        short, speed = self.results.get("shortcuts") or {}, self.results.get("speed") or {}
        # Runs of before had another key.
        last = short.get("last_block", "first token" if short.get("first_token_only") else "all tokens")
        told = {
            "kept activations of frozen blocks": short.get("while_training"),
            f"the {last} only in the last block": last != "all tokens",
            "trainer.speed=auto": speed.get("asked") == "auto",
            "other runs trained in the same steps": self.results.get("trained_together"),
        }
        return [way for way, applies in told.items() if applies]

    @property
    def digest(self) -> str:
        """The sha256 of the delta's weights."""
        return self.results["digests"][WEIGHTS]

    @cached_property
    def size(self) -> int:
        """The bytes of the file with the delta's weights."""
        return (self.folder / DELTA / WEIGHTS).stat().st_size

    @property
    def command(self) -> str | None:
        """The command that makes the run again; None where nothing says how it was made."""
        return " ".join(["python -m deltaexp", *map(shlex.quote, self.overrides)]) if self.overrides else None

    @property
    def loading_code(self) -> str:
        """Python that loads the backbone with the delta."""
        lines = [
            (self.results.get("backbone") or {}).get("loading_code") or "backbone_model = ...  # see the delta's README.md",
            "",
            "from deltaexp import AutoDeltaModel",
            f"delta_model = AutoDeltaModel.from_finetuned({str(self.folder / DELTA)!r}, backbone_model=backbone_model)",
        ]
        return "\n".join(lines)

    @property
    def curves(self) -> dict[str, list[tuple[int, float]]]:
        """Numbers over the steps of training: ``loss`` on the training split, and others on the validation split."""
        found: dict[str, list[tuple[int, float]]] = {}
        for entry in self.results.get("training_log", []):
            for key, value in entry.items():
                name = "loss" if key == "loss" else f"validation {key[5:]}" if key.startswith("eval_") else ""
                if name.partition(" ")[2] in ("", "loss", self.metric) and name and isinstance(value, (int, float)):
                    found.setdefault(name, []).append((int(entry["step"]), float(value)))
        return found

    def check(self) -> None:
        """Touch all that a report needs of the run.

        Raises:
            KeyError, TypeError, ValueError, OSError: If something is not there, or not as it should be.
        """
        for name in ("delta_type", "score", "validation", "trainable", "seconds", "memory", "size", "digest", "seed", "curves"):
            getattr(self, name)
        for key in ("task.name", "backbone.name"):
            self.config[key]


@dataclass
class Other:
    """A run that a report has no numbers of."""

    name: str
    status: str
    """``failed``, ``running``, ``waiting``, ``unfinished`` or ``unreadable``."""
    reason: str


@dataclass
class Found:
    """All runs below some folders."""

    runs: list[Run] = field(default_factory=list)
    others: list[Other] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    """Of the sweeps among them."""


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a config by keys with dots."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return found


def tells_apart(key: str) -> bool:
    """Say whether a key of the config tells one method from another of the same delta type."""
    return not any(key == name or key.startswith(f"{name}.") for name in ASIDE)


def collect(folders: Sequence[str | Path]) -> Found:
    """Return the runs below folders, in the order of their names; each once, however many folders it lies below.

    Raises:
        CheckpointError: If a folder does not exist, or there is no run at all.
    """
    found, seen = Found(), set()
    places = [Path(folder) for folder in folders]
    missing = [str(place) for place in places if not place.is_dir()]
    if missing:
        raise CheckpointError(f"There is no folder {listing(map(repr, missing))}.")
    for place in places:
        folders, sweeps = _walked(place)
        jobs: dict[Path, dict[str, Any]] = {}
        for sweep in sweeps:
            jobs |= _jobs(sweep, place, found)
        for folder in [*folders, *jobs]:
            if folder not in seen:
                seen.add(folder)
                _add(folder, _named(folder, place, len(places) > 1), jobs.get(folder, {}), found)
    if not (found.runs or found.others):
        raise CheckpointError(
            f"Below {listing(repr(str(place)) for place in places)} there is no run: no folder holds {RECORD}."
        )
    return found


def _jobs(sweep: Path, place: Path, found: Found) -> dict[Path, dict[str, Any]]:
    """Return what a sweep says of its jobs, by their folders."""
    path = sweep / SWEEP
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        if told.get("command"):
            found.commands.append(redact(str(told["command"])))
        return {(sweep / job["folder"]).resolve(): job for job in told["jobs"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        found.others.append(Other(_named(path, place), "unreadable", f"{type(error).__name__}: {error}"))
        return {}


def _walked(place: Path) -> tuple[list[Path], list[Path]]:
    """Return the folders of runs and those of sweeps below a place, itself included."""
    runs, sweeps = [], []
    for root, names, files in os.walk(place):
        folder = Path(root)
        if RECORD in files or (folder / DELTA / RESULTS).exists():
            runs.append(folder.resolve())
        if SWEEP in files:
            sweeps.append(folder)
        names[:] = sorted(name for name in names if name not in (DELTA, CHECKPOINTS) and not name.startswith("."))
    return runs, sweeps


def _named(folder: Path, place: Path, several: bool = False) -> str:
    """Return a folder's path from the place that is reported on."""
    path = os.path.relpath(folder.resolve(), place.resolve())
    return os.path.join(place.name, path) if several else place.resolve().name if path == "." else path


def _add(folder: Path, name: str, job: Mapping[str, Any], found: Found) -> None:
    """Add one run to those that were found, or say why it has no numbers."""
    path = folder / DELTA / RESULTS
    try:
        if path.exists():
            run = Run(folder, name, json.loads(path.read_text(encoding="utf-8")), _overrides(folder, job))
            run.check()
            found.runs.append(run)
            return
        # What is running by its sweep's account may have been killed since: then it holds no lock.
        if job.get("status") not in (None, "finished") and (job["status"] != "running" or busy(folder)):
            reason = job.get("error") or STATES.get(job["status"], "no more is known")
            found.others.append(Other(name, str(job["status"]), redact(str(reason))))
            return
        record = Record.read(folder)
    except KeyError as error:
        found.others.append(Other(name, "unreadable", f"{RESULTS} lacks {error}"))
        return
    except (OSError, ValueError, TypeError, AttributeError, DeltaExpError) as error:
        kind = "" if isinstance(error, RunError) else f"{type(error).__name__}: "
        found.others.append(Other(name, "unreadable", f"{kind}{error}"))
        return
    told = f"begun {record.started[:19].replace('T', ' ')} UTC; there is no delta yet" if record else f"there is no {RECORD}"
    found.others.append(Other(name, "unfinished", told))


def _overrides(folder: Path, job: Mapping[str, Any]) -> list[str]:
    """Return what a run was composed of: as its sweep says, or as Hydra wrote it."""
    given = job.get("overrides")
    try:
        if isinstance(given, Mapping):
            return [redact(f"{key}={_value(value)}") for key, value in given.items()]
        words: Iterable[Any] = given or yaml.safe_load((folder / ".hydra" / "overrides.yaml").read_text(encoding="utf-8"))
        return [redact(str(word)) for word in words]
    except (OSError, yaml.YAMLError, TypeError):
        return []


def _value(value: Any) -> str:
    """Return a value as Hydra's command line takes it."""
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(_value, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
