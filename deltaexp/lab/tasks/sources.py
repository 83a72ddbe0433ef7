"""Where a task's rows come from: a folder or file of this machine, or a dataset of the Hub."""

from __future__ import annotations

import csv
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, IterableDataset
from datasets.arrow_writer import ArrowWriter

from deltaexp.errors import TaskError, listing
from deltaexp.lab.taskconfig import TaskConfig
from deltaexp.lab.tasks.cache import in_file

FORMATS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
"""The loaders of `datasets` by the ends of files' names."""
SAME_SPLIT = {"validation": ("dev", "valid", "val"), "test": ("eval", "evaluation")}
"""Names of splits that mean another; `datasets` reads them so as well."""
CONVERTED = "refs/convert/parquet"
"""The branch on which the Hub keeps a dataset as parquet files that it made itself."""


class Drawn(Mapping[str, Dataset]):
    """The splits of streamed data. Of each, the rows that the task takes are read when it is asked for, and kept in a file.

    So whatever is done with rows can be done with these: they have a number, an order and places, an interrupted run finds the
    same ones again, and every process has all of them.

    Args:
        streams: The splits.
        task: How many rows it takes, and whether mixed.
    """

    def __init__(self, streams: Mapping[str, IterableDataset], task: TaskConfig) -> None:
        self.streams, self.task = streams, task
        self._drawn: dict[str, Dataset] = {}

    def __getitem__(self, name: str) -> Dataset:
        if name not in self._drawn:
            self._drawn[name] = self._draw(self.streams[name], self._rows(name))
        return self._drawn[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.streams)

    def __len__(self) -> int:
        return len(self.streams)

    def __contains__(self, name: object) -> bool:
        return name in self.streams  # without reading any row

    def _rows(self, name: str) -> int | None:
        """Return how many rows of a split are taken; None for all."""
        task = self.task
        assert task.train_rows is not None, "see deltaexp.lab.taskconfig.check"
        held_out = 0 if task.validation_split in self else task.holdout
        taken = {
            (task.train_split, task.train_rows + held_out),
            (task.validation_split, task.validation_rows),
            (task.test_split, task.test_rows),
        }
        counts = [count for split, count in taken if split == name]
        return None if None in counts else max(filter(None, counts), default=None)

    def _draw(self, stream: IterableDataset, rows: int | None) -> Dataset:
        task = self.task
        if rows is not None:
            if task.shuffle_buffer:
                stream = stream.shuffle(seed=task.data_seed, buffer_size=task.shuffle_buffer)
            stream = stream.take(rows)
        features = stream.features
        if features is not None:
            stream = stream.decode(False)  # an image stays the file that it is
        try:
            return in_file(functools.partial(_written, stream, features))
        except Exception as error:  # whatever a loader of a file format or the network raises
            raise TaskError(_why(task, Path(task.data).expanduser(), error)) from error


def _written(stream: IterableDataset, features: Any, name: str) -> Dataset:
    """Write the rows of a stream into a file, and return them; without features, the first rows tell the columns' types."""
    with ArrowWriter(features=features, path=name, writer_batch_size=1000) as writer:
        for row in stream:
            writer.write(row)
        writer.finalize()
    return Dataset.from_file(name)


def load(task: TaskConfig) -> tuple[Mapping[str, Dataset], list[str]]:
    """Load all splits that there are, and return with them sentences on what a user might not expect.

    Raises:
        TaskError: If there is nothing to load, or it cannot be read.
    """
    path = Path(task.data).expanduser()
    notes: list[str] = []
    saved = [name for name in ("dataset_dict.json", "state.json") if (path / name).exists()]
    if saved and task.streaming:
        raise TaskError(
            f"{task.data!r} was written by save_to_disk: it is mapped into memory, and no more of it is read than is needed. "
            "Leave task.streaming out."
        )
    try:
        if "dataset_dict.json" in saved:
            loaded: Any = datasets.load_from_disk(str(path))
        elif saved:  # one split alone
            loaded = {task.train_split: datasets.load_from_disk(str(path))}
        elif path.is_dir():
            loaded = _folder(path, task)
        elif path.exists():
            loaded = _files({task.train_split: path}, task)
        elif task.data.startswith((".", "/", "~")) or task.data.count("/") > 1 or path.suffix.lower() in FORMATS:
            raise TaskError(f"There is no folder or file {task.data!r} to load the data of task {task.name!r} from.")
        else:
            loaded, notes = _from_hub(task)
    except TaskError:
        raise
    except Exception as error:  # whatever a loader of a file format or the network raises
        raise TaskError(_why(task, path, error)) from error
    for name, others in SAME_SPLIT.items():
        for other in others:
            if name not in loaded and other in loaded:
                loaded[name] = loaded[other]
    return Drawn(loaded, task) if task.streaming else dict(loaded), notes


def _from_hub(task: TaskConfig) -> tuple[dict[str, Any], list[str]]:
    """Load a dataset of the Hub; where a script would make it, which `datasets` no longer runs, the Hub's own conversion."""
    try:
        return datasets.load_dataset(task.data, task.subset, revision=task.revision, streaming=task.streaming), []
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error) or task.revision not in (None, "main"):
            raise
        # That branch has a folder for each configuration, and names none of them as such.
        found = datasets.load_dataset(task.data, data_dir=task.subset, revision=CONVERTED, streaming=task.streaming)
        return found, [
            f"{task.data} has a script, which nobody runs any more: these are the Hub's parquet files of {CONVERTED}"
        ]


def _folder(path: Path, task: TaskConfig) -> Mapping[str, Dataset]:
    """Load a folder in which each split is a file of its name; anything else is left to `datasets`."""
    suffixes = (".tsv", ".csv") if task.columns else (".tsv",)  # as `datasets` takes tsv for csv
    for suffix in suffixes:
        files = {file.stem: file for file in sorted(path.iterdir()) if file.suffix == suffix}
        if files:
            return _files(files, task)
    return datasets.load_dataset(str(path), streaming=task.streaming)


def _files(files: Mapping[str, Path], task: TaskConfig) -> Mapping[str, Dataset]:
    first = next(iter(files.values()))
    suffix = first.suffix.lower()
    if suffix not in FORMATS:
        raise TaskError(f"{str(first)!r} is not of a known kind; known are {listing(FORMATS)}, or a folder of such files.")
    # Quotes in tsv files are characters of the text, as in GLUE's.
    options: dict[str, Any] = {"sep": "\t", "quoting": csv.QUOTE_NONE} if suffix == ".tsv" else {}
    if task.columns:
        if FORMATS[suffix] != "csv":
            raise TaskError(f"task.columns names the columns of csv and tsv files without a header; {str(first)!r} is neither.")
        _check_width(first, task, "\t" if suffix == ".tsv" else ",", options.get("quoting", csv.QUOTE_MINIMAL))
        options |= {"column_names": task.columns, "header": None}
    named = {name: str(path) for name, path in files.items()}
    return datasets.load_dataset(FORMATS[suffix], data_files=named, streaming=task.streaming, **options)


def _check_width(path: Path, task: TaskConfig, separator: str, quoting: Any) -> None:
    """Refuse names that are more or fewer than the columns: pandas would take columns without one for an index."""
    with path.open(encoding="utf-8", newline="") as file:
        line = next(csv.reader(file, delimiter=separator, quoting=quoting), [])
    if len(line) != len(task.columns):
        raise TaskError(
            f"task.columns names {len(task.columns)} columns ({listing(task.columns)}), and the first line of {str(path)!r} "
            f"has {len(line)}: {listing(line)}."
        )


def _why(task: TaskConfig, path: Path, error: Exception) -> str:
    lines = [line for cause in (error, error.__cause__) if cause is not None for line in str(cause).splitlines()[:1]]
    told = f"The data of task {task.name!r} could not be loaded from {task.data!r}: {type(error).__name__}: {' '.join(lines)}"
    if path.exists():
        # The commonest by far: a file that is empty, cut off, or of another kind than its name says.
        return f"{told} Is the file, or one in the folder, empty, damaged or of another kind than its name says?"
    if "BuilderConfig" in told or "Config name is missing" in told:
        return f"{told} Choose one with task.subset."
    return f"{told} Without a network, give a local copy: task.data=FOLDER."
