"""Writing ``delta_type=peft``: PEFT's own layers, saved by PEFT's own code."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from deltaexp.interop.peft import ADAPTER, PeftLayer, _config, _library
from deltaexp.interop.peft_layers import Written, target_modules

if TYPE_CHECKING:
    from deltaexp.model import DeltaModel


def generic(model: DeltaModel) -> Written:
    """Put PEFT's model around a copy of the backbone that shares its weights, and the delta's tensors into it."""
    library = _library()
    layers: dict[str, Any] = {attachment.site: attachment.layer for attachment in model.attachments}
    values = copy.deepcopy(model.config.peft)  # type: ignore[attr-defined]
    values.pop("bias", None)  # what was trained of them is written with the other parameters
    if not all(isinstance(layer, PeftLayer) for layer in layers.values()):
        return _prompt(model)
    if model.config.modified_modules is not None:
        values["target_modules"] = target_modules(list(layers), model.backbone_model)
    with model.detached() as backbone, torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's about its own defaults were given when the delta was made
        shared: dict[int, Any] = {id(tensor): tensor for tensor in (*backbone.parameters(), *backbone.buffers())}
        trainable = {parameter: parameter.requires_grad for parameter in backbone.parameters()}
        try:
            around = library.get_peft_model(copy.deepcopy(backbone, shared), _config(values))
            for site, layer in layers.items():
                wrapper = around.base_model.model.get_submodule(site)
                for name, tensor in layer.tuner.state_dict(keep_vars=True).items():
                    _set(wrapper, name, tensor.detach())
                for key in layer.tables:
                    vars(wrapper)[key][ADAPTER] = getattr(layer, f"fixed_{key}").detach()
            tensors = library.get_peft_model_state_dict(around, save_embedding_layers=False)
        finally:
            for parameter, required in trainable.items():
                parameter.requires_grad_(required)
    known = around.peft_config[ADAPTER]
    defaults = type(known)()
    keys = {
        field.name: getattr(known, field.name)
        for field in dataclasses.fields(known)
        if getattr(known, field.name) != getattr(defaults, field.name, None) or field.name in values
    }
    keys = {name: sorted(value) if isinstance(value, set) else value for name, value in keys.items()}
    keys.pop("auto_mapping", None)
    return {**keys, "peft_type": values["peft_type"]}, {name: tensor.detach() for name, tensor in tensors.items()}


def _set(wrapper: nn.Module, name: str, value: torch.Tensor) -> None:
    """Replace a parameter or a buffer of a wrapper by a value."""
    owner, _, leaf = name.rpartition(".")
    holder: Any = wrapper.get_submodule(owner)
    if leaf in holder._parameters:
        holder._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    else:
        holder._buffers[leaf] = value


def _prompt(model: DeltaModel) -> Written:
    """Write one of PEFT's prompts by the vectors that it gives."""
    from deltaexp.interop.peft_export import prompt

    return prompt(model)
