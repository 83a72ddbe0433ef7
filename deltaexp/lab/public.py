"""The name of a repository from a template, and what of a config may be shown to others."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

from deltaexp.errors import ConfigError, unknown

PLACEHOLDERS = ("delta_type", "backbone", "task", "seed")
"""What may stand in braces in ``hub.repo_id``."""
REMOTE = re.compile(r"(embedded|package|generated):")
"""How a source begins that is no folder."""


def repository(template: str, delta_type: str, backbone: str, task: str, seed: int) -> str:
    """Return the name of a repository: the template with its placeholders filled in, by characters that the Hub takes.

    Raises:
        ConfigError: If the template has another placeholder, or braces that do not match.
    """
    values = {"delta_type": delta_type, "backbone": backbone, "task": task, "seed": str(seed)}
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(f"hub.repo_id is {template!r}, of which the braces do not match: {error}.") from error
    name = ""
    for text, field, form, conversion in parts:
        name += text
        if field is not None:
            if field not in values or form or conversion:
                raise ConfigError(unknown("placeholder of hub.repo_id", field or "{}", PLACEHOLDERS))
            name += _plain(values[field])
    organisation, slash, rest = name.partition("/")
    # What is filled in may bring two marks together, or put one at an end.
    return organisation + slash + re.sub(r"-{2,}", "-", re.sub(r"\.{2,}", ".", rest)).strip("-.") if len(parts) > 1 else name


def _plain(text: str) -> str:
    """Return a text with each character that a repository's name may not have made into a hyphen."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", text).strip("-.")


def publishable(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config in which a folder of this machine is only named by its last part."""
    return {key: _shown(value, key) for key, value in values.items()}


def _shown(value: Any, key: str) -> Any:
    if isinstance(value, Mapping):
        return publishable(value)
    if isinstance(value, (list, tuple)):
        return [_shown(one, key) for one in value]
    if not (isinstance(value, str) and is_local(value)):
        return value
    name = PureWindowsPath(value).name  # which takes both kinds of slashes
    return name if name.strip(".~") else "local"


def is_local(text: str) -> bool:
    """Say whether a text names a file or folder of this machine, there or not."""
    if REMOTE.match(text) or "://" in text or "\n" in text:
        return False
    if re.match(r"(/|~|\.{1,2}(/|$)|[A-Za-z]:[\\/]|\\\\)", text):
        return True
    try:
        return "/" in text and Path(text).exists()
    except (OSError, ValueError):
        return False
