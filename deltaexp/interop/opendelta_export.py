"""Writing a delta as OpenDelta 0.3 does (https://github.com/thunlp/OpenDelta): ``pytorch_model.bin`` and ``config.json``.

The names of parameters are OpenDelta's, but for what `deltaexp.interop.opendelta` renames in reading; here the names go back.
Modules are written out by their full names. What OpenDelta cannot compute is refused.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from deltaexp.checkpoint import CONFIG, dump
from deltaexp.errors import CheckpointError, listing
from deltaexp.interop.opendelta import ACTIVATIONS, ATTRIBUTES, PICKLED, pattern_of
from deltaexp.interop.peft_files import public_name
from deltaexp.interop.writing import check_new, new_folder
from deltaexp.structure import backbone_modules, backbone_parameters

if TYPE_CHECKING:
    from deltaexp.model import DeltaModel

VERSION = "0.3.0"
"""What the package of OpenDelta 0.3 writes as its version."""
ONLY_HERE: dict[str, dict[str, Any]] = {
    "lora": {"lora_scaling": "standard", "lora_dora": False, "lora_r_pattern": {}, "lora_alpha_pattern": {}},
    "adapter": {"adapter_variant": "houlsby", "adapter_drop": 0},
    "prefix": {"prefix_positions": "none"},
    "soft_prompt": {"pad_id": (None, 0)},
}
"""Keys that OpenDelta does not have, with the value that means what it does."""
LEFT_OUT = {
    "bitfit_add",
    "lora_init",
    "lora_plus_ratio",
    "opendelta_positions",
    "pad_id",
    "raw_embeddings",
    "layers",
    "common_structure",
}
"""Keys that OpenDelta does not have and that say nothing about a delta that has been trained."""


def export(delta_model: DeltaModel, folder: str | Path) -> str:
    """Write a delta in OpenDelta's form (see `deltaexp.interop.export`).

    Raises:
        CheckpointError: If OpenDelta cannot compute it; then nothing is written.
    """
    check_new(folder)
    values = config_values(delta_model)
    tensors = named_tensors(delta_model)
    with new_folder(folder) as stage:
        torch.save(tensors, stage / PICKLED)
        (stage / CONFIG).write_text(dump(values), encoding="utf-8")
    return f"Wrote {len(tensors)} tensors of OpenDelta's {values['delta_type']} to {str(folder)!r}."


def named_tensors(delta_model: DeltaModel) -> dict[str, torch.Tensor]:
    """Return the tensors under the names that they have in OpenDelta."""
    kind = delta_model.config.delta_type
    result = {}
    for name, tensor in delta_model.delta_tensors().items():
        if kind == "bitfit":
            name = name.replace(".bitfit.bias", ".bias")  # a new bias is the module's own there
        elif kind == "prefix":
            name = re.sub(r"(^|\.)prefix\.reparams\.", r"\1reparams.", name)  # the MLP hangs beside the prefixes
        result[name] = tensor.detach().cpu().contiguous().clone()
    return result


def config_values(delta_model: DeltaModel) -> dict[str, Any]:
    """Return OpenDelta's ``config.json``.

    Raises:
        CheckpointError: If OpenDelta cannot compute the delta.
    """
    config, backbone = delta_model.config, delta_model.backbone_model
    kind = config.delta_type
    if kind not in ATTRIBUTES:
        raise _refused(delta_model, f"OpenDelta has only {listing(ATTRIBUTES)}")
    for key, plain in ONLY_HERE.get(kind, {}).items():
        value = getattr(config, key)
        if value not in (plain if isinstance(plain, tuple) else (plain,)):
            raise _refused(delta_model, f"OpenDelta has no {key}, which is {value!r}")
    if any(getattr(attachment.layer, "lora_A0", None) is not None for attachment in delta_model.attachments):
        raise _refused(delta_model, f"lora_init={config.lora_init} subtracts the start, as OpenDelta does not")  # type: ignore[attr-defined]
    slices = [attachment.site for attachment in delta_model.attachments if attachment.rows is not None]
    if slices:
        raise _refused(delta_model, f"OpenDelta has no layer on a slice of a fused projection, as at {slices[0]!r}")
    relative = any(hasattr(module, "has_relative_attention_bias") for module in backbone.modules())
    if kind == "prefix" and relative and not config.opendelta_positions:  # type: ignore[attr-defined]
        raise _refused(
            delta_model, "in a T5, OpenDelta gives prefixes relative positions. Train it with opendelta_positions=true"
        )
    if kind == "soft_prompt" and _scales(delta_model) and not config.raw_embeddings:  # type: ignore[attr-defined]
        raise _refused(delta_model, "OpenDelta scales no embeddings, as this backbone does")
    modules = _modules(delta_model)
    values = {key: value for key, value in config.to_dict().items() if key not in LEFT_OUT | ONLY_HERE.get(kind, {}).keys()}
    if "non_linearity" in values:
        back = {name: other for other, name in ACTIVATIONS.items()}
        values["non_linearity"] = back.get(values["non_linearity"], values["non_linearity"])
    every = [name for name, _ in backbone_modules(backbone)]
    if modules is None:
        values["modified_modules"] = ["root"]
    else:
        values["modified_modules"] = [pattern_of(name, every) for name in modules]
        values["common_structure"] = False
    values["exclude_modules"] = []
    if values["unfrozen_modules"] == ["deltas"]:
        del values["unfrozen_modules"]
    record, saved = delta_model._record(None), config.saved_with
    return {
        **values,
        "backbone_class": record.backbone_class,
        "backbone_checkpoint_name": public_name(saved.backbone_checkpoint_name or record.backbone_checkpoint_name),
        "opendelta_version": VERSION,
        "transformers_version": transformers.__version__,
    }


def _modules(delta_model: DeltaModel) -> list[str] | None:
    """Return the modules that the config names, in pairs for a parallel adapter; None for a soft prompt."""
    kind = delta_model.config.delta_type
    if kind == "soft_prompt":
        return None
    names = {module: name for name, module in backbone_modules(delta_model.backbone_model)}
    if kind == "parallel_adapter":
        pairs = [(a.site, names[a.after]) for a in delta_model.attachments if a.after is not None]
        return [name for pair in pairs for name in pair]
    if kind == "bitfit":
        own = backbone_parameters(delta_model.backbone_model)
        for attachment in delta_model.attachments:
            if not isinstance(attachment.module, (torch.nn.Linear, torch.nn.LayerNorm)):
                raise _refused(delta_model, f"OpenDelta does not save the bias that {attachment.site!r} would get")
        biases = {name.rpartition(".")[0] for name in delta_model._in_place}
        return _containing(delta_model, [name for name in _with_bias(own) if name in biases], _with_bias(own)) + _sites(
            delta_model
        )
    return _sites(delta_model)


def _with_bias(parameters: dict[str, torch.nn.Parameter]) -> list[str]:
    return [name.rpartition(".")[0] for name in parameters if name.endswith(".bias")]


def _containing(delta_model: DeltaModel, modules: list[str], every: list[str]) -> list[str]:
    """Return what to name for biases to be trained: to a leaf that is no Linear or LayerNorm, OpenDelta gives a second one.

    Raises:
        CheckpointError: If what contains such a leaf has other biases, too.
    """
    result: dict[str, None] = {}
    for name in modules:
        if not isinstance(delta_model.backbone_model.get_submodule(name), (torch.nn.Linear, torch.nn.LayerNorm)):
            leaf, name = name, name.rpartition(".")[0]
            if not {other for other in every if other.startswith(f"{name}.")} <= set(modules):
                raise _refused(delta_model, f"OpenDelta cannot train the bias of {leaf!r} without those beside it")
        result[name] = None
    return list(result)


def _sites(delta_model: DeltaModel) -> list[str]:
    return [attachment.site for attachment in delta_model.attachments]


def _scales(delta_model: DeltaModel) -> bool:
    return isinstance(getattr(delta_model.attachments[0].module, "embed_scale", None), (int, float))


def _refused(delta_model: DeltaModel, why: str) -> CheckpointError:
    return CheckpointError(
        f"The delta of type {delta_model.config.delta_type!r} cannot be exported to OpenDelta: {why}. Export it to PEFT "
        "or as a merged checkpoint, or use it with deltaexp."
    )
