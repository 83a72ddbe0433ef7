"""No delta at all: the baseline in which only what ``unfrozen_modules`` names, such as a new head, is trained and saved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from deltaexp.errors import ConfigError
from deltaexp.registry import DeltaConfig, register


@register
@dataclass
class NoneConfig(DeltaConfig):
    """This type modifies nothing; ``unfrozen_modules`` says what is trained."""

    delta_type: str = "none"

    trains_nothing: ClassVar[bool] = True
    learning_rate: ClassVar[float] = 1e-3
    """The usual one of Adam (Kingma & Ba, 2015): only a new head is trained, on features that stay what they are."""

    def __post_init__(self) -> None:
        """Refuse keys that would have no effect."""
        super().__post_init__()
        for key in ("modified_modules", "layers"):
            if getattr(self, key) is not None:
                raise ConfigError(
                    f"The delta type 'none' modifies nothing, and {key} is {getattr(self, key)!r}. Leave it out; what is "
                    "trained is named in unfrozen_modules."
                )
