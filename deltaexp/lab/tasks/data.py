"""Loading a task's data: generated, from the Hub, or from local files, checked before anything is computed with them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, DatasetDict

from deltaexp.digest_cache import cache_dir
from deltaexp.errors import TaskError, did_you_mean, listing, unknown
from deltaexp.lab.config import TaskConfig
from deltaexp.lab.tasks import dates

GENERATORS: Mapping[str, Callable[[str, int, int], list[dict[str, str]]]] = {"dates": dates.generate}
"""The data that deltaexp makes itself: split, number of rows and seed to rows."""
GENERATED_ROWS = {"train": 4000, "validation": 500, "test": 500}
SPLITS = ("train", "validation", "test")
STALE = 86_400
"""Seconds after which half-made data in the cache are nobody's."""


@dataclass
class TaskData:
    """The rows of a task under common names: ``text`` (and ``text_pair``) and ``target``."""

    splits: dict[str, Dataset]
    fingerprint: str
    """sha256 over every row that the run uses."""
    truncated: dict[str, int] = field(default_factory=dict)
    """How many rows of each split were cut to the maximum length; filled in by tokenisation."""

    @property
    def evaluated(self) -> str:
        """The split of the final evaluation: test where the task has one, else validation."""
        return "test" if "test" in self.splits else "validation"


def load(task: TaskConfig, progress: bool = True) -> TaskData:
    """Load the splits of a task, take the rows asked for and check them.

    Args:
        task: What to load.
        progress: Whether `datasets` shows progress bars from here on.

    Raises:
        TaskError: If the data cannot be loaded, a column or split is missing, a split is empty or a label is unknown.
    """
    (datasets.enable_progress_bars if progress else datasets.disable_progress_bars)()
    names = {"train": task.train_split, "validation": task.validation_split}
    if task.test_split is not None:
        names["test"] = task.test_split
    limits = {split: getattr(task, f"{split}_rows") for split in SPLITS}
    loaded = _generated(task, limits) if task.data.startswith("generated:") else _loaded(task)
    splits = {}
    for split, name in names.items():
        if name not in loaded:
            raise TaskError(
                unknown(f"split of {task.data!r}", name, loaded)
                + f" Set task.{split}_split to one of them"
                + (", or to null to evaluate on the validation split." if split == "test" else ".")
            )
        rows = loaded[name]
        if limits[split] is not None and len(rows) > limits[split]:
            rows = rows.shuffle(seed=task.data_seed).select(range(limits[split]))
        splits[split] = _renamed(rows, task, name)
    return TaskData(splits, _fingerprint(splits))


def _generated(task: TaskConfig, limits: Mapping[str, int | None]) -> dict[str, Dataset]:
    name = task.data.removeprefix("generated:")
    if name not in GENERATORS:
        raise TaskError(unknown("generated data set", name, GENERATORS))
    try:
        return {
            split: Dataset.from_list(GENERATORS[name](split, limits[split] or GENERATED_ROWS[split], task.data_seed))
            for split in SPLITS
        }
    except ValueError as error:
        raise TaskError(f"The data of task {task.name!r} cannot be generated: {error}") from error


def _loaded(task: TaskConfig) -> DatasetDict:
    """Load a local folder or file, or a dataset of the Hub."""
    path = Path(task.data).expanduser()
    try:
        if (path / "dataset_dict.json").exists():
            return datasets.load_from_disk(str(path))
        if path.is_dir():
            return datasets.load_dataset(str(path))
        if path.exists():
            kinds = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
            if path.suffix not in kinds:
                raise TaskError(f"{task.data!r} is not of a known kind; known are {listing(kinds)}, or a folder of such files.")
            extra = {"sep": "\t"} if path.suffix == ".tsv" else {}
            return datasets.load_dataset(kinds[path.suffix], data_files={task.train_split: str(path)}, **extra)
        if str(task.data).startswith((".", "/", "~")) or task.data.count("/") > 1:
            raise TaskError(f"There is no folder or file {task.data!r} to load the data of task {task.name!r} from.")
        return datasets.load_dataset(task.data, task.subset)
    except TaskError:
        raise
    except Exception as error:  # whatever a loader of a file format or the network raises
        first_line = (str(error).splitlines() or [""])[0]
        raise TaskError(
            f"The data of task {task.name!r} could not be loaded from {task.data!r}: {type(error).__name__}: {first_line} "
            "Without a network, give a local copy: task.data=FOLDER."
        ) from error


def _renamed(rows: Dataset, task: TaskConfig, split: str) -> Dataset:
    """Return the rows with only the task's columns, under common names."""
    columns = {**dict(zip(("text", "text_pair"), task.inputs, strict=False)), "target": task.target}
    for column in columns.values():
        if column not in rows.column_names:
            raise TaskError(
                f"The data of task {task.name!r} have no column {column!r}.{did_you_mean(column, rows.column_names)} "
                f"Their columns: {listing(rows.column_names)}. Set task.inputs and task.target."
            )
    if not len(rows):
        raise TaskError(f"The split {split!r} of task {task.name!r} is empty.")
    if task.kind == "classification":
        found = set(rows.unique(task.target))
        if not found <= set(range(len(task.labels))):
            strange = sorted(map(str, found - set(range(len(task.labels)))))
            raise TaskError(
                f"The split {split!r} of task {task.name!r} has labels {listing(strange)}, which are no numbers of "
                f"task.labels ({listing(f'{i} {label}' for i, label in enumerate(task.labels))}). A label of -1 means that "
                "the labels of that split are not public: choose another one."
            )
    kept = rows.select_columns(list(columns.values()))
    return kept.rename_columns({column: name for name, column in columns.items() if column != name})


def _fingerprint(splits: Mapping[str, Dataset]) -> str:
    sha256 = hashlib.sha256()
    for split, rows in splits.items():
        for batch in rows.iter(batch_size=1000):
            sha256.update(json.dumps([split, batch], sort_keys=True, ensure_ascii=False).encode())
    return sha256.hexdigest()


def cached(key: Mapping[str, Any], make: Callable[[], DatasetDict]) -> DatasetDict:
    """Return what ``make`` makes, kept on disk under a digest of ``key`` and shared by all runs that need the same."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    folder = cache_dir() / "tokenised" / digest
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        for old in folder.parent.glob(".making-*"):  # of processes that were killed
            with contextlib.suppress(FileNotFoundError):  # another one clears up too
                if time.time() - old.stat().st_mtime > STALE:
                    shutil.rmtree(old, ignore_errors=True)
        stage = Path(tempfile.mkdtemp(prefix=".making-", dir=folder.parent))
        try:
            make().save_to_disk(str(stage / "data"))
            if not folder.exists():  # another process may have been faster
                (stage / "data").rename(folder)
        finally:
            shutil.rmtree(stage, ignore_errors=True)
    return datasets.load_from_disk(str(folder))
