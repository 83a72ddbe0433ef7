"""LoKr: an update that is a Kronecker product (Yeh et al., 2024, https://arxiv.org/abs/2309.14859)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from deltaexp.deltas._linear import LinearMap, WeightDelta
from deltaexp.errors import ConfigError
from deltaexp.lazy import nn, torch
from deltaexp.registry import DeltaConfig, register

if TYPE_CHECKING:
    from deltaexp.targets import Site


@register
@dataclass
class LokrConfig(DeltaConfig):
    """LoKr adds the Kronecker product ``W1 x W2 * alpha / r`` to the weight of each chosen linear module."""

    delta_type: str = "lokr"
    lokr_r: int = 8
    """Rank r of W2 where it is decomposed, which it is where that makes it smaller."""
    lokr_alpha: int = 8
    """Numerator of the scale alpha / r."""
    lokr_dropout: float = 0.0
    """Probability of dropping an element of the update's input while training."""
    lokr_decompose_both: bool = False
    """Decompose W1 as well."""
    lokr_decompose_factor: int = -1
    """How far the dimensions of W1 may go; -1 lets them go up to the square root of the module's."""

    default_modules: ClassVar[tuple[str, ...]] = ("attn.q", "attn.v")
    attribute: ClassVar[str] = "lokr"
    learning_rate: ClassVar[float] = 3e-3
    """The paper (Yeh et al., 2024) trains diffusion models and gives no rate for language models. This is the one of PEFT's
    comparison of methods on MetaMathQA (method_comparison, lokr with factor 4); LoKr has the fewest parameters of LoRA's
    kin."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        self.require("lokr_r", at_least=1)
        self.require("lokr_alpha", above=0)
        self.require("lokr_dropout", at_least=0, below=1)
        if self.lokr_decompose_factor != -1 and self.lokr_decompose_factor < 1:
            raise ConfigError(
                f"lokr_decompose_factor is {self.lokr_decompose_factor}; it must be at least 1, or -1 to set no bound."
            )

    def build(self, site: Site) -> LokrLayer:
        """Make the layer for a linear module."""
        return LokrLayer(
            LinearMap.at(site, self.delta_type),
            self.lokr_r,
            self.lokr_alpha / self.lokr_r,
            self.lokr_dropout,
            self.lokr_decompose_both,
            self.lokr_decompose_factor,
        )


class LokrLayer(WeightDelta):
    """The update of one linear map: ``delta(x) = dropout(x) D^T`` with ``D = W1 x W2 * alpha / r``, a Kronecker product.

    With ``out_dim = a b`` and ``in_dim = c d`` (see `factors`), ``W1`` has shape ``(a, c)`` and ``W2`` shape ``(b, d)``. Each
    is one parameter (``lokr_w1``, ``lokr_w2``) or the product of two (``lokr_w1_a``, ``lokr_w1_b`` and so on), of shapes
    ``(., r)`` and ``(r, .)``, where r is less than half of its larger dimension. ``W1`` starts at zero, so the update starts at
    zero; the others start uniform as in a Linear layer.

    Args:
        target: The map.
        rank: The rank r.
        scale: alpha / r.
        dropout: Probability of dropping an element of ``x`` while training.
        decompose_both: Whether ``W1`` may be a product too.
        bound: The bound of a and c; -1 for none.
    """

    def __init__(
        self, target: LinearMap, rank: int, scale: float, dropout: float, decompose_both: bool = False, bound: int = -1
    ) -> None:
        super().__init__(target, dropout)
        self.scale = scale
        positions = math.prod(target.kernel)  # a convolution's kernel is whole in W2
        (a, b), (c, d) = factors(target.out_dim, bound), factors(target.in_dim // positions, bound)
        self._add("lokr_w1", (a, c), rank if decompose_both and rank < max(a, c) / 2 else None, zero=True)
        self._add("lokr_w2", (b, d * positions), rank if rank < max(b, d) / 2 else None)

    def _add(self, name: str, shape: tuple[int, int], rank: int | None, zero: bool = False) -> None:
        """Add a matrix, as a product of two where a ``rank`` is given."""
        parts = {name: shape} if rank is None else {f"{name}_a": (shape[0], rank), f"{name}_b": (rank, shape[1])}
        for number, (part, size) in enumerate(parts.items()):
            parameter = nn.Parameter(torch.zeros(size))
            if number or not zero:
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
            setattr(self, part, parameter)

    def _matrix(self, name: str) -> torch.Tensor:
        whole: Any = getattr(self, name, None)
        return getattr(self, f"{name}_a") @ getattr(self, f"{name}_b") if whole is None else whole

    def delta(self) -> torch.Tensor:
        """Return ``D``, shape ``(out_dim, in_dim)``."""
        return torch.kron(self._matrix("lokr_w1"), self._matrix("lokr_w2")) * self.scale


def factors(dim: int, bound: int = -1) -> tuple[int, int]:
    """Return two factors of a dimension: the bound and its cofactor, or the two nearest to each other.

    Args:
        dim: The dimension.
        bound: The first factor where it divides ``dim``, and otherwise the most that the smaller one may be; -1 for no bound.
    """
    if bound > 0 and dim % bound == 0:
        return bound, dim // bound
    most = math.isqrt(dim) if bound < 0 else min(bound, math.isqrt(dim))
    first = max(number for number in range(1, most + 1) if dim % number == 0)
    return first, dim // first
