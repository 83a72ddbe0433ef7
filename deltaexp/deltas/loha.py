"""LoHa: an update that is the Hadamard product of two low-rank matrices (Hyeon-Woo et al., 2022).

https://arxiv.org/abs/2108.06098
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from deltaexp.deltas._linear import LinearMap, WeightDelta
from deltaexp.lazy import nn, torch
from deltaexp.registry import DeltaConfig, register

if TYPE_CHECKING:
    from deltaexp.targets import Site


@register
@dataclass
class LohaConfig(DeltaConfig):
    """LoHa adds ``(A1 B1) * (A2 B2) * alpha / r``, an elementwise product, to the weight of each chosen linear module."""

    delta_type: str = "loha"
    loha_r: int = 8
    """Rank r of the two factors; their product has a rank of up to r squared."""
    loha_alpha: int = 8
    """Numerator of the scale alpha / r."""
    loha_dropout: float = 0.0
    """Probability of dropping an element of the update's input while training."""

    default_modules: ClassVar[tuple[str, ...]] = ("attn.q", "attn.v")
    attribute: ClassVar[str] = "loha"
    learning_rate: ClassVar[float] = 1e-3
    """The papers (Hyeon-Woo et al., 2022; Yeh et al., 2024) train convolutions and diffusion models and give no rate for
    language models. This is twice LoRA's: the gradient of each factor is scaled by the small values of the others."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        self.require("loha_r", at_least=1)
        self.require("loha_alpha", above=0)
        self.require("loha_dropout", at_least=0, below=1)

    def build(self, site: Site) -> LohaLayer:
        """Make the layer for a linear module."""
        return LohaLayer(LinearMap.at(site, self.delta_type), self.loha_r, self.loha_alpha / self.loha_r, self.loha_dropout)


class LohaLayer(WeightDelta):
    """The update of one linear map: ``delta(x) = dropout(x) D^T`` with ``D = (A1 B1) * (A2 B2) * alpha / r``.

    ``A1`` and ``A2`` (``hada_w1_a``, ``hada_w2_a``) have shape ``(out_dim, r)``, ``B1`` and ``B2`` (``hada_w1_b``,
    ``hada_w2_b``) shape ``(r, in_dim)``. ``B2`` starts at zero, so the update starts at zero; the others start uniform as in a
    Linear layer.

    Args:
        target: The map.
        rank: The rank r.
        scale: alpha / r.
        dropout: Probability of dropping an element of ``x`` while training.
    """

    def __init__(self, target: LinearMap, rank: int, scale: float, dropout: float) -> None:
        super().__init__(target, dropout)
        self.scale = scale
        self.hada_w1_a = nn.Parameter(torch.empty(target.out_dim, rank))
        self.hada_w1_b = nn.Parameter(torch.empty(rank, target.in_dim))
        self.hada_w2_a = nn.Parameter(torch.empty(target.out_dim, rank))
        self.hada_w2_b = nn.Parameter(torch.zeros(rank, target.in_dim))
        for matrix in (self.hada_w1_a, self.hada_w1_b, self.hada_w2_a):
            nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))

    def delta(self) -> torch.Tensor:
        """Return ``D``, shape ``(out_dim, in_dim)``."""
        if torch.compiler.is_compiling():  # it traces no function with a forward mode, and plans itself what is kept
            return (self.hada_w1_a @ self.hada_w1_b) * (self.hada_w2_a @ self.hada_w2_b) * self.scale
        from deltaexp.hadamard import HadamardProduct  # which imports torch

        return HadamardProduct.apply(self.hada_w1_a, self.hada_w1_b, self.hada_w2_a, self.hada_w2_b, self.scale)
