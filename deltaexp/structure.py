"""The common structure of a transformers backbone, found from its module tree.

Every backbone names its projections differently; here a module gets the names

- ``attn.q``, ``attn.k``, ``attn.v``, ``attn.proj``: the projections of self-attention (a fused projection has the
  names of all its parts, e.g. ``attn.q``, ``attn.k`` and ``attn.v``); ``crossattn.q`` and so on for cross-attention;
- ``ff.w1``, ``ff.w2``: into and out of the feed-forward part; ``ff.gate`` for the gate of a gated one;
- ``layer_norm``, ``lm_head``.

They are read off the tree by the field's names for projections and by shapes; there is no table of models.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import nn

from deltaexp.lazy import Layer

QUERY = {"q", "query", "q_proj", "q_lin", "query_proj", "query_layer", "wq", "to_q", "q_linear", "linear_q", "q_attn"}
KEY = {"k", "key", "k_proj", "k_lin", "key_proj", "key_layer", "wk", "to_k", "k_linear", "linear_k"}
VALUE = {"v", "value", "v_proj", "v_lin", "value_proj", "value_layer", "wv", "to_v", "v_linear", "linear_v"}
FUSED = {
    "c_attn", "qkv", "qkv_proj", "query_key_value", "wqkv", "in_proj", "qkv_linear", "to_qkv", "attn_qkv", "att_proj"
}  # fmt: skip
OUT = {"o", "o_proj", "out_proj", "out_lin", "c_proj", "dense", "proj", "to_out", "wo", "out", "o_linear", "attn_out"}
GATE = {"gate_proj", "wi_0", "gate", "w1", "linear_gate", "gate_up_proj"}
UP = {"wi", "wi_1", "fc1", "lin1", "c_fc", "up_proj", "dense_h_to_4h", "w3", "fc_in", "linear1", "intermediate_dense"}
DOWN = {
    "wo", "fc2", "lin2", "c_proj", "down_proj", "dense_4h_to_h", "w2", "fc_out", "linear2", "output_dense"
}  # fmt: skip
ROLES = {"q": QUERY, "k": KEY, "v": VALUE}
CROSS = re.compile(r"cross|enc_?dec|encoder_attn|encoder_decoder", re.IGNORECASE)


def linear_dims(module: nn.Module) -> tuple[int, int] | None:
    """Return ``(in_dim, out_dim)`` of a linear map (Linear and its kin, transformers' Conv1D); None for others."""
    if isinstance(getattr(module, "in_features", None), int) and isinstance(getattr(module, "out_features", None), int):
        return module.in_features, module.out_features  # type: ignore[return-value]
    if type(module).__name__ == "Conv1D" and isinstance(getattr(module, "nf", None), int):
        return module.nx, module.nf  # type: ignore[return-value]
    return None


def output_dim(module: nn.Module) -> int | None:
    """Return the size of the last dimension of what a leaf module returns; None where its type does not say."""
    linear = linear_dims(module)
    if linear:
        return linear[1]
    if isinstance(module, nn.Embedding):
        return module.embedding_dim
    weight = getattr(module, "weight", None)
    if "Norm" in type(module).__name__ and weight is not None and weight.dim() == 1:
        return weight.shape[0]
    return None


def backbone_modules(backbone: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the names and modules of a backbone in order, without the deltas that hang in it."""
    stack = [("", backbone)]
    while stack:
        name, module = stack.pop()
        yield name, module
        children = [
            (f"{name}.{child_name}" if name else child_name, child)
            for child_name, child in module.named_children()
            if not isinstance(child, Layer)
        ]
        stack.extend(reversed(children))


def backbone_parameters(backbone: nn.Module) -> dict[str, nn.Parameter]:
    """Return a backbone's own parameters, each once under its first name, without those of deltas."""
    result: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for prefix, module in backbone_modules(backbone):
        for name, parameter in module.named_parameters(prefix=prefix, recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                result[name] = parameter
    return result


def backbone_tensors(backbone: nn.Module) -> dict[str, torch.Tensor]:
    """Return what identifies a backbone: its own parameters and its persistent buffers."""
    result: dict[str, torch.Tensor] = {**backbone_parameters(backbone)}
    for prefix, module in backbone_modules(backbone):
        for name, buffer in module.named_buffers(prefix=prefix, recurse=False):
            if name.rsplit(".", 1)[-1] not in module._non_persistent_buffers_set:
                result[name] = buffer
    return result


def common_names(backbone: nn.Module) -> dict[str, list[str]]:
    """Return, for the modules that have any, their names in the common structure."""
    modules = dict(backbone_modules(backbone))
    linears = {name: dims for name, module in modules.items() if (dims := linear_dims(module)) is not None}
    result: dict[str, list[str]] = {}
    containers = _attention(linears)
    regions = set()
    for container, cross in containers.items():
        prefix = "crossattn" if cross else "attn"
        for name in _below(container, linears):
            leaf = name.rsplit(".", 1)[-1].lower()
            roles = [f"{prefix}.{role}" for role, spellings in ROLES.items() if leaf in spellings or leaf in FUSED]
            if roles:
                result[name] = roles
        region, outputs = _outputs(container, linears, result)
        regions.add(region)
        for name in outputs:
            result[name] = [f"{prefix}.proj"]
    attention = [f"{region}." for region in regions]
    for name, (in_dim, out_dim) in linears.items():
        if name not in result and not name.startswith(tuple(attention)) and re.search(r"\.\d+\.", f".{name}"):
            role = _feed_forward(name.rsplit(".", 1)[-1].lower(), in_dim, out_dim, modules, name)
            if role:
                result[name] = [role]
    for name, module in modules.items():
        if "Norm" in type(module).__name__:
            result[name] = ["layer_norm"]
    head = getattr(backbone, "get_output_embeddings", lambda: None)()
    for name, module in modules.items():
        if head is not None and module is head:
            result[name] = ["lm_head"]
    return result


def _attention(linears: dict[str, tuple[int, int]]) -> dict[str, bool]:
    """Return the modules that directly hold query, key and value projections, and whether they are cross-attention."""
    leaves: dict[str, set[str]] = {}
    for name in linears:
        container, _, leaf = name.rpartition(".")
        leaves.setdefault(container, set()).add(leaf.lower())
    return {
        container: CROSS.search(container) is not None
        for container, found in leaves.items()
        if container and (found & FUSED or (found & QUERY and found & VALUE))
    }


def _outputs(container: str, linears: dict[str, tuple[int, int]], taken: dict[str, list[str]]) -> tuple[str, list[str]]:
    """Return the module that spans one attention, and the names of its output projections.

    They are below the module that holds q, k and v; where that one has none (BERT's ``attention.self``), below its
    parent, if the parent is a part of the attention by its name and not already the whole block.
    """
    parent = container.rpartition(".")[0]
    for region in (container, parent):
        outputs = [
            name
            for name in _below(region, linears)
            if name not in taken and OUT & set(name.removeprefix(f"{region}.").lower().split("."))
        ]
        if outputs:
            return region, outputs
        if "att" not in parent.rsplit(".", 1)[-1].lower():
            break
    return container, []


def _feed_forward(leaf: str, in_dim: int, out_dim: int, modules: dict[str, nn.Module], name: str) -> str | None:
    """Return the role of a linear module outside of attention, by its name first and by its shape where that is new."""
    siblings = {child for child, _ in modules[name.rpartition(".")[0]].named_children()}
    if leaf in GATE and (siblings & UP or leaf == "gate_up_proj"):
        return "ff.gate"
    # BERT and its kin call both "dense" and say which one it is in the parent's name.
    parent = name.split(".")[-2].lower() if "." in name else ""
    if leaf in UP or parent == "intermediate":
        return "ff.w1"
    if leaf in DOWN or parent == "output":
        return "ff.w2"
    if out_dim > in_dim:
        return "ff.w1"
    return "ff.w2" if in_dim > out_dim else None


def _below(container: str, names: dict[str, tuple[int, int]]) -> list[str]:
    return [name for name in names if name.startswith(f"{container}.")]
