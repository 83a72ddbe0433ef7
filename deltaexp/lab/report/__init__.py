"""Sweeps that end in an answer: which delta, at what cost, and is the difference real?

``report.html`` is one page that needs no network; ``report.json`` has all of its numbers, ``report.csv`` a row for each run,
``report.md`` and ``report.tex`` the leaderboards. Read in this order: `runs` finds what there is, `boards` puts it together,
`statistics` and `resampling` compare, `document` is the report as plain values, `tables` and `page` show it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import IO

from rich.console import Console

from deltaexp.lab.writing import write_whole

NAME = "report"


def write(
    folders: str | Path | Sequence[str | Path],
    console: Console | None = None,
    best: bool = False,
    out: str | Path | None = None,
) -> Path:
    """Report on the runs below one or more folders: print the leaderboards, and write the page and its files.

    Args:
        folders: Where runs lie, such as the folder of a sweep.
        console: Where to print; standard output where none is given.
        best: Whether to show of each delta type only the method that is best on the validation split.
        out: The folder to write to; the first of the folders where none is given.

    Returns:
        The page.

    Raises:
        CheckpointError: If a folder does not exist, or there is no run.
    """
    from deltaexp.lab.report import boards, document, page, runs, tables

    places = [folders] if isinstance(folders, (str, Path)) else list(folders)
    target = Path(places[0] if out is None else out) / f"{NAME}.html"
    found = runs.collect(places)
    title = ", ".join(Path(place).resolve().name for place in places)
    report = document.build(found, boards.boards(found.runs, only_best=best), title)
    console = console or Console()
    if not console.is_terminal:
        console = Console(file=console.file, width=160)  # a file is as wide as the table needs
    tables.show(console, report)
    texts = {
        "json": json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
        "csv": tables.runs_csv(report),
        "md": tables.markdown(report),
        "tex": tables.latex(report),
        "html": page.build(report, target.parent),
    }
    for ending, text in texts.items():
        write_whole(target.with_suffix(f".{ending}"), partial(_put, text))
    console.print(
        f"written to {target}, with .json, .csv, .md and .tex beside it", markup=False, highlight=False, soft_wrap=True
    )
    return target


def _put(text: str, file: IO[str]) -> None:
    file.write(text)
