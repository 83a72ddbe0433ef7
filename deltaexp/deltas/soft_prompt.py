"""Prompt tuning: learned vectors in front of the input (Lester et al., 2021, https://arxiv.org/abs/2104.08691)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Optional

from deltaexp.errors import AddressingError, ConfigError
from deltaexp.lazy import Layer, nn, torch
from deltaexp.registry import DeltaConfig, register

if TYPE_CHECKING:
    from deltaexp.prompting import Place
    from deltaexp.targets import Site


@register
@dataclass
class SoftPromptConfig(DeltaConfig):
    """A soft prompt is a sequence of learned vectors in front of the embeddings of the input's tokens.

    It goes on the backbone itself, or on the encoder of one that has both; the logits of a causal model include the
    prompt's positions, which come first.
    """

    delta_type: str = "soft_prompt"
    soft_token_num: int = 100
    """Number of learned vectors."""
    token_init: bool = True
    """Whether they start as the embeddings of the vocabulary's first tokens, in its order."""
    init_range: float = 0.5
    """Where they do not, they start uniform between minus and plus this number."""
    pad_id: Optional[int] = None
    """The token id that is not attended to where no attention mask is given; null means that every token is."""
    raw_embeddings: bool = False
    """Whether tokens get the rows of the embedding table as they are, as in OpenDelta, also where the model scales them."""

    attribute: ClassVar[str] = "soft_prompt_layer"
    learning_rate: ClassVar[float] = 3e-2
    """Lester et al., 2021, section 3, take 0.3, constant, with Adafactor that does not scale its steps (so the same would
    do for AdamW), on T5, whose embeddings are larger than others' by an order of magnitude. This is a tenth of it, for all
    backbones; on T5 of the original size try 0.3."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        self.require("soft_token_num", at_least=1)
        self.require("init_range", above=0)
        if self.layers is not None:
            raise ConfigError(f"layers is {self.layers!r}, and a soft prompt is in front of the first block. Leave layers out.")

    def expand(self, name: str, module: nn.Module) -> list[str]:
        """Return the name of the module that takes the prompt: the model chosen, or its encoder."""
        from deltaexp.prompting import place_name

        return [place_name(name, module)]

    def positions(self) -> int:
        """Return the length of the prompt."""
        return self.soft_token_num

    def build(self, site: Site) -> SoftPromptLayer:
        """Make the vectors for one model."""
        return SoftPromptLayer(self, place_of(site, self.soft_token_num))


class PromptLayer(Layer):
    """Learned vectors in front of the embeddings ``E(x)`` of a sequence: ``[p_1; ...; p_P; E(x)]``.

    What the vectors come from is the subclass's matter: it defines `prompt`.

    Args:
        tokens: Their number P.
        place: Where they go.
        pad_id: The token id that is not attended to where the caller gives no mask; None for none.
    """

    def __init__(self, tokens: int, place: Place, pad_id: int | None = None) -> None:
        super().__init__()
        self.raw = False
        self.tokens = tokens
        self.pad_id = pad_id
        self.cut = place.cut
        self.decoder = (place.decoder,)  # in a tuple it is no child, and a copy of the backbone still has its own

    def prompt(self) -> torch.Tensor:
        """Return the vectors, shape ``(P, dim)``."""
        raise NotImplementedError

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Map the embeddings of a batch, shape ``(batch, length, dim)``, to shape ``(batch, P + length, dim)``."""
        prompt = self.prompt().to(embeddings.dtype)
        return torch.cat([prompt.expand(len(embeddings), -1, -1), embeddings], dim=1)

    def connect(self, module: nn.Module, name: str) -> list[Any]:
        """Register the hooks (see `deltaexp.prompting`)."""
        from deltaexp.prompting import connect

        return connect(self, module, name)


class SoftPromptLayer(PromptLayer):
    """A prompt whose vectors are the parameter ``soft_embeds``, shape ``(P, dim)``, itself.

    Args:
        config: Its number of vectors and how they start.
        place: Where they go.
    """

    def __init__(self, config: SoftPromptConfig, place: Place) -> None:
        super().__init__(config.soft_token_num, place, config.pad_id)
        self.raw = config.raw_embeddings
        self.soft_embeds = nn.Parameter(torch.empty(config.soft_token_num, place.weight.shape[1]))
        if place.weight.is_meta:
            pass  # there is nothing to start from
        elif config.token_init:
            rows = torch.arange(config.soft_token_num, device=place.weight.device) % len(place.weight)
            with torch.no_grad():
                self.soft_embeds.copy_(place.embed(rows))
        else:
            nn.init.uniform_(self.soft_embeds, -config.init_range, config.init_range)

    def prompt(self) -> torch.Tensor:
        """Return the vectors, shape ``(P, dim)``."""
        return self.soft_embeds


def place_of(site: Site, tokens: int) -> Place:
    """Return where the prompt of a site goes.

    Raises:
        AddressingError: If the model has no more positions than the prompt has vectors, or no plain embeddings.
    """
    from deltaexp.prompting import find_place

    assert site.backbone is not None
    place = find_place(site.backbone, site.module)
    room = getattr(place.module.config, "max_position_embeddings", None)
    if isinstance(room, int) and 0 < room <= tokens:
        raise AddressingError(
            f"The prompt has {tokens} vectors, and this backbone has {room} positions, which leaves none for the input. "
            "Choose fewer."
        )
    if not isinstance(place.embed(torch.zeros(1, dtype=torch.long, device=place.weight.device)), torch.Tensor):
        raise AddressingError(
            f"The token embeddings of {type(site.backbone).__name__} are more than vectors, as a quantised model's are, so a "
            "soft prompt cannot go in front of them. Choose a delta type that works on modules, such as lora or adapter."
        )
    return place
