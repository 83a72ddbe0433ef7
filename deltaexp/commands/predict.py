"""``predict delta=DIR_OR_REPO input=FILE``: answer rows with a saved delta, a line of JSON for each.

Rows are read, answered and written in batches, in their order: each line is the row with ``prediction``. The columns are those
that the task's inputs name; a target is not needed. Backbone, task and labels are those that the run recorded, and any of
their keys may be given in their place.

    input=FILE               csv, tsv, json, jsonl, parquet or txt (a text a line); - for JSON lines from standard input
    out=FILE                 where to, instead of standard output; called FILE.partial until all is done
    resume=true              go on with FILE.partial
    batch_size=N             rows in a batch
    scores=true              the probability of each class, too
    merged=true              fold the delta into the weights first, where its type can
    revision=REVISION        the revision of a repository; the backbone's own is backbone.revision=...

    deltaexp predict delta=outputs/.../delta input=more.csv out=answers.jsonl
    tail -f log.jsonl | deltaexp predict delta=DeltaHub/name input=- scores=true
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from deltaexp.commands import switch
from deltaexp.commands.eval import own_words, places
from deltaexp.errors import ConfigError
from deltaexp.lazy import imports

USAGE = "predict delta=DIR_OR_REPO input=FILE [out=FILE] [key=value ...]    answer rows, a line of JSON for each"
SWITCHES = ("scores", "merged", "resume")
OWN = ("delta", "input", "out", "batch_size", "revision", *SWITCHES)


def main(words: list[str]) -> int:
    """Write the answers; progress goes to standard error."""
    overrides, options = own_words(words, "predict", OWN)
    switches = {key: bool(switch(options, key)) for key in SWITCHES}
    deltas = places(options.get("delta", ""), "predict")
    if len(deltas) > 1:
        raise ConfigError("predict answers with one delta at a time, and several are named.")
    if "input" not in options:
        raise ConfigError("predict needs rows: add input=FILE, or input=- for JSON lines from standard input.")
    from deltaexp.lab import reading, recorded

    reading.check(options["input"])
    if "batch_size" in options:
        if not options["batch_size"].isdigit() or int(options["batch_size"]) < 1:
            raise ConfigError(f"batch_size is {options['batch_size']!r}; it must be a whole number from 1.")
        overrides = [*overrides, f"trainer.eval_batch_size={options['batch_size']}"]
    recorded.check(overrides, "predict")
    out = Path(options["out"]) if options.get("out", "-") != "-" else None
    if out is None and switches["resume"]:
        raise ConfigError("resume=true goes on with a file, and none is named: add out=FILE.")
    if out is not None and out.is_dir():
        raise ConfigError(f"out={str(out)!r} is a folder; name a file.")
    with imports():
        from deltaexp.lab.predicting import Asked, predict

    asked = Asked(deltas[0], options["input"], overrides, out=out, revision=options.get("revision"), **switches)
    try:
        predict(asked)
    except BrokenPipeError:  # whoever read the answers wants no more of them
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0
