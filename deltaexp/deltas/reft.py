"""LoReFT: low-rank edits of hidden states (Wu et al., 2024, https://arxiv.org/abs/2404.03592)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from deltaexp.deltas.parallel_adapter import stream_width
from deltaexp.errors import AddressingError, ConfigError, DeltaExpError
from deltaexp.lazy import Layer, nn, torch
from deltaexp.registry import DeltaConfig, register

if TYPE_CHECKING:
    from deltaexp.targets import Site

ALL = "all"


@register
@dataclass
class ReftConfig(DeltaConfig):
    """LoReFT replaces the output h of each chosen block by ``h + R^T (W h + b - R h)``, where R has orthonormal rows."""

    delta_type: str = "reft"
    reft_r: int = 4
    """Rank r of the edit: the number of rows of R."""
    reft_positions: str = ALL
    """The positions that are edited: "all", or "f<n>+l<m>" for the first n and the last m of the sequence as the block sees
    it, padding counted; "f<n>" or "l<m>" for one of the two. In the latter cases a sequence of one token, as in generation
    with a cache, is left alone: the edit is made where the prompt is read."""
    reft_dropout: float = 0.0
    """Probability of dropping an element of ``W h + b - R h`` while training."""

    default_modules: ClassVar[tuple[str, ...]] = ("block",)
    attribute: ClassVar[str] = "reft"
    learning_rate: ClassVar[float] = 6e-4
    """Wu et al., 2024: the authors' command for RoBERTa-base on CoLA has 6e-4, those for Llama have 9e-4; AdamW."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        self.require("reft_r", at_least=1)
        self.require("reft_dropout", at_least=0, below=1)
        positions(self.reft_positions)

    def build(self, site: Site) -> ReftLayer:
        """Make the layer for a block, or another module with an output of shape ``(batch, sequence, dim)``.

        Raises:
            AddressingError: If the output is not as wide as the rank.
        """
        dim = site.out_dim(self.delta_type) if site.rows else stream_width(site, self.delta_type, leaving=True)
        if dim < self.reft_r:
            raise AddressingError(
                f"reft_r is {self.reft_r}, and the output of {site.name!r} is {dim} wide; a rank cannot be greater than that."
            )
        return ReftLayer(dim, self.reft_r, positions(self.reft_positions), self.reft_dropout)


def positions(spec: str) -> tuple[int, int] | None:
    """Return how many of the first and how many of the last positions are meant; None for all.

    Raises:
        ConfigError: If ``spec`` is no such text.
    """
    found = re.fullmatch(r"(?:f(\d+))?\+?(?:l(\d+))?", spec)
    if spec == ALL:
        return None
    if not spec or found is None or ("+" in spec) != all(found.groups()) or not sum(map(int, found.groups(default="0"))):
        raise ConfigError(
            f"reft_positions is {spec!r}; it must be 'all', or like 'f3', 'l2' or 'f3+l2': the first 3, the last 2."
        )
    first, last = found.groups(default="0")
    return int(first), int(last)


class ReftLayer(Layer):
    """The edit of one block's output: ``reft(h) = h + R^T (W h + b - R h)``.

    ``R``, shape ``(r, dim)``, has orthonormal rows whatever values training gives to the parameter `rotate` that it is made
    from: it is the orthogonal factor of its QR decomposition. ``W`` starts as ``R`` and ``b`` at zero, so that the layer starts
    as the identity; the paper's own code starts ``W`` at random.

    Args:
        dim: Size of the last dimension of ``h``, shape ``(..., sequence, dim)``.
        rank: The rank r.
        ends: How many of the first and of the last positions are edited; None means all positions.
        dropout: Probability of dropping an element of ``W h + b - R h`` while training.
    """

    insertion = "sequential"

    def __init__(self, dim: int, rank: int, ends: tuple[int, int] | None = None, dropout: float = 0.0) -> None:
        super().__init__()
        self.ends = ends
        self.tokenwise = ends is None
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        self.rotate = nn.Parameter(torch.empty(rank, dim))
        nn.init.orthogonal_(self.rotate)
        self.source = nn.Linear(dim, rank)
        with torch.no_grad():
            self.source.weight.copy_(self.rotate)
            self.source.bias.zero_()

    def rotation(self) -> torch.Tensor:
        """Return R, shape ``(r, dim)``."""
        # Half precision has no QR decomposition.
        wide = self.rotate.to(torch.promote_types(self.rotate.dtype, torch.float32))
        q, triangle = torch.linalg.qr(wide.T)
        # The signs are a convention of the decomposition's; with these it is unique, and continuous while training.
        signs = torch.where(triangle.diagonal() < 0, -1.0, 1.0)
        return (q * signs).T.to(self.rotate.dtype)

    def edited(self, h: torch.Tensor) -> torch.Tensor:
        """Edit ``h``, shape ``(..., dim)``, at all positions."""
        rotation = self.rotation()
        return h + self.dropout(self.source(h) - h @ rotation.T) @ rotation

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """Edit ``h``, shape ``(..., sequence, dim)``, at the positions that are meant.

        Raises:
            DeltaExpError: If ``h`` is not ``dim`` wide.
        """
        if h.shape[-1] != self.source.in_features:
            raise DeltaExpError(
                f"A ReFT layer for {self.source.in_features} features hangs on a module whose output has the shape "
                f"{list(h.shape)}, as where the channels of an image come first. Name other modules in modified_modules, or "
                "take another delta type."
            )
        if self.ends is None:
            return self.edited(h)
        length = h.shape[-2]
        first, last = self.ends
        if length == 1:
            return h
        if first + last >= length:
            return self.edited(h)
        stop = length - last
        edges = self.edited(torch.cat([h[..., :first, :], h[..., stop:, :]], dim=-2))
        return torch.cat([edges[..., :first, :], h[..., first:stop, :], edges[..., first:, :]], dim=-2)
