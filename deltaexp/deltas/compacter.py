"""Compacter: adapters of Kronecker products (Karimi Mahabadi et al., 2021, https://arxiv.org/abs/2106.04647)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Optional

from deltaexp.deltas.adapter import ACTIVATIONS, ResidualLayer, activation, output_width
from deltaexp.deltas.low_rank_adapter import INITIALISATIONS, glorot
from deltaexp.errors import AddressingError, ConfigError
from deltaexp.lazy import Layer, nn, torch
from deltaexp.registry import DeltaConfig, register

if TYPE_CHECKING:
    from deltaexp.targets import Site


Fill = Callable[["torch.Tensor"], None]


@register
@dataclass
class CompacterConfig(DeltaConfig):
    """A compacter is an adapter with projections ``sum_i kron(A_i, B_i)``, where B_i is of low rank.

    The keys are OpenDelta's; the matrices A are its *phm rule*, and the matrices B its *W*.
    """

    delta_type: str = "compacter"
    reduction_factor: int = 16
    """The bottleneck is as wide as the module's output divided by this, rounded down to a multiple of
    `hypercomplex_division`, which is the least that it is."""
    bottleneck_dim: Optional[int] = None
    """Width of the bottleneck, in place of `reduction_factor`; a multiple of `hypercomplex_division`."""
    non_linearity: str = "relu"
    """Activation between the two projections, by its name in transformers."""
    hypercomplex_division: int = 4
    """The number n of Kronecker products in a sum; every A_i has shape (n, n)."""
    phm_rank: int = 1
    """Rank of the matrices B."""
    factorized_phm: bool = True
    """Whether the matrices B are products of two factors of rank `phm_rank`; else they are of full rank."""
    factorized_phm_rule: bool = False
    """Whether the matrices A are products of two factors of rank 1."""
    learn_phm: bool = True
    """Whether the matrices A are trained; else they are fixed at random."""
    shared_phm_rule: bool = False
    """Whether all projections have the same matrices A."""
    shared_W_phm: bool = False
    """Whether all projections of the same shape have the same matrices B."""
    phm_c_init: str = "normal"
    """How the matrices A start: normal with standard deviation 0.01, or uniform in (-0.01, 0.01)."""
    hypercomplex_nonlinearity: str = "glorot-uniform"
    """How the matrices B start: glorot-uniform or glorot-normal, with gain sqrt(2), or normal."""
    phm_init_range: float = 0.0001
    """Standard deviation of the matrices B where they start normal."""
    use_bias_down_sampler: bool = True
    """Whether the first projection has a bias."""
    use_bias_up_sampler: bool = True
    """Whether the second projection has a bias."""
    kronecker_prod: Optional[bool] = None
    """Which of two ways OpenDelta computes the products; the result is the same, and so is it here."""

    default_modules: ClassVar[tuple[str, ...]] = ("attn.proj", "ff.w2")
    attribute: ClassVar[str] = "compactor"
    learning_rate: ClassVar[float] = 3e-3
    """Karimi Mahabadi et al., 2021, on T5-base and GLUE, with AdamW: their config for it has 3e-3, ten times the one for
    adapters."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        for key in ("reduction_factor", "hypercomplex_division", "phm_rank"):
            self.require(key, at_least=1)
        self.require("phm_init_range", above=0)
        self.require_one_of("non_linearity", ACTIVATIONS)
        self.require_one_of("phm_c_init", ("normal", "uniform"))
        self.require_one_of("hypercomplex_nonlinearity", (*INITIALISATIONS, "normal"))
        if self.bottleneck_dim is not None:
            self.require("bottleneck_dim", at_least=1)
            if self.bottleneck_dim % self.hypercomplex_division:
                raise ConfigError(
                    f"bottleneck_dim is {self.bottleneck_dim}; it must be a multiple of hypercomplex_division, which is "
                    f"{self.hypercomplex_division}."
                )

    def build(self, site: Site) -> CompacterLayer:
        """Make the layer for a module's output.

        Raises:
            AddressingError: If its width is no multiple of ``hypercomplex_division``.
        """
        dim, axis = output_width(site, self.delta_type)
        division = self.hypercomplex_division
        if dim % division:
            raise AddressingError(
                f"hypercomplex_division is {division}, and the output of {site.name!r} is {dim} wide, which is no multiple of "
                "that. Choose a divisor of the width, or name other modules in modified_modules."
            )
        width = self.bottleneck_dim or max(division, dim // self.reduction_factor // division * division)
        return CompacterLayer(self, dim, width, site.shared, axis)


class PHMLinear(Layer):
    """A projection by parametrised hypercomplex multiplication: ``x H + b`` with ``H = sum_i kron(A_i, B_i)``.

    Of the n matrices, ``A_i`` has shape ``(n, n)`` and ``B_i`` shape ``(in_dim / n, out_dim / n)``.

    Args:
        config: The keys that say what A and B are.
        in_dim: Size of the last dimension of ``x``, shape ``(..., in_dim)``.
        out_dim: Size of the last dimension of the result, shape ``(..., out_dim)``.
        bias: Whether there is a b, which starts at zero.
        shared: What the layers of one delta share; the matrices are put there, or taken from there, if that is wanted.
    """

    phm_rule: torch.Tensor
    phm_rule_left: torch.Tensor
    phm_rule_right: torch.Tensor
    W: torch.Tensor
    W_left: torch.Tensor
    W_right: torch.Tensor

    def __init__(self, config: CompacterConfig, in_dim: int, out_dim: int, bias: bool, shared: dict[str, Any]) -> None:
        super().__init__()
        n, rank = config.hypercomplex_division, config.phm_rank
        a, b = {"phm_rule": (n, n, n)}, {"W": (n, in_dim // n, out_dim // n)}
        if config.factorized_phm_rule:
            a = {"phm_rule_left": (n, n, 1), "phm_rule_right": (n, 1, n)}
        if config.factorized_phm:
            b = {"W_left": (n, in_dim // n, rank), "W_right": (n, rank, out_dim // n)}

        def fill_a(tensor: torch.Tensor) -> None:
            if config.phm_c_init == "normal":
                nn.init.normal_(tensor, std=0.01)
            else:
                nn.init.uniform_(tensor, -0.01, 0.01)

        def fill_b(tensor: torch.Tensor) -> None:
            for matrix in tensor:
                if config.hypercomplex_nonlinearity == "normal":
                    nn.init.normal_(matrix, std=config.phm_init_range)
                else:
                    glorot(matrix, config.hypercomplex_nonlinearity)

        for name, shape in a.items():
            self._own(name, shape, fill_a, config.learn_phm, shared if config.shared_phm_rule else {})
        for name, shape in b.items():
            self._own(name, shape, fill_b, True, shared if config.shared_W_phm else {})
        self.b = nn.Parameter(torch.zeros(out_dim)) if bias else None

    def _own(self, name: str, shape: tuple, fill: Fill, trained: bool, shared: dict[str, Any]) -> None:
        key = f"{name} {shape}"
        if key not in shared:
            shared[key] = torch.empty(shape)
            with torch.no_grad():
                fill(shared[key])
            if trained:
                shared[key] = nn.Parameter(shared[key])
        if trained:
            self.register_parameter(name, shared[key])
        else:
            self.register_buffer(name, shared[key])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``x``, shape ``(..., in_dim)``, to shape ``(..., out_dim)``."""
        a = self.phm_rule if hasattr(self, "phm_rule") else self.phm_rule_left @ self.phm_rule_right
        b = self.W if hasattr(self, "W") else self.W_left @ self.W_right
        y = x @ torch.einsum("nij,nkl->ikjl", a, b).flatten(2).flatten(0, 1)
        return y if self.b is None else y + self.b


class CompacterLayer(ResidualLayer):
    """The bottleneck of one module: ``compacter(h) = h + up(act(down(h)))`` with projections of the kind `PHMLinear`.

    Args:
        config: The delta's config.
        dim: Size of the dimension of ``h`` that holds the features, which is the last one, shape ``(..., dim)``, as a rule.
        width: Width between the two projections.
        shared: What the layers of one delta share.
        axis: The number of that dimension.
    """

    def __init__(self, config: CompacterConfig, dim: int, width: int, shared: dict[str, Any], axis: int = -1) -> None:
        super().__init__(axis)
        self.activation = activation(config.non_linearity)
        self.down_sampler = PHMLinear(config, dim, width, config.use_bias_down_sampler, shared)
        self.up_sampler = PHMLinear(config, width, dim, config.use_bias_up_sampler, shared)

    def change(self, h: torch.Tensor) -> torch.Tensor:
        """Return the output of the bottleneck for ``h``, shape ``(..., dim)``."""
        return self.up_sampler(self.activation(self.down_sampler(h)))
