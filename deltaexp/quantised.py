"""Weights that are held quantised, by bitsandbytes or torchao: which they are, what identifies them, what they stand for.

Such a weight is more than one tensor: packed integers, and the scales that turn them into numbers. bitsandbytes keeps the
scales as attributes, of which ``state_dict()`` of the module tells; a weight of torchao is a tensor subclass that wraps the
others. What identifies a backbone are all of them. The libraries are not imported here: who has such weights has them loaded.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from deltaexp.errors import AddressingError, listing

LIBRARIES = ("bitsandbytes", "torchao")
INSTEAD = "Load the backbone without quantisation (backbone.quantization=null) for that"
SETTINGS = "quantization_config."
"""What the settings of a backbone are called that tell how it was quantised."""
GUARDED = "_deltaexp_bias"
"""Attribute of a module while it computes: the values of its bias."""


def library(tensor: torch.Tensor | None) -> str | None:
    """Return the library in whose format a weight is quantised; None for one that is not."""
    if type(tensor) in (torch.Tensor, nn.Parameter):  # the compiler cannot look into what follows
        return None
    names = {kind.__module__.partition(".")[0] for kind in type(tensor).__mro__}
    found = next((name for name in LIBRARIES if name in names), None)
    if found == "bitsandbytes" and tensor is not None and tensor.is_floating_point():
        return None  # a weight of its 8-bit layers that was not quantised yet, or is not to be
    return found


def weight_library(module: nn.Module) -> str | None:
    """Return the library in whose format a module's own weight is quantised; None where it is not."""
    weight = module._parameters.get("weight")
    return library(weight)


def names(backbone: nn.Module) -> list[str]:
    """Return the names of the quantised weights of a backbone."""
    return [name for name, parameter in backbone.named_parameters() if library(parameter)]


def numel(parameter: torch.Tensor) -> int:
    """Return the number of elements that a parameter stands for; two of those of 4 bits are packed into a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else int(torch.Size(state.shape).numel())


def parts(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the plain tensors of a module's own quantised weights, under names that begin with the weight's or, where the
    library says so, are its own (``SCB``); nothing where none is quantised."""
    quantised = {name: p for name, p in module._parameters.items() if p is not None and library(p)}
    result: dict[str, torch.Tensor] = {}
    for name, parameter in quantised.items():
        if library(parameter) == "torchao":
            result |= _wrapped(parameter, name)
        elif not result:
            saved: dict[str, Any] = {}
            module._save_to_state_dict(saved, "", False)
            others = {*module._parameters, *module._buffers} - quantised.keys()
            result |= {key: _plain(value) for key, value in saved.items() if key not in others}
    return result


def _wrapped(tensor: Any, name: str) -> dict[str, torch.Tensor]:
    """Return the tensors that a tensor subclass wraps, by PyTorch's protocol for them."""
    result: dict[str, torch.Tensor] = {}
    for attribute in tensor.__tensor_flatten__()[0]:
        inner = getattr(tensor, attribute)
        below = f"{name}.{attribute}"
        result |= _wrapped(inner, below) if hasattr(inner, "__tensor_flatten__") else {below: inner.detach()}
    return result


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    # Moving a weight of bitsandbytes to another device would move the scales of the backbone's own.
    return tensor.detach().as_subclass(torch.Tensor)


def dequantised(module: nn.Module) -> torch.Tensor:
    """Return the weight that a module's quantised one stands for, a new tensor of shape ``(out_dim, in_dim)``."""
    weight: Any = module.weight
    if library(weight) == "torchao":
        return weight.detach().dequantize()
    functional = sys.modules["bitsandbytes"].functional
    if getattr(weight, "quant_state", None) is not None:
        return functional.dequantize_4bit(_plain(weight), weight.quant_state)
    scales: Any = parts(module)["SCB"]
    return functional.int8_vectorwise_dequant(_plain(weight), scales)


def settings(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return of the settings of a backbone those that tell how its weights were quantised, and how they compute.

    Args:
        found: The settings with dotted names, as `deltaexp.verification.settings` has them.
    """
    of_bits = {True: r"bnb_4bit_(quant_type|use_double_quant|compute_dtype)", False: "llm_int8_threshold"}
    keys = of_bits[bool(found.get(f"{SETTINGS}load_in_4bit"))]
    tells = re.compile(rf"{re.escape(SETTINGS)}(quant_method|load_in_[48]bit|quant_type\.default\._type|{keys})")
    return {key: getattr(value, "value", value) for key, value in found.items() if tells.fullmatch(key)}


def check_trainable(trained: Iterable[str], parameters: dict[str, nn.Parameter]) -> None:
    """Check that what is to be trained in place is not quantised.

    Raises:
        AddressingError: If one of the parameters is: it holds integers, which no gradient can move.
    """
    wrong = sorted(name for name in trained if name in parameters and library(parameters[name]))
    if wrong:
        raise AddressingError(
            f"{listing(wrong, 3)} {'is' if len(wrong) == 1 else 'are'} quantised and cannot be trained in place. Take a delta "
            f"type that adds layers, such as lora, or leave these modules out. {INSTEAD}."
        )


def settle(backbone: nn.Module) -> None:
    """Keep the layers of bitsandbytes from changing what they hold while they compute; nothing where there are none.

    On CPUs with AVX512-BF16, a 4-bit layer would pack its weight anew and round the scales; and every layer would leave its
    bias in the dtype of the input, which is another one under autocast.
    """
    for module in backbone.modules():
        if weight_library(module) != "bitsandbytes":
            continue
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
        hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
        if module._parameters.get("bias") is not None and _keep_bias not in hooks:
            module.register_forward_pre_hook(_keep_bias)
            module.register_forward_hook(_restore_bias, always_call=True)


def _keep_bias(module: Any, _: Any) -> None:
    module.__dict__[GUARDED] = module.bias.data


def _restore_bias(module: Any, *_: Any) -> None:
    values = module.__dict__.pop(GUARDED, None)
    if values is not None and values.dtype != module.bias.dtype:
        module.bias.data = values
