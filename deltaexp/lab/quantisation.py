"""Loading a backbone with quantised weights, and saying how it was: what `deltaexp.lab.backbones` asks of the libraries.

Quantised are the linear maps of the base model. Heads stay as they are, new ones in particular: they are trained.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import transformers
from torch import nn

from deltaexp import quantised
from deltaexp.errors import ConfigError, DeltaExpError, listing
from deltaexp.lab.config import BackboneConfig
from deltaexp.quantised import SETTINGS


def options(config: BackboneConfig, chosen: Any, settings: Any) -> dict[str, Any]:
    """Return what ``from_pretrained`` is given so that it quantises; nothing where it is not to.

    Args:
        config: The backbone's config, checked.
        chosen: The class that loads it.
        settings: transformers' config of it.

    Raises:
        ConfigError: If the checkpoint is quantised already.
    """
    if config.quantization is None:
        return {}
    already = getattr(settings, "quantization_config", None)
    if already is not None:
        method = already.get("quant_method") if isinstance(already, dict) else getattr(already, "quant_method", None)
        raise ConfigError(
            f"The checkpoint of {config.name!r} is quantised already ({method or 'in a way of its own'}). Leave "
            "backbone.quantization out; it is loaded as it is."
        )
    kept = heads(chosen, settings)
    if config.quantization.startswith("torchao"):
        from torchao import quantization

        kinds = {"torchao_int8": quantization.Int8WeightOnlyConfig, "torchao_float8": quantization.Float8WeightOnlyConfig}
        made = transformers.TorchAoConfig(kinds[config.quantization](), modules_to_not_convert=kept)
    elif config.quantization == "bnb_8bit":
        made = transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
    else:
        made = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=config.bnb_4bit_type,
            bnb_4bit_use_double_quant=config.bnb_4bit_double,
            bnb_4bit_compute_dtype=getattr(torch, config.bnb_4bit_compute_dtype or config.dtype),
            llm_int8_skip_modules=kept,
        )
    # Of every product it would say that an input in float32 is rounded to float16.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    return {"quantization_config": made}


def heads(chosen: Any, settings: Any) -> list[str]:
    """Return the names of the modules that are not to be quantised: all beside the base model, and what is tied.

    transformers by itself would leave out the last parameter only: a head of two layers would lose its first.
    """
    with torch.device("meta"):
        model = getattr(chosen, "from_config", chosen)(copy.deepcopy(settings))  # an auto class, or a model's own
    output = model.get_output_embeddings()
    kept = {name for name, module in model.named_modules() if output is not None and module is output}
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    kept |= {name.removesuffix(".weight") for name in (*tied, *tied.values())}
    children = [name for name, module in model.named_children() if any(True for _ in module.parameters())]
    # Some, such as T5, hold the parts of the base model themselves.
    if model.base_model_prefix in children:
        kept |= {name for name in children if name != model.base_model_prefix}
    return sorted(kept)


def finish(model: nn.Module, config: BackboneConfig, new: Iterable[str] = ()) -> None:
    """Check what was loaded quantised, and keep it as it is.

    Args:
        model: The model.
        config: The backbone's config.
        new: The names of the parameters that the checkpoint did not have.

    Raises:
        ConfigError: If nothing could be quantised.
        DeltaExpError: If a new parameter is quantised, and so could not be trained.
    """
    names = quantised.names(model)
    if config.quantization is not None and not names:
        raise ConfigError(
            f"backbone.quantization={config.quantization} finds no Linear module to quantise in a {type(model).__name__}. "
            "Take bnb_8bit or bnb_4bit, which know its kind of linear maps, or leave it out."
        )
    wrong = sorted(set(new) & set(names))
    if wrong:
        raise DeltaExpError(
            f"The checkpoint of {config.name!r} has no {listing(wrong, 3)}, which would have to be trained and was quantised. "
            "Leave backbone.quantization out, or name a checkpoint that has it."
        )
    quantised.settle(model)


@contextlib.contextmanager
def trainable(model: Any) -> Iterator[None]:
    """Within this context transformers' Trainer takes a quantised model: it knows no adapters but PEFT's."""
    if not quantised.names(model):
        yield
        return
    model._hf_peft_config_loaded = True
    try:
        yield
    finally:
        del model._hf_peft_config_loaded


def recorded(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a `BackboneConfig` by which a backbone was quantised, as its recorded settings tell."""
    found = {key.removeprefix(SETTINGS): value for key, value in settings.items() if key.startswith(SETTINGS)}
    if found.get("load_in_8bit"):
        return {"quantization": "bnb_8bit"}
    if found.get("load_in_4bit"):
        return {
            "quantization": "bnb_4bit",
            "bnb_4bit_type": found["bnb_4bit_quant_type"],
            "bnb_4bit_double": found["bnb_4bit_use_double_quant"],
            "bnb_4bit_compute_dtype": found["bnb_4bit_compute_dtype"],
        }
    kinds = {"Int8WeightOnlyConfig": "torchao_int8", "Float8WeightOnlyConfig": "torchao_float8"}
    kind = kinds.get(str(found.get("quant_type.default._type")))
    return {"quantization": kind} if kind else {}


def code(model: nn.Module) -> tuple[list[str], str]:
    """Return the lines of Python that ``from_pretrained`` needs to quantise a model like this, and its argument."""
    made: Any = getattr(model.config, "quantization_config", None)
    if made is None or not quantised.names(model):
        return [], ""
    if type(made).__name__ == "BitsAndBytesConfig":
        keys = {key: value for key, value in made.to_diff_dict().items() if key != "quant_method" and not key.startswith("_")}
        keys = {key: value for key, value in keys.items() if value is not None}
        arguments = ", ".join(f"{key}={value!r}" for key, value in keys.items())
        return ["from transformers import BitsAndBytesConfig"], f", quantization_config=BitsAndBytesConfig({arguments})"
    if type(made).__name__ == "TorchAoConfig":
        kind = type(made.quant_type).__name__
        lines = [f"from torchao.quantization import {kind}", "from transformers import TorchAoConfig"]
        kept = f", modules_to_not_convert={made.modules_to_not_convert!r}" if made.modules_to_not_convert else ""
        return lines, f", quantization_config=TorchAoConfig({kind}(){kept})"
    return [], ""  # a checkpoint that is quantised itself
