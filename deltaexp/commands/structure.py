"""``structure backbone=...``: the common structure of a backbone."""

from __future__ import annotations

from deltaexp.commands import searched
from deltaexp.lazy import imports

USAGE = "structure backbone=...    show the names that modified_modules may use on a backbone"


def main(words: list[str]) -> int:
    """Print the names; every key of a run may be given."""
    from deltaexp.lab import schema

    run_config, _ = schema.composed(*searched(words))
    with imports():
        from deltaexp.lab.inspecting import show

    show(run_config)
    return 0
