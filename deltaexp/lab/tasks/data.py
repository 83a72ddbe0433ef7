"""Loading a task's data: generated, from the Hub, or from local files, checked before anything is computed with them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
from datasets import Dataset

from deltaexp.errors import DeltaExpError, TaskError, listing, unknown
from deltaexp.lab.taskconfig import TaskConfig
from deltaexp.lab.tasks import columns, dates, digits, sources

if TYPE_CHECKING:
    from deltaexp.lab.tasks.kinds import Kind

SPLITS = ("train", "validation", "test")
DATES_ROWS = {"train": 4000, "validation": 500, "test": 500}
GENERATORS: Mapping[str, Callable[[str, int | None, int], list[dict[str, Any]]]] = {
    "dates": lambda split, rows, seed: dates.generate(split, rows or DATES_ROWS[split], seed),
    "digits": lambda split, rows, seed: digits.generate(split),
}
"""The data that need no file: split, number of rows and seed to rows, of which there may be more."""


@dataclass
class TaskData:
    """The rows of a task, under the names that its kind uses."""

    splits: dict[str, Dataset]
    fingerprint: str
    """sha256 over every row that the run uses."""
    labels: list[str] = field(default_factory=list)
    """Names of the classes, where the kind has classes."""
    notes: list[str] = field(default_factory=list)
    """Sentences on what a user might not expect of the data."""

    @property
    def evaluated(self) -> str:
        """The split of the final evaluation: test where the task has one, else validation."""
        return "test" if "test" in self.splits else "validation"


def load(task: TaskConfig, kind: type[Kind], progress: bool = True) -> TaskData:
    """Load the splits of a task, take the rows asked for and check them.

    Args:
        task: What to load.
        kind: The kind of task, which says what columns there have to be.
        progress: Whether `datasets` shows progress bars from here on.

    Raises:
        TaskError: If the data cannot be loaded, a column or split is missing, a split is empty or a label is unknown.
    """
    (datasets.enable_progress_bars if progress else datasets.disable_progress_bars)()
    limits = {split: getattr(task, f"{split}_rows") for split in SPLITS}
    loaded, about_source = _generated(task, limits) if task.data.startswith("generated:") else sources.load(task)
    raw, notes = _splits(task, loaded)
    splits = {}
    for split, rows in raw.items():
        rows = _prepared(split, rows, task)
        if limits[split] is not None and len(rows) > limits[split]:
            rows = rows.shuffle(seed=task.data_seed).select(range(limits[split]))
        splits[split] = _viewed(split, rows, task, kind)
    splits, labels, more = kind.labelled(splits, task)
    return TaskData(splits, _fingerprint(splits), labels, [*about_source, *notes, *more])


def load_split(
    task: TaskConfig, kind: type[Kind], split: str | None = None, labels: Sequence[str] = (), progress: bool = True
) -> TaskData:
    """Load one split alone, of any name, for an evaluation: it stands under ``test`` in the result.

    Args:
        task: What to load.
        kind: The kind of task.
        split: The split's name in the data, or ``train``, ``validation`` or ``test`` for those that the task names, in the rows
            that a run takes of them. None is the task's split of the final evaluation, or the only one that there is.
        labels: The names of the classes that the model was trained on; where there are none, they are read from the data.
        progress: Whether `datasets` shows progress bars from here on.

    Raises:
        TaskError: As in `load`; also if the data have other classes than the model was trained on.
    """
    (datasets.enable_progress_bars if progress else datasets.disable_progress_bars)()
    limits = {name: getattr(task, f"{name}_rows") for name in SPLITS}
    loaded, about_source = _generated(task, limits) if task.data.startswith("generated:") else sources.load(task)
    usual = "test" if task.test_split is not None else "validation"
    name = split or usual
    found = (getattr(task, f"{name}_split") or name) if name in SPLITS else name
    notes: list[str] = []
    if split is None and len(loaded) == 1 and found not in loaded:
        found = next(iter(loaded))
        notes.append(f"the data have the one split {found!r}")
    if name in ("train", "validation") and task.holdout and task.validation_split not in loaded:
        parts, notes = _splits(dataclasses.replace(task, test_split=None), loaded)
        rows = parts[name]
    elif found in loaded:
        rows = loaded[found]
    else:
        raise TaskError(unknown(f"split of {task.data!r}", found, loaded) + " Choose one with split=NAME.")
    rows = _prepared(found, rows, task)
    limit = limits.get(name)
    if limit is not None and len(rows) > limit:
        rows = rows.shuffle(seed=task.data_seed).select(range(limit))
    rows = _viewed(found, rows, task, kind)
    if labels:
        _check_labels(rows, task, labels)
    numbered, names, more = kind.labelled({"test": rows}, dataclasses.replace(task, labels=list(labels) or task.labels))
    return TaskData(numbered, _fingerprint(numbered), names, [*about_source, *notes, *more])


def _check_labels(rows: Dataset, task: TaskConfig, labels: Sequence[str]) -> None:
    """Check that the task and the data name no other classes than a model was trained on.

    Raises:
        TaskError: If they do.
    """
    feature = rows.features["target"]
    described = getattr(getattr(feature, "feature", feature), "names", None)
    # What the data themselves say of their numbers may be in another order; what the task says is how they are read.
    wrong = task.labels and list(task.labels) != list(labels)
    if wrong or (not task.labels and described is not None and set(described) != set(labels)):
        raise TaskError(
            f"The data of task {task.name!r} have the labels {listing(task.labels or described or [])}, and the delta was "
            f"trained on {listing(labels)}. Evaluate it on data with the same labels, in the same order."
        )


def _splits(task: TaskConfig, loaded: Mapping[str, Dataset]) -> tuple[dict[str, Dataset], list[str]]:
    """Return the splits under deltaexp's names, the validation split held out of the training split where there is none."""
    names = {"train": task.train_split, "validation": task.validation_split}
    if task.test_split is not None:
        names["test"] = task.test_split
    found: dict[str, Dataset] = {}
    notes: list[str] = []
    for split, name in names.items():
        if name in loaded:
            found[split] = loaded[name]
        elif split == "validation" and task.holdout:
            rows = found["train"]
            if len(rows) <= task.holdout:
                raise TaskError(f"task.holdout is {task.holdout}, and the training split has {len(rows)} rows.")
            order = rows.shuffle(seed=task.data_seed)
            found["validation"] = order.select(range(task.holdout))
            found["train"] = order.select(range(task.holdout, len(rows)))
            notes.append(f"{task.holdout:,} rows of {task.train_split} are held out for validation (task.holdout)")
        else:
            raise TaskError(
                unknown(f"split of {task.data!r}", name, loaded)
                + f" Set task.{split}_split to one of them"
                + (", or to null to evaluate on the validation split." if split == "test" else "")
                + (
                    f", or task.holdout={_tenth(found)} to hold rows of the training split out."
                    if split == "validation"
                    else ""
                )
                + ("." if split == "train" else "")
            )
    return found, notes


def _tenth(found: Mapping[str, Dataset]) -> int:
    return min(500, max(1, len(found["train"]) // 10))


def _prepared(split: str, rows: Dataset, task: TaskConfig) -> Dataset:
    """Return what the function ``task.prepare`` makes of rows."""
    if task.prepare is None:
        return rows
    prepare = columns.function(task.prepare, "task.prepare")
    try:
        made = prepare(rows, task)
    except DeltaExpError:
        raise
    except Exception as error:  # a user's code may raise anything
        raise TaskError(
            f"task.prepare={task.prepare} failed on the split {split!r} of task {task.name!r}: {type(error).__name__}: {error} "
            f"({columns.where(error, prepare)})."
        ) from error
    if not isinstance(made, Dataset):
        raise TaskError(f"task.prepare={task.prepare} returned a {type(made).__name__}; it must return a datasets.Dataset.")
    if len(rows) and not len(made):
        raise TaskError(f"task.prepare={task.prepare} left none of the {len(rows)} rows of the split {split!r}.")
    return made


def _viewed(split: str, rows: Dataset, task: TaskConfig, kind: type[Kind]) -> Dataset:
    """Return rows with the columns of their kind, checked."""
    if not len(rows):
        raise TaskError(f"The split {split!r} of task {task.name!r} is empty.")
    specs = kind.columns(task)
    made = columns.view(rows, specs, task)
    columns.check(split, made, specs, task)
    return made


def _generated(task: TaskConfig, limits: Mapping[str, int | None]) -> tuple[Mapping[str, Dataset], list[str]]:
    name = task.data.removeprefix("generated:")
    if name not in GENERATORS:
        raise TaskError(unknown("generated data set", name, GENERATORS))
    try:
        made = {split: Dataset.from_list(GENERATORS[name](split, limits.get(split), task.data_seed)) for split in SPLITS}
    except ValueError as error:
        raise TaskError(f"The data of task {task.name!r} cannot be generated: {error}") from error
    return made, []


def _fingerprint(splits: Mapping[str, Dataset]) -> str:
    sha256 = hashlib.sha256()
    for split, rows in splits.items():
        images = [name for name, feature in rows.features.items() if isinstance(feature, datasets.Image)]
        for name in images:
            rows = rows.cast_column(name, datasets.Image(decode=False))
        for batch in rows.iter(batch_size=1000):
            for name in images:  # where a file lies is not what it holds
                batch[name] = [image["bytes"] or Path(image["path"]).read_bytes() for image in batch[name]]
            sha256.update(json.dumps([split, batch], sort_keys=True, ensure_ascii=False, default=_plain).encode())
    return sha256.hexdigest()


def _plain(value: Any) -> str:
    """Return what stands in a fingerprint for a value that JSON does not know, such as the bytes of an image."""
    return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else repr(value)
