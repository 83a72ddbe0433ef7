"""What backbone and trackers ask of the machine, checked before PyTorch is imported: values, packages, contradictions."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from deltaexp.errors import ConfigError, unknown

if TYPE_CHECKING:
    from deltaexp.lab.config import BackboneConfig

DTYPES = ("float32", "bfloat16", "float16", "auto")
ATTENTION = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3")
ON_GPUS = ATTENTION[2:]
"""Those of which the gradient is computed on GPUs only."""
QUANTIZATION = {
    "bnb_8bit": "bitsandbytes",
    "bnb_4bit": "bitsandbytes",
    "torchao_int8": "torchao",
    "torchao_float8": "torchao",
}
"""The ways of quantising a backbone while it is loaded, and the package that each needs."""
NOT_TRAINED = {
    "torchao_int4": "Its 4-bit kernels compute no gradient, so nothing could be trained on them; take bnb_4bit",
    "torchao_int8_dynamic": "Rounding the activations stops the gradient, so nothing could be trained below; take torchao_int8",
}
FOUR_BIT = ("nf4", "fp4")
SPREAD = ("auto", "balanced", "balanced_low_0", "sequential")
DEVICE = re.compile(r"(cpu|mps|(cuda|xpu|npu|hpu)(:\d+)?)")
TRACKERS = ("wandb", "tensorboard")
"""Each is the name of its package, and of what installs that."""
PACKAGES = {"flash_attention_2": ("flash_attn", "flash-attn"), "flash_attention_3": ("flash_attn_interface", "flash-attn-3")}


def check(config: BackboneConfig) -> None:
    """Check how a backbone is to be loaded.

    Raises:
        ConfigError: If a value is not allowed, two contradict each other, or a package is missing.
    """
    if config.dtype not in DTYPES:
        raise ConfigError(unknown("backbone.dtype", config.dtype, DTYPES))
    place = config.device_map
    if place is not None and place not in SPREAD and not DEVICE.fullmatch(place):
        raise ConfigError(
            f"{unknown('backbone.device_map', place, SPREAD)} It may also be the name of a device, such as cuda:0 or cpu."
        )
    if config.attention is not None:
        if config.attention not in ATTENTION:
            raise ConfigError(unknown("backbone.attention", config.attention, ATTENTION))
        module, package = PACKAGES.get(config.attention, ("", ""))
        if module and importlib.util.find_spec(module) is None:
            raise ConfigError(
                f"backbone.attention={config.attention} needs the package {package!r}, which is not installed, and a CUDA GPU. "
                f"Run `pip install {package}`, or take backbone.attention=sdpa."
            )
        if module and config.dtype == "float32":
            raise ConfigError(
                f"backbone.attention={config.attention} computes in bfloat16 or float16 only, and backbone.dtype is float32. "
                "Take backbone.dtype=bfloat16."
            )
    _check_quantization(config)


def _check_quantization(config: BackboneConfig) -> None:
    wanted = config.quantization
    if config.bnb_4bit_type not in FOUR_BIT:
        raise ConfigError(unknown("backbone.bnb_4bit_type", config.bnb_4bit_type, FOUR_BIT))
    if config.bnb_4bit_compute_dtype not in (None, *DTYPES[:-1]):
        raise ConfigError(unknown("backbone.bnb_4bit_compute_dtype", str(config.bnb_4bit_compute_dtype), DTYPES[:-1]))
    if wanted is None:
        return
    if wanted in NOT_TRAINED:
        raise ConfigError(f"backbone.quantization={wanted} is not offered. {NOT_TRAINED[wanted]}.")
    if wanted not in QUANTIZATION:
        raise ConfigError(unknown("backbone.quantization", wanted, QUANTIZATION))
    package = QUANTIZATION[wanted]
    if importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"backbone.quantization={wanted} needs the package {package!r}, which is not installed. Run `pip install "
            f'"deltaexp[{package}]"`, or leave it out.'
        )
    if config.dtype == "auto":
        raise ConfigError(
            f"backbone.quantization={wanted} needs to know in which dtype the rest is held: name one, such as "
            "backbone.dtype=bfloat16, in place of auto."
        )


def check_trackers(names: Sequence[str]) -> None:
    """Check that trackers are known and their packages installed.

    Raises:
        ConfigError: If one is not.
    """
    for name in names:
        if name not in TRACKERS:
            raise ConfigError(unknown("tracker.names", name, TRACKERS))
        found = importlib.util.find_spec(name)
        # A folder ./wandb, in which W&B keeps its logs, is no package, though Python takes it for one.
        if found is None or found.origin is None:
            raise ConfigError(
                f"tracker.names={name} needs the package {name!r}, which is not installed. Run `pip install "
                f'"deltaexp[{name}]"`, or leave it out.'
            )
