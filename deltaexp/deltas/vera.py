"""VeRA: vectors that scale random matrices shared by all modules (Kopiczko et al., 2024, https://arxiv.org/abs/2310.11454)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from deltaexp.deltas._linear import LinearMap, LowRankDelta
from deltaexp.lazy import Layer, nn, torch
from deltaexp.registry import DeltaConfig, register

if TYPE_CHECKING:
    from deltaexp.targets import Site


@register
@dataclass
class VeraConfig(DeltaConfig):
    """VeRA adds ``b * (B (d * (A x)))`` to each chosen linear module; A and B are random and shared, b and d are trained."""

    delta_type: str = "vera"
    vera_r: int = 256
    """Rank r: the number of rows of A and of columns of B."""
    vera_dropout: float = 0.0
    """Probability of dropping an element of the input of A while training."""
    vera_d_initial: float = 0.1
    """What the elements of d start at."""
    vera_seed: int = 0
    """Seed from which A and B are drawn."""

    default_modules: ClassVar[tuple[str, ...]] = ("attn.q", "attn.v")
    attribute: ClassVar[str] = "vera"
    learning_rate: ClassVar[float] = 1e-2
    """The paper takes 4e-3 to 1e-2 for the vectors, about ten times LoRA's, on RoBERTa-base and GLUE (Kopiczko et al.,
    2024, appendix A); for the classifier it has a rate of its own in the same range."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        self.require("vera_r", at_least=1)
        self.require("vera_dropout", at_least=0, below=1)
        self.require("vera_seed", at_least=0)

    def build(self, site: Site) -> VeraLayer:
        """Make the layer for a linear module."""
        if "vera" not in site.shared:
            maps = [LinearMap.at(other, self.delta_type) for other in site.shared.get("sites", [site])]
            dims = max(m.in_dim for m in maps), max(m.out_dim for m in maps)
            site.shared["vera"] = VeraProjection(*dims, self.vera_r, self.vera_seed)
        return VeraLayer(
            LinearMap.at(site, self.delta_type), site.shared["vera"], self.vera_r, self.vera_d_initial, self.vera_dropout
        )


class VeraLayer(LowRankDelta):
    """The update of one linear map: ``delta(x) = b * (B (d * (A dropout(x))))``, the products with ``b`` and ``d`` elementwise.

    ``A`` of shape ``(r, in_dim)`` and ``B`` of shape ``(out_dim, r)`` are the corner of the shared matrices that fits.
    ``vera_lambda_d``, the ``d`` of shape ``(r,)``, starts at a constant, and ``vera_lambda_b``, the ``b`` of shape
    ``(out_dim,)``, at zero, so the update starts at zero.

    Args:
        target: The map.
        projection: The matrices that all layers share.
        rank: The rank r.
        d_initial: What the elements of ``d`` start at.
        dropout: Probability of dropping an element of ``x`` while training.
    """

    light = True

    def __init__(self, target: LinearMap, projection: VeraProjection, rank: int, d_initial: float, dropout: float) -> None:
        super().__init__(target, dropout)
        self.projection = projection
        self.vera_lambda_d = nn.Parameter(torch.full((rank,), d_initial))
        self.vera_lambda_b = nn.Parameter(torch.zeros(target.out_dim))

    @property
    def fusable(self) -> bool:
        """Whether `forward` computes ``delta()``, which it does."""
        return type(self).forward is VeraLayer.forward

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ``A`` and ``b * B * d``."""
        # What is trained is in one factor, so that no gradient of the other one is computed.
        down, up = self._shared()
        return down, self.vera_lambda_b[:, None] * (up * self.vera_lambda_d)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``x``, shape ``(..., in_dim)``, to the update, shape ``(..., out_dim)``."""
        if self.target.kernel:
            return super().forward(x)
        down, up = self._shared()
        inner = nn.functional.linear(self.dropout(x), down) * self.vera_lambda_d
        return nn.functional.linear(inner, up) * self.vera_lambda_b

    def _shared(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ``A`` and ``B``; where a backbone is spread over devices, the shared matrices are on one of them."""
        down = self.projection.vera_A[:, : self.target.in_dim].to(self.vera_lambda_d)
        return down, self.projection.vera_B[: self.target.out_dim].to(self.vera_lambda_b)


class VeraProjection(Layer):
    """The random matrices A and B, held once for all layers of a delta, and large enough for the largest of their modules.

    They are uniform with Kaiming's bound ``sqrt(6 / fan_in)``, drawn on the CPU, A first.

    Args:
        in_dim: The largest ``in_dim`` of the modules.
        out_dim: The largest ``out_dim``.
        rank: The rank r.
        seed: The seed of the draw, which depends on nothing else.
    """

    vera_A: torch.Tensor
    vera_B: torch.Tensor

    def __init__(self, in_dim: int, out_dim: int, rank: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for name, shape in {"vera_A": (rank, in_dim), "vera_B": (out_dim, rank)}.items():
            matrix = torch.empty(shape)
            if not matrix.is_meta:
                matrix = torch.empty(shape, device="cpu")  # where the generator is, whatever the default device
                nn.init.kaiming_uniform_(matrix, generator=generator)
            # Not in the backbone's state dict, where safetensors would refuse one tensor under many names.
            self.register_buffer(name, matrix, persistent=False)
