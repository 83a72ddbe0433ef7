"""Configs said again: values as words of the command line, runs as files of experiments."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import yaml
from hydra.core.override_parser.types import Quote, QuotedString
from omegaconf import OmegaConf

from deltaexp.lab import schema
from deltaexp.lab.config import RunConfig
from deltaexp.registry import DeltaConfig


def written(value: Any) -> str:
    """Return a value as it is typed on the command line after ``key=``, in quotes where Hydra's grammar wants them."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, Mapping):
        # A key cannot be in quotes; what means something to Hydra is escaped in it.
        keys = {key: re.sub(r"([\\()\[\]{}:=,\s])", r"\\\1", str(key)) for key in value}
        return "{" + ",".join(f"{keys[key]}:{written(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(written, value)) + "]"
    if not isinstance(value, str):
        return str(value)
    plain = re.fullmatch(r"[A-Za-z_][\w./@-]*", value) and value.lower() not in ("null", "true", "false", "nan", "inf")
    return value if plain else QuotedString(value, Quote.single).with_quotes()


def experiment(overrides: Sequence[str], delta_config: DeltaConfig, about: str, search_path: Sequence[str] = ()) -> str:
    """Return the text of an experiment's file: the run of a command with another delta.

    Args:
        overrides: The command's overrides; those of its delta do not count.
        delta_config: The delta.
        about: A line on it.
        search_path: Folders with config groups of the user's.

    Raises:
        ConfigError: If the overrides cannot be composed.
    """
    schema.register_schemas(search_path)
    cfg = schema.compose_root(overrides, search_path, return_hydra_config=True)
    chosen, usual = cfg.hydra.runtime.choices, _usual_choices()
    groups = {group: chosen[group] for group in schema.GROUPS if group not in ("delta_type", "experiment")}
    groups = {"delta_type": delta_config.delta_type, **groups}
    base: Any = OmegaConf.to_container(
        schema.compose_root([f"{group}={choice}" for group, choice in groups.items()], search_path)
    )
    typed: Any = OmegaConf.to_container(cfg)
    run = {f.name: typed[f.name] for f in dataclasses.fields(RunConfig)}
    lines = [f"  - override /{g}: {c}" for g, c in groups.items() if g in ("delta_type", "backbone") or c != usual[g]]
    values = _difference({**delta_config.to_dict(), **run}, base)
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120, default_flow_style=None) if values else ""
    return "\n".join(["# @package _global_", f"# {about}", "defaults:", *lines, "  - _self_", "", text])


@cache
def _usual_choices() -> Mapping[str, Any]:
    """Return what is chosen of every group where nothing is typed."""
    return schema.compose_root((), (), return_hydra_config=True).hydra.runtime.choices


def _difference(values: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of nested values is not so in ``base``."""
    result = {}
    for key, value in values.items():
        other = base.get(key)
        if isinstance(value, Mapping) and isinstance(other, Mapping):
            inner = _difference(value, other)
            if inner:
                result[key] = inner
        elif value != other:
            result[key] = value
    return result
