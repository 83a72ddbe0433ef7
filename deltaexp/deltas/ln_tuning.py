"""LN-tuning: the normalisations' own parameters (Zhao et al., 2024, https://arxiv.org/abs/2312.11420)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from deltaexp.errors import AddressingError
from deltaexp.registry import DeltaConfig, register

if TYPE_CHECKING:
    from torch import nn

    from deltaexp.targets import Site


@register
@dataclass
class LnTuningConfig(DeltaConfig):
    """LN-tuning trains weight and bias of the chosen normalisations in place, with no parameters of its own."""

    delta_type: str = "ln_tuning"

    default_modules: ClassVar[tuple[str, ...]] = ("layer_norm",)
    learning_rate: ClassVar[float] = 1e-3
    """Zhao et al., 2024, search between 1e-7 and 2e-3, for multimodal models of 7 and 13 billion parameters. This is from
    the upper end, as for `bitfit`, which trains as few parameters of the same kind."""

    def expand(self, name: str, module: nn.Module) -> list[str]:
        """Return the names of the normalisations in a module that is none itself."""
        from deltaexp.structure import backbone_modules

        inside = [f"{name}.{below}" for below, found in backbone_modules(module) if below and is_norm(found)]
        return [name] if is_norm(module) or not inside else inside

    def owned(self, site: Site) -> list[str]:
        """Return the names of the normalisation's parameters.

        Raises:
            AddressingError: If the module is no normalisation.
        """
        if not is_norm(site.module) and site.role != "layer_norm":
            raise AddressingError(
                f"The delta type 'ln_tuning' trains normalisations, and {site.name!r} is a {type(site.module).__name__}. "
                "Name norms or what contains them in modified_modules, or train other parameters with the delta type 'full'."
            )
        return [name for name, _ in site.module.named_parameters(recurse=False)]


def is_norm(module: nn.Module) -> bool:
    """Say whether a module's class calls itself a normalisation."""
    return "norm" in type(module).__name__.lower() and next(module.parameters(recurse=False), None) is not None
