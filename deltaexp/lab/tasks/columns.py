"""Columns of a data set under the names that the kinds of tasks use, filled from columns or templates."""

from __future__ import annotations

import importlib
import importlib.util
import string
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, List, Value

from deltaexp.errors import ConfigError, TaskError, did_you_mean, listing
from deltaexp.lab import taskconfig
from deltaexp.lab.taskconfig import TaskConfig
from deltaexp.lab.tasks.cache import mapped

Spec = str | list[str]
"""A column or a template; a list of them makes a column of lists."""


def view(rows: Dataset, specs: Mapping[str, Spec], task: TaskConfig) -> Dataset:
    """Return rows with only the columns that ``specs`` names, each filled as its column or template says.

    Raises:
        TaskError: If a column is missing, or a row does not hold what a template asks for.
    """
    needed = []
    for spec in specs.values():
        for one in [spec] if isinstance(spec, str) else spec:
            for column in taskconfig.fields_of(one) or [one]:
                if column not in rows.column_names:
                    raise TaskError(_missing(column, rows, task))
                needed.append(column)
    plain = [spec for spec in specs.values() if isinstance(spec, str) and not taskconfig.fields_of(spec)]
    if len(plain) == len(specs) == len(set(plain)):
        kept = rows.select_columns(plain)
        return kept.rename_columns({spec: name for name, spec in specs.items() if spec != name and isinstance(spec, str)})

    def fill(batch: dict[str, list], numbers: list[int]) -> dict[str, list]:
        table = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        made = zip(numbers, table, strict=True)
        filled = [[value_of(row, spec, task, number) for spec in specs.values()] for number, row in made]
        return {name: list(values) for name, values in zip(specs, zip(*filled, strict=True), strict=True)}

    columns = list(dict.fromkeys(needed))
    return mapped(
        rows.select_columns(columns), fill, batched=True, with_indices=True, remove_columns=columns,
        features=Features({name: _feature(rows, spec) for name, spec in specs.items()}), desc="columns",
    )  # fmt: skip


def _feature(rows: Dataset, spec: Spec) -> Any:
    """Return the type of the column that a spec makes: a column's own, which may name classes; text of a template."""
    if isinstance(spec, str):
        return Value("string") if taskconfig.fields_of(spec) else rows.features[spec]
    types = [_feature(rows, one) for one in spec]
    return List(types[0] if all(one == types[0] for one in types) else Value("string"))


class _Filled(string.Formatter):
    """Fills templates, and takes a value that is missing for an error instead of writing "None"."""

    def get_field(self, field_name: str, args: Any, kwargs: Any) -> tuple[Any, Any]:
        value, first = super().get_field(field_name, args, kwargs)
        if value is None:
            raise LookupError(f"{{{field_name}}} has no value")
        return value, first


def value_of(row: Mapping[str, Any], spec: Spec, task: TaskConfig, number: int = 0) -> Any:
    """Return what a column or template is in one row; a column of lists is taken apart only by its user.

    Args:
        row: Values by column.
        spec: The column or template.
        task: For an error, its name.
        number: For an error, the number of the row.

    Raises:
        TaskError: If the row does not hold what a template asks for.
    """
    if isinstance(spec, list):
        return [value_of(row, one, task, number) for one in spec]
    if not taskconfig.fields_of(spec):
        return row[spec]
    try:
        return _Filled().vformat(spec, (), row)
    except (LookupError, TypeError, ValueError) as error:
        reason = error.args[0] if error.args and " " in str(error.args[0]) else f"there is no {error}"
        raise TaskError(
            f"Row {number} of task {task.name!r} does not fit the template {spec!r}: {reason}. The row: {dict(row)!r:.300}"
            + MISSING
        ) from error


MISSING = " Fill what is missing, or take such rows out: task.prepare=deltaexp.lab.tasks.preparing:nonempty."


def check(split: str, rows: Dataset, specs: Mapping[str, Spec], task: TaskConfig) -> None:
    """Check that no value is missing, and that what is to be a text is one.

    Args:
        split: The split's name, for an error.
        rows: Rows from `view`.
        specs: What their columns were made of.
        task: The task.

    Raises:
        TaskError: If a value is missing or a text is something else.
    """
    for name in ("text", "text_pair"):
        feature = rows.features.get(name)
        if feature is not None and getattr(feature, "dtype", None) not in ("string", "large_string"):
            held = getattr(feature, "dtype", None) or type(feature).__name__
            raise TaskError(
                f"The column {specs[name]!r} of task {task.name!r} holds {held}, and a text is wanted. Name another column, or "
                f"make a text of it by a template in task.inputs: '{{{specs[name]}}}'."
            )
    missing: dict[str, list[int]] = {name: [] for name in rows.column_names}
    start = 0
    for table in rows.with_format("arrow").iter(batch_size=1000):
        for name in rows.column_names:
            if table[name].null_count:
                missing[name] += [start + n for n, null in enumerate(table[name].is_null().to_pylist()) if null]
        start += table.num_rows
    for name, numbers in missing.items():
        if numbers:
            raise TaskError(
                f"The column {specs[name]!r} of task {task.name!r} has no value in {len(numbers)} of the {len(rows)} rows of "
                f"the split {split!r}; the first is row {numbers[0]}.{MISSING}"
            )


def _missing(column: str, rows: Dataset, task: TaskConfig) -> str:
    header = ""
    if Path(task.data).suffix in (".csv", ".tsv") and not task.columns:
        header = " If the file has no line with their names, give them in task.columns."
    return (
        f"The data of task {task.name!r} have no column {column!r}.{did_you_mean(column, rows.column_names)} "
        f"Their columns: {listing(rows.column_names)}. Set task.inputs, task.target and the like.{header}"
    )


def function(name: str, key: str) -> Callable[..., Any]:
    """Return the function that ``package.module:function`` or ``FILE.py:function`` names.

    Args:
        name: The name.
        key: The key of the config, for an error.

    Raises:
        ConfigError: If there is no such module, file or function.
    """
    place, _, attribute = name.rpartition(":")
    try:
        if place.endswith(".py"):
            path = Path(place).expanduser()
            spec = importlib.util.spec_from_file_location(path.stem, path)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
    except Exception as error:  # whatever code at the top of a module raises
        raise ConfigError(f"{key} names {place!r}, which cannot be imported: {type(error).__name__}: {error}.") from error
    found = getattr(module, attribute, None)
    if not callable(found):
        names = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
        raise ConfigError(f"{key} names {attribute!r}, and {place!r} has no such function.{did_you_mean(attribute, names)}")
    return found


def where(error: BaseException, function: Callable[..., Any]) -> str:
    """Return the line of a user's function, or of its file, at which an error arose."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename == getattr(getattr(function, "__code__", None), "co_filename", None)]
    last = (own or list(frames))[-1]
    return f"{last.filename}, line {last.lineno}"
