"""Reading an adapter that PEFT saved (https://github.com/huggingface/peft) as a delta of deltaexp.

The names of its tensors tell where its layers are, and their shapes how large they are: nothing is made in a size that only
the config names. What PEFT's model computed is reproduced. Methods that deltaexp has itself become its own delta types; others
become ``delta_type=peft``. PEFT records no digest of anything, so the answer of the hash check is "unknown".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deltaexp import addressing
from deltaexp.checkpoint import SavedDelta
from deltaexp.deltas.peft import METHODS_ELSEWHERE
from deltaexp.errors import CheckpointError, DeltaExpError, ExtraTensorError, MissingTensorError, listing
from deltaexp.interop import peft_methods as methods
from deltaexp.interop.opendelta import pattern_of
from deltaexp.interop.peft_files import PREFIX, Adapter, check_floating, read_adapter, read_values, recognised
from deltaexp.registry import DeltaConfig
from deltaexp.structure import backbone_modules, backbone_parameters

__all__ = ["METHODS", "read", "read_config", "recognised"]

HEADS = {
    "SEQ_CLS": ["classifier", "score"],
    "TOKEN_CLS": ["classifier", "score"],
    "QUESTION_ANS": ["qa_outputs"],
}
"""For a task of PEFT's, the modules that it trains and saves without being asked."""
WRAPPED = re.compile(r"\.?(?:base_layer|modules_to_save(?:\.default)?)(?=\.)")
"""What may stand in the name of a parameter that is the backbone's own."""


@dataclass(frozen=True)
class Method:
    """How one method of PEFT's is read."""

    delta_type: str
    keys: Callable[[Adapter], dict[str, Any]]
    """The delta type's keys, as far as the config alone tells them."""
    tensors: methods.Reader
    """More keys, and the tensors by the names that they have here."""
    suffix: str = ""
    """A regular expression for what follows a module's name in the names of its tensors."""
    beside: tuple[str, ...] = ()
    """The names of tensors that belong to no module."""
    native: Callable[[Adapter], bool] = lambda adapter: True
    """Whether the delta type can be it; else PEFT's own layers are taken."""


METHODS: dict[str, Method] = {
    "LORA": Method(
        "lora",
        methods.lora_keys,
        methods.lora,
        r"lora_A\.weight|lora_B\.weight|lora_magnitude_vector(?:\.weight)?|lora_B\.bias|lora_embedding_[AB]",
        native=methods.is_plain_lora,
    ),
    "ADALORA": Method("adalora", methods.adalora_keys, methods.adalora, r"lora_[ABE]"),
    "IA3": Method("ia3", methods.ia3_keys, methods.ia3, r"ia3_l"),
    "VERA": Method("vera", methods.vera_keys, methods.vera, r"vera_lambda_[bd]", ("base_model.vera_A", "base_model.vera_B")),
    "LOHA": Method("loha", methods.loha_keys, methods.loha, r"hada_(?:w[12]_[ab]|t[12])", native=methods.is_plain_product),
    "LOKR": Method("lokr", methods.lokr_keys, methods.lokr, r"lokr_(?:w[12](?:_[ab])?|t2)", native=methods.is_plain_product),
    "LN_TUNING": Method("ln_tuning", methods.no_keys, methods.ln_tuning, r"ln_tuning_layers\.(?:weight|bias)"),
    "PROMPT_TUNING": Method("soft_prompt", methods.prompt_keys, methods.prompt, beside=("prompt_embeddings",)),
    "P_TUNING": Method("soft_prompt", methods.prompt_keys, methods.prompt, beside=("prompt_embeddings",)),
    "PREFIX_TUNING": Method("prefix", methods.prefix_keys, methods.prefix, beside=("prompt_embeddings",)),
}
"""The methods that deltaexp has a delta type for."""


def read_config(folder: str | Path) -> DeltaConfig:
    """Read ``adapter_config.json``; the patterns in it are as they were written.

    Raises:
        CheckpointError: If it is no config of a method that can be read here.
    """
    return _config(read_values(folder), {})


def read(folder: str | Path, backbone: nn.Module) -> SavedDelta:
    """Read an adapter for a backbone, in the form of one of deltaexp's.

    Raises:
        CheckpointError: If the files are damaged, or what they hold does not fit the config or the backbone.
    """
    adapter = read_adapter(folder)
    _config(adapter, {})  # what is wrong with the config alone is said first
    if not _is_native(adapter):
        from deltaexp.interop import peft_generic

        return peft_generic.read(adapter, backbone, _heads)
    method = METHODS[adapter.method]
    check_floating(adapter, adapter.tensors)
    groups, beside, rest = _parted(adapter, method, backbone)
    heads = _heads(adapter, rest, backbone, list(groups))
    _check_complete(adapter, list(groups), backbone)
    keys, tensors = method.tensors(adapter, groups, beside, backbone)
    every = [name for name, _ in backbone_modules(backbone)]
    if groups:
        keys |= {"modified_modules": [pattern_of(name, every) for name in groups]}
        keys |= {"common_structure": False, "exclude_modules": []}
    config = _config(adapter, {**keys, "unfrozen_modules": ["deltas", *own_patterns(heads, backbone)]})
    return SavedDelta(adapter.folder, config, {**tensors, **heads}, None)


def _is_native(adapter: Adapter) -> bool:
    return adapter.method in METHODS and METHODS[adapter.method].native(adapter)


def _config(adapter: Adapter, more: Mapping[str, Any]) -> DeltaConfig:
    """Return the config of the delta type that an adapter becomes."""
    if adapter.method in METHODS_ELSEWHERE and adapter.method not in METHODS:
        advice = METHODS_ELSEWHERE[adapter.method]
        raise CheckpointError(
            f"The adapter in {str(adapter.folder)!r} is one of PEFT's {adapter.method}, which cannot be loaded here: {advice}"
        )
    method = METHODS.get(adapter.method)
    if method is None or not method.native(adapter):
        from deltaexp.interop import peft_generic

        flat: dict[str, Any] = {"delta_type": "peft", "peft": peft_generic.keys(adapter, sorted(METHODS))}
    else:
        flat = {"delta_type": method.delta_type, **method.keys(adapter)}
        if method.suffix:
            flat["modified_modules"] = _patterns(adapter)
    try:
        config = DeltaConfig.from_dict({**flat, **more})
    except DeltaExpError as error:
        raise CheckpointError(f"The config of the adapter in {str(adapter.folder)!r} cannot be used: {error}") from error
    config.saved_with = adapter.record()
    return config


def _patterns(adapter: Adapter) -> list[str] | None:
    """Return ``target_modules`` as patterns; a single text is a regular expression for whole names."""
    targets = adapter.names("target_modules")
    if targets and isinstance(adapter.values["target_modules"], str) and targets[0] != addressing.ALL_LINEAR:
        return [f"{addressing.REGEX}^(?:{targets[0]})"]
    return targets or None


def _parted(
    adapter: Adapter, method: Method, backbone: nn.Module
) -> tuple[methods.Groups, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Part the tensors into those of layers, by module in the backbone's order, those beside them, and all others."""
    modules = dict(backbone_modules(backbone))
    pattern = re.compile(rf"{re.escape(PREFIX)}(?P<module>.+)\.(?P<rest>{method.suffix})") if method.suffix else None
    found: methods.Groups = {}
    beside: dict[str, torch.Tensor] = {}
    rest: dict[str, torch.Tensor] = {}
    for name, tensor in adapter.tensors.items():
        part = pattern.fullmatch(name) if pattern else None
        if name in method.beside:
            beside[name] = tensor
        elif part is None:
            rest[name] = tensor
        elif part["module"] not in modules:
            raise CheckpointError(
                f"The adapter in {str(adapter.folder)!r} has a tensor {name!r}, and this {type(backbone).__name__} has no "
                f"module {part['module']!r}. Load it onto the backbone it was trained on. Nothing was loaded."
            )
        else:  # half precision is for the file: PEFT computes with float32 as well
            found.setdefault(part["module"], {})[part["rest"]] = wide(tensor)
    if method.suffix and not found:
        raise MissingTensorError(
            f"{str(adapter.folder)!r} holds no tensors of {adapter.method}: it has {listing(adapter.tensors, 3)}. Copy the "
            "adapter again."
        )
    return {name: found[name] for name in modules if name in found}, beside, rest


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor in float32, or in its own dtype where that is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _heads(
    adapter: Adapter, rest: Mapping[str, torch.Tensor], backbone: nn.Module, modules: list[str]
) -> dict[str, torch.Tensor]:
    """Return the tensors that are the backbone's own parameters, under their names there.

    Args:
        adapter: The adapter.
        rest: The tensors that are no layer's.
        backbone: The backbone.
        modules: The names of the modules that have layers.

    Raises:
        ExtraTensorError: If there is one that the config does not own.
        MissingTensorError: If a module of ``modules_to_save`` is not whole.
    """
    parameters = backbone_parameters(backbone)
    asked = adapter.names("modules_to_save") or []
    trained = [*asked, *HEADS.get(str(adapter.values.get("task_type")), [])]
    bias = adapter.values.get("bias", "none")
    result: dict[str, torch.Tensor] = {}
    for key, tensor in rest.items():
        # The classes for prompts have the backbone one level higher.
        name = WRAPPED.sub("", key.removeprefix(PREFIX))
        if name not in parameters and key.startswith("base_model."):
            name = WRAPPED.sub("", key.removeprefix("base_model."))
        module = name.rpartition(".")[0]
        within = [".".join(module.split(".")[:end]) for end in range(1, module.count(".") + 2)]
        owned = any(outer.endswith(entry) for outer in within for entry in trained)
        owned |= name.endswith("bias") and (bias == "all" or (str(bias).endswith("_only") and module in modules))
        if not owned and name in parameters and torch.equal(tensor, parameters[name].detach().to(tensor)):
            continue  # embeddings that have layers are saved as well, as they were
        if name not in parameters or not owned:
            why = "its config does not own" if name in parameters else f"this {type(backbone).__name__} has no place for"
            raise ExtraTensorError(
                f"The adapter in {str(adapter.folder)!r} holds a tensor {key!r}, which {why}. Nothing was loaded; load it onto "
                "the backbone it was trained on, and name what was trained beside the layers in modules_to_save."
            )
        result[name] = tensor.to(parameters[name].dtype)
    every = dict(backbone.named_parameters(remove_duplicate=False))
    first = {id(parameter): name for name, parameter in parameters.items()}
    missing = [
        name
        for entry in asked
        for name in every
        if any(outer.endswith(entry) for outer in _above(name)) and id(every[name]) in first and name not in result
    ]
    if missing:
        raise MissingTensorError(
            f"The adapter in {str(adapter.folder)!r} lacks {listing(missing, 3)}, which its modules_to_save name. Nothing was "
            "loaded; copy it again."
        )
    tied = [name for name in result if sum(every[name] is other for other in every.values()) > 1]
    if tied:
        raise CheckpointError(
            f"The adapter in {str(adapter.folder)!r} trained {listing(tied, 2)} apart from what it is tied to in this "
            f"{type(backbone).__name__}, where both are one parameter. Load the adapter with PEFT and merge it there."
        )
    return {name: result[name] for name in parameters if name in result}


def _above(name: str) -> list[str]:
    """Return the names of the modules that contain a parameter."""
    parts = name.split(".")[:-1]
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


def own_patterns(names: Mapping[str, Any], backbone: nn.Module) -> list[str]:
    """Return patterns for ``unfrozen_modules`` that mean these parameters of the backbone and no others."""
    every = list(backbone_parameters(backbone))
    alone = {name: sum(addressing.covers(name, other) for other in every) == 1 for name in names}
    return [name if alone[name] else f"{addressing.REGEX}^{re.escape(name)}" for name in names]


def _check_complete(adapter: Adapter, found: list[str], backbone: nn.Module) -> None:
    """Compare the modules that have tensors with those that ``target_modules`` means, where it says so plainly.

    Raises:
        MissingTensorError: If one has none.
    """
    targets, values = adapter.names("target_modules"), adapter.values
    if not targets or isinstance(values["target_modules"], str) or values.get("layers_to_transform") is not None:
        return
    aside = [*(adapter.names("exclude_modules") or []), *(adapter.names("modules_to_save") or [])]
    aside += HEADS.get(str(values.get("task_type")), [])
    meant = [
        name
        for name, _ in backbone_modules(backbone)
        if any(addressing.matches(target, name) for target in targets if not target.startswith(addressing.REGEX))
        and not any(addressing.covers(entry, name) for entry in aside if not entry.startswith(addressing.REGEX))
    ]
    without = [name for name in meant if name not in found]
    if without:
        raise MissingTensorError(
            f"The adapter in {str(adapter.folder)!r} has no tensors for {listing(without, 3)}, which its target_modules "
            f"{targets!r} mean in this {type(backbone).__name__}. Load it onto the backbone it was trained on, or copy it "
            "again. Nothing was loaded."
        )
