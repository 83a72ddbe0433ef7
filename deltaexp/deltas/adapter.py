"""Bottleneck adapters in sequence after a module (Houlsby et al., 2019, https://arxiv.org/abs/1902.00751)."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from deltaexp.errors import ConfigError
from deltaexp.lazy import Layer, nn, torch
from deltaexp.registry import DeltaConfig, register

if TYPE_CHECKING:
    from deltaexp.targets import Site

SPELLINGS = {"gelu_orig": "gelu", "leakyrelu": "leaky_relu"}
"""Names of activations in OpenDelta, where they differ from transformers'."""
IN_ONE = {"gelu_new": "gelu_pytorch_tanh", "gelu_fast": "gelu_pytorch_tanh", "gelu_python": "gelu"}
"""Activations that transformers has under a second name as one operation, which keeps one tensor for the backward pass and
not four."""
ACTIVATIONS = (
    "relu", "relu2", "relu6", "leaky_relu", "gelu", "gelu_new", "gelu_fast", "gelu_python", "gelu_pytorch_tanh", "quick_gelu",
    "silu", "swish", "mish", "tanh", "sigmoid", "laplace", "linear", *SPELLINGS,
)  # fmt: skip
"""The names accepted as `non_linearity`: those of transformers' activations that suit a bottleneck, and OpenDelta's."""
VARIANTS = {"houlsby": ("attn.proj", "ff.w2"), "pfeiffer": ("ff.w2",)}
"""The values of `adapter_variant`, and the modules that each of them modifies by default."""


@register
@dataclass
class AdapterConfig(DeltaConfig):
    """An adapter replaces the output h of each chosen module by ``h + up(act(down(h)))``."""

    delta_type: str = "adapter"
    bottleneck_dim: int = 24
    """Width of the bottleneck."""
    non_linearity: str = "gelu_new"
    """Activation between the two projections, by its name in transformers."""
    adapter_variant: str = "houlsby"
    """The default modules: after attention and feed-forward (houlsby), or after feed-forward only, as Pfeiffer et al., 2020
    (https://arxiv.org/abs/2005.00247) found sufficient (pfeiffer)."""
    adapter_drop: int = 0
    """In how many of the first blocks of every stack the adapters are left out (AdapterDrop, Rücklé et al., 2021,
    https://arxiv.org/abs/2010.11918)."""

    default_modules: ClassVar[tuple[str, ...]] = VARIANTS["houlsby"]
    attribute: ClassVar[str] = "adapter"
    learning_rate: ClassVar[float] = 3e-4
    """Houlsby et al., 2019, section 3.2, sweep 3e-5, 3e-4 and 3e-3 on GLUE, and their own command for MRPC has 3e-4; so
    have the adapters on T5 of Karimi Mahabadi et al., 2021, and those on RoBERTa of Hu et al., 2021, which were trained
    with AdamW."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        self.require("bottleneck_dim", at_least=1)
        self.require("adapter_drop", at_least=0)
        self.require_one_of("non_linearity", ACTIVATIONS)
        self.require_one_of("adapter_variant", VARIANTS)

    def defaults(self) -> tuple[str, ...]:
        """Return the default modules of the variant."""
        return VARIANTS[self.adapter_variant]

    def build(self, site: Site) -> AdapterLayer | None:
        """Make the layer for a module's output; None in a block that AdapterDrop leaves out.

        Raises:
            ConfigError: If it leaves out all of them.
        """
        dropped = self._dropped(site)
        if f"{site.name}.".startswith(dropped):
            return None
        dim, axis = output_width(site, self.delta_type)
        return AdapterLayer(dim, self.bottleneck_dim, self.non_linearity, axis)

    def _dropped(self, site: Site) -> tuple[str, ...]:
        """Return what the names of the modules in the blocks without adapters start with."""
        if self.adapter_drop == 0 or site.backbone is None:
            return ()
        from deltaexp.structure import blocks

        if "dropped" not in site.shared:  # the same for all places
            dropped = tuple(f"{block}." for stack in blocks(site.backbone) for block in stack[: self.adapter_drop])
            if all(f"{place.name}.".startswith(dropped) for place in site.shared["sites"]):
                raise ConfigError(
                    f"adapter_drop is {self.adapter_drop}, which leaves out the adapters of that many of the first blocks of "
                    f"every stack, and all {site.total} chosen modules lie in these. Make it less."
                )
            site.shared["dropped"] = dropped
        return site.shared["dropped"]


def output_width(site: Site, delta_type: str) -> tuple[int, int]:
    """Return size and number of the dimension of a module's output that holds the features: the last one, or the channels.

    Raises:
        AddressingError: If the size is not known.
    """
    if isinstance(site.module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return site.module.out_channels, 1
    return site.out_dim(delta_type), -1


def activation(name: str) -> nn.Module:
    """Return the activation that one of `ACTIVATIONS` names."""
    from transformers.activations import ACT2FN

    name = SPELLINGS.get(name, name)
    return ACT2FN[IN_ONE.get(name, name)]


def bottleneck(in_dim: int, width: int, out_dim: int, non_linearity: str) -> nn.Sequential:
    """Return the two projections of an adapter with the activation between them.

    The weights start at N(0, 0.01^2) and the biases at zero, so that the result starts close to zero.
    """
    down, up = nn.Linear(in_dim, width), nn.Linear(width, out_dim)
    for projection in (down, up):
        nn.init.normal_(projection.weight, std=0.01)
        nn.init.zeros_(projection.bias)
    return nn.Sequential(OrderedDict(down_proj=down, non_linear=activation(non_linearity), up_proj=up))


class ResidualLayer(Layer):
    """What adds to a module's output ``h`` a function of it: ``h + change(h)``.

    Args:
        axis: The number of the dimension of ``h`` that holds the features.
    """

    insertion = "sequential"
    tokenwise = True

    def __init__(self, axis: int = -1) -> None:
        super().__init__()
        self.axis = axis

    def change(self, h: torch.Tensor) -> torch.Tensor:
        """Return what is added to ``h``, shape ``(..., dim)``."""
        raise NotImplementedError

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """Map ``h`` to the new output of the same shape."""
        if self.axis == -1:
            return h + self.change(h)
        return h + self.change(h.movedim(self.axis, -1)).movedim(-1, self.axis)


class AdapterLayer(ResidualLayer):
    """The bottleneck of one module: ``adapter(h) = h + W_up act(W_down h + b_down) + b_up``.

    The weights start at N(0, 0.01^2) and the biases at zero, so that the layer starts close to the identity.

    Args:
        dim: Size of the dimension of ``h`` that holds the features, which is the last one, shape ``(..., dim)``, as a rule.
        bottleneck_dim: Width between the two projections.
        non_linearity: Name of the activation in transformers.
        axis: The number of that dimension.
    """

    def __init__(self, dim: int, bottleneck_dim: int, non_linearity: str, axis: int = -1) -> None:
        super().__init__(axis)
        self.modulelist = bottleneck(dim, bottleneck_dim, dim, non_linearity)

    def change(self, h: torch.Tensor) -> torch.Tensor:
        """Return the output of the bottleneck for ``h``, shape ``(..., dim)``."""
        return self.modulelist(h)
