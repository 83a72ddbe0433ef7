"""The files of a PEFT adapter: ``adapter_config.json`` and ``adapter_model.safetensors``, read with suspicion."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from deltaexp.checkpoint import WEIGHTS as OWN_WEIGHTS
from deltaexp.checkpoint import check_not_empty, read_tensors
from deltaexp.errors import (
    CheckpointError,
    DamagedFileError,
    MissingFileError,
    TensorDtypeError,
    UnsafeFileError,
    listing,
)
from deltaexp.manifest import read_json
from deltaexp.registry import SavedWith

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
"""What PEFT puts before the name of a module of the backbone."""
NESTED = re.compile(r"\)\s*(?:[*+]|\{\d)")
"""What a regular expression has that may take for ever: a repeated group."""


@dataclass
class Adapter:
    """What a folder of PEFT's holds, without its meaning."""

    folder: Path
    values: dict[str, Any]
    """``adapter_config.json``."""
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def method(self) -> str:
        """PEFT's name of the method, such as LORA."""
        return str(self.values["peft_type"]).upper()

    def whole(self, key: str, default: int | None = None, least: int = 1) -> int:
        """Return a whole number of the config."""
        value = self.values.get(key, default)
        if value is None:
            value = default
        if type(value) is not int or value < least:
            raise self.wrong(key, f"a whole number of at least {least}")
        return value

    def number(self, key: str, default: float) -> float:
        """Return a number of the config."""
        value = self.values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise self.wrong(key, "a number")
        return value

    def names(self, key: str) -> list[str] | None:
        """Return a list of texts of the config, of which a single text is one; None where there is none."""
        value = self.values.get(key)
        if value is None or isinstance(value, str):
            return None if value is None else [value]
        if not isinstance(value, list) or not all(isinstance(entry, str) and entry for entry in value):
            raise self.wrong(key, "a list of texts")
        return value

    def pattern(self, key: str) -> dict[str, float]:
        """Return a mapping of regular expressions to positive numbers, such as ``rank_pattern``."""
        value = self.values.get(key) or {}
        fits = isinstance(value, Mapping) and all(
            isinstance(number, (int, float)) and not isinstance(number, bool) and 0 < number < math.inf
            for number in value.values()
        )
        if not fits:
            raise self.wrong(key, "a mapping of patterns to positive numbers")
        for expression in value:
            self.expression(expression, key)
        return dict(value)

    def expression(self, text: str, key: str) -> re.Pattern[str]:
        """Compile a regular expression of the config.

        Raises:
            UnsafeFileError: If it could take for ever.
            CheckpointError: If it is none.
        """
        if NESTED.search(text) or len(text) > 10_000:
            raise UnsafeFileError(
                f"The regular expression under {key!r} in {str(self.folder / CONFIG)!r} repeats a group or is very long, and "
                "matching it may take for ever. Name the modules instead."
            )
        try:
            return re.compile(text)
        except re.error as error:
            raise self.wrong(key, f"a regular expression ({error})") from error

    def wrong(self, key: str, needed: str) -> CheckpointError:
        """Return the error for a value of the config that cannot be used."""
        return CheckpointError(
            f"{key!r} in {str(self.folder / CONFIG)!r} is {str(self.values.get(key))[:80]!r}; it must be {needed}. Nothing was "
            "loaded; copy the adapter again."
        )

    def record(self) -> SavedWith:
        """Return what the config tells about where the adapter comes from."""
        name, revision = self.values.get("base_model_name_or_path"), self.values.get("revision")
        version = self.values.get("peft_version")
        return SavedWith(
            backbone_checkpoint_name=public_name(name) if isinstance(name, str) else None,
            backbone_revision=revision if isinstance(revision, str) else None,
            origin=f"PEFT {version}" if isinstance(version, str) else "PEFT",
        )


def public_name(name: str | None) -> str | None:
    """Return a backbone's name without the folders that somebody has it in; None for an empty one."""
    if not name:
        return None
    local = Path(name).is_dir() or name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1] or None if local else name


def recognised(folder: str | Path) -> bool:
    """Say whether a folder holds an adapter of PEFT's and no delta of deltaexp."""
    folder = Path(folder)
    return (folder / CONFIG).exists() and not (folder / OWN_WEIGHTS).exists()


def read_values(folder: str | Path) -> Adapter:
    """Read the config alone.

    Raises:
        CheckpointError: If it is no adapter's config.
    """
    path = Path(folder) / CONFIG
    values = read_json(path)
    if not isinstance(values, dict) or not isinstance(values.get("peft_type"), str):
        raise DamagedFileError(f"{str(path)!r} names no peft_type, so it is no config that PEFT wrote. Copy the adapter again.")
    return Adapter(Path(folder), values)


def read_adapter(folder: str | Path) -> Adapter:
    """Read config and tensors.

    Raises:
        CheckpointError: If a file is missing or damaged, or a tensor is empty or holds no floating-point numbers.
    """
    adapter = read_values(folder)
    safe, pickled = adapter.folder / WEIGHTS, adapter.folder / PICKLED
    if safe.exists():
        adapter.tensors = read_tensors(safe)
    elif pickled.exists():
        adapter.tensors = _unpickled(pickled)
    else:
        raise MissingFileError(f"{str(folder)!r} holds {CONFIG} and no {WEIGHTS}. Copy the adapter again.")
    if not adapter.tensors:
        raise DamagedFileError(f"{str(folder)!r} holds no tensor at all. Copy the adapter again.")
    check_not_empty(adapter.tensors, repr(str(folder)))
    return adapter


def check_floating(adapter: Adapter, names: Iterable[str]) -> None:
    """Raise a `TensorDtypeError` if one of these tensors holds no floating-point numbers."""
    wrong = [name for name in names if not adapter.tensors[name].is_floating_point()]
    if wrong:
        raise TensorDtypeError(
            f"{len(wrong)} tensors in {str(adapter.folder)!r} hold no floating-point numbers ({listing(wrong, 3)}): "
            f"{adapter.tensors[wrong[0]].dtype}. Nothing was loaded."
        )


def _unpickled(path: Path) -> dict[str, torch.Tensor]:
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or hostile file leads it into
        raise UnsafeFileError(
            f"{str(path)!r} cannot be read as named tensors ({type(error).__name__}), and nothing else in a pickle is ever "
            f"loaded. Load it with PEFT where you trust it, and save it there as {WEIGHTS}."
        ) from error
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in tensors.items()
    ):
        raise UnsafeFileError(f"{str(path)!r} holds something else than named tensors. Copy the adapter again.")
    return tensors
