"""A backbone without its weights: the modules that its config describes, on the meta device."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from torch import nn

from deltaexp.errors import DeltaExpError
from deltaexp.lab import backbones, quantisation, requirements
from deltaexp.lab.config import BackboneConfig
from deltaexp.lab.taskconfig import TaskConfig
from deltaexp.lab.tasks.kinds import Kind, choose
from deltaexp.structure import linear_dims

WEIGHT_FILES = ("*.safetensors", "*.bin")
"""What a checkpoint's files are called; where there are files of the first pattern, the second is not read."""
INDEXES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""A file that is there if a checkpoint of the Hub is."""


@dataclass
class Blueprint:
    """A backbone as a run would load it, without its weights."""

    model: Any
    """On the meta device, in the dtype of the config."""
    settings: Any
    """Its config, as transformers reads it."""
    kind: type[Kind]
    """How it does the task."""
    new: list[str]
    """Patterns of the parameters that its checkpoint does not have, such as a new classifier."""
    packed: dict[str, int]
    """Bytes of the weights that are held quantised, by the parameters' names; they are no smaller here."""
    assumed: list[str]
    """Sentences on what only a run finds out."""


@dataclass
class Checkpoint:
    """The weights of a backbone, of which no more is looked at than where they are."""

    bytes: int
    """Their size: of the files where they are there, else what the backbone's config tells."""
    here: bool
    """Whether they are on this machine."""


def make(config: BackboneConfig, task: TaskConfig) -> Blueprint:
    """Make a backbone without its weights; of its checkpoint, no more than the config is read.

    Args:
        config: Which backbone, and how it is loaded.
        task: The task, whose kind says which class the backbone has.

    Raises:
        ConfigError: If the backbone is not there or cannot do the task.
        DeltaExpError: If its config cannot be read.
    """
    settings = backbones.settings_of(config)
    kind, assumed = choose(task, settings, config.name), []
    if task.kind in ("classification", "token_classification", "image_classification") and not task.labels:
        task = dataclasses.replace(task, labels=["0", "1"])
        if kind.model_options(task):
            assumed.append("How many labels there are is read from the data, which are not read here: two are assumed.")
    saved_as, own = (getattr(settings, "architectures", None) or [None])[0], copy.deepcopy(settings)
    for key, value in kind.model_options(task).items():
        setattr(own, key, value)
    model = _model(kind.auto_class(), own, config, assumed)
    missing = _missing(model, settings, saved_as)
    if missing is None:
        missing = _outside(model) if kind.model_options(task) else []
        assumed.append(
            "The backbone's config does not say which class it was saved as; "
            + ("what lies outside of the base model counts as new." if missing else "nothing counts as new.")
        )
    if getattr(settings, "quantization_config", None) is not None:
        assumed.append("The checkpoint is quantised in a way of its own; its weights are counted as if they were not.")
    return Blueprint(model, own, kind, backbones.new_patterns(model, missing), _packed(config, kind, own, model), assumed)


def checkpoint(config: BackboneConfig, blueprint: Blueprint) -> Checkpoint:
    """Return how large the weights of a backbone are, and whether they are on this machine; they are not read."""
    place = Path(backbones.location(config.source))
    dtype = getattr(blueprint.settings, "dtype", None)
    size = dtype.itemsize if isinstance(dtype, torch.dtype) else 4
    described = sum(p.numel() for p in blueprint.model.parameters()) * size
    if place.is_dir():
        for pattern in WEIGHT_FILES:
            found = [path.stat().st_size for path in place.glob(pattern)]
            if found:
                return Checkpoint(sum(found), True)
        return Checkpoint(described, False)
    cached = (huggingface_hub.try_to_load_from_cache(config.source, name, revision=config.revision) for name in INDEXES)
    return Checkpoint(described, any(isinstance(path, str) for path in cached))


def _model(auto_class: Any, settings: Any, config: BackboneConfig, assumed: list[str]) -> Any:
    options: dict[str, Any] = {"dtype": _dtype(config, settings), "trust_remote_code": config.trust_remote_code}
    if config.attention in requirements.ON_GPUS:
        assumed.append(f"backbone.attention={config.attention} is computed as sdpa here, which keeps about as much.")
    elif config.attention:
        options["attn_implementation"] = config.attention
    try:
        with torch.device("meta"), backbones.without_report():
            model = auto_class.from_config(settings, **options)
    except (OSError, ValueError, ImportError) as error:
        raise DeltaExpError(f"No model can be made of the config of {config.source!r}: {error}") from error
    if getattr(model.config, "pad_token_id", 0) is None:
        model.config.pad_token_id = 0  # a run takes the tokenizer's
    return model


def _dtype(config: BackboneConfig, settings: Any) -> torch.dtype:
    """Return the dtype in which a backbone is held; ``auto`` is that of its checkpoint."""
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    found = getattr(settings, "dtype", None)
    return found if isinstance(found, torch.dtype) else torch.float32


def _packed(config: BackboneConfig, kind: type[Kind], settings: Any, model: nn.Module) -> dict[str, int]:
    """Return the bytes of the weights that would be quantised: their numbers and the scales.

    LLM.int8() and torchao have a scale for every row (https://arxiv.org/abs/2208.07339), QLoRA one for 64 numbers, of a byte
    and with a scale of its own for 256 of them if it is quantised twice (https://arxiv.org/abs/2305.14314).
    """
    if config.quantization is None:
        return {}
    kept = quantisation.heads(kind.auto_class(), settings)
    found = {}
    for name, module in model.named_modules():
        dims = linear_dims(module)
        if dims is None or any(f"{name}.".startswith(f"{head}.") for head in kept):
            continue
        count = dims[0] * dims[1]
        groups = -(-count // 64)
        scales = groups + 4 * -(-groups // 256) if config.bnb_4bit_double else 4 * groups
        found[f"{name}.weight"] = count // 2 + scales if config.quantization == "bnb_4bit" else count + 4 * dims[1]
    return found


def _missing(model: nn.Module, settings: Any, saved_as: str | None) -> list[str] | None:
    """Return the names of a model's parameters that a checkpoint does not have; None where its config does not tell.

    The config names the class that was saved. Two models without weights show what the one has and the other has not, or has in
    another shape, such as a head for other classes.
    """
    chosen = getattr(transformers, saved_as or "", None)
    if chosen is None:
        return None
    with torch.device("meta"), backbones.without_report():
        saved = chosen(copy.deepcopy(settings))

    def plain(name: str, whole: Any) -> str:
        return name.removeprefix(f"{whole.base_model_prefix}.")

    there = {(plain(name, saved), tensor.shape) for name, tensor in saved.state_dict().items()}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    loaded = {id(parameter) for name, parameter in parameters.items() if (plain(name, model), parameter.shape) in there}
    return [name for name, parameter in parameters.items() if id(parameter) not in loaded]  # what is tied is there, too


def _outside(model: Any) -> list[str]:
    """Return the names of the parameters that a model has beside its base model's: its head."""
    inside = {id(parameter) for parameter in model.base_model.parameters()}
    return [name for name, parameter in model.named_parameters(remove_duplicate=False) if id(parameter) not in inside]
