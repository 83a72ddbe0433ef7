"""AdaLoRA: low-rank updates whose ranks are allotted while training (Zhang et al., 2023, https://arxiv.org/abs/2303.10512)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from deltaexp.deltas._linear import LinearMap, LowRankDelta
from deltaexp.errors import ConfigError
from deltaexp.lazy import nn, torch
from deltaexp.registry import DeltaConfig, register

if TYPE_CHECKING:
    from deltaexp.targets import Site


@register
@dataclass
class AdaloraConfig(DeltaConfig):
    """AdaLoRA adds ``P diag(e) Q x * alpha / r`` to each chosen linear module and gives up the e that matter least.

    The first `adalora_tinit` of the optimizer steps train all ranks. Then the budget, the number of ranks in all modules
    together, falls with the cube of the steps that are left until `adalora_tfinal` of them remain. These train what was kept.
    """

    delta_type: str = "adalora"
    adalora_init_r: int = 12
    """Rank of every module at the start."""
    adalora_target_r: int = 8
    """Rank of the modules in the end, on average."""
    adalora_alpha: int = 16
    """Numerator of the scale alpha / r."""
    adalora_dropout: float = 0.0
    """Probability of dropping an element of the input of Q while training."""
    adalora_tinit: float = 0.1
    """Fraction of the optimizer steps before the budget falls."""
    adalora_tfinal: float = 0.3
    """Fraction of the optimizer steps after it has fallen."""
    adalora_delta_t: int = 1
    """Steps from one allotment to the next."""
    adalora_beta1: float = 0.85
    """Weight of the past in the running mean of an element's sensitivity."""
    adalora_beta2: float = 0.85
    """Weight of the past in the running mean of the sensitivity's uncertainty."""
    adalora_orth_reg_weight: float = 0.5
    """Weight in the loss of how far P and Q are from orthogonal."""

    default_modules: ClassVar[tuple[str, ...]] = ("attn.q", "attn.v")
    attribute: ClassVar[str] = "adalora"
    learning_rate: ClassVar[float] = 1e-3
    """The paper takes 5e-4 to 2.2e-3 for DeBERTaV3-base on GLUE (Zhang et al., 2023, appendix; the authors' scripts have
    8e-4 for SST-2 and 1.2e-3 for RTE)."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        for key in ("adalora_init_r", "adalora_target_r", "adalora_delta_t"):
            self.require(key, at_least=1)
        self.require("adalora_alpha", above=0)
        self.require("adalora_orth_reg_weight", at_least=0)
        for key in ("adalora_dropout", "adalora_tinit", "adalora_tfinal"):
            self.require(key, at_least=0, below=1)
        for key in ("adalora_beta1", "adalora_beta2"):
            self.require(key, above=0, below=1)
        if self.adalora_target_r > self.adalora_init_r:
            raise ConfigError(
                f"adalora_target_r is {self.adalora_target_r} and adalora_init_r is {self.adalora_init_r}. Ranks are only "
                "given up, so the target must not be above the start."
            )
        if self.adalora_tinit + self.adalora_tfinal >= 1:
            raise ConfigError(
                f"adalora_tinit={self.adalora_tinit} and adalora_tfinal={self.adalora_tfinal} leave no steps in which the "
                "budget could fall. They are fractions of the run's steps; together they must be less than 1."
            )

    def build(self, site: Site) -> AdaloraLayer:
        """Make the layer for a linear module or a convolution."""
        target = LinearMap.at(site, self.delta_type)
        return AdaloraLayer(target, self.adalora_init_r, self.adalora_alpha, self.adalora_dropout)

    def decays(self, parameter: str, dim: int) -> bool:
        """Leave the singular values alone, which are a column."""
        return dim > 1 and not parameter.endswith("lora_E")

    def penalty(self, layers: Sequence[Any]) -> torch.Tensor | None:
        """Return the weighted mean of ``|P^T P - I|`` and ``|Q Q^T - I|``, Frobenius norms, over the layers."""
        if not self.adalora_orth_reg_weight or not layers:
            return None
        matrices: list[Any] = [matrix for layer in layers for matrix in (layer.lora_A, layer.lora_B.T)]
        terms = [_skew(matrix).to(matrices[0].device) for matrix in matrices]
        return self.adalora_orth_reg_weight * torch.stack(terms).mean()

    def after_step(self, layers: Sequence[Any], step: int, total_steps: int) -> None:
        """Note how much every element matters, and give up the ranks that are beyond the budget.

        Until the last allotment a rank is given up by setting its e to zero, so that the gradient may bring it back.
        """
        first = int(self.adalora_tinit * total_steps)
        last = total_steps - int(self.adalora_tfinal * total_steps)
        if step > last or not layers:
            return
        for layer in layers:
            if step < last or not layer.importance:
                layer.note_importance(self.adalora_beta1, self.adalora_beta2)
        if step == last or (step > first and step % self.adalora_delta_t == 0):
            self._allot(layers, self.budget(len(layers), step, first, last), final=step == last)

    def training_state(self, layers: Sequence[Any]) -> dict[str, torch.Tensor]:
        """Return the running means of every layer, while there are any."""
        return {
            f"{number}.{name}.{part}": tensor
            for number, layer in enumerate(layers)
            for name, means in layer.importance.items()
            for part, tensor in zip(("mean", "uncertainty"), means, strict=True)
        }

    def load_training_state(self, layers: Sequence[Any], state: Mapping[str, torch.Tensor]) -> None:
        """Set the running means."""
        for number, layer in enumerate(layers):
            layer.importance = {
                name: (state[f"{key}.mean"].to(parameter), state[f"{key}.uncertainty"].to(parameter))
                for name, parameter in layer.named_parameters()
                if f"{(key := f'{number}.{name}')}.mean" in state
            }

    def budget(self, layers: int, step: int, first: int, last: int) -> int:
        """Return the number of ranks that all layers together may have after a step from ``first`` to ``last``."""
        start, target = self.adalora_init_r * layers, self.adalora_target_r * layers
        return int((start - target) * (1 - (step - first) / (last - first)) ** 3 + target)

    def _allot(self, layers: Sequence[AdaloraLayer], budget: int, final: bool) -> None:
        scores = [layer.scores() for layer in layers]
        order = torch.cat([score.cpu() for score in scores]).argsort(descending=True, stable=True)
        kept = torch.zeros(len(order))
        kept[order[:budget]] = 1
        for layer, mask in zip(layers, kept.split([len(score) for score in scores]), strict=True):
            mask = mask[:, None].to(layer.lora_mask)
            with torch.no_grad():
                layer.lora_E.mul_(mask)
            if final:
                layer.lora_mask.copy_(mask)
                layer.importance = {}


def _skew(matrix: torch.Tensor) -> torch.Tensor:
    """Return how far the rows of a matrix are from orthonormal."""
    identity = torch.eye(len(matrix), device=matrix.device, dtype=matrix.dtype)
    return torch.linalg.matrix_norm(matrix @ matrix.T - identity)


class AdaloraLayer(LowRankDelta):
    """The update of one linear map, in the form of a singular value decomposition.

    ``delta(x) = dropout(x) (Q * e * mask)^T P^T * alpha / r``, with ``Q`` (``lora_A``) of shape ``(r, in_dim)``, ``P``
    (``lora_B``) of shape ``(out_dim, r)``, and the singular values ``e`` (``lora_E``) of shape ``(r, 1)``. The buffer
    ``lora_mask``, of the same shape, is one for the ranks that the last allotment kept and zero for the others; before that it
    is one everywhere. ``P`` and ``Q`` start at N(0, 0.02^2) and ``e`` at zero, so the update starts at zero.

    Args:
        target: The map.
        rank: The rank at the start.
        alpha: The numerator of the scale.
        dropout: Probability of dropping an element of ``x`` while training.
    """

    lora_mask: torch.Tensor

    def __init__(self, target: LinearMap, rank: int, alpha: float, dropout: float) -> None:
        super().__init__(target, dropout)
        self.scale = alpha / (rank + 1e-5)  # as in PEFT, for the same outputs
        self.lora_A = nn.Parameter(torch.empty(rank, target.in_dim))
        self.lora_E = nn.Parameter(torch.zeros(rank, 1))
        self.lora_B = nn.Parameter(torch.empty(target.out_dim, rank))
        nn.init.normal_(self.lora_A, std=0.02)
        nn.init.normal_(self.lora_B, std=0.02)
        self.register_buffer("lora_mask", torch.ones(rank, 1))
        self.importance: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        """While the budget falls: for every parameter, the running means of its elements' sensitivity and its uncertainty."""

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ``Q * e`` and ``P``."""
        return self.lora_A * (self.lora_E * self.lora_mask), self.lora_B

    def note_importance(self, beta1: float, beta2: float) -> None:
        """Take this step's sensitivities, ``|parameter * gradient|``, into the running means."""
        for name, parameter in self.named_parameters():
            grad: Any = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            now = (parameter * grad).abs().detach()
            mean, uncertainty = self.importance.get(name, (torch.zeros_like(now), torch.zeros_like(now)))
            mean = beta1 * mean + (1 - beta1) * now
            uncertainty = beta2 * uncertainty + (1 - beta2) * (now - mean).abs()
            self.importance[name] = mean, uncertainty

    def scores(self) -> torch.Tensor:
        """Return how much each rank matters, shape ``(r,)``: its e, and the means over its vectors in P and Q."""
        element = {name: mean * uncertainty for name, (mean, uncertainty) in self.importance.items()}
        return element["lora_E"][:, 0] + element["lora_A"].mean(1) + element["lora_B"].mean(0)
