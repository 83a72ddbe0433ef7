"""``compare FOLDER``: the runs below a folder side by side.

deltaexp compare outputs/multirun             every finished run below the folder
deltaexp compare outputs/multirun best=true   of every delta type the run that is best on the validation split
"""

from __future__ import annotations

from deltaexp.commands import parted, switch

USAGE = "compare FOLDER [best=true]    the runs below a folder side by side, or the best of each delta type"


def main(words: list[str]) -> int:
    """Print the table, and write it beside the runs."""
    places, options = parted(words, "compare", ("best",), "FOLDER")
    best = bool(switch(options, "best"))
    from deltaexp.lab import comparison

    print(f"written to {comparison.show(places[0], best)}")
    return 0
