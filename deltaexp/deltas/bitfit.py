"""BitFit: biases only (Ben Zaken et al., 2022, https://arxiv.org/abs/2106.10199)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from deltaexp.addressing import covers
from deltaexp.lazy import Layer, nn, torch
from deltaexp.registry import DeltaConfig, register

if TYPE_CHECKING:
    from deltaexp.targets import Site

BIAS = re.compile(r"bias|(in_proj|qkv|q|k|v|gate_proj|up_proj|gate_up_proj|down_proj|out_proj)_bias")
"""Names of a module's parameters that are biases: its own, and those of projections that it holds as tensors."""


@register
@dataclass
class BitfitConfig(DeltaConfig):
    """BitFit trains the biases of the chosen modules and of all modules in them.

    Where a linear map or a normalisation has none, as in T5 and Llama, a new bias is added to its output.
    """

    delta_type: str = "bitfit"
    bitfit_add: bool = True
    """Whether linear maps and normalisations without a bias get one."""

    default_modules: ClassVar[tuple[str, ...]] = ("attn", "ff", "ff.w1", "ff.gate", "ff.w2", "layer_norm")
    attribute: ClassVar[str] = "bitfit"
    learning_rate: ClassVar[float] = 1e-3
    """Ben Zaken et al., 2022, appendix A, choose among 1e-4, 4e-4, 7e-4 and 1e-3 for BERT-base on GLUE, with AdamW. This is
    the largest, as most runs are shorter than the paper's."""

    def expand(self, name: str, module: nn.Module) -> list[str]:
        """Return the names of the modules that have a bias or can have one: the one called ``name``, or those in it."""
        from deltaexp.structure import backbone_modules

        # Of the default modules, the norms among the embeddings are none of a block's (OpenDelta leaves them out as well).
        if self.common_structure and any("embed" in part.lower() for part in name.split(".")[-2:]):
            return []
        inside = {f"{name}.{below}" if below and name else below or name: m for below, m in backbone_modules(module)}
        if len(inside) == 1:
            return [name]
        # A router takes the weight of its linear map by itself (LongCat), or chooses before its output is seen (Phi-MoE).
        routers = tuple(f"{full}." for full, found in inside.items() if type(found).__name__.endswith("Router"))
        return [
            full
            for full, found in inside.items()
            if (own_biases(found) or (takes_bias(found) and not f"{full}.".startswith(routers)))
            and not any(covers(entry, full) for entry in self.exclude_modules)
        ]

    def owned(self, site: Site) -> list[str]:
        """Return the biases that the module has; the bias of a slice of a fused projection is a new one, as of no other."""
        return [] if site.rows else own_biases(site.module)

    def build(self, site: Site) -> BitfitLayer | None:
        """Make a bias for a module that has none; None for one that has, or cannot take one."""
        if not self.bitfit_add or self.owned(site) or not takes_bias(site.module):
            return None
        return BitfitLayer(site.out_dim(self.delta_type))


def own_biases(module: nn.Module) -> list[str]:
    """Return the names of the biases that a module itself holds."""
    return [name for name, _ in module.named_parameters(recurse=False) if BIAS.fullmatch(name)]


def takes_bias(module: nn.Module) -> bool:
    """Say whether a new bias can be added to a module's output: a linear map's, or a normalisation's that has a weight.

    Not a convolution's: where that has no bias, a normalisation follows, which takes away what is the same everywhere.
    """
    from deltaexp.structure import output_dim

    return not isinstance(module, nn.Embedding) and output_dim(module) is not None


class BitfitLayer(Layer):
    """A bias for one module: ``bitfit(h) = h + b``, with ``b`` at zero to start with.

    Args:
        dim: Size of the last dimension of ``h``, shape ``(..., dim)``.
    """

    insertion = "sequential"
    tokenwise = True

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """Add the bias to ``h``, shape ``(..., dim)``."""
        return h + self.bias
