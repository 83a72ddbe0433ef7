"""Deltas of other libraries: OpenDelta's and PEFT's folders read and written, and plain checkpoints of transformers written."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltaexp.errors import ConfigError, unknown

if TYPE_CHECKING:
    from torch import nn

    from deltaexp.checkpoint import SavedDelta
    from deltaexp.model import DeltaModel
    from deltaexp.registry import DeltaConfig

FORMATS = ("peft", "opendelta", "merged")
"""What a delta can be exported to."""


def read(folder: str | Path, backbone: nn.Module) -> SavedDelta:
    """Read a saved delta for a backbone, in whichever format it is: deltaexp's, OpenDelta's or PEFT's.

    Raises:
        CheckpointError: If it is no delta, is damaged, or does not fit the backbone.
    """
    from deltaexp import checkpoint

    other = _format(folder)
    return checkpoint.read(folder) if other is None else other.read(folder, backbone)


def read_config(folder: str | Path) -> DeltaConfig:
    """Read the config of a saved delta in any of these formats; the patterns in it are as they were written.

    Raises:
        CheckpointError: If there is none, or it is no delta's config.
    """
    from deltaexp import checkpoint

    other = _format(folder)
    return checkpoint.read_config(Path(folder)) if other is None else other.read_config(folder)


def _format(folder: str | Path) -> Any:
    """Return the module that reads a folder of another library; None for one of deltaexp's, or of nobody's."""
    others = (_module("opendelta"), _module("peft_import"))
    return next((other for other in others if other.recognised(folder)), None)


def _module(name: str) -> Any:
    """Return a module of this package; they are imported when they are needed, as most need torch."""
    return importlib.import_module(f"{__name__}.{name}")


def export(delta_model: DeltaModel, folder: str | Path, to: str = "peft", *, tokenizer: object = None) -> str:
    """Write an attached delta into a new folder, in another library's format.

    Args:
        delta_model: The delta, attached to its backbone.
        folder: Where to; it must not exist, and afterwards holds all of the export or is not there.
        to: ``"peft"``, ``"opendelta"``, or ``"merged"`` for a plain checkpoint of transformers with the delta in its weights.
        tokenizer: Saved beside a merged checkpoint, where one is given.

    Returns:
        A sentence on what was written, with the measured error of a merge.

    Raises:
        ConfigError: If there is no such format, or the folder exists.
        CheckpointError: If the format cannot hold this delta, or the disk refuses.
    """
    check_format(to)
    if to == "merged":
        return _module("merged").export(delta_model, folder, tokenizer)
    return _module(f"{to}_export").export(delta_model, folder)


def check_format(to: str) -> None:
    """Raise a `ConfigError` unless ``to`` names a format."""
    if to not in FORMATS:
        raise ConfigError(unknown("format", to, FORMATS))
