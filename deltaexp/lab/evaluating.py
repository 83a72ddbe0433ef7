"""Measuring saved deltas, several on one backbone that is loaded once: attached, measured and taken out one after the other."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers
from rich.console import Console
from rich.table import Table

from deltaexp import hub
from deltaexp.auto import AutoDeltaModel
from deltaexp.checksum import model_sha256
from deltaexp.digest_cache import model_digests
from deltaexp.errors import ConfigError, DeltaExpError, TaskError, listing
from deltaexp.lab import backbones, predictions, recorded, shortcuts, speeding, telling, training
from deltaexp.lab.backbones import Backbone
from deltaexp.lab.checkpoints import Checkpoints
from deltaexp.lab.config import RunConfig, TrainerConfig
from deltaexp.lab.recorded import Recorded
from deltaexp.lab.shortcuts import Shortcuts
from deltaexp.lab.taskconfig import TaskConfig
from deltaexp.lab.tasks import data as task_data
from deltaexp.lab.tasks.kinds import Kind, Split, choose
from deltaexp.model import DeltaModel
from deltaexp.structure import backbone_tensors

METRICS = "metrics.json"
BASELINE = "the backbone as it is"


@dataclass
class Asked:
    """What `evaluate` is to do."""

    places: list[str]
    """Folders or repositories of deltas."""
    overrides: list[str] = field(default_factory=list)
    """Keys of a run in the place of what is recorded."""
    split: str | None = None
    """The split; None takes the one that the run was evaluated on."""
    baseline: bool = False
    """Measure the backbone without a delta, too."""
    merged: bool = False
    """Fold each delta into the weights first, which computes faster and rounds otherwise."""
    predictions: bool = False
    """Keep the answers; needs `out`."""
    out: Path | None = None
    """A folder for metrics and predictions."""
    json: Path | None = None
    """A file for the metrics."""
    revision: str | None = None
    """The revision of repositories."""


def evaluate(asked: Asked, console: Console | None = None) -> dict[str, Any]:
    """Measure deltas on a split, print a table and return what it holds, for JSON.

    Raises:
        ConfigError: If they were not trained on one backbone and for one task, and no other is named.
        TaskError: If the split is not there, or has other labels.
        DeltaExpError: If a delta cannot be loaded on the backbone.
    """
    console = console or Console(highlight=False, soft_wrap=True)
    found = [fetched(place, asked.overrides, "eval", asked.revision) for place in asked.places]
    _check_alike(found)
    first = found[0]
    config = first.config
    console.print(f"backbone {config.backbone.name} from {config.backbone.source}", markup=False)
    kind_class = choose(config.task, backbones.settings_of(config.backbone), config.backbone.name)
    data = task_data.load_split(config.task, kind_class, asked.split, first.labels, config.trainer.progress)
    task = dataclasses.replace(config.task, labels=data.labels, save_predictions=asked.predictions)
    backbone = loaded(first, task)
    for note in data.notes:
        console.print(f"  {note}", markup=False)
    rows = len(data.splits["test"])
    split = asked.split or (first.results or {}).get("evaluated_on") or "test"
    console.print(f"task {task.name}, {rows:,} rows of {split}", markup=False)
    before = digest(backbone)
    kinds: dict[int, tuple[Kind, Split]] = {}
    measured: list[dict[str, Any]] = []
    base: dict[str, float] | None = None
    for one, name in zip(found, names(asked.places), strict=True):
        start = time.perf_counter()
        with attached(one, backbone, asked.merged) as delta_model:
            positions = delta_model.config.positions()  # which the input has to leave to it
            if positions not in kinds:
                kind = backbone.kind(task, backbone.processor, backbone.model.config, positions)
                kinds[positions] = kind, kind.splits(data)["test"]
                for line in telling.about_lengths(kind, {split: rows}, {split: kinds[positions][1].truncated}):
                    console.print(f"  {line}", style="yellow", markup=False)
            kind, features = kinds[positions]
            with trainer_for(one.config, delta_model, kind, {"test": features}) as trainer:
                if asked.baseline and base is None:
                    with delta_model.detached():
                        base = _measured(trainer, features, asked, "baseline")
                base_tensors = model_digests(backbone.model, delta_model.base_tensors())
                with Shortcuts(one.config, trainer, ["test"], model_sha256(base_tensors)) as short:
                    short.begin()
                    metrics = _measured(trainer, features, asked, name)
        if digest(backbone) != before:
            raise DeltaExpError(
                f"The backbone is not the one that it was before {one.place!r} was attached and detached. This is a fault of "
                f"the delta type {delta_model.config.delta_type!r}; please report it."
            )
        check = delta_model.hash_check
        measured.append(
            {
                "delta": one.place, "name": name, "delta_type": delta_model.config.delta_type,
                "hash_check": check.value if check else None, "metrics": metrics,
                "seconds": round(time.perf_counter() - start, 3),
            }
        )  # fmt: skip
    result = {
        "backbone": config.backbone.name, "task": task.name, "split": split, "rows": rows, "metric": kind.metric,
        "greater_is_better": kind.greater_is_better, "merged": asked.merged, "data_fingerprint": data.fingerprint,
        "deltas": measured, **({} if base is None else {"baseline": base}), "versions": telling.versions(),
    }  # fmt: skip
    _show(console, result)
    text = json.dumps(result, indent=2, ensure_ascii=False)
    for path in filter(None, (asked.json, asked.out and asked.out / METRICS)):
        predictions.write_lines(path, [text])
        console.print(f"written to {path}", markup=False)
    return result


def fetched(place: str, overrides: Sequence[str], command: str, revision: str | None = None, data: bool = True) -> Recorded:
    """Fetch a delta if it is in a repository, and read what is recorded with it (see `deltaexp.lab.recorded.read`)."""
    return recorded.read(place, hub.fetch(place, revision=revision, needs="all"), overrides, command, data)


def loaded(one: Recorded, task: TaskConfig) -> Backbone:
    """Load a delta's backbone for a task with labels, as the run began with it."""
    transformers.set_seed(one.config.resolved_seeds()["init"])  # a new head of the plain backbone is the one of the run
    return backbones.load(one.config.backbone, task)


def digest(backbone: Backbone) -> str:
    """Return a digest of all that a backbone holds."""
    return model_sha256(model_digests(backbone.model, backbone_tensors(backbone.model)))


@contextlib.contextmanager
def attached(one: Recorded, backbone: Backbone, merged: bool = False) -> Iterator[DeltaModel]:
    """Within this context a delta is on the backbone, checked, and merged into its weights if asked.

    Raises:
        DeltaExpError: If it was trained on another backbone, is damaged, or cannot be merged; the message names it.
    """
    try:
        delta_model = AutoDeltaModel.from_finetuned(one.folder, backbone_model=backbone.model)
    except DeltaExpError as error:
        raise type(error)(f"{one.place}: {error}") from error
    try:
        if merged:
            try:
                delta_model.merge()
            except DeltaExpError as error:
                raise type(error)(f"{one.place}: {error} Leave merged=true out.") from error
        yield delta_model
    finally:
        delta_model.detach()


@contextlib.contextmanager
def trainer_for(
    config: RunConfig, delta_model: DeltaModel, kind: Kind, splits: dict[str, Split]
) -> Iterator[training.DeltaTrainer]:
    """Within this context there is a run's trainer that only evaluates, and the backbone computes as it did in the run."""
    own = config.trainer
    settings = TrainerConfig(
        eval_batch_size=own.eval_batch_size, precision=own.precision, cpu=own.cpu, progress=own.progress, speed=own.speed,
        max_steps=1, learning_rate=1.0, save_every=0,
    )  # fmt: skip
    model = delta_model.backbone_model
    choice = speeding.choose(dataclasses.replace(config, trainer=settings), model)
    with tempfile.TemporaryDirectory(prefix="deltaexp-") as folder:  # where a trainer would put what it does not have
        seeds = {"data": 0, "dropout": 0}
        trainer = training.build(choice.trainer, delta_model, kind, splits, Checkpoints(Path(folder), 0), seeds, [])
        try:
            with (
                speeding.without_denormals(),
                speeding.applied(choice, model),
                shortcuts.in_few(config, model) or contextlib.nullcontext(),
            ):
                yield trainer
        finally:
            trainer.unwrap()


def names(places: Sequence[str]) -> list[str]:
    """Return a short name for each delta, no two alike: of its folder, or of its run's where that is called ``delta``."""
    found: list[str] = []
    for place in places:
        path = Path(place)
        last = (path.resolve().parent if path.is_dir() and path.resolve().name == "delta" else path).name
        plain = re.sub(r"[^\w.,=+-]+", "-", last).strip("-.") or "delta"
        same = sum(name == plain or name.startswith(f"{plain}~") for name in found)
        found.append(f"{plain}~{same + 1}" if same else plain)
    return found


def _measured(trainer: training.DeltaTrainer, features: Split, asked: Asked, name: str) -> dict[str, float]:
    """Return the metrics on a split, and write the answers if they are asked for."""
    metrics = training.evaluate(trainer, features)
    if asked.predictions and asked.out is not None:
        predictions.write(asked.out / "predictions" / f"{name}.jsonl", trainer.kind, features.rows, trainer.answers)
    return metrics


def _check_alike(found: Sequence[Recorded]) -> None:
    """Check that deltas belong to one backbone, one task and one list of labels.

    Raises:
        ConfigError: If they belong to several.
        TaskError: If they know other labels.
    """
    first = found[0]
    for other in found[1:]:
        for section, what in (("backbone", "on"), ("task", "for")):
            mine, theirs = (_that_matter(getattr(one.config, section)) for one in (first, other))
            if mine != theirs:
                differ = listing(f"{section}.{k} ({mine[k]!r}, {theirs[k]!r})" for k in mine if mine[k] != theirs[k])
                raise ConfigError(
                    f"The deltas {first.place!r} and {other.place!r} were not trained {what} the same {section}: they differ "
                    f"in {differ}. Evaluate them one by one, or say which to take: {section}=..."
                )
        if first.labels != other.labels:
            raise TaskError(
                f"The delta {first.place!r} was trained on the labels {listing(first.labels) or 'of no task'}, and "
                f"{other.place!r} on {listing(other.labels) or 'those of no task'}. Evaluate them one by one."
            )


def _that_matter(section: Any) -> dict[str, Any]:
    """Return the keys of a section that an evaluation depends on."""
    values = dataclasses.asdict(section)
    return {k: v for k, v in values.items() if k not in ("train_rows", "save_predictions", "probe_rows", "dataset", "language")}


def _show(console: Console, result: dict[str, Any]) -> None:
    """Print the table of deltas and metrics."""
    columns = list(result["deltas"][0]["metrics"])
    table = Table(title=f"{result['task']}, {result['rows']:,} rows of {result['split']}")
    for name in ("delta", "type", "hash check", *columns):
        table.add_column(name, overflow="fold", justify="right" if name in columns else "left")
    if "baseline" in result:
        table.add_row(BASELINE, "", "", *(f"{result['baseline'][name]:.4f}" for name in columns))
    for one in result["deltas"]:
        values = (f"{one['metrics'][name]:.4f}" for name in columns)
        table.add_row(one["name"], one["delta_type"], one["hash_check"] or "", *values)
    (console if console.is_terminal else Console(file=console.file, width=160)).print(table)
