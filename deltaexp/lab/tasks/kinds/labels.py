"""Labels as numbers: of rows and of tokens, by names given or found in the data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from datasets import Dataset

from deltaexp.errors import TaskError, did_you_mean, listing
from deltaexp.lab.taskconfig import TaskConfig


def numbered(
    splits: dict[str, Dataset], task: TaskConfig, nested: bool = False
) -> tuple[dict[str, Dataset], list[str], list[str]]:
    """Return the splits with labels as numbers, the labels' names, and sentences on labels that training never shows.

    Args:
        splits: Rows with the column ``target``: numbers or names.
        task: Its ``labels``, where there are some, are the names in the order of their numbers.
        nested: Whether a target is a list of labels, one for each token.

    Raises:
        TaskError: If a label is none of the names or numbers.
    """
    found = {split: _values(rows, nested) for split, rows in splits.items()}
    names = list(task.labels) or _names(splits, found, task, nested)
    numbers: dict[Any, int] = {name: number for number, name in enumerate(names)}
    as_numbers = all(isinstance(value, int) and not isinstance(value, bool) for values in found.values() for value in values)
    if task.labels or as_numbers:
        numbers |= {number: number for number in range(len(names))}
    if not task.labels and as_numbers and _class_names(splits, nested) is None:
        numbers = {int(name): number for number, name in enumerate(names)}  # such as the labels 1, 2 and 5
    for split, values in found.items():
        strange = [value for value in values if value not in numbers]
        if strange:
            raise TaskError(_strange(split, strange, names, task, given=bool(task.labels)))
    if "train" in found:
        seen = {numbers[value] for value in found["train"]}
        unseen = [name for number, name in enumerate(names) if number not in seen]
        notes = [f"no row of the training split has the label {listing(unseen)}"] if unseen else []
    else:
        notes = []
    same = all(number == value for value, number in numbers.items() if isinstance(value, int))
    if as_numbers and same:
        return splits, names, notes

    def number(row: dict[str, Any]) -> dict[str, Any]:
        target = row["target"]
        return {"target": [numbers[one] for one in target] if nested else numbers[target]}

    mapped = {
        split: rows.rename_column("target", "label").map(
            lambda row: number({"target": row["label"]}), remove_columns="label", keep_in_memory=True,
            load_from_cache_file=False, desc="labels",
        )
        for split, rows in splits.items()
    }  # fmt: skip
    return mapped, names, notes


def _values(rows: Dataset, nested: bool) -> set[Any]:
    if not nested:
        return set(rows.unique("target"))
    return {label for labels in rows["target"] for label in labels}


def _class_names(splits: dict[str, Dataset], nested: bool) -> list[str] | None:
    """Return the names that the data's own description gives to the classes."""
    feature = next(iter(splits.values())).features["target"]
    feature = getattr(feature, "feature", feature) if nested else feature
    return list(feature.names) if hasattr(feature, "names") else None


def _names(splits: dict[str, Dataset], found: dict[str, set[Any]], task: TaskConfig, nested: bool) -> list[str]:
    described = _class_names(splits, nested)
    if described is not None:
        return described
    seen: Iterable[Any] = found.get("train") or set().union(*found.values())
    if None in seen:
        raise TaskError(f"Rows of task {task.name!r} have no label in {task.target!r}. Take them out, or give them one.")
    names = [str(value) for value in sorted(seen, key=lambda value: (str(type(value)), value))]
    if len(names) < 2:
        raise TaskError(
            f"The training split of task {task.name!r} has the one label {listing(names)} in {task.target!r}; there "
            "have to be two."
        )
    return names


def _strange(split: str, strange: list[Any], names: list[str], task: TaskConfig, given: bool) -> str:
    shown = listing(sorted(map(str, strange)))
    if not given:
        return (
            f"The split {split!r} of task {task.name!r} has labels that no row of the training split has: {shown}. "
            f"Name all of them in task.labels, or choose other rows. Seen in training: {listing(names)}."
        )
    numbered_names = listing(f"{number} {name}" for number, name in enumerate(names))
    hint = did_you_mean(str(strange[0]), names) if isinstance(strange[0], str) else ""
    public = " A label of -1 means that the labels of that split are not public: choose another one." if -1 in strange else ""
    return (
        f"The split {split!r} of task {task.name!r} has labels {shown}, which are no numbers or names of task.labels "
        f"({numbered_names}).{hint}{public}"
    )
