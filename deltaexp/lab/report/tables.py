"""A report as tables: in the terminal, as CSV, Markdown and LaTeX."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from deltaexp.lab.report.document import number, p_value, sentences, whole

HEADS = (
    "method", "seeds", "mean", "sd", "95 % interval", "validation",
    "trainable", "saved KiB", "training s", "memory MiB", "PSCP",
)  # fmt: skip
"""The columns of a leaderboard."""
COLUMNS = (
    "name", "task", "backbone", "method", "delta_type", "seed", "split", "metric", "score", "validation", "before", "trainable",
    "size", "seconds", "memory", "steps", "digest", "base_sha256", "data_fingerprint", "command", "path",
)  # fmt: skip
"""The columns of the table of runs."""
SPECIAL = str.maketrans(
    {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "·": r"$\cdot$", "–": "--"}
    | {character: "\\" + character for character in "&%$#_{}"}
)
"""What LaTeX would take for something else."""


def cells(method: Mapping[str, Any]) -> list[str]:
    """Return a method's row of a leaderboard."""
    interval = "–" if method["low"] is None else f"{number(method['low'])} to {number(method['high'])}"
    memory, pscp = method["memory"], method["pscp"]
    return [
        method["label"],
        str(method["seeds"]),
        number(method["mean"]),
        number(method["sd"]),
        interval,
        number(method["validation"]),
        whole(method["trainable"]),
        f"{method['size'] / 1024:,.1f}",
        f"{method['seconds']:,.1f}",
        "–" if memory is None else whole(memory / 2**20),
        "–" if pscp is None else f"{pscp['value']:.2f}",
    ]


def caption(board: Mapping[str, Any]) -> str:
    """Return what a leaderboard is of."""
    better = "more" if board["greater_is_better"] else "less"
    return f"{board['task']} with {board['backbone']}: {board['metric']} on {board['split']} ({better} is better)"


def show(console: Console, report: Mapping[str, Any]) -> None:
    """Print the leaderboards with what they come to, and the runs that are in none."""
    for board in report["boards"]:
        table = Table(title=caption(board), title_justify="left")
        for name in HEADS:
            left = name == "method"
            table.add_column(name, justify="left" if left else "right", no_wrap=not left, overflow="fold")
        for method in board["methods"]:
            table.add_row(*cells(method), style="dim" if method["baseline"] else None)
        console.print(table, soft_wrap=False)
        console.print("\n".join(sentences(board)) + "\n", markup=False, highlight=False)
    for line in remarks(report):
        console.print(line, style="yellow", markup=False, highlight=False)


def remarks(report: Mapping[str, Any]) -> list[str]:
    """Return a line for each run that no leaderboard counts."""
    lines = [f"{other['name']} is {other['status']}: {other['reason']}" for other in report["others"]]
    for board in report["boards"]:
        names = (report["runs"][number]["name"] for number in board["repeats"])
        lines += [f"{name} repeats a run of the same config and seed, and does not count as a further seed" for name in names]
    return lines


def runs_csv(report: Mapping[str, Any]) -> str:
    """Return a row for every finished run, as CSV; sizes are in bytes."""
    methods = {run: method["label"] for board in report["boards"] for method in board["methods"] for run in method["runs"]}
    file = io.StringIO()
    writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for place, run in enumerate(report["runs"]):
        writer.writerow({**run, "method": methods.get(place, "")})
    return file.getvalue()


def markdown(report: Mapping[str, Any]) -> str:
    """Return leaderboards, comparisons and remarks as Markdown."""
    parts = [f"# {report['title']}"]
    for board in report["boards"]:
        rows = [HEADS, ["---"] + ["---:"] * (len(HEADS) - 1), *map(cells, board["methods"])]
        parts += [f"## {caption(board)}", _pipes(rows), " ".join(sentences(board))]
        if board["pairs"]:
            head = ["first", "second", "difference", "95 % interval", "p (Holm)", "what it says", "by"]
            parts.append(_pipes([head, ["---"] * len(head), *(_pair(pair, board) for pair in board["pairs"])]))
    told = remarks(report)
    if told:
        parts += ["## Runs that are not counted", "\n".join(f"- {line}" for line in told)]
    return "\n\n".join(parts) + "\n"


def _pair(pair: Mapping[str, Any], board: Mapping[str, Any]) -> list[str]:
    first, second = (board["methods"][pair[key]]["label"] for key in ("first", "second"))
    interval = "–" if pair["low"] is None else f"{number(pair['low'])} to {number(pair['high'])}"
    return [first, second, number(pair["difference"]), interval, p_value(pair["p_holm"]), pair["verdict"], pair["basis"]]


def _pipes(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows)


def latex(report: Mapping[str, Any]) -> str:
    """Return the leaderboards as tables of LaTeX, for the package booktabs."""
    parts = [r"% \usepackage{booktabs}"]
    for board in report["boards"]:
        rows = [" & ".join(cell.translate(SPECIAL) for cell in row) + r" \\" for row in map(cells, board["methods"])]
        head = " & ".join(name.translate(SPECIAL) for name in HEADS) + r" \\"
        lines = [r"\begin{table}[ht]", r"\centering", rf"\caption{{{caption(board).translate(SPECIAL)}}}"]
        lines += [rf"\begin{{tabular}}{{l{'r' * (len(HEADS) - 1)}}}", r"\toprule", head, r"\midrule", *rows, r"\bottomrule"]
        parts.append("\n".join([*lines, r"\end{tabular}", r"\end{table}"]))
    return "\n\n".join(parts) + "\n"
