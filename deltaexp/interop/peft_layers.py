"""What the layers of each delta type are in an adapter of PEFT's: the keys of its config and the tensors.

A layer on a slice of a fused projection becomes one on the whole projection that leaves the other outputs as they are.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from deltaexp.errors import CheckpointError, listing
from deltaexp.interop.peft_files import PREFIX
from deltaexp.structure import backbone_modules, linear_dims
from deltaexp.surgery import Attachment
from deltaexp.targets import linear_weight

if TYPE_CHECKING:
    from deltaexp.model import DeltaModel

Written = tuple[dict[str, Any], dict[str, torch.Tensor]]
"""Keys of PEFT's config, and tensors under the names that PEFT gives them."""


def lora(model: DeltaModel) -> Written:
    """Write LoRA and its variants; what PiSSA and OLoRA subtract from the weight are more ranks here."""
    return low_rank(model, dora=getattr(model.config, "lora_dora", False))


def low_rank(model: DeltaModel, dora: bool = False) -> Written:
    """Write any update ``scale up down`` as LoRA."""
    groups = by_module(model)
    scaling = getattr(model.config, "lora_scaling", "standard")
    whole = all(len(own) == 1 and own[0].rows is None for own in groups.values())
    start = any(getattr(own[0].layer, "lora_A0", None) is not None for own in groups.values())
    rslora = scaling == "rslora" and whole and not start
    tensors: dict[str, torch.Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, int] = {}
    for site, own in groups.items():
        down, up, scale = _combined(own)
        ranks[site] = len(down)
        alpha = scale * (math.sqrt(len(down)) if rslora else len(down))
        alphas[site] = max(1, round(alpha))  # others than PEFT want a whole number
        if abs(alpha - alphas[site]) > 1e-12 * alpha:
            up = up * (alpha / alphas[site])
        name = f"{PREFIX}{site}.lora_"
        kernel: tuple[int, ...] = own[0].layer.target.kernel  # type: ignore[union-attr, assignment]
        tensors[f"{name}A.weight"] = down.unflatten(1, (-1, *kernel)) if kernel else down
        tensors[f"{name}B.weight"] = up.unflatten(1, (-1, *(1 for _ in kernel))) if kernel else up
        if dora:
            magnitude = _magnitude(own)
            tensors[f"{name}magnitude_vector"] = magnitude.view(1, -1, *(1 for _ in kernel)) if kernel else magnitude
    r, alpha_of_most = most(ranks), most(alphas)
    keys = {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": alpha_of_most,
        "rank_pattern": {site: rank for site, rank in ranks.items() if rank != r},
        "alpha_pattern": {site: alpha for site, alpha in alphas.items() if alpha != alpha_of_most},
        "lora_dropout": getattr(model.config, "lora_dropout", 0.0),
        "use_rslora": rslora,
        "use_dora": dora,
        "init_lora_weights": True,
        "fan_in_fan_out": all(is_conv1d(own[0].module) for own in groups.values()),
        "bias": "none",
        "target_modules": target_modules(list(groups), model.backbone_model),
    }
    return keys, tensors


def ia3(model: DeltaModel) -> Written:
    """Write (IA)^3: a row where the input is scaled, a column where the output is."""
    groups = by_module(model)
    backbone = model.backbone_model
    inputs = []
    tensors = {}
    for site, own in groups.items():
        dims = linear_dims(own[0].module)
        if dims is None or any(getattr(a.layer, "axis", -1) != -1 for a in own):
            raise refused(model, f"PEFT's IA3 goes on linear maps only, and {site!r} is a {type(own[0].module).__name__}")
        if own[0].layer.insertion == "input":
            inputs.append(site)
            vector: torch.Tensor = own[0].layer.ia3_l  # type: ignore[assignment]
            tensors[f"{PREFIX}{site}.ia3_l"] = vector.detach()[None, :]
        else:
            parts = [(a, dict(a.layer.named_parameters())["ia3_l"].detach()) for a in own]
            tensors[f"{PREFIX}{site}.ia3_l"] = spread(parts, torch.ones(dims[1]))[:, None]
    targets = target_modules(list(groups), backbone)
    ends = [entry for entry in targets if any(site.endswith(entry) for site in inputs)] if isinstance(targets, list) else []
    if {site for site in groups if any(site.endswith(entry) for entry in ends)} != set(inputs):
        targets, ends = list(groups), inputs  # by full names, of which none ends as another one does
        if any(a != b and a.endswith(b) for a in groups for b in groups):
            raise refused(model, "PEFT tells the modules whose input is scaled by the ends of names, which are not unique here")
    keys = {
        "peft_type": "IA3",
        "target_modules": targets,
        "feedforward_modules": ends,
        "fan_in_fan_out": all(is_conv1d(own[0].module) for own in groups.values()),
    }
    return keys, tensors


def vera(model: DeltaModel) -> Written:
    """Write VeRA with its matrices; on slices of projections as LoRA, as there PEFT's would take other rows of B."""
    config: Any = model.config
    groups = by_module(model)
    layers: dict[str, Any] = {site: own[0].layer for site, own in groups.items()}
    if any(own[0].rows is not None or layers[site].target.kernel for site, own in groups.items()):
        return low_rank(model)
    projection = next(iter(layers.values())).projection
    tensors = {"base_model.vera_A": projection.vera_A, "base_model.vera_B": projection.vera_B}
    for site, layer in layers.items():
        tensors[f"{PREFIX}{site}.vera_lambda_b"] = layer.vera_lambda_b.detach()
        tensors[f"{PREFIX}{site}.vera_lambda_d"] = layer.vera_lambda_d.detach()
    keys = {
        "peft_type": "VERA",
        "r": config.vera_r,
        "vera_dropout": config.vera_dropout,
        "d_initial": config.vera_d_initial,
        "projection_prng_key": config.vera_seed,
        "save_projection": True,
        "fan_in_fan_out": all(is_conv1d(own[0].module) for own in groups.values()),
        "bias": "none",
        "target_modules": target_modules(list(groups), model.backbone_model),
    }
    return keys, tensors


def loha(model: DeltaModel) -> Written:
    """Write LoHa; slices of a projection become blocks of the factors.

    PEFT has none for transformers' Conv1D. There it is written as LoRA: a product of two matrices of rank r, element by
    element, is a matrix of rank r squared, and which one is known.
    """
    config: Any = model.config
    groups = by_module(model)
    if any(is_conv1d(own[0].module) for own in groups.values()):
        return low_rank(model)
    tensors: dict[str, torch.Tensor] = {}
    ranks: dict[str, int] = {}
    for site, own in groups.items():
        dims = linear_dims(own[0].module)
        for number in (1, 2):
            ups = [(a, getattr(a.layer, f"hada_w{number}_a").detach()) for a in own]
            downs = [getattr(a.layer, f"hada_w{number}_b").detach() for a in own]
            up = ups[0][1] if own[0].rows is None or dims is None else blocks(ups, dims[1])
            tensors[f"{PREFIX}{site}.hada_w{number}_a"] = up
            tensors[f"{PREFIX}{site}.hada_w{number}_b"] = torch.cat(downs)
        ranks[site] = sum(len(down) for down in downs)
    r = most(ranks)
    others = {site: rank for site, rank in ranks.items() if rank != r}
    scale = config.loha_alpha / config.loha_r
    keys = {
        "peft_type": "LOHA",
        "r": r,
        "alpha": _plain(scale * r),
        "rank_pattern": others,
        "alpha_pattern": {site: _plain(scale * rank) for site, rank in others.items()},
        "rank_dropout": 0.0,
        "module_dropout": 0.0,
        "target_modules": target_modules(list(groups), model.backbone_model),
    }
    return keys, tensors


def lokr(model: DeltaModel) -> Written:
    """Write LoKr."""
    config: Any = model.config
    groups = by_module(model)
    _no_conv1d(model, groups)
    if any(own[0].rows is not None for own in groups.values()):
        raise refused(model, "on a slice of a fused projection the update is no Kronecker product of the whole")
    tensors = {
        f"{PREFIX}{site}.{name}": value.detach()
        for site, own in groups.items()
        for name, value in own[0].layer.named_parameters()
    }
    keys = {
        "peft_type": "LOKR",
        "r": config.lokr_r,
        "alpha": config.lokr_alpha,
        "decompose_both": config.lokr_decompose_both,
        "decompose_factor": config.lokr_decompose_factor,
        "rank_dropout": 0.0,
        "module_dropout": 0.0,
        "target_modules": target_modules(list(groups), model.backbone_model),
    }
    return keys, tensors


def ln_tuning(model: DeltaModel) -> Written:
    """Write LN-tuning: the norms' parameters."""
    values = {name: value for name, value in model.delta_tensors().items() if name in model._in_place}
    sites = list(dict.fromkeys(name.rpartition(".")[0] for name in values))
    tensors = {}
    for name, value in values.items():
        site, _, part = name.rpartition(".")
        tensors[f"{PREFIX}{site}.ln_tuning_layers.{part}"] = value.detach()
    return {"peft_type": "LN_TUNING", "target_modules": target_modules(sites, model.backbone_model)}, tensors


WRITERS: dict[str, Callable[[DeltaModel], Written]] = {
    "lora": lora,
    "adalora": low_rank,
    "ia3": ia3,
    "vera": vera,
    "loha": loha,
    "lokr": lokr,
    "ln_tuning": ln_tuning,
}
"""The delta types that are layers of one of PEFT's methods, too; AdaLoRA without the ranks that it has given up."""


def by_module(model: DeltaModel) -> dict[str, list[Attachment]]:
    """Return the layers of every module: one, or several on slices of it."""
    result: dict[str, list[Attachment]] = {}
    for attachment in model.attachments:
        result.setdefault(attachment.site, []).append(attachment)
    return result


def is_conv1d(module: nn.Module) -> bool:
    """Say whether a module is transformers' Conv1D, which holds the transpose of a Linear's weight."""
    return type(module).__name__ == "Conv1D"


def _combined(own: Sequence[Attachment]) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Return ``down``, ``up`` and the scale of the update of a whole module."""
    parts = [_factors(attachment) for attachment in own]
    scale = parts[0][2] if len({scale for _, _, scale in parts}) == 1 else 1.0
    ups = [(a, up * (own_scale / scale)) for a, (_, up, own_scale) in zip(own, parts, strict=True)]
    down = torch.cat([down for down, _, _ in parts])
    dims = linear_dims(own[0].module)
    if own[0].rows is None or dims is None:
        return down, ups[0][1], scale
    return down, blocks(ups, dims[1]), scale


def _factors(attachment: Attachment) -> tuple[torch.Tensor, torch.Tensor, float]:
    layer: Any = attachment.layer
    target = layer.target
    if target.options.get("groups", 1) != 1:
        raise CheckpointError(
            f"The layer on {attachment.site!r}, a convolution in {target.options['groups']} groups, is none that PEFT has. "
            "Export the delta with to=merged."
        )
    with torch.no_grad():
        if hasattr(layer, "hada_w1_a"):
            down = (layer.hada_w1_b[:, None] * layer.hada_w2_b[None]).flatten(0, 1)
            return down, (layer.hada_w1_a[:, :, None] * layer.hada_w2_a[:, None]).flatten(1), layer.scale
        down, up = (factor.detach() for factor in layer.factors())
        if hasattr(layer, "lora_mask"):  # of AdaLoRA, without the ranks that were given up
            kept = (down != 0).any(dim=1)
            kept[0] |= not kept.any()
            down, up = down[kept], up[:, kept]
    return down, up, layer.scale


def _magnitude(own: Sequence[Attachment]) -> torch.Tensor:
    """Return DoRA's norms for a whole module; an output that has no layer keeps its own."""
    parts = [(a, dict(a.layer.named_parameters())["magnitude"].detach()) for a in own]
    weight = linear_weight(own[0].module).detach().flatten(1).to(parts[0][1].dtype)
    return spread(parts, torch.linalg.vector_norm(weight, dim=1))


def spread(parts: Sequence[tuple[Attachment, torch.Tensor]], otherwise: torch.Tensor) -> torch.Tensor:
    """Return a vector for a module's whole output from those for slices of it."""
    if parts[0][0].rows is None:
        return parts[0][1]
    result = otherwise.to(parts[0][1])
    for attachment, vector in parts:
        assert attachment.rows is not None
        result[attachment.rows.indices().to(result.device)] = vector
    return result


def blocks(parts: Sequence[tuple[Attachment, torch.Tensor]], out_dim: int) -> torch.Tensor:
    """Return a matrix ``(out_dim, sum of ranks)`` with those for slices of the output, ``(width, rank)``, as blocks."""
    result = parts[0][1].new_zeros(out_dim, sum(up.shape[1] for _, up in parts))
    column = 0
    for attachment, up in parts:
        assert attachment.rows is not None
        result[attachment.rows.indices().to(result.device), column : column + up.shape[1]] = up
        column += up.shape[1]
    return result


def target_modules(sites: Sequence[str], backbone: nn.Module) -> list[str]:
    """Return what PEFT finds exactly these modules by: the shortest ends of names that do, as other programs expect."""
    every = [name for name, _ in backbone_modules(backbone) if name]
    for length in range(1, max(name.count(".") for name in sites) + 2):
        ends = sorted({".".join(name.split(".")[-length:]) for name in sites})
        if {name for name in every if any(name == end or name.endswith(f".{end}") for end in ends)} == set(sites):
            return ends
    raise CheckpointError(
        f"PEFT finds modules by the ends of their names, and others end like {listing(sites, 2)}. Export the delta with "
        "to=merged."
    )


def most(values: Mapping[str, int]) -> int:
    """Return the value that comes most often."""
    return Counter(values.values()).most_common(1)[0][0]


def refused(model: DeltaModel, why: str) -> CheckpointError:
    """Return the error for a delta that PEFT cannot hold."""
    from deltaexp.folding import mergeable_types

    kind = model.config.delta_type
    can = kind in mergeable_types() or not model.attachments
    advice = "Export it with to=merged, as a plain checkpoint" if can else "It can be used with deltaexp"
    return CheckpointError(f"The delta of type {kind!r} cannot be exported to PEFT: {why}. {advice}.")


def _plain(value: float) -> float:
    return int(value) if value == int(value) else value


def _no_conv1d(model: DeltaModel, groups: Mapping[str, Sequence[Attachment]]) -> None:
    found = [site for site, own in groups.items() if is_conv1d(own[0].module)]
    if found:
        raise refused(model, f"PEFT has no such layer for transformers' Conv1D, which {found[0]!r} is")
