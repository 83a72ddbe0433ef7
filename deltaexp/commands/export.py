"""``export DIR_OR_REPO --to FORMAT``: write a saved delta for PEFT, for OpenDelta, or merged into a plain checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from deltaexp.commands import check_place, parted
from deltaexp.errors import ConfigError
from deltaexp.lazy import imports

if TYPE_CHECKING:
    from deltaexp.lab.config import RunConfig

USAGE = "export DIR_OR_REPO --to peft|opendelta|merged [out=FOLDER] [backbone=...]    write a delta in another library's format"
OWN = ("to", "out", "revision")


def main(words: list[str]) -> int:
    """Write the export, and print what was written."""
    overrides, places, options = split(words, "export", OWN)
    from deltaexp.interop import FORMATS, check_format
    from deltaexp.interop.writing import check_new

    if "to" not in options:
        raise ConfigError(f"export needs a format: --to {'|'.join(FORMATS)}")
    check_format(options["to"])
    check_place(places[0])
    out = options.get("out") or f"{Path(places[0]).name}-{options['to']}"
    if "out" not in options and Path(places[0]).is_dir():
        out = str(Path(places[0]).resolve().parent / out)
    check_new(out)
    config = backbone_of(overrides, "export") or _of_the_run(Path(places[0]))
    if config is None:
        raise ConfigError("export computes with the backbone, and none is named: add backbone=..., as in the run.")
    with imports():
        from deltaexp.lab.converting import export

    return export(places[0], out, options["to"], config, revision=options.get("revision"))


def split(words: list[str], command: str, own: tuple[str, ...]) -> tuple[list[str], list[str], dict[str, str]]:
    """Part what was typed into overrides of a run's config, places, and the command's own options.

    Options may be written ``--to peft`` and ``--to=peft`` as well as ``to=peft``.
    """
    plain: list[str] = []
    for word in words:
        if plain and plain[-1].startswith("--") and "=" not in plain[-1]:
            plain[-1] += f"={word}"
        else:
            plain.append(word)
    plain = [word.removeprefix("--") for word in plain]
    overrides = [word for word in plain if "=" in word and word.split("=", 1)[0] not in own]
    places, options = parted([word for word in plain if word not in overrides], command, own, "DIR_OR_REPO")
    return overrides, places, options


def backbone_of(overrides: list[str], command: str) -> RunConfig | None:
    """Return the run's config that overrides make; None where there are none.

    Raises:
        ConfigError: If they name no backbone.
    """
    if not overrides:
        return None
    if not any(word.split("=", 1)[0].split(".")[0] == "backbone" for word in overrides):
        raise ConfigError(f"{command} takes the keys of a backbone, and {overrides[0]!r} is none: add backbone=...")
    from deltaexp.lab import schema

    return schema.composed(overrides)[0]


def _of_the_run(folder: Path) -> RunConfig | None:
    """Return a config with the backbone of the run that saved a delta; None where that is not recorded, or was a folder."""
    try:
        values = json.loads((folder / "results.json").read_text(encoding="utf-8"))["config"]["backbone"]
        from deltaexp.lab import schema

        config = schema.composed([])[0]
        for key in ("name", "source", "revision", "dtype"):
            if values.get(key) is None or isinstance(values[key], str):
                setattr(config.backbone, key, values.get(key))
        source = str(config.backbone.source)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return config if source.startswith(("embedded:", "package:")) or source.count("/") == 1 else None
