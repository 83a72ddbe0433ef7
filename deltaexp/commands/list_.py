"""``list``: find deltas on the Hugging Face Hub, the newest first.

base=NAME        the backbone, with its organisation or without
task=NAME        the task
delta_type=NAME  the type of delta
author=NAME      a user or an organisation
limit=20         how many at most
--json           for programs

deltaexp list --base t5-base --task sst2 --delta-type lora
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from deltaexp.commands import parted
from deltaexp.errors import ConfigError

if TYPE_CHECKING:
    from deltaexp.searching import Found

USAGE = "list [key=value ...] [--json]    find deltas on the Hub by base, task, delta_type and author [limit=20]"
OPTIONS = ("base", "task", "delta_type", "author", "limit")


def main(words: list[str]) -> int:
    """Print the deltas that fit, as a table or as JSON; ``--base t5-base`` is the same as ``base=t5-base``."""
    plain, as_json = _spelled(words)
    _, options = parted(plain, "list", OPTIONS)
    try:
        limit = int(options.pop("limit", "20"))
    except ValueError:
        raise ConfigError("limit must be a whole number, e.g. limit=20.") from None
    from deltaexp.searching import search

    found = search(**{key: options.get(key) for key in ("base", "task", "delta_type", "author")}, limit=limit)
    if as_json:
        print(json.dumps([one.to_dict() for one in found], indent=2))
        return 0
    from rich.console import Console
    from rich.table import Table

    if not found:
        print("No delta on the Hub fits.")
        return 0
    table = Table(title=f"{len(found)} deltas on the Hub, the newest first")
    for name in ("repository", "delta type", "base", "task", "metric", "updated"):
        table.add_column(name, overflow="fold")
    for one in found:
        table.add_row(*(_plain(text) for text in _texts(one)))
    console = Console()
    (console if console.is_terminal else Console(width=160)).print(table)
    print(f'load one: AutoDeltaModel.from_finetuned("{found[0].repo}", backbone_model=...)')
    return 0


def _texts(one: Found) -> list[str]:
    score = f"{one.metric} {one.value:.4f}" if one.value is not None else ""
    repo = one.repo + (" (private)" if one.private else "")
    return [repo, *(text or "" for text in (one.delta_type, one.base, one.task)), score, one.updated or ""]


def _plain(text: str) -> str:
    """Return a text of somebody else's without what a terminal or `rich` would take for a command."""
    from rich.markup import escape

    return escape("".join(character for character in text if character.isprintable()))


def _spelled(words: list[str]) -> tuple[list[str], bool]:
    """Return the words with ``--base t5-base`` as ``base=t5-base``, and whether JSON is asked for."""
    result, rest, as_json = [], list(words), False
    while rest:
        word = rest.pop(0)
        if word == "--json":
            as_json = True
            continue
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            if not equals:
                if not rest:
                    raise ConfigError(f"{word} needs a value, e.g. {word} NAME.")
                value = rest.pop(0)
            word = f"{name.replace('-', '_')}={value}"
        result.append(word)
    return result, as_json
