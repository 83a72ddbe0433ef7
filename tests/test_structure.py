"""The common structure, read off the module tree of each backbone."""

from __future__ import annotations

import pytest
import torch
from models import FAMILIES, attach
from torch import nn
from transformers.pytorch_utils import Conv1D

from deltaexp.structure import (
    backbone_modules,
    backbone_parameters,
    backbone_tensors,
    common_names,
    linear_dims,
    output_dim,
)

BLOCK = {
    "t5": {
        "encoder.block.1.layer.0.SelfAttention.q": ["attn.q"],
        "encoder.block.1.layer.0.SelfAttention.k": ["attn.k"],
        "encoder.block.1.layer.0.SelfAttention.v": ["attn.v"],
        "encoder.block.1.layer.0.SelfAttention.o": ["attn.proj"],
        "encoder.block.1.layer.0.layer_norm": ["layer_norm"],
        "encoder.block.1.layer.1.DenseReluDense.wi": ["ff.w1"],
        "encoder.block.1.layer.1.DenseReluDense.wo": ["ff.w2"],
        "encoder.block.1.layer.1.layer_norm": ["layer_norm"],
        "decoder.block.1.layer.1.EncDecAttention.q": ["crossattn.q"],
        "decoder.block.1.layer.1.EncDecAttention.k": ["crossattn.k"],
        "decoder.block.1.layer.1.EncDecAttention.v": ["crossattn.v"],
        "decoder.block.1.layer.1.EncDecAttention.o": ["crossattn.proj"],
        "lm_head": ["lm_head"],
    },
    "bert": {
        "bert.encoder.layer.1.attention.self.query": ["attn.q"],
        "bert.encoder.layer.1.attention.self.key": ["attn.k"],
        "bert.encoder.layer.1.attention.self.value": ["attn.v"],
        "bert.encoder.layer.1.attention.output.dense": ["attn.proj"],
        "bert.encoder.layer.1.attention.output.LayerNorm": ["layer_norm"],
        "bert.encoder.layer.1.intermediate.dense": ["ff.w1"],
        "bert.encoder.layer.1.output.dense": ["ff.w2"],
    },
    "gpt2": {
        "transformer.h.1.attn.c_attn": ["attn.q", "attn.k", "attn.v"],
        "transformer.h.1.attn.c_proj": ["attn.proj"],
        "transformer.h.1.mlp.c_fc": ["ff.w1"],
        "transformer.h.1.mlp.c_proj": ["ff.w2"],
        "transformer.ln_f": ["layer_norm"],
        "lm_head": ["lm_head"],
    },
    "llama": {
        "model.layers.1.self_attn.q_proj": ["attn.q"],
        "model.layers.1.self_attn.k_proj": ["attn.k"],
        "model.layers.1.self_attn.v_proj": ["attn.v"],
        "model.layers.1.self_attn.o_proj": ["attn.proj"],
        "model.layers.1.mlp.gate_proj": ["ff.gate"],
        "model.layers.1.mlp.up_proj": ["ff.w1"],
        "model.layers.1.mlp.down_proj": ["ff.w2"],
        "model.layers.1.input_layernorm": ["layer_norm"],
        "lm_head": ["lm_head"],
    },
}
# Roles of one role per linear module in all blocks: T5 has two stacks of two blocks, the others one.
COUNTS = {"t5": 4, "bert": 2, "gpt2": 2, "llama": 2}


@pytest.mark.parametrize("name", FAMILIES)
def test_common_names(name: str) -> None:
    found = common_names(FAMILIES[name].build())
    assert {module: found.get(module) for module in BLOCK[name]} == BLOCK[name]
    for role in ("attn.q", "attn.k", "attn.v", "attn.proj", "ff.w1", "ff.w2"):
        assert sum(role in roles for roles in found.values()) == COUNTS[name], role
    assert sum("crossattn.q" in roles for roles in found.values()) == (2 if name == "t5" else 0)
    # What lies outside of the blocks is no feed-forward part of one.
    assert not {"classifier", "bert.pooler.dense", "shared", "model.embed_tokens"} & set(found)


def test_linear_maps() -> None:
    assert linear_dims(nn.Linear(3, 5)) == (3, 5)
    assert linear_dims(Conv1D(5, 3)) == (3, 5)
    assert linear_dims(nn.LayerNorm(3)) is None
    assert linear_dims(nn.Embedding(3, 5)) is None


@pytest.mark.parametrize(
    ("module", "dim"),
    [
        (nn.Linear(3, 5), 5),
        (Conv1D(5, 3), 5),
        (nn.Embedding(3, 5), 5),
        (nn.LayerNorm(4), 4),
        (nn.LayerNorm((2, 4)), None),
        (nn.LayerNorm(4, elementwise_affine=False), None),
        (nn.ReLU(), None),
        (nn.Sequential(nn.Linear(3, 5)), None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_output_widths(module: nn.Module, dim: int | None) -> None:
    assert output_dim(module) == dim


@pytest.mark.parametrize("name", FAMILIES)
def test_a_backbone_does_not_contain_its_deltas(name: str) -> None:
    backbone = FAMILIES[name].build()
    modules = [name for name, _ in backbone.named_modules()]
    assert [name for name, _ in backbone_modules(backbone)] == modules
    parameters = dict(backbone.named_parameters())
    attach(backbone)
    attach(backbone, "adapter")
    assert len(list(backbone.named_modules())) > len(modules)
    assert [name for name, _ in backbone_modules(backbone)] == modules
    found = backbone_parameters(backbone)
    assert set(found) == set(parameters)
    assert all(found[name] is parameter for name, parameter in parameters.items())


def test_buffers_count_where_they_are_saved() -> None:
    backbone = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3))
    backbone[1].register_buffer("scratch", torch.ones(1), persistent=False)
    assert set(backbone_tensors(backbone)) == set(backbone.state_dict())
    assert "1.scratch" not in backbone_tensors(backbone)
