"""Where a task's rows come from: a folder or file of this machine, or a dataset of the Hub."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, DatasetDict

from deltaexp.errors import TaskError, listing
from deltaexp.lab.taskconfig import TaskConfig

FORMATS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
"""The loaders of `datasets` by the ends of files' names."""
SAME_SPLIT = {"validation": ("dev", "valid", "val"), "test": ("eval", "evaluation")}
"""Names of splits that mean another; `datasets` reads them so as well."""
CONVERTED = "refs/convert/parquet"
"""The branch on which the Hub keeps a dataset as parquet files that it made itself."""


def load(task: TaskConfig) -> tuple[dict[str, Dataset], list[str]]:
    """Load all splits that there are, and return with them sentences on what a user might not expect.

    Raises:
        TaskError: If there is nothing to load, or it cannot be read.
    """
    path = Path(task.data).expanduser()
    notes: list[str] = []
    try:
        if (path / "dataset_dict.json").exists():
            loaded: Any = datasets.load_from_disk(str(path))
        elif (path / "state.json").exists():  # one split alone
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
    return dict(loaded), notes


def _from_hub(task: TaskConfig) -> tuple[DatasetDict, list[str]]:
    """Load a dataset of the Hub; where a script would make it, which `datasets` no longer runs, the Hub's own conversion."""
    try:
        return datasets.load_dataset(task.data, task.subset, revision=task.revision), []
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error) or task.revision not in (None, "main"):
            raise
        # That branch has a folder for each configuration, and names none of them as such.
        found = datasets.load_dataset(task.data, data_dir=task.subset, revision=CONVERTED)
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
    return datasets.load_dataset(str(path))


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
    return datasets.load_dataset(FORMATS[suffix], data_files={name: str(path) for name, path in files.items()}, **options)


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
