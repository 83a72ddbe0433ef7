"""Writing a delta as an adapter that PEFT loads (https://github.com/huggingface/peft), and whatever reads PEFT's files.

The adapter computes what the delta computes, on the backbone as it is. Parameters of the backbone that the delta trained, such
as a new head, become ``modules_to_save``. What PEFT has no method for is refused.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import nn

from deltaexp.checkpoint import dump
from deltaexp.errors import AddressingError, CheckpointError
from deltaexp.interop.peft_files import CONFIG, PREFIX, WEIGHTS, public_name
from deltaexp.interop.peft_layers import WRITERS, Written, refused
from deltaexp.interop.writing import check_new, new_folder
from deltaexp.structure import backbone_modules, backbone_parameters

if TYPE_CHECKING:
    from deltaexp.model import DeltaModel

CARD = "README.md"


def export(delta_model: DeltaModel, folder: str | Path) -> str:
    """Write a delta as an adapter of PEFT's (see `deltaexp.interop.export`).

    Raises:
        CheckpointError: If PEFT has no method that computes the same; then nothing is written.
    """
    check_new(folder)
    if delta_model.merged:
        raise CheckpointError("The delta is merged into its backbone. Call unmerge() before it is exported.")
    keys, tensors = adapter(delta_model)
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with new_folder(folder) as stage:
        save_file(plain, stage / WEIGHTS, metadata={"format": "pt"})
        (stage / CONFIG).write_text(dump(keys), encoding="utf-8")
        (stage / CARD).write_text(_card(keys), encoding="utf-8")
    return f"Wrote an adapter of PEFT's method {keys['peft_type']} with {len(plain)} tensors to {str(folder)!r}."


def adapter(delta_model: DeltaModel) -> Written:
    """Return the config and the tensors of the adapter that computes what a delta computes."""
    kind = delta_model.config.delta_type
    if kind == "peft":
        from deltaexp.interop.peft_export_generic import generic

        keys, tensors = generic(delta_model)
    elif kind in PROMPTS:
        keys, tensors = PROMPTS[kind](delta_model)
    elif kind in WRITERS:
        keys, tensors = WRITERS[kind](delta_model)
    else:
        known = ", ".join(sorted([*WRITERS, *PROMPTS, "peft"]))
        raise refused(delta_model, f"PEFT has no method that computes the same; the types that can be are {known}")
    record = delta_model._record(None)
    backbone = delta_model.backbone_model
    saved_as = delta_model.config.saved_with.backbone_checkpoint_name
    beside, extra = _beside(delta_model, keys)
    task = task_type(backbone)
    if task in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS") and "modules_to_save" not in beside:
        task = None  # PEFT would take the head for part of the adapter
    return {
        "base_model_name_or_path": public_name(saved_as or record.backbone_checkpoint_name),
        "revision": record.backbone_revision or delta_model.config.saved_with.backbone_revision,
        "task_type": task,
        "inference_mode": True,
        **keys,
        **beside,
    }, {**tensors, **extra}


def task_type(backbone: Any) -> str | None:
    """Return what PEFT calls the task that a backbone's head is for; None where it has no name."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    name = type(backbone).__name__
    heads = {"SequenceClassification": "SEQ_CLS", "TokenClassification": "TOKEN_CLS", "QuestionAnswering": "QUESTION_ANS"}
    for ending, task in heads.items():
        if name.endswith(ending):
            return task
    if getattr(getattr(backbone, "config", None), "is_encoder_decoder", False):
        return "SEQ_2_SEQ_LM" if name.endswith(("ConditionalGeneration", "LMHeadModel", "MTModel")) else None
    return "CAUSAL_LM" if name in CAUSAL.values() else None


def _beside(delta_model: DeltaModel, keys: Mapping[str, Any]) -> Written:
    """Return the keys and tensors of the backbone's parameters that the delta trained beside its layers."""
    backbone = delta_model.backbone_model
    values = {n: v for n, v in delta_model._ownership.values().items() if n not in delta_model._in_place}
    prompt = "num_virtual_tokens" in keys
    prefix = "base_model." if prompt else PREFIX
    sites = {attachment.site for attachment in delta_model.attachments} if not prompt else set()
    every = dict(backbone.named_parameters(remove_duplicate=False))
    tied = [name for name in values if sum(every[name] is other for other in every.values()) > 1]
    if tied:
        raise refused(delta_model, f"{tied[0]!r} is tied to another parameter, and PEFT would train the two apart")
    if values and keys["peft_type"] == "LORA":
        own = backbone_parameters(backbone)
        of_targets = {f"{site}.bias" for site in sites} & own.keys()
        all_biases = {name for name in own if name.endswith("bias")}
        if values.keys() in (of_targets, all_biases):
            names = {n: n.replace(".bias", ".base_layer.bias") if n in of_targets else n for n in values}
            bias = "lora_only" if values.keys() == of_targets else "all"
            return {"bias": bias}, {f"{prefix}{names[n]}": value for n, value in values.items()}
    heads = _whole_modules(delta_model, set(values))
    if prompt and not heads:
        heads = _task_heads(backbone)
    inside = [site for site in sites if any(f"{site}.".startswith(f"{head}.") for head in heads)]
    if inside:
        raise refused(
            delta_model, f"{inside[0]!r} has a layer and trained parameters of its own, which PEFT keeps in one place"
        )
    current = backbone_parameters(backbone)
    within = [name for name in current if any(name.startswith(f"{head}.") for head in heads)]
    tensors = {f"{prefix}{name}": values.get(name, current[name]).detach() for name in within}
    return {"modules_to_save": heads} if heads else {}, tensors


def _whole_modules(delta_model: DeltaModel, names: set[str]) -> list[str]:
    """Return the largest modules that hold only trained parameters, and the direct parents of the others.

    Raises:
        CheckpointError: If PEFT, which looks at the ends of names, would take other modules as well.
    """
    backbone = delta_model.backbone_model
    own = backbone_parameters(backbone)
    modules = [name for name, _ in backbone_modules(backbone) if name]
    result: list[str] = []
    for name in names:
        parts = name.split(".")[:-1]
        above = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
        complete = [m for m in above if {n for n in own if n.startswith(f"{m}.")} <= names]
        if not above:
            raise refused(delta_model, f"{name!r} is a parameter of the whole model, which lies in no module")
        result.append(complete[0] if complete else above[-1])
    result = sorted(set(result))
    for entry in result:
        others = [m for m in modules if m.endswith(entry) and not any(f"{m}.".startswith(f"{head}.") for head in result)]
        if others:
            raise refused(delta_model, f"PEFT would take {others[0]!r} for {entry!r}, as its name ends like that")
    return result


def _task_heads(backbone: nn.Module) -> list[str]:
    """Return the head that PEFT trains with every prompt for a classifier."""
    children = dict(backbone.named_children())
    return [name for name in ("classifier", "score", "qa_outputs") if name in children and task_type(backbone) != "CAUSAL_LM"]


def prompt(model: DeltaModel) -> Written:
    """Write a soft prompt."""
    layer: Any = model.attachments[0].layer
    place = model.attachments[0].module
    if getattr(layer, "pad_id", None) is not None:
        raise refused(model, "pad_id makes a mask of its own, and PEFT has none for it")
    scales = isinstance(getattr(place, "embed_scale", None), (int, float))
    if scales and not layer.raw:
        raise refused(model, f"a {type(model.backbone_model).__name__} scales the embeddings of tokens, and PEFT does not")
    if layer.cut:
        raise refused(model, "the head looks for the last token in the ids that it was given, which PEFT does not hand on")
    vectors = layer.prompt().detach()
    return {**_prompt_keys(model, "PROMPT_TUNING", *vectors.shape), "prompt_tuning_init": "RANDOM"}, {
        "prompt_embeddings": vectors
    }


def prefix(model: DeltaModel) -> Written:
    """Write a prefix as the keys and values themselves, whatever made them in training."""
    config: Any = model.config
    backbone: Any = model.backbone_model
    settings = backbone.config.get_text_config()
    with torch.no_grad():
        pairs = [attachment.layer() for attachment in model.attachments]
    widths = {part.shape[1] for pair in pairs for part in pair}
    if len(pairs) != settings.num_hidden_layers or len(widths) != 1 or config.opendelta_positions:
        raise refused(model, "PEFT puts prefixes of one width into every block")
    width = widths.pop()
    core: Any = model.attachments[0].module.get_submodule(model.attachments[0].layer.core)  # type: ignore[arg-type]
    head_dim = getattr(core, "head_dim", None) or getattr(core, "attention_head_size", None)
    if not head_dim or width % head_dim:
        raise refused(model, f"how a prefix of width {width} falls into heads is not to be seen")
    if config.prefix_positions != "shifted":
        pairs = [(_turned(model, key, head_dim), value) for key, value in pairs]
    keys = _prompt_keys(model, "PREFIX_TUNING", config.prefix_token_num, width)
    keys |= {"num_attention_heads": width // head_dim, "prefix_projection": False, "encoder_hidden_size": width}
    return keys, {"prompt_embeddings": torch.cat([part for pair in pairs for part in pair], dim=1)}


def _turned(model: DeltaModel, key: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Return learned keys for a text that starts behind them: where positions are rotations, they are rotated as far.

    Raises:
        CheckpointError: If positions are something else.
    """
    from deltaexp.attention import positioned

    layer: Any = model.attachments[0].layer
    core = model.attachments[0].module.get_submodule(layer.core)
    rotate: Any = getattr(sys.modules[type(core).__module__], "apply_rotary_pos_emb", None)
    heads = key.unflatten(-1, (-1, head_dim)).transpose(0, 1)[None]
    try:
        place: Any = positioned(model.backbone_model)
        cos, sin = place.rotary_emb(heads, torch.full((1, len(key)), len(key), device=key.device))
        turned = rotate(heads, heads, cos, sin)[1]
        fits = torch.allclose(turned.norm(dim=-1), heads.norm(dim=-1), rtol=1e-4)
    except (AddressingError, AttributeError, TypeError, ValueError, RuntimeError):
        fits = False
    if not fits:
        raise refused(
            model,
            "PEFT keeps a prefix in the cache, so that the positions of the text start behind it. This one was trained with "
            "prefix_positions=none, on a backbone whose positions are no plain rotations. Train it with "
            "prefix_positions=shifted",
        )
    return turned[0].transpose(0, 1).flatten(1)


def _prompt_keys(model: DeltaModel, method: str, count: int, width: int) -> dict[str, Any]:
    backbone: Any = model.backbone_model
    if task_type(backbone) is None:
        raise refused(model, f"PEFT has no task for a {type(backbone).__name__}, and a prompt needs one")
    settings = backbone.config.get_text_config()
    return {
        "peft_type": method,
        "num_virtual_tokens": count,
        "token_dim": width,
        "num_transformer_submodules": 1,
        "num_attention_heads": settings.num_attention_heads,
        "num_layers": settings.num_hidden_layers,
    }


PROMPTS = {"soft_prompt": prompt, "prefix": prefix}


def _card(keys: Mapping[str, Any]) -> str:
    """Return a short card in the Hub's format."""
    name = keys["base_model_name_or_path"]
    head = ["library_name: peft", *([f"base_model: {name}"] if name and name.count("/") == 1 else []), "tags: [deltaexp]"]
    code = 'from peft import PeftModel\n\nmodel = PeftModel.from_pretrained(backbone_model, "PATH_OR_REPO")'
    return (
        "---\n"
        + "\n".join(head)
        + f"\n---\n\n# A {keys['peft_type']} adapter, exported by deltaexp\n\n```python\n{code}\n```\n"
    )
