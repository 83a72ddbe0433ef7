"""Adapters whose projections are of low rank (the baseline of Karimi Mahabadi et al., 2021, https://arxiv.org/abs/2106.04647)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from deltaexp.deltas.adapter import ACTIVATIONS, ResidualLayer, activation, output_width
from deltaexp.lazy import Layer, nn, torch
from deltaexp.registry import DeltaConfig, register

if TYPE_CHECKING:
    from deltaexp.targets import Site

INITIALISATIONS = ("glorot-uniform", "glorot-normal")
"""The values of `low_rank_w_init`."""


@register
@dataclass
class LowRankAdapterConfig(DeltaConfig):
    """A low-rank adapter is an adapter with projections of rank ``low_rank_rank`` each."""

    delta_type: str = "low_rank_adapter"
    reduction_factor: int = 32
    """The bottleneck is as wide as the module's output divided by this, rounded down, and at least 1."""
    non_linearity: str = "gelu_new"
    """Activation between the two projections, by its name in transformers."""
    low_rank_w_init: str = "glorot-uniform"
    """How the factors start: glorot-uniform or glorot-normal, with gain sqrt(2)."""
    low_rank_rank: int = 1
    """Rank of each projection."""

    default_modules: ClassVar[tuple[str, ...]] = ("attn.proj", "ff.w2")
    attribute: ClassVar[str] = "low_rank_adapter"
    learning_rate: ClassVar[float] = 3e-3
    """Karimi Mahabadi et al., 2021, on T5-base and GLUE, with AdamW: their config for it has 3e-3, as for compacters."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        self.require("reduction_factor", at_least=1)
        self.require("low_rank_rank", at_least=1)
        self.require_one_of("non_linearity", ACTIVATIONS)
        self.require_one_of("low_rank_w_init", INITIALISATIONS)

    def build(self, site: Site) -> LowRankAdapterLayer:
        """Make the layer for a module's output."""
        dim, axis = output_width(site, self.delta_type)
        width = max(1, dim // self.reduction_factor)
        return LowRankAdapterLayer(dim, width, self.low_rank_rank, self.non_linearity, self.low_rank_w_init, axis)


def glorot(tensor: torch.Tensor, name: str) -> None:
    """Initialise a matrix as one of `INITIALISATIONS` says."""
    fill = nn.init.xavier_uniform_ if name == "glorot-uniform" else nn.init.xavier_normal_
    fill(tensor, gain=math.sqrt(2))


class LowRankLinear(Layer):
    """A projection of low rank: ``x W_left W_right + b``.

    Args:
        in_dim: Size of the last dimension of ``x``, shape ``(..., in_dim)``.
        out_dim: Size of the last dimension of the result, shape ``(..., out_dim)``.
        rank: Columns of ``W_left`` and rows of ``W_right``.
        w_init: How both start.
    """

    def __init__(self, in_dim: int, out_dim: int, rank: int, w_init: str) -> None:
        super().__init__()
        self.W_left = nn.Parameter(torch.empty(in_dim, rank))
        self.W_right = nn.Parameter(torch.empty(rank, out_dim))
        self.b = nn.Parameter(torch.zeros(out_dim))
        glorot(self.W_left, w_init)
        glorot(self.W_right, w_init)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``x``, shape ``(..., in_dim)``, to shape ``(..., out_dim)``."""
        return x @ self.W_left @ self.W_right + self.b


class LowRankAdapterLayer(ResidualLayer):
    """The bottleneck of one module: ``adapter(h) = h + up(act(down(h)))`` with ``down`` and ``up`` of low rank.

    Args:
        dim: Size of the dimension of ``h`` that holds the features, which is the last one, shape ``(..., dim)``, as a rule.
        width: Width between the two projections.
        rank: Rank of each projection.
        non_linearity: Name of the activation in transformers.
        w_init: How the factors start.
        axis: The number of that dimension.
    """

    def __init__(self, dim: int, width: int, rank: int, non_linearity: str, w_init: str, axis: int = -1) -> None:
        super().__init__(axis)
        self.activation = activation(non_linearity)
        self.down_sampler = LowRankLinear(dim, width, rank, w_init)
        self.up_sampler = LowRankLinear(width, dim, rank, w_init)

    def change(self, h: torch.Tensor) -> torch.Tensor:
        """Return the output of the bottleneck for ``h``, shape ``(..., dim)``."""
        return self.up_sampler(self.activation(self.down_sampler(h)))
