"""The commands beside ``run``: one module each, named as the command is, with its ``USAGE`` and ``main(words) -> exit code``.

A module imports torch and what needs it inside of ``main``, after it has checked what was typed.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType

from deltaexp.errors import ConfigError, unknown


def names() -> list[str]:
    """Return the names of all commands."""
    found = {module.name.rstrip("_") for module in pkgutil.iter_modules(__path__)}
    # In the order in which a user comes to need them; what is new stands at the end.
    order = ["plan", "pick", "report", "eval", "predict", "verify", "push", "list", "export", "import", "structure"]
    return [*(name for name in order if name in found), *sorted(found - set(order))]


def load(name: str) -> ModuleType:
    """Return the module of a command; one that is named after a word of Python's ends in an underscore."""
    return importlib.import_module(f"{__name__}.{name}_" if name in ("import", "list") else f"{__name__}.{name}")


def parted(words: Sequence[str], command: str, known: Iterable[str] = (), places: str = "") -> tuple[list[str], dict[str, str]]:
    """Part what was typed into places and ``key=value`` options.

    Args:
        words: What was typed after the command.
        command: The command's name.
        known: The options it has.
        places: What the words without ``=`` are, e.g. ``FOLDER ORG/NAME``: all of them must be there.

    Raises:
        ConfigError: If an option is unknown, or there are more or fewer places.
    """
    options = dict(word.split("=", 1) for word in words if "=" in word)
    found = [word for word in words if "=" not in word]
    known = list(known)
    for key in options:
        if key not in known:
            raise ConfigError(unknown(f"option of {command}", key, known))
    if len(found) != len(places.split()):
        keys = "".join(f" [{key}=...]" for key in known)
        raise ConfigError(
            f"{command} takes {len(places.split())} words and {len(found)} were given; write: deltaexp {command} {places}{keys}"
        )
    return found, options


def search_path(folder: str | None) -> list[str]:
    """Return the folder that ``--config-dir`` names, with all of its path, in a list; an empty one where there is none.

    Raises:
        ConfigError: If there is no such folder.
    """
    if folder is not None and not Path(folder).is_dir():
        raise ConfigError(f"--config-dir names {folder!r}, and there is no such folder.")
    return [] if folder is None else [str(Path(folder).absolute())]


def searched(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Part ``--config-dir FOLDER``, as Hydra has it, from what was typed; return the other words, and `search_path`.

    Raises:
        ConfigError: If there is no such folder.
    """
    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    options.add_argument("--config-dir", "-cd")
    found, others = options.parse_known_args(words)
    return others, search_path(found.config_dir)


def switch(options: dict[str, str], key: str) -> bool | None:
    """Return an option that is true or false; None where it was not given.

    Raises:
        ConfigError: If it is neither.
    """
    if options.get(key, "true") not in ("true", "false"):
        raise ConfigError(f"{key} is {options[key]!r}; it must be true or false.")
    return options[key] == "true" if key in options else None


def check_place(place: str) -> None:
    """Raise a `ConfigError` unless a word is a folder or looks like the name of a repository."""
    if not Path(place).is_dir() and (place.startswith((".", "/", "~")) or place.count("/") != 1):
        raise ConfigError(f"There is no folder {place!r}, and it is no name of a repository either, such as DeltaHub/name.")
