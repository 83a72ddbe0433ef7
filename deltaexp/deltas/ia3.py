"""(IA)^3: vectors that scale keys, values and the inside of the feed-forward (Liu et al., 2022, https://arxiv.org/abs/2205.05638)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Optional

from deltaexp.addressing import matches
from deltaexp.deltas.adapter import output_width
from deltaexp.errors import AddressingError
from deltaexp.lazy import Layer, nn, torch
from deltaexp.registry import DeltaConfig, register

if TYPE_CHECKING:
    from deltaexp.targets import Site


@register
@dataclass
class Ia3Config(DeltaConfig):
    """(IA)^3 multiplies by a vector the output of each chosen module, or the input of what leads out of the feed-forward."""

    delta_type: str = "ia3"
    ia3_feedforward_modules: Optional[list[str]] = None
    """Patterns of those of the chosen modules whose input is scaled instead of the output; null means `ff.w2`."""

    default_modules: ClassVar[tuple[str, ...]] = ("attn.k", "attn.v", "crossattn.k", "crossattn.v", "ff.w2")
    attribute: ClassVar[str] = "ia3"
    learning_rate: ClassVar[float] = 3e-3
    """Liu et al., 2022, appendix (T-Few; the authors' config has 3e-3 too), with Adafactor. That scales a step by the norm
    of what it changes, which is 1 for vectors that start at 1; so AdamW's steps have the same size."""

    def build(self, site: Site) -> Ia3Layer:
        """Make the layer for a module.

        Raises:
            AddressingError: If the input of a module that is no linear map is to be scaled, or a pattern in
                ``ia3_feedforward_modules`` means none of the chosen modules.
        """
        if self._scales_input(site):
            return Ia3Layer(site.linear_dims(self.delta_type)[0], scales_input=True)
        dim, axis = output_width(site, self.delta_type)
        return Ia3Layer(dim, axis=axis)

    def _scales_input(self, site: Site) -> bool:
        from deltaexp.structure import linear_dims

        if self.ia3_feedforward_modules is None:
            return site.role == "ff.w2" and linear_dims(site.module) is not None
        for pattern in self.ia3_feedforward_modules if site.index == 0 else ():
            if not any(self._names(pattern, place) for place in site.shared["sites"]):
                raise AddressingError(
                    f"{pattern!r} in ia3_feedforward_modules means none of the modules that are modified. Name modules that "
                    "modified_modules names as well."
                )
        return any(self._names(pattern, site) for pattern in self.ia3_feedforward_modules)

    @staticmethod
    def _names(pattern: str, site: Site) -> bool:
        return matches(pattern, site.name) or matches(pattern.replace("@", ""), site.role or "")


class Ia3Layer(Layer):
    """The vector of one module: ``ia3(h) = l * h``, where ``h`` is its output or its input; ``l`` starts at one.

    Args:
        dim: Size of the dimension of ``h`` that holds the features, which is the last one, shape ``(..., dim)``, as a rule.
        scales_input: Whether ``h`` is the module's input.
        axis: The number of that dimension.
    """

    tokenwise = True

    def __init__(self, dim: int, scales_input: bool = False, axis: int = -1) -> None:
        super().__init__()
        self.insertion = "input" if scales_input else "sequential"
        self.axis = axis
        self.ia3_l = nn.Parameter(torch.ones(dim))

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """Scale ``h``, shape ``(..., dim)``."""
        if self.axis == -1:
            return h * self.ia3_l
        return (h.movedim(self.axis, -1) * self.ia3_l).movedim(-1, self.axis)

    def merged(self, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return a linear map's weight, shape ``(out_dim, in_dim)``, and bias with the scaling in them."""
        if self.insertion == "input":
            return weight * self.ia3_l, bias
        return weight * self.ia3_l[:, None], None if bias is None else bias * self.ia3_l
