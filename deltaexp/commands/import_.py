"""``import DIR_OR_REPO out=FOLDER backbone=...``: save a delta of PEFT or OpenDelta as one of deltaexp, with digests."""

from __future__ import annotations

from deltaexp.commands import check_place
from deltaexp.commands.export import backbone_of, split
from deltaexp.errors import ConfigError
from deltaexp.lazy import imports

USAGE = "import DIR_OR_REPO out=FOLDER backbone=...    save a delta of PEFT or OpenDelta as one of deltaexp, with digests"
OWN = ("out", "revision")


def main(words: list[str]) -> int:
    """Save the delta, and print what is known of it."""
    overrides, places, options = split(words, "import", OWN)
    from deltaexp.interop.writing import check_new

    if not options.get("out"):
        raise ConfigError("import writes a new folder, and none is named: add out=FOLDER.")
    check_place(places[0])
    check_new(options["out"])
    config = backbone_of(overrides, "import")
    if config is None:
        raise ConfigError("import puts the delta on its backbone to record what that is, and none is named: add backbone=...")
    with imports():
        from deltaexp.lab.converting import import_

    return import_(places[0], options["out"], config, revision=options.get("revision"))
