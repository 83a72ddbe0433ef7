"""``report FOLDER...``: which method is best, at what cost, and whether the difference is real.

deltaexp report outputs/multirun/...               tables, and report.html with .json, .csv, .md and .tex beside it
deltaexp report outputs/multirun best=true         of every delta type only what is best on the validation split
deltaexp report FOLDER FOLDER out=outputs/report   the runs of several folders in one report
"""

from __future__ import annotations

from deltaexp.commands import parted, switch
from deltaexp.errors import ConfigError

USAGE = "report FOLDER... [best=true] [out=FOLDER]    the runs below folders compared: tables and one page"


def main(words: list[str]) -> int:
    """Print the tables, and write the report."""
    places = [word for word in words if "=" not in word]
    _, options = parted([word for word in words if "=" in word], "report", ("best", "out"))
    best = bool(switch(options, "best"))
    if not places:
        raise ConfigError("report takes the folders that runs lie below; write: deltaexp report FOLDER... [best=...] [out=...]")
    if len(places) > 1 and "out" not in options:
        raise ConfigError("The report on several folders lies in none of them: add out=FOLDER.")
    from deltaexp.lab import report

    report.write(places, best=best, out=options.get("out"))
    return 0
