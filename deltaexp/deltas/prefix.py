"""Prefix tuning: learned keys and values in front of self-attention (Li & Liang, 2021, https://arxiv.org/abs/2101.00190)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from deltaexp.errors import AddressingError, listing
from deltaexp.lazy import Layer, nn, torch
from deltaexp.registry import DeltaConfig, register

if TYPE_CHECKING:
    from deltaexp.targets import Site


@register
@dataclass
class PrefixConfig(DeltaConfig):
    """Prefix tuning lets each chosen self-attention see learned keys and values: ``softmax(q [P_k; K]^T) [P_v; V]``.

    What is learned has no position and is never masked. It is made by one MLP for all layers, or learned directly.
    """

    delta_type: str = "prefix"
    prefix_token_num: int = 6
    """How many keys and values each attention gets."""
    reparameterize: bool = True
    """Whether an MLP makes them while training, which is steadier; False trains them directly."""
    embed_dim: int = 512
    """Width of the MLP's input."""
    mid_dim: int = 512
    """Width of the MLP's hidden layer."""
    opendelta_positions: bool = False
    """Whether, in a T5, relative positions are OpenDelta's, for which its checkpoints were trained: the prefix is at positions
    0 to P - 1, before the text, in the layer of a stack that makes the relative bias, and later layers have none."""
    prefix_positions: str = "none"
    """"none": the text starts at position 0, as without a prefix; "shifted": it starts at P, as where a cache holds the prefix,
    which is PEFT's way."""

    default_modules: ClassVar[tuple[str, ...]] = ("attn",)
    attribute: ClassVar[str] = "prefix"
    learning_rate: ClassVar[float] = 1e-3
    """Li & Liang, 2021, take 5e-5 with the MLP, for ten thousands of steps on GPT-2 and BART. Without it P-tuning v2 (Liu
    et al., 2022; the authors' scripts for RTE and BoolQ) takes 5e-3, AdamW both. This lies between them, for shorter
    trainings with it."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        for key in ("prefix_token_num", "embed_dim", "mid_dim"):
            self.require(key, at_least=1)
        self.require_one_of("prefix_positions", ("none", "shifted"))

    def recommended_learning_rate(self) -> float:
        """Return the one for what is trained: the MLP, or keys and values themselves."""
        return self.learning_rate if self.reparameterize else 5e-3

    def positions(self) -> int:
        """Return the length of the prefix where the text starts behind it."""
        return self.prefix_token_num if self.prefix_positions == "shifted" else 0

    def build(self, site: Site) -> _CarriedLayer | None:
        """Make the layer for one attention; None for what is none, where the default modules have others that are.

        Raises:
            AddressingError: If the module is no attention, or one that does not use transformers' attention interface.
        """
        if "places" not in site.shared:
            site.shared["places"] = self._places(site.shared["sites"])
        places: list[Place | None] = site.shared["places"]
        place = places[site.index]
        if place is None:
            return None
        layer = self._layer(site, place, places)
        layer.opendelta_positions = self.opendelta_positions
        if self.prefix_positions == "shifted" and "positioned" not in site.shared:
            from deltaexp.attention import positioned

            assert site.backbone is not None
            site.shared["positioned"] = positioned(site.backbone)
            layer.shift = self.prefix_token_num, site.shared["positioned"]
        return layer

    def _layer(self, site: Site, place: Place, places: list[Place | None]) -> _CarriedLayer:
        if not self.reparameterize:
            return PrefixLayer(place.core, self.prefix_token_num, place.widths)
        before = [sum(other.widths) for other in places[: site.index] if other is not None]
        if not before:
            total = sum(sum(other.widths) for other in places if other is not None)
            site.shared["reparams"] = Reparameterization(self.prefix_token_num, self.embed_dim, self.mid_dim, total)
        return ReparameterizedPrefixLayer(place.core, place.widths, site.shared["reparams"], sum(before), own=not before)

    def _places(self, sites: list[Site]) -> list[Place | None]:
        """Return where the layers go; with the default modules, what cannot carry one is left out, but not all of it."""
        places: list[Place | None] = []
        refusals = []
        for site in sites:
            try:
                places.append(_place(site))
            except AddressingError as error:
                places.append(None)
                refusals.append(error)
        if refusals and (self.common_structure is not True or len(refusals) == len(sites)):
            raise refusals[0]
        return places


class Place(NamedTuple):
    """An attention that can carry a layer."""

    core: str
    """Its name, relative to the module that the layer hangs on."""
    widths: tuple[int, int]
    """The widths of its keys and values, all key heads together."""


class _CarriedLayer(Layer):
    """A layer that an attention module carries (see `deltaexp.attention`).

    Args:
        core: The name of that module, relative to the one that the layer hangs on.
    """

    opendelta_positions = False
    """See `PrefixConfig`."""
    tokenwise = True
    shift: tuple[int, nn.Module] | None = None
    """How far the text's positions are moved, and the model that takes them. One layer of a delta has it, in a tuple, so that
    the model is no child of it."""

    def __init__(self, core: str) -> None:
        super().__init__()
        self.core = core

    @property
    def keeps_rows(self) -> bool:
        """Whether nothing is moved or left out for all rows of a batch."""
        return self.shift is None and not self.opendelta_positions

    def connect(self, module: nn.Module, name: str) -> list[Any]:
        """Let the attention module in ``module`` carry the layer."""
        from deltaexp.attention import carry, forget_bias, shift_positions

        core = module.get_submodule(self.core)
        handles: list[Any] = [carry(core, self)]
        if self.shift is not None:
            count, model = self.shift
            handles.append(model.register_forward_pre_hook(partial(shift_positions, count=count), with_kwargs=True))
        if hasattr(core, "has_relative_attention_bias"):
            handles.append(core.register_forward_hook(forget_bias))
        return handles


class PrefixLayer(_CarriedLayer):
    """The learned keys and values of one attention.

    ``past_key``, shape ``(P, key heads * head_dim)``, and ``past_value`` start standard normal.

    Args:
        core: The name of the attention module, relative to the one that the layer hangs on.
        length: The number P of keys and values.
        widths: The widths of keys and values.
    """

    def __init__(self, core: str, length: int, widths: tuple[int, int]) -> None:
        super().__init__(core)
        self.past_key = nn.Parameter(torch.randn(length, widths[0]))
        self.past_value = nn.Parameter(torch.randn(length, widths[1]))

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values, shapes ``(P, width)``."""
        return self.past_key, self.past_value


class ReparameterizedPrefixLayer(_CarriedLayer):
    """The keys and values of one attention, made by the MLP that all layers share and the first one holds.

    Args:
        core: The name of the attention module, relative to the one that the layer hangs on.
        widths: The widths of keys and values.
        reparams: The MLP.
        start: Where in its output this layer's keys start; its values follow.
        own: Whether this layer is the one that holds the MLP, with its parameters.
    """

    def __init__(self, core: str, widths: tuple[int, int], reparams: Reparameterization, start: int, own: bool) -> None:
        super().__init__(core)
        self.widths, self.start = widths, start
        if own:
            self.reparams = reparams
        else:  # only refers to it: as a child, the MLP would be in the backbone once for every layer
            self.__dict__["reparams"] = reparams

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values, shapes ``(P, width)``."""
        return self.reparams(self.start, self.widths)


class Reparameterization(Layer):
    """The MLP that makes the keys and values of all layers: ``control_trans_2 tanh(control_trans_0 wte)``.

    Each layer computes its own rows of the output, as any layer may be run alone or anew (gradient checkpointing).

    Args:
        length: The number P of keys and values.
        embed_dim: Width of the input ``wte``, shape ``(P, embed_dim)``.
        mid_dim: Width of the hidden layer.
        out_dim: Sum of the widths of all layers' keys and values.
    """

    def __init__(self, length: int, embed_dim: int, mid_dim: int, out_dim: int) -> None:
        super().__init__()
        self.wte = nn.Embedding(length, embed_dim)
        self.control_trans = nn.Sequential(nn.Linear(embed_dim, mid_dim), nn.Tanh(), nn.Linear(mid_dim, out_dim))

    def forward(self, start: int, widths: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return two consecutive parts of the output, of these widths, the first from ``start`` on."""
        first, activation, last = self.control_trans.children()
        rows = [parameter[start : start + sum(widths)] for parameter in last.parameters()]
        out = nn.functional.linear(activation(first(self.wte.weight)), *rows)
        key, value = out.split(widths, dim=-1)
        return key, value


def _place(site: Site) -> Place:
    """Return the attention in ``site.module``."""
    from deltaexp.attention import attention_cores, chooses_by_name

    cores = attention_cores(site.module)
    where = f"{site.name!r} ({type(site.module).__name__})"
    if not cores:
        raise AddressingError(
            f"{where} does not hand its keys and values to transformers' attention interface: it computes attention itself, or "
            "is none. Prefix tuning cannot go there. Choose attention modules of another backbone, or another delta type; "
            "soft_prompt is the nearest."
        )
    if len(cores) > 1:
        names = listing([f"{site.name}.{core}" for core in cores], 3)
        raise AddressingError(
            f"{where} holds {len(cores)} attentions. Name the ones to modify in modified_modules, such as {names}."
        )
    core = site.module.get_submodule(cores[0])
    if chooses_by_name(core):
        raise AddressingError(
            f"{where} chooses the keys that a query sees in a way that depends on the name of the attention function, which "
            "prefix tuning changes. Choose another delta type."
        )
    return Place(cores[0], _widths(site, ".".join(part for part in (site.name, cores[0]) if part), core))


def _widths(site: Site, name: str, core: Any) -> tuple[int, int]:
    """Return the widths of an attention's keys and values, all key heads together."""
    if hasattr(core, "qk_head_dim") and hasattr(core, "v_head_dim"):  # latent attention: the heads' sizes are its own
        return core.num_heads * core.qk_head_dim, core.num_heads * core.v_head_dim
    key, value = (_projected(site, name, letter) for letter in "kv")
    if key is None or value is None:
        raise AddressingError(
            f"How wide the keys and values of {name!r} are is not to be seen from its projections, so prefix tuning cannot go "
            "there. Choose another delta type."
        )
    return key, value


def _projected(site: Site, name: str, letter: str) -> int | None:
    from deltaexp.structure import common_structure, linear_dims

    assert site.backbone is not None
    if "structure" not in site.shared:
        with torch.device("cpu"):  # the layers may be being made on the meta device, on which there is nothing to compare
            site.shared["structure"] = common_structure(site.backbone)
    for inner, roles in site.shared["structure"].items():
        role = next((r for r in roles if r.name in (f"attn.{letter}", f"crossattn.{letter}")), None)
        if role is not None and f"{inner}.".startswith(f"{name}." if name else ""):
            if role.rows is not None:
                return role.rows.groups * role.rows.width
            dims = linear_dims(site.backbone.get_submodule(inner))
            return dims[1] if dims is not None and len(roles) == 1 else None
    return None
