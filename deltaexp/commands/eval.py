"""``eval delta=DIR_OR_REPO``: measure saved deltas on any split; several on one backbone, which is loaded once.

Backbone, task, labels and precision are those that the run recorded, and any of their keys may be given in their place.

    delta=A,B,C              folders, repositories, or patterns such as 'outputs/**/delta'
    split=NAME               train, validation or test of the task, or a split's own name in the data
    baseline=true            the backbone without a delta, too
    merged=true              fold each delta into the weights first, where its type can
    json=FILE                the metrics for programs
    out=FOLDER               metrics.json; with predictions=true also predictions/NAME.jsonl, a line for each row
    revision=REVISION        the revision of repositories; the backbone's own is backbone.revision=...

    deltaexp eval delta=outputs/.../delta split=validation
    deltaexp eval delta='outputs/multirun/**/delta' baseline=true out=measured predictions=true
    deltaexp eval delta=DeltaHub/name task.data=FOLDER trainer.eval_batch_size=32
"""

from __future__ import annotations

import glob
from pathlib import Path

from deltaexp.commands import check_place, parted, switch
from deltaexp.errors import ConfigError, listing
from deltaexp.lazy import imports

USAGE = "eval delta=DIR_OR_REPO[,...] [key=value ...]    measure saved deltas on any split"
SWITCHES = ("baseline", "merged", "predictions")
OWN = ("delta", "split", "json", "out", "revision", *SWITCHES)


def main(words: list[str]) -> int:
    """Print a table of deltas and metrics, and write what is asked for."""
    overrides, options = own_words(words, "eval", OWN)
    switches = {key: bool(switch(options, key)) for key in SWITCHES}
    if switches["predictions"] and "out" not in options:
        raise ConfigError("predictions=true needs a folder to write them to: add out=FOLDER.")
    deltas = places(options.get("delta", ""), "eval")
    from deltaexp.lab import recorded

    recorded.check(overrides, "eval")
    with imports():
        from deltaexp.lab.evaluating import Asked, evaluate

    evaluate(
        Asked(
            deltas, overrides, split=options.get("split"), revision=options.get("revision"),
            out=Path(options["out"]) if "out" in options else None, json=Path(options["json"]) if "json" in options else None,
            **switches,
        )
    )  # fmt: skip
    return 0


def own_words(words: list[str], command: str, own: tuple[str, ...]) -> tuple[list[str], dict[str, str]]:
    """Part what was typed into overrides of a run's config and the command's own options; a bare word is a delta.

    Raises:
        ConfigError: If an option has no value.
    """
    plain = [word if "=" in word else f"delta={word}" for word in words]
    mine = [word for word in plain if word.split("=", 1)[0] in own]
    bare = [word.split("=", 1)[1] for word in mine if word.startswith("delta=")]
    _, options = parted([word for word in mine if not word.startswith("delta=")], command, own)
    if bare:
        options["delta"] = ",".join(bare)
    for key, value in options.items():
        if not value:
            raise ConfigError(f"{key}= has no value.")
    return [word for word in plain if word not in mine], options


def places(text: str, command: str) -> list[str]:
    """Return the folders and repositories that ``delta=`` names, patterns taken as the folders that they match.

    Raises:
        ConfigError: If there is none, or one is there twice.
    """
    found: list[str] = []
    for part in filter(None, (part.strip() for part in text.strip("[]").split(","))):
        if any(mark in part for mark in "*?["):
            matched = [path for path in sorted(glob.glob(part, recursive=True)) if (Path(path) / "config.json").is_file()]
            if not matched:
                raise ConfigError(f"The pattern {part!r} matches no folder of a delta.")
            found += matched
        else:
            check_place(part)
            found.append(part)
    if not found:
        raise ConfigError(f"{command} needs a delta: deltaexp {command} delta=FOLDER, or the name of a repository.")
    twice = [place for place in dict.fromkeys(found) if found.count(place) > 1]
    if twice:
        raise ConfigError(f"delta= names {listing(twice)} twice.")
    return found
