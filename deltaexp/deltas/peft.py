"""Any method of the PEFT library (https://github.com/huggingface/peft), by its own config keys."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from deltaexp import registry
from deltaexp.errors import ConfigError
from deltaexp.registry import DeltaConfig, register

if TYPE_CHECKING:
    from torch import nn

    from deltaexp.lazy import Layer
    from deltaexp.targets import Site

ELSEWHERE = {
    "modules_to_save": "Name the modules in unfrozen_modules.",
    "trainable_token_indices": "Put a second delta with peft.peft_type=TRAINABLE_TOKENS on the backbone.",
    "target_parameters": "Name modules in peft.target_modules.",
    "inference_mode": "Leave it out: freeze_module() says what is trained.",
}
"""Keys of PEFT's configs that mean something outside of its layers, and what to do instead."""
SCALES = ("ia3_l", "lambda", "gamma", "magnitude", "lora_E", "boft_s", "road_")
"""What PEFT calls parameters that multiply, in any shape."""
METHODS_ELSEWHERE = {
    "ADALORA": "its ranks are chosen by PEFT's own training loop. Use delta_type=adalora.",
    "ADAPTION_PROMPT": "it replaces whole attention modules. Use delta_type=prefix.",
    "CARTRIDGE": "it fills the cache of the model. Use delta_type=prefix.",
    "CPT": "its prompt depends on a text and its loss on labels of its own. Use delta_type=soft_prompt.",
    "MULTITASK_PROMPT_TUNING": "every call must name a task. Use delta_type=soft_prompt.",
    "POLY": "every call must name a task. Use delta_type=lora.",
    "PREFIX_TUNING": "it fills the cache of the model. Use delta_type=prefix.",
    "SHADOW": "it runs a second model beside the backbone. Use delta_type=adapter.",
    "XLORA": "it mixes adapters that were trained before. Use delta_type=lora.",
}
"""Methods of PEFT that are more than layers at modules, with the reason and what to use instead."""


@register
@dataclass
class PeftConfig(DeltaConfig):
    """A method of the PEFT library, with PEFT's own layers: ``peft`` holds the keys of its config.

    The modules are those of ``peft.target_modules`` or PEFT's defaults for the backbone; with ``modified_modules`` they are
    chosen as for every other delta type. The layers compute what they compute in PEFT; they hang on the modules instead of
    replacing them, so the backbone keeps its names.
    """

    delta_type: str = "peft"
    peft: dict[str, Any] = field(default_factory=lambda: {"peft_type": "LORA"})
    """The config as PEFT knows it: ``peft_type``, ``target_modules``, ``r`` and so on."""

    attribute: ClassVar[str] = "peft"
    learning_rate: ClassVar[float] = 5e-4
    """LoRA's, which is PEFT's default method; see `recommended_learning_rate` for the others."""
    builds_on_meta: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check what can be checked without PEFT, which checks the rest when the delta is built.

        Raises:
            ConfigError: If no method is named, or a key belongs elsewhere.
        """
        super().__post_init__()
        method = self.peft.get("peft_type")
        if not isinstance(method, str):
            raise ConfigError("peft.peft_type must name a method of the PEFT library, e.g. peft.peft_type=BOFT.")
        method = method.upper()
        self.peft = dict(sorted({**self.peft, "peft_type": method}.items()))  # in the order in which it is read back
        if method in METHODS_ELSEWHERE:
            raise ConfigError(f"peft.peft_type={method} cannot be attached as layers: {METHODS_ELSEWHERE[method]}")
        for key, advice in ELSEWHERE.items():
            if self.peft.get(key):
                raise ConfigError(f"peft.{key} is not taken here. {advice}")
        if self.peft.get("bias") == "all":
            raise ConfigError("peft.bias='all' is not taken here. Write unfrozen_modules=[deltas,bias] for it.")
        if self.modified_modules is not None and self.peft.get("target_modules") is not None:
            raise ConfigError("Give either modified_modules or peft.target_modules; both name the modules to modify.")
        if self.modified_modules is None and (self.layers is not None or self.exclude_modules != ["lm_head"]):
            raise ConfigError(
                "layers and exclude_modules go with modified_modules. Without it, PEFT chooses the modules: write "
                "peft.layers_to_transform or peft.exclude_modules."
            )

    def recommended_learning_rate(self) -> float:
        """Return that of the delta type of the same name, such as ``ia3``; where there is none, LoRA's."""
        name = str(self.peft["peft_type"]).lower()
        return registry.get(name).learning_rate if name in registry.known() else self.learning_rate

    def decays(self, parameter: str, dim: int) -> bool:
        """Leave factors and singular values alone, which several of PEFT's methods hold as rows or columns."""
        return dim > 1 and not any(word in parameter for word in SCALES)

    def expand(self, name: str, module: nn.Module) -> list[str]:
        """Return the names of the modules that PEFT chooses in the backbone, or of the one chosen."""
        from deltaexp.interop import peft

        return peft.expand(self, name, module)

    def build(self, site: Site) -> Layer:
        """Make PEFT's layer for one place; it is filled when the last place of all is known."""
        from deltaexp.interop import peft

        return peft.build(self, site)

    def owned(self, site: Site) -> list[str]:
        """Return the bias of a module where PEFT would train it: ``peft.bias="lora_only"`` and its like."""
        trained = str(self.peft.get("bias", "none")).endswith("_only")
        return ["bias"] if trained and getattr(site.module, "bias", None) is not None else []
