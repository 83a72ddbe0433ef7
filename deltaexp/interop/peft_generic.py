"""Reading an adapter of any other method of PEFT's, as ``delta_type=peft``: PEFT's own layers with what was saved in them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from deltaexp.checkpoint import SavedDelta
from deltaexp.deltas.peft import METHODS_ELSEWHERE
from deltaexp.errors import CheckpointError, DeltaExpError, MissingTensorError, UnsafeFileError, listing, unknown
from deltaexp.interop.peft_files import PREFIX, Adapter
from deltaexp.registry import DeltaConfig
from deltaexp.structure import backbone_parameters

ELSEWHERE = (
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "modules_to_save", "peft_version", "revision", "task_type"),
    "runtime_config",
)
"""Keys that say nothing about the layers."""
MOST = 4
"""How many times the longest side of a saved tensor a whole number of the config may be."""


def keys(adapter: Adapter, known: list[str]) -> dict[str, Any]:
    """Return the config as ``delta_type=peft`` takes it: without what PEFT's defaults say as well.

    Raises:
        CheckpointError: If there is no such method, or PEFT is not installed.
    """
    from deltaexp.interop.peft import _library

    try:
        mapping = _library().mapping.PEFT_TYPE_TO_CONFIG_MAPPING
    except DeltaExpError as error:
        raise CheckpointError(
            f"The adapter in {str(adapter.folder)!r} is one of PEFT's {adapter.method}. {error} Without PEFT these can be "
            f"loaded: {listing(known)}."
        ) from error
    if adapter.method not in list(mapping):
        names = sorted({*known, *(kind.value for kind in mapping)} - set(METHODS_ELSEWHERE))
        raise CheckpointError(f"{str(adapter.folder)!r}: {unknown('peft_type', adapter.method, names)}")
    defaults: dict[str, Any] = {}
    for field in dataclasses.fields(mapping[adapter.method]):
        factory: Any = field.default_factory
        defaults[field.name] = field.default if factory is dataclasses.MISSING else factory()
    values = {
        key: value
        for key, value in adapter.values.items()
        if key not in ELSEWHERE and (key not in defaults or value != defaults[key])
    }
    for key in ("target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern"):
        value = values.get(key)
        for text in [value] if isinstance(value, str) else value if isinstance(value, (list, dict)) else []:
            if isinstance(text, str):
                adapter.expression(text, key)  # PEFT matches them, and some would take for ever
    if str(values.get("bias", "none")) != "none":
        values["bias"] = "none"  # those that were saved are named in unfrozen_modules
    return {**values, "peft_type": adapter.method}


def read(adapter: Adapter, backbone: nn.Module, heads: Callable[..., dict[str, torch.Tensor]]) -> SavedDelta:
    """Read an adapter; the layers are made once to learn the names of what is in them, and the backbone is as before.

    Raises:
        CheckpointError: If the tensors are not those that the config describes.
    """
    from deltaexp.interop.peft_import import METHODS, own_patterns
    from deltaexp.model import DeltaModel

    values = keys(adapter, sorted(METHODS))
    _check_sizes(adapter, values)
    try:
        config = DeltaConfig.from_dict({"delta_type": "peft", "peft": values})
        trainable = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
        with torch.random.fork_rng(devices=[]):
            model = DeltaModel(backbone, config)
    except DeltaExpError as error:
        raise CheckpointError(f"The adapter in {str(adapter.folder)!r} cannot be loaded: {error}") from error
    try:
        own = dict(model.delta_tensors())
        # What layers share hangs on the first of them here, and on PEFT's model there.
        fixed = {name for name, tensor in own.items() if not isinstance(tensor, nn.Parameter)}
        sites = [attachment.site for attachment in model.attachments]
        config = model.config
    finally:
        model.detach()
        for parameter in trainable:
            parameter.requires_grad_(True)
    tensors: dict[str, torch.Tensor] = {}
    used: set[str] = set()
    for name, tensor in own.items():
        found = next((key for key in file_names(name) if key in adapter.tensors), None)
        if found is None and name not in fixed:
            raise MissingTensorError(
                f"The adapter in {str(adapter.folder)!r} lacks {file_names(name)[0]}, which its config describes on this "
                f"{type(backbone).__name__}. Nothing was loaded; copy it again."
            )
        value = tensor.detach() if found is None else adapter.tensors[found]
        if value.is_floating_point():
            value = value.to(torch.promote_types(value.dtype, tensor.dtype))
        tensors[name] = value
        used.add(found or "")
    shared = [tensors[name] for name in fixed]  # which some methods save once more for every layer
    rest = {
        key: value
        for key, value in adapter.tensors.items()
        if key not in used and not any(value.shape == one.shape and torch.equal(value.to(one), one) for one in shared)
    }
    owned = heads(adapter, rest, backbone, sites)
    config.unfrozen_modules = ["deltas", *own_patterns(owned, backbone)]
    config.saved_with = adapter.record()
    parameters = backbone_parameters(backbone)
    return SavedDelta(adapter.folder, config, {**tensors, **{n: owned[n] for n in parameters if n in owned}}, None)


def file_names(name: str) -> list[str]:
    """Return the names under which PEFT may have saved a tensor of ours: at its module, or where it is shared, at the top."""
    module, _, rest = name.partition(".peft.")
    rest = rest.removeprefix("tuner.").removeprefix("fixed_")
    rest = ".".join(part for part in rest.split(".") if part != "default")
    return [f"{PREFIX}{module}.{rest}", f"base_model.{rest}", f"{PREFIX}{rest}", f"{PREFIX}{module}.{rest}.weight"]


def _check_sizes(adapter: Adapter, values: dict[str, Any]) -> None:
    """Refuse a whole number that is much larger than any side of a saved tensor, before PEFT makes layers of that size."""
    longest = max((side for tensor in adapter.tensors.values() for side in tensor.shape), default=1)
    for key, value in values.items():
        for number in value if isinstance(value, list) else value.values() if isinstance(value, dict) else [value]:
            large = type(number) is int and abs(number) > max(1024, MOST * longest)
            if large and not any(word in key for word in ("seed", "prng", "alpha", "random")):
                raise UnsafeFileError(
                    f"The config of the adapter in {str(adapter.folder)!r} says {key}={number}, and no side of its tensors is "
                    f"longer than {longest}. It was damaged or made by hand; copy the adapter again."
                )
