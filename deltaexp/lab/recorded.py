"""What a run recorded of itself beside its delta, from which `eval` and `predict` know backbone, task and labels.

A delta's folder has ``results.json``, whose config names folders of the machine it was made on by their last part only. In a
run's own folder lies ``run.json``, which names them whole. Nothing in this module imports torch.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deltaexp.errors import ConfigError, RunError
from deltaexp.lab import config as lab_config
from deltaexp.lab import public, schema
from deltaexp.lab.config import RunConfig
from deltaexp.lab.recovery import Record

RESULTS = "results.json"
SECTIONS = ("backbone", "task", "trainer")
"""What of a run's config matters to a delta that is trained."""


@dataclass
class Recorded:
    """A saved delta, and what is known of how to use it."""

    place: str
    """The folder or repository that was named."""
    folder: Path
    """The folder it lies in."""
    config: RunConfig
    """What the run recorded, with what was typed in its place."""
    labels: list[str] = field(default_factory=list)
    """The classes that it was trained on; none where the task has no classes, or nothing is recorded."""
    results: dict[str, Any] | None = None
    """All that the run recorded; None for a delta that no run of deltaexp saved."""


def check(overrides: Sequence[str], command: str) -> None:
    """Check overrides before anything is fetched.

    Raises:
        ConfigError: If one is no key of a run, or none that matters to the command.
    """
    parsed = schema.parse(overrides)
    schema.check_keys(parsed)
    for override in parsed:
        if override.key_or_group.split(".")[0] not in SECTIONS:
            raise ConfigError(
                f"{command} takes keys of backbone, task and trainer, and {override.input_line!r} is none: the delta is what "
                "it was trained to be."
            )


def read(place: str, folder: Path, overrides: Sequence[str], command: str, data: bool = True) -> Recorded:
    """Read what is recorded of a delta, with overrides in the place of what is recorded.

    Args:
        place: The folder or repository that was named.
        folder: The folder it lies in.
        overrides: Such as ``task.data=FOLDER`` or ``backbone=tiny_t5``; see `check`.
        command: The command's name, for errors.
        data: Whether the task's data are needed.

    Raises:
        ConfigError: If backbone or task are not known, or are a folder of another machine.
    """
    parsed = schema.parse(overrides)
    keys = [override.key_or_group for override in parsed]
    results = _results(folder)
    if results is None:
        missing = [f"{section}=..." for section in ("backbone", "task") if section not in keys]
        if missing:
            raise ConfigError(
                f"Nothing is recorded with the delta {place!r} of the run that made it ({RESULTS} is not there), so name what "
                f"it works with: add {' and '.join(missing)}"
            )
        config, _ = schema.composed(overrides)
        return Recorded(place, folder, config, list(config.task.labels))
    values, whole = _values(folder, results)
    # A chosen group takes the place of a whole section, and keys that are typed of what they name.
    groups = {key for key in keys if key in SECTIONS}
    if groups:
        typed, _ = schema.composed([w for w, key in zip(overrides, keys, strict=True) if key.split(".")[0] in groups])
        values |= {section: dataclasses.asdict(getattr(typed, section)) for section in groups}
    for override in parsed:
        section, _, key = override.key_or_group.partition(".")
        if key:
            values[section][key] = override.value()
    try:
        config = lab_config.from_dict(values)
    except ConfigError as error:
        raise ConfigError(f"What is recorded with the delta {place!r}, with what was typed, is no config: {error}") from error
    _check_folders(place, config, results, whole, keys, command, data)
    labels = results.get("labels")
    return Recorded(place, folder, config, [str(label) for label in labels] if isinstance(labels, list) else [], results)


def _results(folder: Path) -> dict[str, Any] | None:
    path = folder / RESULTS
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{str(path)!r} cannot be read: {error}") from error
    config = values.get("config") if isinstance(values, dict) else None
    if not (isinstance(config, dict) and all(isinstance(config.get(section), dict) for section in SECTIONS)):
        raise ConfigError(f"{str(path)!r} holds no config of a run.")
    return values


def _values(folder: Path, results: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """Return the recorded sections with the keys that this version knows, and whether they name folders whole."""
    recorded, whole = results["config"], False
    try:
        record = Record.read(folder.resolve().parent)
    except RunError:
        record = None
    if record is not None and json.loads(json.dumps(public.publishable(record.config))) == recorded:
        recorded, whole = record.config, True
    values: dict[str, Any] = {key: recorded[key] for key in ("seed", "seeds") if key in recorded}
    for section in SECTIONS:
        known = {f.name for f in dataclasses.fields(type(lab_config.PARTS[section]()))}
        values[section] = {key: value for key, value in recorded[section].items() if key in known}
    # What was computed in, not that the hardware was to choose it.
    values["trainer"]["precision"] = results.get("precision", values["trainer"].get("precision", "auto"))
    return values, whole


def _check_folders(
    place: str, config: RunConfig, results: Mapping[str, Any], whole: bool, keys: Sequence[str], command: str, data: bool
) -> None:
    """Check that no folder of another machine is needed, of which only the last part of the name is recorded.

    Raises:
        ConfigError: If one is.
    """
    typed = {key for key in keys if key in SECTIONS} | set(keys)
    missing = []
    facts = results.get("backbone")
    local = isinstance(facts, dict) and facts.get("local") is True
    if local and not whole and not {"backbone", "backbone.source"} & typed:
        missing.append((f"the backbone {config.backbone.name!r}", config.backbone.source, "backbone.source=FOLDER"))
    name = config.task.data
    stripped = "/" not in name and not public.REMOTE.match(name)
    if data and stripped and not whole and not {"task", "task.data"} & typed:
        copy = f" (a copy of {config.task.dataset})" if config.task.dataset else ""
        missing.append((f"the data of task {config.task.name!r}{copy}", name, "task.data=FOLDER"))
    if missing:
        what = " and ".join(f"{subject} lay in a folder {folder!r}" for subject, folder, _ in missing)
        words = " ".join(word for _, _, word in missing)
        raise ConfigError(
            f"Where the delta {place!r} was trained, {what}; where that folder is on this machine is not recorded. Give it to "
            f"{command}: {words}"
        )
