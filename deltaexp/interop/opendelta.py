"""Reading what OpenDelta 0.3 saved: ``pytorch_model.bin`` and ``config.json`` (https://github.com/thunlp/OpenDelta).

Its files name parameters by their modules, and that is what tells where layers go. Its patterns are asked where names do not
say it, for the far ends of parallel adapters and for the attentions that share one MLP of prefixes, and whether any module has
been left out. What its models computed is reproduced, quirks included. Its hash covers the text that PyTorch prints for a
model, which differs from version to version, so it cannot be compared: the answer of the check is "unknown".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deltaexp import addressing
from deltaexp.checkpoint import CONFIG, WEIGHTS, SavedDelta
from deltaexp.errors import AddressingError, CheckpointError, DamagedFileError, DeltaExpError, MissingTensorError, listing
from deltaexp.manifest import read_json
from deltaexp.registry import DeltaConfig
from deltaexp.structure import backbone_modules, backbone_parameters, blocks, common_structure

PICKLED = "pytorch_model.bin"
"""The file with the tensors."""
ATTRIBUTES = {
    "lora": "lora",
    "adapter": "adapter",
    "parallel_adapter": "parallel_adapter",
    "low_rank_adapter": "low_rank_adapter",
    "compacter": "compactor",
    "bitfit": "bitfit",
    "prefix": "prefix|reparams",
    "soft_prompt": "soft_prompt_layer",
}
"""For every type, the names under which its layers hang; a number follows where a module had one already."""
IGNORED = {"scaled", "sequential", "bottleneck_dim"}
"""Keys that OpenDelta writes as null, and does not use."""
ACTIVATIONS = {"gelu_orig": "gelu", "leakyrelu": "leaky_relu"}
"""Activations that transformers calls otherwise."""
RECORD = {"backbone_class", "backbone_checkpoint_name", "transformers_version"}


def recognised(folder: str | Path) -> bool:
    """Say whether a folder holds a checkpoint of OpenDelta and none of deltaexp."""
    folder = Path(folder)
    return (folder / PICKLED).exists() and (folder / CONFIG).exists() and not (folder / WEIGHTS).exists()


def read_config(folder: str | Path) -> DeltaConfig:
    """Read ``config.json``; the patterns in it are as they were written.

    Raises:
        CheckpointError: If it is no config of a delta of OpenDelta.
    """
    path = Path(folder) / CONFIG
    try:
        values = read_json(path)
        flat = _translated(values)
    except (ValueError, TypeError, AttributeError) as error:
        raise DamagedFileError(f"{str(path)!r} is no config that OpenDelta wrote: {error}. Copy the delta again.") from error
    try:
        config = DeltaConfig.from_dict(flat)
    except DeltaExpError as error:
        raise CheckpointError(f"{str(path)!r} is no config of a delta that this version knows: {error}") from error
    config.saved_with.origin = f"OpenDelta {values.get('opendelta_version', '')}".strip()
    return config


def read(folder: str | Path, backbone: nn.Module) -> SavedDelta:
    """Read a checkpoint for a backbone, in the form of one of deltaexp's.

    Raises:
        CheckpointError: If the file is damaged, or what it holds does not fit the backbone.
    """
    folder = Path(folder)
    config = read_config(folder)
    if config.delta_type not in ATTRIBUTES:
        raise CheckpointError(
            f"{str(folder)!r} holds a {PICKLED} and a delta of type {config.delta_type!r}, which OpenDelta does not have. "
            f"Its types: {listing(ATTRIBUTES)}."
        )
    tensors = read_tensors(folder)
    if config.delta_type == "compacter" and not getattr(config, "learn_phm", True):
        raise CheckpointError(
            f"The compacter in {str(folder)!r} has learn_phm false. OpenDelta does not save the random matrices of such a "
            "delta, so that nobody can compute with it again. Train it anew."
        )
    layers, own = _parted(config.delta_type, tensors, backbone, folder)
    heads = [pattern for pattern in config.unfrozen_modules if pattern != "deltas"]
    names = dict(backbone_parameters(backbone))
    added: set[str] = set()
    if config.delta_type == "bitfit":  # a module without a bias got one
        added = {name.removesuffix(".bias") for name in own if name not in names} & dict(backbone_modules(backbone)).keys()
    elif own and not heads:
        raise CheckpointError(
            f"The delta in {str(folder)!r} also holds {len(own)} tensors that are none of its layers' ({listing(own, 3)}), and "
            "its config has no unfrozen_modules that would say so. Nothing was loaded."
        )
    unknown = [name for name in own if name not in names and name.removesuffix(".bias") not in added]
    if unknown:
        raise MissingTensorError(
            f"The delta in {str(folder)!r} has tensors that this {type(backbone).__name__} has no place for: "
            f"{listing(unknown, 3)}. Load it onto the backbone it was trained on. Nothing was loaded."
        )
    renamed = {**layers, **own}
    modules = list(dict.fromkeys(name.rpartition(f".{config.attribute}.")[0] for name in layers))
    if config.delta_type == "bitfit":
        biases = [name for name in own if name.endswith(".bias") and not any(addressing.covers(p, name) for p in heads)]
        modules = [name.rpartition(".")[0] for name in biases]
        renamed = {
            (name.replace(".bias", ".bitfit.bias") if name.rpartition(".")[0] in added else name): t for name, t in own.items()
        }
        own = {name: tensor for name, tensor in own.items() if name not in biases}
    if config.unfrozen_modules != ["deltas"]:
        config.unfrozen_modules = [*(["deltas"] if "deltas" in config.unfrozen_modules else []), *own]
    _place(config, modules, backbone, folder)
    return SavedDelta(folder, config, renamed, None)


def _translated(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the flat config that deltaexp reads."""
    flat = {key: value for key, value in values.items() if key in RECORD}
    for key, value in values.items():
        if key in RECORD or key in ("backbone_hash", "opendelta_version") or (value is None and key in IGNORED):
            continue
        flat[key] = value
    if "non_linearity" in flat:
        name = str(flat["non_linearity"]).lower()
        flat["non_linearity"] = ACTIVATIONS.get(name, name)
    flat["common_structure"] = bool(values.get("common_structure", False))
    if flat.get("delta_type") == "soft_prompt":
        # It goes on the root or the encoder whatever its file says, takes id 0 for padding, and scales no embeddings.
        flat |= {"modified_modules": None, "pad_id": 0, "raw_embeddings": True}
        flat.pop("common_structure")
    return flat


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a checkpoint, under OpenDelta's names.

    Raises:
        DamagedFileError: If the file holds anything else.
    """
    path = folder / PICKLED
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged file leads it into
        raise DamagedFileError(
            f"{str(path)!r} cannot be read as named tensors ({type(error).__name__}), and nothing else in a pickle is ever "
            "loaded. It is damaged, or no delta: copy it again."
        ) from error
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) and tensor.is_floating_point()
        for name, tensor in tensors.items()
    ):
        raise DamagedFileError(f"{str(path)!r} holds something else than named tensors of numbers. Copy the delta again.")
    return tensors


def _parted(
    delta_type: str, tensors: Mapping[str, torch.Tensor], backbone: nn.Module, folder: Path
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Part the tensors into those of layers, under their names here, and those of the backbone itself."""
    modules = dict(backbone_modules(backbone))
    attribute = ATTRIBUTES[delta_type]
    # From the third on, OpenDelta counts on from the first word of the name: low_2, parallel_2.
    first = "|".join({attribute, *(word.partition("_")[0] for word in attribute.split("|"))})
    pattern = re.compile(rf"(?:(?P<module>.*)\.)?(?P<attribute>(?:{attribute})(?:_\d+)?|(?:{first})_\d+)\.(?P<rest>.+)")
    layers: dict[str, torch.Tensor] = {}
    own: dict[str, torch.Tensor] = {}
    used: dict[str, set[str]] = {}
    for name, tensor in tensors.items():
        found = pattern.fullmatch(name)
        if found is None:
            own[name] = tensor
            continue
        module = found["module"] or ""
        if module not in modules:
            raise CheckpointError(
                f"The delta in {str(folder)!r} has a tensor {name!r}, and this {type(backbone).__name__} has no module "
                f"{module!r}. Load it onto the backbone it was trained on. Nothing was loaded."
            )
        kind = "reparams" if found["attribute"].startswith("reparams") else attribute.partition("|")[0]
        used.setdefault(module, set()).add(found["attribute"])
        inner = f"prefix.reparams.{found['rest']}" if kind == "reparams" else f"{kind}.{found['rest']}"
        if not tensor.numel():  # a low-rank adapter without width adds a bias, and so does one of width 1 that is zero
            tensor = tensor.new_zeros([max(1, size) for size in tensor.shape])
        layers[f"{module}.{inner}" if module else inner] = tensor
    several = [module for module, names in used.items() if len(names) > 1]
    if several:
        raise CheckpointError(
            f"The file in {str(folder)!r} holds more than one {delta_type} on {listing(several, 2)} "
            f"({listing(sorted(used[several[0]]))}): OpenDelta saves every delta in the backbone, also those that were not "
            "meant. Save the one you want from a backbone that has no other."
        )
    return layers, own


def _place(config: DeltaConfig, modules: list[str], backbone: nn.Module, folder: Path) -> None:
    """Write into a config the modules that the layers go on, by their full names."""
    if config.delta_type == "soft_prompt":
        return
    try:
        meant = _matched(config, backbone)
    except AddressingError as error:
        raise CheckpointError(f"The config in {str(folder)!r} cannot be used: {error}") from error
    names, wanted = modules, meant
    if config.delta_type == "parallel_adapter":
        names = _paired(meant, config.modified_modules or [])
        wanted = names[::2]
    elif config.delta_type == "prefix" and getattr(config, "reparameterize", False):
        names, wanted = meant, meant[:1]
    elif config.delta_type == "bitfit":
        wanted = _biased(meant, config, backbone)
    present = [*modules, *(name.rpartition(".")[0] for name in config.unfrozen_modules)]
    without = [name for name in wanted if not any(_within(module, name) for module in present)]
    beside = [module for module in modules if not any(_within(module, name) for name in wanted)]
    if config.common_structure:  # its names mean a few modules more to OpenDelta than to the structure here, but no fewer
        beside = []
    if without or beside:
        wrong = [f"it has none for {listing(without, 3)}"] if without else []
        wrong += [f"it has some for {listing(beside, 3)}"] if beside else []
        raise MissingTensorError(
            f"The tensors of the delta in {str(folder)!r} are not those of the modules that its patterns "
            f"{config.modified_modules!r} mean in this {type(backbone).__name__}: {', and '.join(wrong)}. Load it onto the "
            "backbone it was trained on. Nothing was loaded."
        )
    if config.delta_type == "prefix" and any(hasattr(m, "has_relative_attention_bias") for m in backbone.modules()):
        config.opendelta_positions = True  # type: ignore[attr-defined]
    every = [name for name, _ in backbone_modules(backbone)]
    config.modified_modules = [pattern_of(name, every) for name in names]
    config.common_structure = False
    config.exclude_modules = []


def _biased(meant: list[str], config: DeltaConfig, backbone: nn.Module) -> list[str]:
    """Return the modules whose biases OpenDelta's BitFit saves, where ``meant`` are those that the patterns mean."""
    stacks = [name for stack in blocks(backbone) for name in stack]
    return [
        name
        for name, module in backbone_modules(backbone)
        if any(_within(name, other) for other in meant)
        # Norms outside of the blocks are none of its common structure's.
        and (not config.common_structure or any(_within(name, block) for block in stacks))
        # What it adds to a leaf of another kind is not saved.
        and (
            isinstance(module, (nn.Linear, nn.LayerNorm))
            or (isinstance(getattr(module, "bias", None), nn.Parameter) and name not in meant)
        )
    ]


def _within(name: str, module: str) -> bool:
    """Say whether a name is a module's or that of one in it."""
    return f"{name}.".startswith(f"{module}.")


def _paired(names: list[str], patterns: list[str]) -> list[str]:
    """Return the modules before and after in turn: OpenDelta counts matches, whichever pattern they are of."""
    result, number, count = [], 0, len(patterns)
    for name in names:
        result.append(name)
        if number % 2 == 0 and patterns[number % count] == patterns[(number + 1) % count]:
            result.append(name)
            number += 1
        number += 1
    return result


def pattern_of(name: str, every: list[str]) -> str:
    """Return a pattern that means one module and no other."""
    alone = sum(other == name or other.endswith(f".{name}") for other in every) == 1
    return name if alone else f"{addressing.REGEX}^{re.escape(name)}"


def _matched(config: DeltaConfig, backbone: nn.Module) -> list[str]:
    """Return the modules that OpenDelta's patterns mean, in the order of the backbone."""
    names = [name for name, _ in backbone_modules(backbone) if name]
    spoken = _common_names(backbone) if config.common_structure else {}
    return [
        name
        for name in names
        if not name.startswith(tuple(config.exclude_modules))
        and any(addressing.matches(p, other) for p in config.modified_modules or [] for other in spoken.get(name, [name]))
    ]


def _common_names(backbone: nn.Module) -> dict[str, list[str]]:
    """Return full names as OpenDelta's common structure has them, such as ``encoder@.block@.0.attn@.q@``."""
    result: dict[str, list[str]] = {}
    numbers = {name: number for stack in blocks(backbone) for number, name in enumerate(stack)}
    for name, roles in common_structure(backbone).items():
        block = next((block for block in numbers if f"{name}.".startswith(f"{block}.")), None)
        start = [f"block@.{numbers[block]}"] if block else []
        result[name] = [".".join([*start, *(f"{part}@" for part in role.name.split("."))]) for role in roles]
    for name, number in numbers.items():
        result.setdefault(name, [f"block@.{number}"])
    return result
