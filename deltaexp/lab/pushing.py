"""Pushing the delta of a run, or any other, with a card that names the repository."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from deltaexp import publishing
from deltaexp.lab import modelcard, public

OPTIONS = ("private", "revision", "tag", "create_pr", "parent_commit", "message")
"""The keys of ``hub`` that `deltaexp.publishing.push` takes."""


def push(folder: Path, repo_id: str, hub: Mapping[str, Any], say: Callable[[str], None]) -> publishing.Pushed:
    """Make the card of a run's delta anew, with the name of the repository, and push the delta (see `deltaexp.publishing`).

    Args:
        folder: The folder of the delta.
        repo_id: The repository.
        hub: The keys of ``hub``.
        say: Takes the sentences that say what is waited for.
    """
    modelcard.refresh(folder, {**hub, "repo_id": repo_id})
    given = {key: hub[key] for key in OPTIONS if hub.get(key) is not None}
    return publishing.push(folder, repo_id, **given, say=say)


def named(run: Mapping[str, Any], hub: Mapping[str, Any]) -> str:
    """Return the name of the repository that a run's config asks for, which must ask for one."""
    return public.repository(hub["repo_id"], run["delta_type"], run["backbone"]["name"], run["task"]["name"], run["seed"])
