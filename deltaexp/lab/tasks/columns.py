"""Columns of a data set under the names that the kinds of tasks use, filled from columns or templates."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset

from deltaexp.errors import ConfigError, TaskError, did_you_mean, listing
from deltaexp.lab import taskconfig
from deltaexp.lab.taskconfig import TaskConfig

Spec = str | list[str]
"""A column or a template; a list of them makes a column of lists."""


def view(rows: Dataset, specs: Mapping[str, Spec], task: TaskConfig) -> Dataset:
    """Return rows with only the columns that ``specs`` names, each filled as its column or template says.

    Raises:
        TaskError: If a column is missing, or a row does not hold what a template asks for.
    """
    for spec in specs.values():
        for one in [spec] if isinstance(spec, str) else spec:
            for column in taskconfig.fields_of(one) or [one]:
                if column not in rows.column_names:
                    raise TaskError(
                        f"The data of task {task.name!r} have no column {column!r}.{did_you_mean(column, rows.column_names)} "
                        f"Their columns: {listing(rows.column_names)}. Set task.inputs, task.target and the like."
                    )
    plain = [spec for spec in specs.values() if isinstance(spec, str) and not taskconfig.fields_of(spec)]
    if len(plain) == len(specs) == len(set(plain)):
        kept = rows.select_columns(plain)
        return kept.rename_columns({spec: name for name, spec in specs.items() if spec != name and isinstance(spec, str)})

    def fill(row: dict[str, Any]) -> dict[str, Any]:
        return {name: value_of(row, spec, task) for name, spec in specs.items()}

    # Columns of the result may have names of the source's, of another type: the source's go first.
    source = rows.rename_columns({name: f"source {name}" for name in rows.column_names})
    strip = len("source ")
    return source.map(
        lambda row: fill({name[strip:]: value for name, value in row.items()}),
        remove_columns=source.column_names, keep_in_memory=True, load_from_cache_file=False, desc="columns",
    )  # fmt: skip


def value_of(row: Mapping[str, Any], spec: Spec, task: TaskConfig) -> Any:
    """Return what a column or template is in one row; a column of lists is taken apart only by its user.

    Raises:
        TaskError: If the row does not hold what a template asks for.
    """
    if isinstance(spec, list):
        return [value_of(row, one, task) for one in spec]
    if not taskconfig.fields_of(spec):
        return row[spec]
    try:
        return spec.format_map(row)
    except (LookupError, TypeError) as error:
        raise TaskError(
            f"A row of task {task.name!r} does not fit the template {spec!r}: {error!r}. The row: {dict(row)!r:.300}"
        ) from error


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
    except (ImportError, FileNotFoundError) as error:
        raise ConfigError(f"{key} names {place!r}, which cannot be imported: {error}.") from error
    found = getattr(module, attribute, None)
    if not callable(found):
        names = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
        raise ConfigError(f"{key} names {attribute!r}, and {place!r} has no such function.{did_you_mean(attribute, names)}")
    return found
