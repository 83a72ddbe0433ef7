"""What a backbone is made of, in the names of the common structure, without loading its weights."""

from __future__ import annotations

import re

from rich.console import Console
from rich.table import Table

from deltaexp.lab import blueprint
from deltaexp.lab.config import RunConfig
from deltaexp.structure import Rows, blocks, common_structure, linear_dims


def show(config: RunConfig, console: Console | None = None) -> None:
    """Print the common structure of a run's backbone: for every name the modules that it means, and their shapes.

    Args:
        config: The run's config; of it, the backbone and the task's kind matter.
        console: Where to print; standard output where none is given.

    Raises:
        DeltaExpError: If the backbone's config cannot be read.
    """
    console = console or Console(highlight=False)
    if not console.is_terminal:
        console = Console(file=console.file, highlight=False, width=160)  # a file is as wide as the table needs
    backbone = blueprint.make(config.backbone, config.task).model
    modules = dict(backbone.named_modules())
    rows: dict[tuple[str, str, str], list[str]] = {}
    for name, roles in common_structure(backbone).items():
        for role in roles:
            dims = linear_dims(modules[name])
            shape = f"{dims[0]} -> {dims[1]}" if dims else type(modules[name]).__name__
            key = (role.name, re.sub(r"(?<=\.)\d+(?=\.)", "*", name), shape + span(role.rows))
            rows.setdefault(key, []).append(name)
    table = Table("common name", title=type(backbone).__name__)
    table.add_column("modules", overflow="fold")
    table.add_column("how many", justify="right")
    table.add_column("in -> out, or class")
    for (common, pattern, shape), names in sorted(rows.items()):
        table.add_row(common, names[0] if len(names) == 1 else pattern, str(len(names)), shape)
    console.print(table)
    for stack in blocks(backbone):
        console.print(f"layers=0-{len(stack) - 1}: {stack[0]} to {stack[-1]}", markup=False)
    total = sum(parameter.numel() for parameter in backbone.parameters())
    console.print(
        f"{total:,} parameters; modified_modules takes names of the first column, and the ends of those of the second"
    )


def span(rows: Rows | None) -> str:
    """Say which part of a fused projection's output is meant."""
    if rows is None:
        return ""
    of_each = f" of each {rows.size}" if rows.groups > 1 else ""
    return f", elements {rows.start} to {rows.start + rows.width - 1}{of_each}"
