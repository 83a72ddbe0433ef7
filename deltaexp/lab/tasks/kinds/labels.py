"""Labels as numbers: of rows and of tokens, by names given or found in the data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from datasets import Dataset

from deltaexp.errors import TaskError, did_you_mean, listing
from deltaexp.lab.taskconfig import TaskConfig
from deltaexp.lab.tasks.cache import mapped


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
    _check_shape(splits, task, nested)
    found = {split: _values(rows, nested) for split, rows in splits.items()}
    described = _class_names(splits, nested)
    if task.labels:
        names = list(task.labels)
        numbers: dict[Any, int] = {name: number for number, name in enumerate(names)}
        numbers |= _given(names, described)
    elif described is not None:
        names = described
        numbers = {name: number for number, name in enumerate(names)} | {number: number for number in range(len(names))}
    else:
        ordered = _seen(found, task)
        # Whole numbers that a file has with a point, as it does where others are missing, are named without it.
        names = [str(int(value) if isinstance(value, float) and value.is_integer() else value) for value in ordered]
        numbers = {value: number for number, value in enumerate(ordered)}
    as_numbers = all(isinstance(value, int) and not isinstance(value, bool) for values in found.values() for value in values)
    for split, values in found.items():
        strange = [value for value in values if value not in numbers]
        if strange:
            raise TaskError(_strange(split, strange, names, task, given=bool(task.labels)))
    if "train" in found:
        seen = {numbers[value] for value in found["train"]}
        unseen = [name for number, name in enumerate(names) if number not in seen]
        if len(seen) == 1 and len(names) > 1:
            notes = [f"every row of the training split has the label {names[seen.pop()]}: there is nothing to learn from it"]
        else:
            notes = [f"no row of the training split has the label {listing(unseen)}"] if unseen else []
    else:
        notes = []
    same = all(numbers[value] == value for values in found.values() for value in values)
    if as_numbers and same:
        return splits, names, notes

    def number(batch: dict[str, list]) -> dict[str, list]:
        return {
            "target": [[numbers[one] for one in target] if nested else numbers[target] for target in batch["label"]],
        }

    made = {
        split: mapped(rows.rename_column("target", "label"), number, batched=True, remove_columns="label", desc="labels")
        for split, rows in splits.items()
    }
    return made, names, notes


def _values(rows: Dataset, nested: bool) -> set[Any]:
    if not nested:
        return set(rows.unique("target"))
    return {label for batch in rows.select_columns("target").iter(1000) for labels in batch["target"] for label in labels}


def _class_names(splits: dict[str, Dataset], nested: bool) -> list[str] | None:
    """Return the names that the data's own description gives to the classes."""
    feature = next(iter(splits.values())).features["target"]
    feature = getattr(feature, "feature", feature) if nested else feature
    return list(feature.names) if hasattr(feature, "names") else None


def _given(names: list[str], described: list[str] | None) -> dict[Any, int]:
    """Return what the numbers of the data stand for, where the names of the classes are given.

    They are the places of the names, unless the data themselves say that they stand for these names in another order, or the
    names are numbers, such as the stars 1 to 5.
    """
    if described is not None and described != names and set(described) == set(names):
        return {number: names.index(name) for number, name in enumerate(described)}
    if described is None and all(name.lstrip("-").isdecimal() for name in names):
        return {int(name): number for number, name in enumerate(names)}
    return {number: number for number in range(len(names))}


def _seen(found: dict[str, set[Any]], task: TaskConfig) -> list[Any]:
    """Return the labels that training shows, in order."""
    seen: Iterable[Any] = found.get("train") or set().union(*found.values())
    values = sorted(seen, key=lambda value: (str(type(value)), value))
    if len(values) < 2:
        raise TaskError(
            f"The training split of task {task.name!r} has the one label {listing(values)} in {task.target!r}; there "
            "have to be two. If others come up elsewhere, name all of them in task.labels."
        )
    return values


def _check_shape(splits: dict[str, Dataset], task: TaskConfig, nested: bool) -> None:
    feature = next(iter(splits.values())).features["target"]
    lists = hasattr(feature, "feature") or isinstance(feature, (list, dict))
    if lists and not nested:
        raise TaskError(
            f"The column {task.target!r} of task {task.name!r} holds lists, and one label is wanted. Name another column in "
            "task.target, or task.kind=token_classification for a label of each word."
        )
    if nested and not lists:
        raise TaskError(
            f"The column {task.target!r} of task {task.name!r} holds one value a row, and a list of labels is wanted, one for "
            "each word. Name another column in task.target, or task.kind=classification."
        )


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
