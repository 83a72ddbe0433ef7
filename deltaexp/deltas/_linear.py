"""What the deltas that add to a linear map's weight have in common: the map, and the two ways of applying what is added."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from deltaexp.lazy import Layer, nn, torch

if TYPE_CHECKING:
    from deltaexp.targets import Site


@dataclass(frozen=True)
class LinearMap:
    """The linear map of a Linear module or of a convolution, the weight of which is seen as a matrix ``(out_dim, in_dim)``.

    A row of a convolution's matrix is one filter: the channels of a group times the positions of the kernel.
    """

    in_dim: int
    out_dim: int
    kernel: tuple[int, ...] = ()
    """Size of a convolution's kernel; empty for a Linear module."""
    options: dict[str, Any] = field(default_factory=dict)
    """Stride, padding, dilation and groups of a convolution."""

    @classmethod
    def at(cls, site: Site, delta_type: str) -> LinearMap:
        """Return the map at a place in a backbone.

        Raises:
            AddressingError: If there is none.
        """
        module: Any = site.module
        for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
            # A subclass with a forward of its own may pad or scale in ways that its attributes do not tell.
            if isinstance(module, kind) and type(module).forward is kind.forward and module.padding_mode == "zeros":
                options = {name: getattr(module, name) for name in ("stride", "padding", "dilation", "groups")}
                return cls(module.weight[0].numel(), module.out_channels, tuple(module.kernel_size), options)
        return cls(*site.linear_dims(delta_type))

    def apply(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Apply another weight, shape ``(any, in_dim)``, in the map's place."""
        if not self.kernel:
            return nn.functional.linear(x, weight)
        return self._convolve(x, weight.unflatten(1, (-1, *self.kernel)), **self.options)

    def apply_factors(self, x: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Apply the weight ``up down``, shapes ``(out_dim, r)`` and ``(r, in_dim)``, without computing it."""
        if not self.kernel:
            return nn.functional.linear(nn.functional.linear(x, down), up)
        groups = self.options["groups"]
        inner = self.apply(x, down.repeat(groups, 1))  # every group has filters of its own, made from the same r
        return self._convolve(inner, up.unflatten(1, (-1, *(1 for _ in self.kernel))), groups=groups)

    def per_output(self, vector: torch.Tensor) -> torch.Tensor:
        """Return a vector of ``out_dim`` elements in the shape in which it multiplies the map's output."""
        return vector.view(-1, *(1 for _ in self.kernel))

    def _convolve(self, x: torch.Tensor, weight: torch.Tensor, **options: Any) -> torch.Tensor:
        convolve = {1: nn.functional.conv1d, 2: nn.functional.conv2d, 3: nn.functional.conv3d}[len(self.kernel)]
        return convolve(x, weight, **options)


class WeightDelta(Layer):
    """Adds ``dropout(x) delta()^T`` to what a linear map returns: base of the layers that change its weight.

    Args:
        target: The map.
        dropout: Probability of dropping an element of ``x`` while training.
    """

    light = False
    """Whether `forward` is the faster way for a few rows of ``x``, as it makes nothing of the size of a factor."""

    def __init__(self, target: LinearMap, dropout: float) -> None:
        super().__init__()
        self.target = target
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        self.tokenwise = not target.kernel

    @property
    def drops(self) -> float:
        """The probability with which an element of ``x`` is dropped at present."""
        return self.dropout.p if self.training and isinstance(self.dropout, nn.Dropout) else 0.0

    @property
    def fusable(self) -> bool:
        """Whether `forward` computes what is described here, and nothing else, so that `deltaexp.fused` may do it."""
        return type(self).forward in (WeightDelta.forward, LowRankDelta.forward)

    def delta(self) -> torch.Tensor:
        """Return what is added to the weight, shape ``(out_dim, in_dim)``."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``x``, shape ``(..., in_dim)``, to the update, shape ``(..., out_dim)``."""
        return self.target.apply(self.dropout(x), self.delta())

    def merged(self, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return weight and bias of the map with the delta in them."""
        return weight + self.delta().reshape(weight.shape).to(weight.dtype), bias


class LowRankDelta(WeightDelta):
    """A `WeightDelta` with ``delta() = scale * up down``; ``up`` and ``down`` are what `factors` returns."""

    scale: float = 1.0

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ``down``, shape ``(r, in_dim)``, and ``up``, shape ``(out_dim, r)``."""
        raise NotImplementedError

    def delta(self) -> torch.Tensor:
        """Return what is added to the weight, shape ``(out_dim, in_dim)``."""
        down, up = self.factors()
        return up @ down * self.scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``x``, shape ``(..., in_dim)``, to the update, shape ``(..., out_dim)``."""
        return self.target.apply_factors(self.dropout(x), *self.factors()) * self.scale
