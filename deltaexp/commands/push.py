"""``push FOLDER ORG/NAME``: push the folder of a delta to the Hugging Face Hub."""

from __future__ import annotations

from deltaexp.commands import parted, switch

USAGE = "push FOLDER ORG/NAME    push a saved delta to the Hugging Face Hub"


def main(words: list[str]) -> int:
    """Push, and print where the commit is."""
    places, options = parted(words, "push", ("private", "revision"), "FOLDER ORG/NAME")
    private = switch(options, "private")
    from deltaexp import hub

    print(f"Pushed and verified: {hub.push(*places, private=private, revision=options.get('revision'))}")
    return 0
