"""LoRA: low-rank updates parallel to a linear map (Hu et al., 2021, https://arxiv.org/abs/2106.09685), and its variants.

- rsLoRA, the scale ``alpha / sqrt(r)``: Kalajdzievski, 2023, https://arxiv.org/abs/2312.03732
- DoRA, which trains the norms of the weight's rows as well: Liu et al., 2024, https://arxiv.org/abs/2402.09353
- PiSSA, which starts from the weight's principal components: Meng et al., 2024, https://arxiv.org/abs/2404.02948
- OLoRA, which starts from its QR decomposition: Büyükakyüz, 2024, https://arxiv.org/abs/2406.01775
- LoRA+, a larger learning rate for B: Hayou et al., 2024, https://arxiv.org/abs/2402.12354
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from deltaexp import addressing
from deltaexp.deltas._linear import LinearMap, LowRankDelta
from deltaexp.errors import AddressingError, ConfigError, did_you_mean, listing
from deltaexp.lazy import nn, torch
from deltaexp.registry import DeltaConfig, register

if TYPE_CHECKING:
    from deltaexp.targets import Site

FROM_THE_WEIGHT = ("pissa", "olora")
"""The values of `lora_init` that take A and B from the weight."""


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
    lora_scaling: str = "standard"
    """"standard": the scale is alpha / r; "rslora": it is alpha / sqrt(r)."""
    lora_dora: bool = False
    """DoRA: train the norm of each row of the weight apart from its direction."""
    lora_init: str = "kaiming"
    """How A and B start: "kaiming" or "gaussian", with B at zero; "pissa" or "olora", from the weight."""
    lora_plus_ratio: float = 1.0
    """LoRA+: what the learning rate of B is a multiple of that of A by."""
    lora_r_pattern: dict[str, int] = field(default_factory=dict)
    """Other ranks for the modules that a pattern matches, by name or common name; of several patterns the first counts."""
    lora_alpha_pattern: dict[str, int] = field(default_factory=dict)
    """Other values of alpha, in the same way."""

    default_modules: ClassVar[tuple[str, ...]] = ("attn.q", "attn.v")
    attribute: ClassVar[str] = "lora"
    learning_rate: ClassVar[float] = 5e-4
    """The paper trains RoBERTa-base on GLUE with 4e-4 or 5e-4 (Hu et al., 2021, appendix D, table 9; the authors' scripts
    for QNLI have 4e-4), with AdamW, warm-up over 6 % of the steps and a linear decay, as here."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        self.require("lora_r", at_least=1)
        self.require("lora_alpha", above=0)
        self.require("lora_dropout", at_least=0, below=1)
        self.require("lora_plus_ratio", above=0)
        self.require_one_of("lora_scaling", ("standard", "rslora"))
        self.require_one_of("lora_init", ("kaiming", "gaussian", *FROM_THE_WEIGHT))
        for key in ("lora_r_pattern", "lora_alpha_pattern"):
            for pattern, value in getattr(self, key).items():
                if value < 1:
                    raise ConfigError(f"{key} gives {value} for {pattern!r}; it must be at least 1.")

    def build(self, site: Site) -> LoraLayer:
        """Make the layer for a linear module or a convolution.

        Raises:
            AddressingError: If it is neither, or if a pattern of ranks matches none of the delta's modules.
            ConfigError: If A and B start from the weight, and the weight has a smaller rank than they.
        """
        if site.index == 0:
            self._check_patterns(site.shared.get("sites", [site]))
        target = LinearMap.at(site, self.delta_type)
        rank = _matched(self.lora_r_pattern, site, self.lora_r)
        alpha = _matched(self.lora_alpha_pattern, site, self.lora_alpha)
        scale = alpha / (math.sqrt(rank) if self.lora_scaling == "rslora" else rank)
        full = min(target.in_dim, target.out_dim)
        if self.lora_init in FROM_THE_WEIGHT and rank > full:
            raise ConfigError(
                f"lora_init={self.lora_init} takes A and B from the weight, which at {site.name!r} has a rank of at most "
                f"{full}, and lora_r there is {rank}. Lower lora_r, or take lora_init=kaiming."
            )
        kind = DoraLayer if self.lora_dora else LoraLayer
        weight = site.weight() if self.lora_dora or self.lora_init in FROM_THE_WEIGHT else None
        return kind(target, rank, scale, self.lora_dropout, self.lora_init, weight)

    def learning_rate_factor(self, parameter: str) -> float:
        """Return what the learning rate is multiplied by: `lora_plus_ratio` for B."""
        return self.lora_plus_ratio if parameter.endswith("lora_B") else 1.0

    def _check_patterns(self, sites: Sequence[Site]) -> None:
        for key in ("lora_r_pattern", "lora_alpha_pattern"):
            for pattern in getattr(self, key):
                if not any(_matches(pattern, site) for site in sites):
                    length = pattern.count(".") + 1
                    near = {".".join(site.name.split(".")[-length:]) for site in sites} | {site.role or "" for site in sites}
                    raise AddressingError(
                        f"The pattern {pattern!r} in {key} matches none of the modules that the delta goes on."
                        f"{did_you_mean(pattern, near)} They are {listing([site.name for site in sites], 4)}."
                    )


def _matches(pattern: str, site: Site) -> bool:
    """Say whether a pattern means a place, by the module's name or by its role in the common structure."""
    role = site.role is not None and addressing.matches(pattern.replace("@", ""), site.role)
    return role or addressing.matches(pattern, site.name)


def _matched(patterns: Mapping[str, int], site: Site, otherwise: int) -> int:
    return next((value for pattern, value in patterns.items() if _matches(pattern, site)), otherwise)


class LoraLayer(LowRankDelta):
    """The low-rank update of one linear map.

    ``delta(x) = dropout(x) A^T B^T * scale``, with ``A`` of shape ``(r, in_dim)`` and ``B`` of shape ``(out_dim, r)``. ``A``
    starts uniform as in a Linear layer, or normal with the deviation 1 / r, and ``B`` at zero, so the update starts at zero.

    Where ``A`` and ``B`` start from the weight, PiSSA and OLoRA subtract ``scale B A`` from the weight itself. Here the weight
    stays as it is: the starting values are kept as ``lora_A0`` and ``lora_B0``, and
    ``delta(x) = dropout(x) A^T B^T * scale - x A0^T B0^T * scale``, which computes the same, and starts at zero too.

    Args:
        target: The map.
        rank: The rank r.
        scale: The scale.
        dropout: Probability of dropping an element of ``x`` while training.
        init: One of the values of `LoraConfig.lora_init`.
        weight: The map's weight, for what starts from it.
    """

    lora_A0: torch.Tensor | None
    lora_B0: torch.Tensor | None

    def __init__(
        self,
        target: LinearMap,
        rank: int,
        scale: float,
        dropout: float,
        init: str = "kaiming",
        weight: torch.Tensor | None = None,
    ) -> None:
        super().__init__(target, dropout)
        self.scale = scale
        self.lora_A = nn.Parameter(torch.empty(rank, target.in_dim))
        self.lora_B = nn.Parameter(torch.zeros(target.out_dim, rank))
        self.register_buffer("lora_A0", None)
        self.register_buffer("lora_B0", None)
        if init in FROM_THE_WEIGHT:
            if weight is not None and not weight.is_meta:
                down, up = decomposed(init, weight, rank, scale)
                self.lora_A, self.lora_B = nn.Parameter(down), nn.Parameter(up)
            self.lora_A0, self.lora_B0 = self.lora_A.detach().clone(), self.lora_B.detach().clone()
        elif init == "gaussian":
            nn.init.normal_(self.lora_A, std=1 / rank)
        else:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    @property
    def fusable(self) -> bool:
        """Whether the layer is nothing but a low-rank update: starting values get all of ``x`` where the rest gets a part."""
        return type(self).forward is LoraLayer.forward and not (self.drops and self.lora_A0 is not None)

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ``A`` and ``B``, or ``[A - A0, A0]`` and ``[B, B - B0]``, of which the product is ``B A - B0 A0``.

        In this form it is zero at the start to the last bit, and no small difference of large products after that.
        """
        if self.lora_A0 is None or self.lora_B0 is None:
            return self.lora_A, self.lora_B
        down = torch.cat([self.lora_A - self.lora_A0, self.lora_A0])
        return down, torch.cat([self.lora_B, self.lora_B - self.lora_B0], dim=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``x``, shape ``(..., in_dim)``, to the update, shape ``(..., out_dim)``."""
        if self.lora_A0 is None or self.lora_B0 is None or not self.drops:
            return super().forward(x)
        trained = self.target.apply_factors(self.dropout(x), self.lora_A, self.lora_B)
        return (trained - self.target.apply_factors(x, self.lora_A0, self.lora_B0)) * self.scale


class DoraLayer(LoraLayer):
    """LoRA with the norms of the weight's rows trained apart.

    ``h = b + m / |W + D| (W + D) x`` with the ``D`` of `LoraLayer`, the norms ``|.|`` of rows, shape ``(out_dim,)``, and the
    trained ``m`` (``magnitude``), which starts at ``|W|``, so that ``h`` starts as it was. The gradient takes ``|W + D|`` for a
    constant, as the paper proposes (section 4.3). Dropout falls on the ``x`` of everything that is added to ``W x``.
    """

    insertion = "weighted"

    def __init__(
        self, target: LinearMap, rank: int, scale: float, dropout: float, init: str, weight: torch.Tensor | None
    ) -> None:
        super().__init__(target, rank, scale, dropout, init, weight)
        assert weight is not None  # `LoraConfig.build` gives it to every layer that needs it
        self.magnitude = nn.Parameter(_norms(_wide(weight)))

    @property
    def fusable(self) -> bool:
        """Whether the layer is nothing but what is described here."""
        return type(self).forward is DoraLayer.forward

    def forward(  # type: ignore[override]  # the arguments follow from `insertion`
        self, x: torch.Tensor, h: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the new output for the input ``x``, shape ``(..., in_dim)``, and the output ``h``, ``(..., out_dim)``."""
        weight = weight.flatten(1).to(x.dtype)
        ratio = self.target.per_output(self._ratio(weight))
        if self.drops:
            dropped = self.dropout(x)
            update, start = self.target.apply_factors(dropped, self.lora_A, self.lora_B) * self.scale, None
            if self.lora_A0 is not None and self.lora_B0 is not None:
                start = self.target.apply_factors(x, self.lora_A0, self.lora_B0) * self.scale
                weight = weight - self.lora_B0 @ self.lora_A0 * self.scale
            straight = self.target.apply(dropped, weight)
            h = h if start is None else h - start
        else:
            update = super().forward(x)
            straight = h if bias is None else h - self.target.per_output(bias.to(x.dtype))
        return torch.addcmul(torch.addcmul(h, straight, ratio - 1), update, ratio)

    def merged(self, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return weight and bias of the map with the delta in them."""
        ratio = self._ratio(weight.flatten(1)).to(weight.dtype)
        whole = super().merged(weight, bias)[0]
        return (ratio[:, None] * whole.flatten(1)).view_as(weight), bias

    def ratio(self, whole: torch.Tensor) -> torch.Tensor:
        """Return ``m / |W + D|``, shape ``(out_dim,)``, given ``W + D``."""
        with torch.no_grad():
            norms = _norms(whole)
        # A row of zeros keeps its norm, zero, until the update gives it another.
        return self.magnitude / norms.clamp_min(torch.finfo(norms.dtype).tiny)

    def _ratio(self, weight: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            whole = weight + self.delta().to(weight.dtype)
        return self.ratio(whole)


def _wide(weight: torch.Tensor) -> torch.Tensor:
    """Return a weight as a matrix in float32, or in its own dtype where that is wider."""
    return weight.detach().flatten(1).to(torch.promote_types(weight.dtype, torch.float32))


def _norms(matrix: torch.Tensor) -> torch.Tensor:
    """Return the norms of a matrix's rows."""
    # In one layout, so that equal matrices have equal norms to the last bit.
    return torch.linalg.vector_norm(matrix.contiguous(), dim=1)


def decomposed(init: str, weight: torch.Tensor, rank: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the A and B that `lora_init` takes from a weight."""
    if init == "olora":
        up, down = torch.linalg.qr(_wide(weight))
        up, down = up[:, :rank], down[:rank]
    else:
        u, s, vh = torch.linalg.svd(_wide(weight), full_matrices=False)
        root = (s[:rank] / scale).sqrt()  # so that scale B A is the best approximation of rank r
        up, down = u[:, :rank] * root, root[:, None] * vh[:rank]
    # In the layout of a saved tensor, so that one that is loaded computes the same to the last bit.
    return down.clone(memory_format=torch.contiguous_format), up.clone(memory_format=torch.contiguous_format)
