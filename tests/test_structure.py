"""The common structure, read off the module tree of each backbone."""

from __future__ import annotations

import re

import pytest
import torch
import transformers
from models import FAMILIES, attach
from torch import nn
from transformers.pytorch_utils import Conv1D

from deltaexp.structure import (
    Role,
    Rows,
    backbone_modules,
    backbone_parameters,
    backbone_tensors,
    blocks,
    common_names,
    common_structure,
    linear_dims,
    output_dim,
)

BLOCK = {
    "t5": {
        "encoder.block.1.layer.0.SelfAttention.q": ["attn.q"],
        "encoder.block.1.layer.0.SelfAttention.k": ["attn.k"],
        "encoder.block.1.layer.0.SelfAttention.v": ["attn.v"],
        "encoder.block.1.layer.0.SelfAttention.o": ["attn.proj"],
        "encoder.block.1.layer.0": ["attn"],
        "encoder.block.1.layer.0.SelfAttention": None,
        "encoder.block.1.layer.1": ["ff"],
        "decoder.block.1.layer.1": ["crossattn"],
        "decoder.block.1.layer.2": ["ff"],
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias": None,
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
        "bert.encoder.layer.1.attention": ["attn"],
        "bert.encoder.layer.1": None,
        "bert.encoder.layer.1.intermediate.dense": ["ff.w1"],
        "bert.encoder.layer.1.output.dense": ["ff.w2"],
    },
    "gpt2": {
        "transformer.h.1.attn.c_attn": ["attn.q", "attn.k", "attn.v"],
        "transformer.h.1.attn": ["attn"],
        "transformer.h.1.mlp": ["ff"],
        "transformer.wpe": ["embedding"],
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
        "model.layers.1.self_attn": ["attn"],
        "model.layers.1.mlp": ["ff"],
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
    # What lies outside of the blocks is no part of one, and a pooler is no head.
    outside = {"classifier": ["head"], "shared": ["embedding"], "model.embed_tokens": ["embedding"]}
    assert all(found[module] == roles for module, roles in outside.items() if module in found)
    assert "bert.pooler.dense" not in found


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


ATTENTION = ("attn.q", "attn.k", "attn.v", "attn.proj")
SIZES = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
OLD_SIZES = {"vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 4}
IMAGES = {"image_size": 8, "patch_size": 4, "num_labels": 3}


def build(model: str, **keys: object) -> nn.Module:
    """Return a model of transformers by the name of its class, on the meta device."""
    cls = getattr(transformers, model)
    with torch.device("meta"):
        return cls(cls.config_class(**keys))


def roles(backbone: nn.Module, under: str) -> dict[str, str]:
    """Return the roles of the modules under a block but norms, in its own names."""
    found = common_names(backbone)
    below = {name.removeprefix(f"{under}."): " ".join(given) for name, given in found.items() if name.startswith(f"{under}.")}
    return {name: given for name, given in below.items() if given != "layer_norm"}


def attention(name: str, *projections: str) -> dict[str, str]:
    """Return the roles of an attention called ``name`` and its projections q, k, v and out."""
    return {name: "attn", **{f"{name}.{leaf}": role for leaf, role in zip(projections, ATTENTION, strict=True)}}


GATED = {"mlp": "ff", "mlp.gate_proj": "ff.gate", "mlp.up_proj": "ff.w1", "mlp.down_proj": "ff.w2"}
BART = attention("self_attn", "q_proj", "k_proj", "v_proj", "out_proj") | {"fc1": "ff.w1", "fc2": "ff.w2"}
CROSS = {name.replace("self_attn", "encoder_attn"): f"cross{role}" for name, role in BART.items() if "attn" in name}
BERT = attention("attention", "self.query", "self.key", "self.value", "output.dense") | {
    "intermediate.dense": "ff.w1",
    "output.dense": "ff.w2",
}
LLAMA = attention("self_attn", "q_proj", "k_proj", "v_proj", "o_proj")
NEOX_MLP = {"mlp": "ff", "mlp.dense_h_to_4h": "ff.w1", "mlp.dense_4h_to_h": "ff.w2"}
QKV = "attn.q attn.k attn.v"
MIXTURE = {"mlp": "ff", "mlp.gate": "ff.router", "mlp.experts": "ff.experts"}
SHARED = {f"mlp.shared_experts.{leaf}_proj": f"ff.{role}" for leaf, role in (("gate", "gate"), ("up", "w1"), ("down", "w2"))}
FUSED_BLOCK = {"self_attention": "attn", "self_attention.query_key_value": QKV, "self_attention.dense": "attn.proj"}
SEQ2SEQ = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
T5_SIZES = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
T5_ATTENTION = {
    "layer.0": "attn",
    **{f"layer.0.SelfAttention.{leaf}": role for leaf, role in zip("qkvo", ATTENTION, strict=True)},
}
DEEPSEEK = {
    "self_attn": "attn",
    "self_attn.q_b_proj": "attn.q",
    "self_attn.kv_b_proj": "attn.k attn.v",
    "self_attn.o_proj": "attn.proj",
}

FOUND = {
    "gated t5": (
        "T5ForConditionalGeneration",
        {**T5_SIZES, "feed_forward_proj": "gated-gelu"},
        "encoder.block.1",
        T5_ATTENTION
        | {"layer.1": "ff"}
        | {f"layer.1.DenseReluDense.{n}": f"ff.{r}" for n, r in (("wi_0", "gate"), ("wi_1", "w1"), ("wo", "w2"))},
    ),
    "roberta": ("RobertaForCausalLM", SIZES, "roberta.encoder.layer.1", BERT),
    "gpt2 with cross-attention": (
        "GPT2LMHeadModel",
        {**OLD_SIZES, "add_cross_attention": True},
        "transformer.h.1",
        {
            "attn": "attn",
            "attn.c_attn": QKV,
            "attn.c_proj": "attn.proj",
            "crossattention": "crossattn",
            "crossattention.q_attn": "crossattn.q",
            "crossattention.c_attn": "crossattn.k crossattn.v",
            "crossattention.c_proj": "crossattn.proj",
            "mlp": "ff",
            "mlp.c_fc": "ff.w1",
            "mlp.c_proj": "ff.w2",
        },
    ),
    "bart": ("BartForConditionalGeneration", {"vocab_size": 32, **SEQ2SEQ}, "model.decoder.layers.1", BART | CROSS),
    "whisper": (
        "WhisperForConditionalGeneration",
        {"vocab_size": 32, "pad_token_id": 0, "decoder_start_token_id": 1, **SEQ2SEQ},
        "model.decoder.layers.1",
        BART | CROSS,
    ),
    "opt": (
        "OPTForCausalLM",
        {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 24},
        "model.decoder.layers.1",
        BART,
    ),
    "distilbert": (
        "DistilBertForSequenceClassification",
        {"vocab_size": 32, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24},
        "distilbert.transformer.layer.1",
        attention("attention", "q_lin", "k_lin", "v_lin", "out_lin") | {"ffn": "ff", "ffn.lin1": "ff.w1", "ffn.lin2": "ff.w2"},
    ),
    "deberta-v2": (
        "DebertaV2ForSequenceClassification",
        SIZES,
        "deberta.encoder.layer.1",
        {
            name.replace("query", "query_proj").replace("key", "key_proj").replace("value", "value_proj"): r
            for name, r in BERT.items()
        },
    ),
    "gpt_neox": (
        "GPTNeoXForCausalLM",
        SIZES,
        "gpt_neox.layers.1",
        {"attention": "attn", "attention.query_key_value": QKV, "attention.dense": "attn.proj", **NEOX_MLP},
    ),
    "bloom": (
        "BloomForCausalLM",
        {"vocab_size": 32, "hidden_size": 16, "n_layer": 2, "n_head": 4},
        "transformer.h.1",
        {**FUSED_BLOCK, **NEOX_MLP},
    ),
    "falcon": ("FalconForCausalLM", SIZES, "transformer.h.1", {**FUSED_BLOCK, **NEOX_MLP}),
    "phi3": (
        "Phi3ForCausalLM",
        {**SIZES, "pad_token_id": 0},
        "model.layers.1",
        {
            "self_attn": "attn",
            "self_attn.qkv_proj": QKV,
            "self_attn.o_proj": "attn.proj",
            "mlp": "ff",
            "mlp.gate_up_proj": "ff.gate ff.w1",
            "mlp.down_proj": "ff.w2",
        },
    ),
    "mixtral": ("MixtralForCausalLM", {**SIZES, "num_key_value_heads": 2}, "model.layers.1", LLAMA | MIXTURE),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        {**SIZES, "num_key_value_heads": 4, "first_k_dense_replace": 1, "n_routed_experts": 8},
        "model.layers.1",
        DEEPSEEK | MIXTURE | SHARED,
    ),
    "switch": (
        "SwitchTransformersForConditionalGeneration",
        {**T5_SIZES, "num_decoder_layers": 2, "num_experts": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
        "encoder.block.1",
        T5_ATTENTION
        | {"layer.1": "ff", "layer.1.mlp.router.classifier": "ff.router"}
        | {f"layer.1.mlp.experts.expert_{i}.{n}": r for i in (0, 1) for n, r in (("wi", "ff.w1"), ("wo", "ff.w2"))},
    ),
    "mamba": (
        "MambaForCausalLM",
        {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2},
        "backbone.layers.1",
        {"mixer": "mixer", "mixer.in_proj": "mixer.in", "mixer.out_proj": "mixer.out"},
    ),
    "rwkv": (
        "RwkvForCausalLM",
        {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2},
        "rwkv.blocks.1",
        attention("attention", "receptance", "key", "value", "output")
        | {
            "feed_forward": "ff",
            "feed_forward.receptance": "ff.gate",
            "feed_forward.key": "ff.w1",
            "feed_forward.value": "ff.w2",
        },
    ),
    "vit": (
        "ViTForImageClassification",
        {**IMAGES, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24},
        "vit.layers.1",
        attention("attention", "q_proj", "k_proj", "v_proj", "o_proj") | {"mlp": "ff", "mlp.fc1": "ff.w1", "mlp.fc2": "ff.w2"},
    ),
    "convnext": (
        "ConvNextForImageClassification",
        {"hidden_sizes": [4, 8], "depths": [2, 3], "num_stages": 2},
        "convnext.encoder.stages.1.layers.2",
        {"pwconv1": "ff.w1", "pwconv2": "ff.w2"},
    ),
    "resnet": (
        "ResNetForImageClassification",
        {"embedding_size": 4, "hidden_sizes": [8, 16], "depths": [2, 3]},
        "resnet.encoder.stages.1.layers.2",
        {f"layer.{i}.convolution": "conv" for i in range(3)},
    ),
}


@pytest.mark.parametrize("family", FOUND)
def test_families(family: str) -> None:
    model, keys, block, expected = FOUND[family]
    backbone = build(model, **keys)
    assert roles(backbone, block) == expected
    stacks = blocks(backbone)
    assert any(block == stack[-1] for stack in stacks)
    # Deeper in a wrapper and in a list, the same is found under longer names.
    wrapped = nn.Sequential(nn.ModuleDict({"plm": backbone}), nn.Linear(16, 2))
    assert {n: r for n, r in common_names(wrapped).items() if n.startswith("0.plm.")} == {
        f"0.plm.{name}": given for name, given in common_names(backbone).items()
    }
    assert blocks(wrapped) == [[f"0.plm.{name}" for name in stack] for stack in stacks]
    assert common_names(wrapped)["1"] == ["head"]


def test_stages_and_hybrids() -> None:
    swin = build("SwinForImageClassification", **IMAGES, embed_dim=8, depths=[2, 3], num_heads=[2, 2], window_size=2)
    assert blocks(swin) == [
        [f"swin.encoder.layers.{stage}.blocks.{i}" for stage, depth in ((0, 2), (1, 3)) for i in range(depth)]
    ]
    xlm = build("XLMForSequenceClassification", vocab_size=32, emb_dim=16, n_layers=2, n_heads=2)
    assert blocks(xlm) == [[f"transformer.{part}.{i}" for i in range(2)] for part in ("attentions", "ffns")]
    assert roles(xlm, "transformer.attentions.0") | roles(xlm, "transformer.ffns.0") == {
        "q_lin": "attn.q", "k_lin": "attn.k", "v_lin": "attn.v", "out_lin": "attn.proj", "lin1": "ff.w1", "lin2": "ff.w2"
    }  # fmt: skip
    hybrid = build("JambaForCausalLM", **SIZES, num_key_value_heads=2, attn_layer_period=2, attn_layer_offset=1)
    found = common_names(hybrid)
    assert found["model.layers.0.mamba"] == ["mixer"]
    assert found["model.layers.0.mamba.in_proj"] == ["mixer.in"]
    assert found["model.layers.1.self_attn.q_proj"] == ["attn.q"]
    assert [len(stack) for stack in blocks(hybrid)] == [2]
    assert [len(stack) for stack in blocks(nn.ModuleList([FAMILIES["t5"].build(), FAMILIES["gpt2"].build()]))] == [2, 2, 2]
    assert blocks(nn.Linear(3, 3)) == []


# Of each: the module with the fused projection, and the keys that decide on the layout.
FUSED = {
    "gpt2": ("GPT2LMHeadModel", OLD_SIZES, "c_attn"),
    "gpt_neox": ("GPTNeoXForCausalLM", SIZES, "query_key_value"),
    "bloom": ("BloomForCausalLM", {"vocab_size": 32, "hidden_size": 16, "n_layer": 2, "n_head": 4}, "query_key_value"),
    "falcon-rw": ("FalconForCausalLM", {**SIZES, "multi_query": False, "alibi": True}, "query_key_value"),
    "falcon-7b": ("FalconForCausalLM", SIZES, "query_key_value"),
    "falcon-40b": ("FalconForCausalLM", {**SIZES, "new_decoder_architecture": True, "num_kv_heads": 2}, "query_key_value"),
    "bigcode": ("GPTBigCodeForCausalLM", OLD_SIZES, "c_attn"),
    "bigcode, all heads": ("GPTBigCodeForCausalLM", {**OLD_SIZES, "multi_query": False}, "c_attn"),
    "phi3": ("Phi3ForCausalLM", {**SIZES, "num_key_value_heads": 2, "pad_token_id": 0}, "qkv_proj"),
    "mpt": ("MptForCausalLM", {"vocab_size": 32, "d_model": 16, "n_layers": 2, "n_heads": 4}, "Wqkv"),
    "codegen": ("CodeGenForCausalLM", {**OLD_SIZES, "rotary_dim": 4}, "qkv_proj"),
    "deberta": ("DebertaModel", {**SIZES, "relative_attention": False}, "in_proj"),
    "modernbert": ("ModernBertModel", {**SIZES, "pad_token_id": 0}, "Wqkv"),
}


@pytest.mark.parametrize("name", FUSED)
def test_rows_of_fused_projections(name: str) -> None:
    """Rows of the value change what attention makes linearly; those of query and key, only where it attends.

    With one token, attention returns its value whatever query and key are, so that their rows have no influence. With
    two, the rows of the query matter where those of the key are not all zero, and the other way round.
    """
    model, keys, leaf = FUSED[name]
    cls = getattr(transformers, model)
    torch.manual_seed(0)
    backbone = cls(cls.config_class(**keys)).eval()
    found = {n: r for n, r in common_structure(backbone).items() if n.endswith(f".{leaf}")}
    assert len(found) == 2
    site, given = next(iter(found.items()))
    rows = {role.name: role.rows for role in given}
    assert list(rows) == ["attn.q", "attn.k", "attn.v"]
    width = output_dim(backbone.get_submodule(site))
    assert sorted(torch.cat([part.indices() for part in rows.values()]).tolist()) == list(range(width))
    reach = _reach(backbone, site, torch.tensor([[3]]))
    assert set(reach.nonzero().flatten().tolist()) == set(rows["attn.v"].indices().tolist())
    # The query's rows at the last of two tokens matter to it, at the first only the key's and the value's do.
    first, last = _reach(backbone, site, torch.tensor([[3, 5]]), at=0), _reach(backbone, site, torch.tensor([[3, 5]]), at=1)
    if "bert" not in name:
        assert not first[rows["attn.q"].indices()].any()
    assert first[rows["attn.k"].indices()].any()
    assert last[rows["attn.q"].indices()].any()


def _reach(backbone: nn.Module, site: str, ids: torch.Tensor, at: int = 0) -> torch.Tensor:
    """Return how strongly each output of the fused projection at one token moves what attention makes of the last token."""
    held = []

    def keep(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        held.append(output.detach().requires_grad_())
        return held[-1]

    made = []
    owner = backbone.get_submodule(site.rpartition(".")[0])
    handles = [
        backbone.get_submodule(site).register_forward_hook(keep),
        owner.register_forward_hook(
            lambda module, args, output: made.append(output[0] if isinstance(output, tuple) else output)
        ),
    ]
    backbone(ids)
    for handle in handles:
        handle.remove()
    out = made[0].reshape(ids.shape[1], -1)[-1]
    weights = torch.linspace(1, 2, out.numel())
    (gradient,) = torch.autograd.grad((out * weights).sum(), held[0])
    strength = gradient.reshape(ids.shape[1], -1)[at].abs()
    return strength * (strength > 1e-6 * strength.max())  # some processors' attention rounds what is zero by its formula


def test_rows_that_no_code_tells_are_left_open() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(8, 24)
            self.proj = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.proj(mix(self.qkv(x)))

    def mix(x: torch.Tensor) -> torch.Tensor:
        return x[..., :8]

    found = common_structure(nn.ModuleList([nn.ModuleDict({"attn": Attention()}) for _ in range(2)]))
    assert found["0.attn.qkv"] == (Role("attn.q"), Role("attn.k"), Role("attn.v"))
    assert found["1.attn.proj"] == (Role("attn.proj"),)


def test_rows_of_low_rank_and_gated_projections() -> None:
    keys = {"qk_nope_head_dim": 6, "qk_rope_head_dim": 2, "v_head_dim": 5, "kv_lora_rank": 4, "q_lora_rank": 4}
    found = common_structure(build("DeepseekV3ForCausalLM", **SIZES, num_key_value_heads=4, **keys))
    assert found["model.layers.0.self_attn.kv_b_proj"] == (Role("attn.k", Rows(4, 11, 0, 6)), Role("attn.v", Rows(4, 11, 6, 5)))
    found = common_structure(build("Phi3ForCausalLM", **SIZES, pad_token_id=0))
    assert found["model.layers.0.mlp.gate_up_proj"] == (Role("ff.gate", Rows(1, 48, 0, 24)), Role("ff.w1", Rows(1, 48, 24, 24)))
    found = common_structure(build("GPT2LMHeadModel", **OLD_SIZES, add_cross_attention=True))
    assert found["transformer.h.0.crossattention.c_attn"] == (
        Role("crossattn.k", Rows(1, 32, 0, 16)),
        Role("crossattn.v", Rows(1, 32, 16, 16)),
    )


def test_what_is_no_linear_map_for_hooks() -> None:
    attention = nn.MultiheadAttention(8, 2)
    assert linear_dims(attention.out_proj) is None
    grouped = nn.Linear(4, 8)
    grouped.n_groups = 2
    assert linear_dims(grouped) is None
    assert linear_dims(nn.Conv1d(4, 8, 1)) is None


def test_every_linear_module_of_a_block_has_a_role() -> None:
    for family in FAMILIES.values():
        backbone = family.build()
        found = common_names(backbone)
        inside = [name for name, module in backbone.named_modules() if linear_dims(module) and re.search(r"\.\d+\.", name)]
        assert [name for name in inside if name not in found] == []
