"""``report.html``: one page that needs neither network nor server."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from deltaexp.lab.report import pscp, tables
from deltaexp.lab.report.boards import MANY
from deltaexp.lab.report.document import number, p_value, sentences, whole
from deltaexp.lab.report.resampling import ANEW, RESAMPLES

ASSETS = Path(__file__).parent / "assets"
PLOTLY = "plotly-basic.min.js"
"""plotly.js, the bundle with points, lines and bars only; see ``plotly-LICENSE.txt``."""


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("deltaexp.lab.report", "assets"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "whole": whole, "p_value": p_value}
    environment.globals |= {"cells": tables.cells, "caption": tables.caption, "sentences": sentences, "shade": shade}
    return environment


def build(report: Mapping[str, Any], folder: Path) -> str:
    """Return the page.

    Args:
        report: What `document.build` returned.
        folder: Where the page will lie; runs are linked from there.
    """
    links = [quote(os.path.relpath(run["path"], folder.resolve()).replace(os.sep, "/")) + "/" for run in report["runs"]]
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            report=report,
            links=links,
            remarks=tables.remarks(report),
            data=embedded(report),
            css=_own("report.css"),
            script=_own("report.js"),
            plotly=_own(PLOTLY),
            pscp=pscp,
            resamples=RESAMPLES,
            anew=ANEW,
            many=MANY,
        )
    )


def _own(name: str) -> Markup:
    """Return a file of deltaexp's own that goes into the page as it is."""
    return Markup((ASSETS / name).read_text(encoding="utf-8"))


def embedded(value: Any) -> Markup:
    """Return JSON that can stand in a ``script`` element: nothing in it ends the element, or begins another or a comment."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def shade(board: Mapping[str, Any], value: float | None) -> float:
    """Return where a mean stands between the worst and the best of its board, from 0 to 1."""
    means = [method["mean"] for method in board["methods"] if method["mean"] is not None]
    if value is None or not means or max(means) == min(means):
        return 0.0
    share = (value - min(means)) / (max(means) - min(means))
    return share if board["greater_is_better"] else 1 - share
