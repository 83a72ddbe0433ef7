"""Bottleneck adapters in sequence after a module (Houlsby et al., 2019, https://arxiv.org/abs/1902.00751)."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from deltaexp.lazy import Layer, nn, torch
from deltaexp.registry import DeltaConfig, register

if TYPE_CHECKING:
    from deltaexp.surgery import Site

ACTIVATIONS = ("relu", "gelu", "gelu_new", "silu", "swish", "mish", "tanh", "sigmoid", "leaky_relu", "linear")
"""The names accepted as `non_linearity`: those of transformers' activations that suit a bottleneck."""


@register
@dataclass
class AdapterConfig(DeltaConfig):
    """An adapter replaces the output h of each chosen module by ``h + up(act(down(h)))``."""

    delta_type: str = "adapter"
    bottleneck_dim: int = 24
    """Width of the bottleneck."""
    non_linearity: str = "gelu_new"
    """Activation between the two projections, by its name in transformers."""

    default_modules: ClassVar[tuple[str, ...]] = ("attn.proj", "ff.w2")
    attribute: ClassVar[str] = "adapter"
    insertion: ClassVar[str] = "sequential"

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        self.require("bottleneck_dim", at_least=1)
        self.require_one_of("non_linearity", ACTIVATIONS)

    def build(self, site: Site) -> AdapterLayer:
        """Make the layer for a module with an output of shape ``(..., out_dim)``."""
        return AdapterLayer(site.out_dim(self.delta_type), self.bottleneck_dim, self.non_linearity)


class AdapterLayer(Layer):
    """The bottleneck of one module: ``adapter(h) = h + W_up act(W_down h + b_down) + b_up``.

    The weights start at N(0, 0.01^2) and the biases at zero, so that the layer starts close to the identity.

    Args:
        dim: Size of the last dimension of ``h``, shape ``(..., dim)``.
        bottleneck_dim: Width between the two projections.
        non_linearity: Name of the activation in transformers.
    """

    def __init__(self, dim: int, bottleneck_dim: int, non_linearity: str) -> None:
        super().__init__()
        from transformers.activations import ACT2FN

        down, up = nn.Linear(dim, bottleneck_dim), nn.Linear(bottleneck_dim, dim)
        for projection in (down, up):
            nn.init.normal_(projection.weight, std=0.01)
            nn.init.zeros_(projection.bias)
        self.modulelist = nn.Sequential(OrderedDict(down_proj=down, non_linear=ACT2FN[non_linearity], up_proj=up))

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """Map ``h``, shape ``(..., dim)``, to the new output of the same shape."""
        return h + self.modulelist(h)
