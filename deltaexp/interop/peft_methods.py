"""What each method of PEFT's keeps in an adapter, as keys and tensors of the delta type that computes the same."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from deltaexp.deltas.lora import FROM_THE_WEIGHT, decomposed
from deltaexp.deltas.vera import VeraProjection
from deltaexp.errors import CheckpointError, MissingTensorError, TensorShapeError, listing
from deltaexp.interop.opendelta import pattern_of
from deltaexp.interop.peft_files import Adapter
from deltaexp.prompting import find_place, place_name
from deltaexp.registry import DeltaConfig
from deltaexp.structure import backbone_modules
from deltaexp.targets import find, linear_weight

Groups = dict[str, dict[str, torch.Tensor]]
"""For every module with a layer, in the backbone's order, the layer's tensors under PEFT's names."""
Read = tuple[dict[str, Any], dict[str, torch.Tensor]]
Reader = Callable[[Adapter, Groups, dict[str, torch.Tensor], nn.Module], Read]

UNUSUAL = (
    *("alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "loftq_config", "lora_ga_config"),
    *("megatron_config", "monteclora_config", "target_parameters", "trainable_token_indices", "use_bdlora", "use_qalora"),
    *("velora_config", "runtime_config"),
)
"""Keys of PEFT's LoRA that make it compute something else, if set."""
INITS = (True, False, None, "gaussian", "orthogonal", "eva", *FROM_THE_WEIGHT)
"""Ways in which A and B start that either do not matter later, or can be had from the backbone again."""


def no_keys(adapter: Adapter) -> dict[str, Any]:
    """Return the keys of a method that has none."""
    return {}


def is_plain_lora(adapter: Adapter) -> bool:
    """Say whether deltaexp's LoRA can be this one: no embeddings, no bias in B.

    Raises:
        CheckpointError: If it is one that nobody but PEFT can load.
    """
    used = [key for key in UNUSUAL if adapter.values.get(key)]
    init = adapter.values.get("init_lora_weights", True)
    if used or not any(init is known or (isinstance(known, str) and init == known) for known in INITS):
        what = f"its key {used[0]!r}" if used else f"init_lora_weights={init!r}, which changes the backbone's own weights"
        raise CheckpointError(
            f"The LoRA in {str(adapter.folder)!r} uses {what}, which cannot be had here. Load it with PEFT and merge it there."
        )
    return not adapter.values.get("lora_bias") and not any(".lora_embedding_" in name for name in adapter.tensors)


def is_plain_product(adapter: Adapter) -> bool:
    """Say whether deltaexp's LoHa or LoKr can be this one: one rank and one alpha, and no kernels in parts."""
    alpha = adapter.number("alpha", 8)
    split = any(name.endswith(("hada_t1", "hada_t2", "lokr_t2")) for name in adapter.tensors)
    return not (split or adapter.pattern("rank_pattern") or adapter.pattern("alpha_pattern") or alpha != int(alpha))


def lora_keys(adapter: Adapter) -> dict[str, Any]:
    """Return the keys of ``delta_type=lora``."""
    init = adapter.values.get("init_lora_weights", True)
    return {
        "lora_r": adapter.whole("r", 8),
        "lora_alpha": max(1, round(adapter.number("lora_alpha", 8))),
        "lora_dropout": float(adapter.number("lora_dropout", 0.0)),
        "lora_scaling": "rslora" if adapter.values.get("use_rslora") else "standard",
        "lora_dora": bool(adapter.values.get("use_dora")),
        "lora_init": init if init in FROM_THE_WEIGHT or init == "gaussian" else "kaiming",
    }


def lora(adapter: Adapter, groups: Groups, beside: Mapping[str, torch.Tensor], backbone: nn.Module) -> Read:
    """Read LoRA: A and B as they are, B times what of alpha is no whole number."""
    keys = lora_keys(adapter)
    every = [name for name, _ in backbone_modules(backbone)]
    r_pattern, alpha_pattern = adapter.pattern("rank_pattern"), adapter.pattern("alpha_pattern")
    ranks: dict[str, int] = {}
    alphas: dict[str, int] = {}
    tensors: dict[str, torch.Tensor] = {}
    for name, parts in groups.items():
        down, up = _part(adapter, name, parts, "lora_A.weight"), _part(adapter, name, parts, "lora_B.weight")
        ranks[name] = len(down)
        _same_rank(adapter, name, {len(down), up.shape[1] if up.dim() > 1 else -1}, _patterned(r_pattern, name, keys["lora_r"]))
        alpha = _patterned(alpha_pattern, name, adapter.number("lora_alpha", 8))
        alphas[name] = max(1, round(alpha))
        down, up = down.flatten(1), up.flatten(1)  # those of a convolution have its kernel's shape
        tensors[f"{name}.lora.lora_A"] = down
        tensors[f"{name}.lora.lora_B"] = up if alphas[name] == alpha else up * (alpha / alphas[name])
        if keys["lora_init"] in FROM_THE_WEIGHT:
            root = math.sqrt(ranks[name]) if keys["lora_scaling"] == "rslora" else ranks[name]
            weight = linear_weight(backbone.get_submodule(name))
            if ranks[name] > min(weight.flatten(1).shape):
                raise _shape(adapter, name, f"a rank of {ranks[name]}, which is more than the weight has")
            start = decomposed(keys["lora_init"], weight, ranks[name], alphas[name] / root)
            tensors[f"{name}.lora.lora_A0"], tensors[f"{name}.lora.lora_B0"] = start
        if keys["lora_dora"]:
            found = next((parts[key] for key in parts if key.startswith("lora_magnitude")), None)
            if found is None:
                raise _missing(adapter, f"{name}.lora_magnitude_vector")
            tensors[f"{name}.lora.magnitude"] = found.flatten()
        elif any(key.startswith("lora_magnitude") for key in parts):
            raise _extra_magnitude(adapter, name)
    keys["lora_r"], keys["lora_r_pattern"] = _most(ranks, every)
    keys["lora_alpha"], keys["lora_alpha_pattern"] = _most(alphas, every)
    return keys, tensors


def adalora_keys(adapter: Adapter) -> dict[str, Any]:
    """Return the keys of ``delta_type=adalora``; PEFT counts its phases in steps, which are over."""
    start = adapter.whole("init_r", 12)
    return {
        "adalora_init_r": start,
        "adalora_target_r": min(adapter.whole("target_r", 8), start),
        "adalora_alpha": max(1, round(adapter.number("lora_alpha", 8))),
        "adalora_dropout": float(adapter.number("lora_dropout", 0.0)),
    }


def adalora(adapter: Adapter, groups: Groups, beside: Mapping[str, torch.Tensor], backbone: nn.Module) -> Read:
    """Read AdaLoRA; where PEFT left ranks out that were given up, zeros stand for them."""
    keys = adalora_keys(adapter)
    start, alpha = keys["adalora_init_r"], adapter.number("lora_alpha", 8)
    kept = adapter.values.get("rank_pattern") or {}
    tensors: dict[str, torch.Tensor] = {}
    for name, parts in groups.items():
        down, up, e = (_part(adapter, name, parts, f"lora_{letter}") for letter in "ABE")
        if down.dim() != 2 or up.dim() != 2 or not len(down) == up.shape[1] == len(e):
            raise _shape(adapter, name, f"lora_A, lora_B and lora_E of shapes {[list(t.shape) for t in (down, up, e)]}")
        mask = torch.ones(start, dtype=torch.bool) if len(down) == start else None
        if mask is None:  # as long as the list in the file, so that nothing is made in a size that only a number names
            mask = next((_mask(found) for key, found in kept.items() if str(key).startswith(f"{name}.")), None)
            if mask is None or len(mask) != start or int(mask.sum()) != len(down):
                raise _shape(adapter, name, f"{len(down)} ranks, where init_r is {start} and rank_pattern tells no other")
        layer = f"{name}.adalora."
        spread = down.new_zeros(start, down.shape[1]), up.new_zeros(len(up), start), e.new_zeros(start, 1)
        spread[0][mask], spread[1][:, mask], spread[2][mask] = down, up * (alpha / keys["adalora_alpha"]), e
        for part, tensor in zip(("lora_A", "lora_B", "lora_E"), spread, strict=True):
            tensors[layer + part] = tensor
        tensors[f"{layer}lora_mask"] = mask[:, None].to(e)
    return keys, tensors


def ia3_keys(adapter: Adapter) -> dict[str, Any]:
    """Return the keys of ``delta_type=ia3``."""
    return {"ia3_feedforward_modules": adapter.names("feedforward_modules") or []}


def ia3(adapter: Adapter, groups: Groups, beside: Mapping[str, torch.Tensor], backbone: nn.Module) -> Read:
    """Read (IA)^3: a row scales the input, a column the output."""
    every = [name for name, _ in backbone_modules(backbone)]
    named = adapter.values.get("feedforward_modules") or []
    inputs = [name for name in groups if _feeds(adapter, named, name)]
    tensors = {}
    for name, parts in groups.items():
        vector = _part(adapter, name, parts, "ia3_l")
        if vector.dim() != 2 or vector.shape[0 if name in inputs else 1] != 1:
            kind = "row, as feedforward_modules names it" if name in inputs else "column"
            raise _shape(adapter, name, f"a vector of shape {list(vector.shape)}, which must be a {kind}")
        tensors[f"{name}.ia3.ia3_l"] = vector.flatten()
    return {"ia3_feedforward_modules": [pattern_of(name, every) for name in inputs]}, tensors


def vera_keys(adapter: Adapter) -> dict[str, Any]:
    """Return the keys of ``delta_type=vera``."""
    return {
        "vera_r": adapter.whole("r", 256),
        "vera_dropout": float(adapter.number("vera_dropout", 0.0)),
        "vera_d_initial": float(adapter.number("d_initial", 0.1)),
        "vera_seed": adapter.whole("projection_prng_key", 0, least=0),
    }


def vera(adapter: Adapter, groups: Groups, beside: Mapping[str, torch.Tensor], backbone: nn.Module) -> Read:
    """Read VeRA; the random matrices are in the file, or are drawn anew from their seed."""
    keys = vera_keys(adapter)
    tensors: dict[str, torch.Tensor] = {}
    dims = []
    for name, parts in groups.items():
        b, d = _part(adapter, name, parts, "vera_lambda_b"), _part(adapter, name, parts, "vera_lambda_d")
        _same_rank(adapter, name, {len(d)}, keys["vera_r"])
        dims.append(tuple(linear_weight(backbone.get_submodule(name)).shape))
        tensors[f"{name}.vera.vera_lambda_d"], tensors[f"{name}.vera.vera_lambda_b"] = d, b
    out_dim, in_dim = (max(sizes) for sizes in zip(*dims, strict=True))
    saved = {name.rpartition(".")[2]: tensor for name, tensor in beside.items()}
    if len(saved) < 2 and (saved or adapter.values.get("save_projection", True)):
        raise _missing(adapter, "base_model.vera_A or base_model.vera_B")
    if not saved:
        saved = dict(VeraProjection(in_dim, out_dim, keys["vera_r"], keys["vera_seed"]).named_buffers())
    first = next(iter(groups))
    return keys, {**tensors, **{f"{first}.vera.projection.{name}": tensor for name, tensor in saved.items()}}


def loha_keys(adapter: Adapter) -> dict[str, Any]:
    """Return the keys of ``delta_type=loha``."""
    return {"loha_r": adapter.whole("r", 8), "loha_alpha": int(adapter.number("alpha", 8))}


def loha(adapter: Adapter, groups: Groups, beside: Mapping[str, torch.Tensor], backbone: nn.Module) -> Read:
    """Read LoHa."""
    keys = loha_keys(adapter)
    for name, parts in groups.items():
        found = {_part(adapter, name, parts, f"hada_w{n}_b").shape[0] for n in (1, 2)}
        _same_rank(adapter, name, found, keys["loha_r"])
    return keys, {f"{name}.loha.{part}": tensor for name, parts in groups.items() for part, tensor in parts.items()}


def lokr_keys(adapter: Adapter) -> dict[str, Any]:
    """Return the keys of ``delta_type=lokr``."""
    factor = adapter.whole("decompose_factor", -1, least=-1)
    return {
        "lokr_r": adapter.whole("r", 8),
        "lokr_alpha": int(adapter.number("alpha", 8)),
        "lokr_decompose_both": bool(adapter.values.get("decompose_both")),
        "lokr_decompose_factor": factor,
    }


def lokr(adapter: Adapter, groups: Groups, beside: Mapping[str, torch.Tensor], backbone: nn.Module) -> Read:
    """Read LoKr, where a rank is a shape only of what is decomposed."""
    keys = lokr_keys(adapter)
    for name, parts in groups.items():
        found = {len(tensor) for part, tensor in parts.items() if part.endswith("_b")}
        _same_rank(adapter, name, found, keys["lokr_r"])
    return keys, {f"{name}.lokr.{part}": tensor for name, parts in groups.items() for part, tensor in parts.items()}


def ln_tuning(adapter: Adapter, groups: Groups, beside: Mapping[str, torch.Tensor], backbone: nn.Module) -> Read:
    """Read LN-tuning, which trains the norms' own parameters."""
    own = {n: p.dtype for n, p in backbone.named_parameters()}
    tensors = {f"{name}.{part.rpartition('.')[2]}": t for name, parts in groups.items() for part, t in parts.items()}
    return {}, {name: tensor.to(own.get(name, tensor.dtype)) for name, tensor in tensors.items()}


def prompt_keys(adapter: Adapter) -> dict[str, Any]:
    """Return the keys of ``delta_type=soft_prompt``."""
    return {"soft_token_num": adapter.whole("num_virtual_tokens"), "token_init": False}


def prompt(adapter: Adapter, groups: Groups, beside: Mapping[str, torch.Tensor], backbone: nn.Module) -> Read:
    """Read a soft prompt; PEFT may keep one for a decoder behind the encoder's, which nothing reads."""
    vectors, count = _prompt(adapter, beside), prompt_keys(adapter)["soft_token_num"]
    parts = adapter.whole("num_transformer_submodules", 2 if adapter.values.get("task_type") == "SEQ_2_SEQ_LM" else 1)
    if vectors.dim() != 2 or len(vectors) != count * parts:
        raise _shape(adapter, "prompt_embeddings", f"shape {list(vectors.shape)}, where {count} x {parts} vectors are due")
    place = find_place(backbone)
    if isinstance(getattr(place.module, "embed_scale", None), (int, float)):
        raise CheckpointError(
            f"The prompt in {str(adapter.folder)!r} cannot go in front of a {type(backbone).__name__}, which scales the "
            "embeddings of tokens, as PEFT does not. Use it with PEFT."
        )
    name = ".".join(part for part in (place_name("", backbone), "soft_prompt_layer.soft_embeds") if part)
    return {}, {name: vectors[:count].to(torch.promote_types(vectors.dtype, torch.float32)).clone()}


def prefix_keys(adapter: Adapter) -> dict[str, Any]:
    """Return the keys of ``delta_type=prefix``; what made the prefix in training is not in the file."""
    return {"prefix_token_num": adapter.whole("num_virtual_tokens"), "reparameterize": False, "prefix_positions": "shifted"}


def prefix(adapter: Adapter, groups: Groups, beside: Mapping[str, torch.Tensor], backbone: nn.Module) -> Read:
    """Read a prefix: for every block the keys, then the values, side by side."""
    vectors, count = _prompt(adapter, beside), prefix_keys(adapter)["prefix_token_num"]
    if vectors.dim() != 2 or len(vectors) != count:
        raise _shape(adapter, "prompt_embeddings", f"shape {list(vectors.shape)}, where {count} rows are due")
    config = DeltaConfig.from_dict({"delta_type": "prefix", "prefix_token_num": count})
    sites = [site.name for site in find(config, backbone)[1]]
    if getattr(getattr(backbone, "config", None), "is_encoder_decoder", False):
        raise CheckpointError(
            f"The prefix in {str(adapter.folder)!r} is also one for cross-attention in an encoder-decoder, which cannot be had "
            "here. Use it with PEFT."
        )
    width, left = divmod(vectors.shape[1], 2 * len(sites))
    if left or adapter.values.get("num_layers", len(sites)) != len(sites):
        raise _shape(adapter, "prompt_embeddings", f"shape {list(vectors.shape)}, which is none for {len(sites)} attentions")
    rows = vectors.to(torch.promote_types(vectors.dtype, torch.float32)).split(width, dim=1)
    names = [f"{name}.prefix.past_{part}" for name in sites for part in ("key", "value")]
    every = [name for name, _ in backbone_modules(backbone)]
    patterns = [pattern_of(name, every) for name in sites]
    tensors = {name: tensor.clone() for name, tensor in zip(names, rows, strict=True)}
    return {"modified_modules": patterns, "common_structure": False, "exclude_modules": []}, tensors


def _prompt(adapter: Adapter, beside: Mapping[str, torch.Tensor]) -> torch.Tensor:
    if "prompt_embeddings" not in beside:
        raise _missing(adapter, "prompt_embeddings")
    return beside["prompt_embeddings"]


def _feeds(adapter: Adapter, named: list[str] | str, name: str) -> bool:
    """Say whether PEFT takes a module for one of ``feedforward_modules``: by any end of its name, or all of it."""
    if isinstance(named, str):
        return adapter.expression(named, "feedforward_modules").fullmatch(name) is not None
    return any(name.endswith(entry) for entry in named)


def _patterned(pattern: Mapping[str, float], name: str, otherwise: float) -> float:
    """Return what ``rank_pattern`` or ``alpha_pattern`` says about a module: regular expressions for ends of names."""
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", name)), otherwise)


def _most(values: Mapping[str, int], every: list[str]) -> tuple[int, dict[str, int]]:
    """Return the value that most modules have, and a pattern with the value of each of the others."""
    common = Counter(values.values()).most_common(1)[0][0]
    return common, {pattern_of(name, every): value for name, value in values.items() if value != common}


def _mask(value: Any) -> torch.Tensor | None:
    fits = isinstance(value, list) and all(isinstance(entry, bool) for entry in value)
    return torch.tensor(value, dtype=torch.bool) if fits else None


def _part(adapter: Adapter, module: str, parts: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    if name not in parts:
        raise _missing(adapter, f"{module}.{name}")
    if parts[name].dim() == 0:
        raise _shape(adapter, module, f"a {name} that is a single number")
    return parts[name]


def _same_rank(adapter: Adapter, module: str, found: set[int], declared: float) -> None:
    if found and found != {declared}:
        raise _shape(adapter, module, f"tensors of rank {listing(sorted(found))}, where its config says {declared}")


def _missing(adapter: Adapter, name: str) -> MissingTensorError:
    return MissingTensorError(
        f"The adapter in {str(adapter.folder)!r} lacks {name}, which its config describes. Nothing was loaded; copy it again."
    )


def _extra_magnitude(adapter: Adapter, name: str) -> CheckpointError:
    return TensorShapeError(
        f"The adapter in {str(adapter.folder)!r} has a DoRA magnitude for {name}, and use_dora is not set in its config. "
        "Nothing was loaded; copy it again."
    )


def _shape(adapter: Adapter, module: str, what: str) -> TensorShapeError:
    return TensorShapeError(
        f"The adapter in {str(adapter.folder)!r} has for {module!r} {what}. Nothing was loaded; copy it again, or load it onto "
        "the backbone it was trained on."
    )
