"""LoRA: low-rank updates parallel to a linear map (Hu et al., 2021, https://arxiv.org/abs/2106.09685)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from deltaexp.lazy import Layer, nn, torch
from deltaexp.registry import DeltaConfig, register

if TYPE_CHECKING:
    from deltaexp.surgery import Site


@register
@dataclass
class LoraConfig(DeltaConfig):
    """LoRA adds ``dropout(x) A^T B^T * alpha / r`` to the output of each chosen linear module."""

    delta_type: str = "lora"
    lora_r: int = 8
    """Rank r of the update."""
    lora_alpha: int = 16
    """Numerator of the scale alpha / r."""
    lora_dropout: float = 0.0
    """Probability of dropping an element of the input of A while training."""

    default_modules: ClassVar[tuple[str, ...]] = ("attn.q", "attn.v")
    attribute: ClassVar[str] = "lora"
    insertion: ClassVar[str] = "parallel"

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        self.require("lora_r", at_least=1)
        self.require("lora_alpha", above=0)
        self.require("lora_dropout", at_least=0, below=1)

    def build(self, site: Site) -> LoraLayer:
        """Make the layer for a linear module."""
        in_dim, out_dim = site.linear_dims(self.delta_type)
        return LoraLayer(in_dim, out_dim, self.lora_r, self.lora_alpha, self.lora_dropout)


class LoraLayer(Layer):
    """The low-rank update of one linear map.

    ``delta(x) = dropout(x) A^T B^T * alpha / r``, with ``A`` of shape ``(r, in_dim)`` and ``B`` of shape
    ``(out_dim, r)``. ``A`` starts uniform as in a Linear layer and ``B`` at zero, so the update starts at zero.

    Args:
        in_dim: Size of the last dimension of ``x``, shape ``(..., in_dim)``.
        out_dim: Size of the last dimension of the result, shape ``(..., out_dim)``.
        rank: The rank r.
        alpha: The numerator of the scale.
        dropout: Probability of dropping an element of ``x`` while training.
    """

    def __init__(self, in_dim: int, out_dim: int, rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        self.scaling = alpha / rank
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        self.lora_A = nn.Parameter(torch.empty(rank, in_dim))
        self.lora_B = nn.Parameter(torch.zeros(out_dim, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``x``, shape ``(..., in_dim)``, to the update, shape ``(..., out_dim)``."""
        return nn.functional.linear(nn.functional.linear(self.dropout(x), self.lora_A), self.lora_B) * self.scaling
