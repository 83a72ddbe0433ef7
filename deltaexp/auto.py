"""The AutoDelta classes: configs and delta models of any registered type, from a dict or from a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from deltaexp import hub, interop
from deltaexp.model import DeltaModel, direct_class
from deltaexp.registry import DeltaConfig


class AutoDeltaConfig:
    """Makes the config of any registered delta type."""

    @staticmethod
    def from_dict(config_dict: Mapping[str, Any], **changes: Any) -> DeltaConfig:
        """Make a config from a flat dict, strictly; ``changes`` win over its values.

        Raises:
            ConfigError: If the delta type or a key is unknown, or a value has the wrong type or range.
        """
        return DeltaConfig.from_dict({**config_dict, **changes})

    @staticmethod
    def from_finetuned(path_or_repo: str | Path, **hub_options: Any) -> DeltaConfig:
        """Read the config of a saved delta from a folder or a repository (see `DeltaModel.from_finetuned`)."""
        folder = hub.fetch(path_or_repo, needs="config", **hub_options)
        return interop.read_config(folder)


class AutoDeltaModel:
    """Makes a delta model of any registered type."""

    @staticmethod
    def from_config(config: DeltaConfig, backbone_model: nn.Module) -> DeltaModel:
        """Attach a new delta to a backbone (see `DeltaModel`)."""
        return direct_class(type(config))(backbone_model, config)

    @staticmethod
    def from_finetuned(
        path_or_repo: str | Path,
        backbone_model: nn.Module,
        check_hash: bool = True,
        check_probe: bool = False,
        **hub_options: Any,
    ) -> DeltaModel:
        """Load a saved delta onto its backbone (see `DeltaModel.from_finetuned`)."""
        return DeltaModel.from_finetuned(path_or_repo, backbone_model, check_hash, check_probe, **hub_options)
