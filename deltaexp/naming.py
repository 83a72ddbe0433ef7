"""The field's names for projections, on which `deltaexp.structure` relies."""

from __future__ import annotations

import re
from collections.abc import Collection

LETTERS = {
    **dict.fromkeys(("q", "wq", "query", "queries", "receptance"), "q"),
    **dict.fromkeys(("k", "wk", "key", "keys"), "k"),
    **dict.fromkeys(("v", "wv", "value", "values"), "v"),
    **dict.fromkeys(("qkv", "wqkv", "qkvz"), "qkv"),
    **dict.fromkeys(("kv", "wkv"), "kv"),
    "qk": "qk",
}
"""What a word in a projection's name says that it makes."""
FUSED = {"c_attn", "in_proj", "att_proj"}
"""Names of fused projections that say so only where their module is attention."""
NEITHER = {"a", "pos", "rel", "relative", "norm", "layernorm", "bias", "scale", "conv", "sconv", "emb", "embed", "embeddings"}
"""Words of what serves a projection: the first of a low-rank pair, positions, norms."""
WRAPPED = {"linear", "dense", "layer"}
"""Names of a linear module that is named by the module around it."""
FILLERS = {"proj", "projection", "project", "linear", "lin", "layer", "to", "c", "fc"}
OUT = {"", "o", "wo", "out", "output", "attn_out", "attention_out", "attn_output", "attention_output", "post", "final", "o_b"}
"""Names of attention's projection out, without the words of `FILLERS`."""
GATE = {"gate_proj", "wi_0", "linear_gate", "proj_up_gate"}
UP = {
    "wi", "wi_1", "fc1", "lin1", "c_fc", "up_proj", "dense_h_to_4h", "w3", "fc_in", "linear1", "linear_1", "layer_1", "w_1",
    "linear_fc1", "intermediate_dense", "intermediate", "dense1", "ffn", "pwconv1", "proj_up", "gate_up_proj", "input_linear",
}  # fmt: skip
DOWN = {
    "wo", "fc2", "lin2", "c_proj", "down_proj", "dense_4h_to_h", "w2", "fc_out", "linear2", "linear_2", "layer_2", "w_out",
    "linear_fc2", "output_dense", "output", "dense2", "ffn_output", "pwconv2", "proj_down", "output_linear",
}  # fmt: skip
NORM = re.compile(r"Norm(\d?[dP]|Gated|Act.*)?$")
"""The end of the name of a normalisation's class."""
CROSS = re.compile(r"cross|enc_?dec|encoder_attn|encoder_decoder", re.IGNORECASE)


def words(name: str) -> list[str]:
    """Return the words of a module's name in lower case: ``q_proj`` has two, ``SelfAttention`` too."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)]


def letters(label: str) -> str:
    """Return which of query, key and value a projection called ``label`` makes: "q", "kv", "qkv" or nothing."""
    found = words(label)
    if not NEITHER.isdisjoint(found):
        return ""
    return "".join(sorted("".join(LETTERS.get(word, "") for word in found), key="qkv".index))


def leads_out(label: str, wrapped: bool) -> bool:
    """Say whether ``label`` is a name for attention's projection out; ``wrapped``: of the module around it."""
    name = "_".join(word for word in words(label) if word not in FILLERS)
    return name in OUT or (wrapped and name.endswith("_output"))


def feed_forward_role(label: str, around: str, siblings: Collection[str]) -> str | None:
    """Return the role of the projection ``label``, one of ``siblings`` in the module ``around``, if it is a feed-forward's."""
    gated = (label == "gate" and not UP.isdisjoint(siblings)) or (label == "w1" and "w3" in siblings)
    if label in GATE or gated or (label == "w_0" and "w_1" in siblings):
        return "ff.gate"
    outer = words(around) if label == "dense" else []
    if label in UP or label == "w1" or "intermediate" in outer:
        return "ff.w1"
    return "ff.w2" if label in DOWN or "output" in outer else None
