"""Prefix tuning: against attention computed by hand, against PEFT's, and on every way a model may attend."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models import FAMILIES, attach, logits, md5, same, slow_but, train_step, values
from tiny import quiet, tiny_inputs, tiny_model
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from deltaexp import AutoDeltaConfig, AutoDeltaModel, DeltaModel
from deltaexp.attention import attend
from deltaexp.errors import AddressingError, ConfigError, DeltaExpError
from deltaexp.routing import route

LENGTH = 3
# Fused and separate projections, grouped queries, sliding windows, rotary, relative and learned positions.
MODELS = [
    ("causal", "llama"),
    ("causal", "gpt2"),
    ("causal", "opt"),
    ("causal", "qwen2"),
    ("causal", "gemma"),
    ("causal", "mistral"),
    ("causal", "phi3"),
    ("causal", "gpt_neox"),
    ("seq2seq", "t5"),
    ("seq2seq", "bart"),
    ("classification", "bert"),
    ("classification", "modernbert"),
    ("classification", "distilbert"),
    ("image", "vit"),
]
every_model = pytest.mark.parametrize(("kind", "name"), MODELS, ids=[name for _, name in MODELS])
both_ways = pytest.mark.parametrize("reparameterize", [False, True], ids=["direct", "reparameterized"])


def put(backbone: nn.Module, reparameterize: bool = False, seed: int = 7, **keys: Any) -> DeltaModel:
    sizes = {"embed_dim": 8, "mid_dim": 8} if reparameterize else {}
    return attach(backbone, "prefix", seed=seed, reparameterize=reparameterize, **{"prefix_token_num": LENGTH, **sizes, **keys})


def attended(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layer: nn.Module, visible: torch.Tensor, scale: float
) -> torch.Tensor:
    """Attention with a prefix, head by head: (B, H, T, D) x (B, G, T, D) -> (B, T, H * D)."""
    past_key, past_value = layer()
    groups, dim = key.shape[1], key.shape[3]
    heads = []
    for head in range(query.shape[1]):
        group = head * groups // query.shape[1]
        part = slice(group * dim, (group + 1) * dim)
        scores = torch.cat([query[:, head] @ past_key[:, part].T, query[:, head] @ key[:, group].mT], dim=-1) * scale
        hidden = ~torch.cat([torch.ones(*visible.shape[:-1], LENGTH, dtype=torch.bool), visible], dim=-1)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        heads.append(weights[..., :LENGTH] @ past_value[:, part] + weights[..., LENGTH:] @ value[:, group])
    return torch.cat(heads, dim=-1)


@both_ways
def test_llama_by_hand(reparameterize: bool) -> None:
    backbone = FAMILIES["llama"].build()
    delta_model = put(backbone, reparameterize)
    core, layer = backbone.model.layers[1].self_attn, delta_model.attachments[1].layer
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(3))
    rotary = backbone.model.rotary_emb(x, torch.arange(5)[None])
    query, key, value = (
        projection(x).view(2, 5, -1, 4).transpose(1, 2) for projection in (core.q_proj, core.k_proj, core.v_proj)
    )
    query, key = apply_rotary_pos_emb(query, key, *rotary)
    causal = torch.ones(5, 5, dtype=torch.bool).tril().expand(2, 5, 5)
    expected = core.o_proj(attended(query, key, value, layer, causal, 4**-0.5))
    torch.testing.assert_close(core(x, position_embeddings=rotary, attention_mask=None)[0], expected)


@both_ways
def test_bert_by_hand(reparameterize: bool) -> None:
    backbone = FAMILIES["bert"].build()
    delta_model = put(backbone, reparameterize)
    core, layer = backbone.bert.encoder.layer[1].attention.self, delta_model.attachments[1].layer
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(3))
    visible = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], dtype=torch.bool)[:, None].expand(2, 5, 5)
    parts = [projection(x).view(2, 5, 2, 8).transpose(1, 2) for projection in (core.query, core.key, core.value)]
    expected = attended(*parts, layer, visible, 8**-0.5)
    torch.testing.assert_close(core(x, attention_mask=visible[:, None])[0], expected)


def test_one_mlp_makes_all_layers() -> None:
    backbone = FAMILIES["llama"].build()
    delta_model = put(backbone, reparameterize=True)
    parameters = dict(backbone.named_parameters())
    names = [f"model.layers.0.self_attn.prefix.reparams.{name}" for name in (
        "wte.weight", "control_trans.0.weight", "control_trans.0.bias", "control_trans.2.weight", "control_trans.2.bias"
    )]  # fmt: skip
    assert list(delta_model.delta_tensors()) == list(delta_model.trainable_parameters()) == names
    wte, w0, b0, w2, b2 = (parameters[name] for name in names)
    made = torch.tanh(wte @ w0.T + b0) @ w2.T + b2
    expected = made.view(LENGTH, 2, 2, 8).permute(1, 2, 0, 3)  # layer by layer, key and value
    for attachment, pair in zip(delta_model.attachments, expected, strict=True):
        torch.testing.assert_close(torch.stack(attachment.layer()), pair)


def test_widths_may_differ() -> None:
    backbone = nn.ModuleList([FAMILIES["llama"].build(), FAMILIES["bert"].build()])
    delta_model = put(backbone, reparameterize=True, modified_modules=["self_attn", "attention"])
    shapes = [[tuple(part.shape) for part in attachment.layer()] for attachment in delta_model.attachments]
    assert shapes == [[(LENGTH, 8)] * 2] * 2 + [[(LENGTH, 16)] * 2] * 2
    assert delta_model.delta_tensors()["0.model.layers.0.self_attn.prefix.reparams.control_trans.2.bias"].shape == (96,)


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")  # as does its prefix
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
@pytest.mark.parametrize("projection", [False, True], ids=["direct", "reparameterized"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_equals_peft(name: str, projection: bool) -> None:
    family = FAMILIES[name]
    backbone, inputs = family.build(), family.inputs()
    width = 8 if name == "llama" else 16
    other = peft.get_peft_model(
        family.build(),
        peft.PrefixTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=LENGTH, prefix_projection=projection, encoder_hidden_size=5
        ),
    ).eval()
    delta_model = put(backbone, projection, **({"embed_dim": width, "mid_dim": 5} if projection else {}))
    ours = dict(delta_model.trainable_parameters())
    encoder = other.prompt_encoder["default"]
    pairs = {}
    with torch.no_grad():
        if projection:
            theirs = [encoder.embedding.weight, *encoder.transform.parameters()]
            for parameter, (key, value) in zip(theirs, ours.items(), strict=True):
                parameter.copy_(value)
                pairs[key] = parameter, slice(None)
        else:
            for index, (key, value) in enumerate(ours.items()):
                part = slice(index * width, (index + 1) * width)
                encoder.embedding.weight[:, part] = value
                pairs[key] = encoder.embedding.weight, part
    # PEFT puts the prefix into the cache, so that the text starts at position P for it; with us it starts at 0.
    shifted = {**inputs, "position_ids": torch.arange(LENGTH, LENGTH + 7).expand(2, 7)}
    expected, found = other(**inputs), backbone(**shifted)
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-5, rtol=1e-5)
    expected.loss.backward()
    found.loss.backward()
    for key, (parameter, part) in pairs.items():
        gradient = parameter.grad[:, part] if parameter.dim() == 2 else parameter.grad
        assert gradient.abs().max() > 0
        torch.testing.assert_close(ours[key].grad, gradient, atol=1e-5, rtol=1e-4, msg=key)


@every_model
def test_every_prefix_on_every_kind_of_attention(kind: str, name: str) -> None:
    backbone = tiny_model(kind, name)
    inputs = tiny_inputs(kind, backbone.config)
    if "attention_mask" in inputs:
        inputs["attention_mask"][1, 6:] = 0
    plain, digest, implementation = logits(backbone, inputs), md5(backbone), backbone.config._attn_implementation
    delta_model = put(backbone)
    assert len(delta_model.attachments) == (4 if kind == "seq2seq" else 2)
    with_prefix = logits(backbone, inputs)
    assert not torch.allclose(with_prefix, plain, atol=1e-3)
    with quiet():
        backbone.set_attn_implementation("eager")
        eager = logits(backbone, inputs)
        backbone.set_attn_implementation(implementation)
    torch.testing.assert_close(eager, with_prefix, atol=1e-5, rtol=1e-5)
    gradients = train_step(delta_model, inputs)
    assert set(gradients) == set(delta_model.delta_tensors())
    assert [key for key, gradient in gradients.items() if not gradient.abs().max() > 0] == []
    delta_model.detach()
    assert torch.equal(logits(backbone, inputs), plain)
    assert md5(backbone) == digest


def test_keys_may_be_wider_than_values() -> None:
    """Latent attention, whose heads have their sizes from elsewhere than its projections."""
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 8, "q_lora_rank": 8, "v_head_dim": 6}
    backbone = DeepseekV3ForCausalLM(
        DeepseekV3Config(
            vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, first_k_dense_replace=2,
            qk_nope_head_dim=8, qk_rope_head_dim=4, head_dim=4, initializer_range=0.2, **sizes
        )
    ).eval()  # fmt: skip
    inputs = FAMILIES["llama"].inputs()
    plain = logits(backbone, inputs)
    delta_model = put(backbone)
    shapes = [tuple(value.shape) for value in delta_model.delta_tensors().values()]
    assert shapes == [(LENGTH, 48), (LENGTH, 24)] * 2
    assert not torch.allclose(logits(backbone, inputs), plain, atol=1e-3)
    assert all(gradient.abs().max() > 0 for gradient in train_step(delta_model, inputs).values())
    delta_model.detach()
    assert torch.equal(logits(backbone, inputs), plain)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_compiles_to_one_graph(name: str) -> None:
    backbone, inputs = FAMILIES[name].build(), FAMILIES[name].inputs()
    delta_model = put(backbone, reparameterize=True)
    compiled = torch.compile(backbone, backend="eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled, inputs), logits(backbone, inputs))
    delta_model.detach()
    torch.compiler.reset()


@both_ways
@pytest.mark.parametrize("name", slow_but(["llama", "gpt2", "opt", "mistral", "gemma", "t5", "bart"], ["llama", "t5"]))
def test_generation_with_and_without_cache(name: str, reparameterize: bool) -> None:
    kind = "seq2seq" if name in ("t5", "bart") else "causal"
    backbone = tiny_model(kind, name)
    put(backbone, reparameterize)
    ids = torch.randint(3, 64, (2, 10), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0  # padding on the left
    keys: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    with quiet():  # beyond the sliding window of 16
        cached = backbone.generate(ids, **keys)
        assert torch.equal(backbone.generate(ids, use_cache=False, **keys), cached)
        if name == "llama":
            assert torch.equal(backbone.generate(ids, cache_implementation="static", disable_compile=True, **keys), cached)
        if kind == "causal":  # the padding does not matter
            alone = backbone.generate(ids[1:, 4:], **{**keys, "attention_mask": mask[1:, 4:]})
            assert torch.equal(alone[0, -12:], cached[1, -12:])


def test_a_sliding_window_does_not_hide_the_prefix() -> None:
    backbone = tiny_model("causal", "mistral")
    delta_model = put(backbone)
    ids = torch.randint(3, 64, (1, 40), generator=torch.Generator().manual_seed(2))
    attention = backbone.model.layers[-1].self_attn
    backbone.set_attn_implementation("eager")
    with torch.no_grad():
        weights = backbone(ids, output_attentions=True).attentions[-1]
    assert weights.shape[-1] == LENGTH + 40
    assert (weights[..., :LENGTH] > 0).all()
    assert (weights[0, :, 39, LENGTH : LENGTH + 39 - attention.config.sliding_window + 1] == 0).all()
    delta_model.detach()


def test_cross_attention_is_left_alone() -> None:
    backbone = FAMILIES["t5"].build()
    delta_model = put(backbone)
    sites = [attachment.site for attachment in delta_model.attachments]
    assert sites == [f"{stack}.block.{block}.layer.0" for stack in ("encoder", "decoder") for block in (0, 1)]
    cross = put(FAMILIES["t5"].build(), modified_modules=["EncDecAttention"])
    assert [attachment.site for attachment in cross.attachments] == [
        f"decoder.block.{block}.layer.1.EncDecAttention" for block in (0, 1)
    ]
    assert not torch.equal(
        logits(cross.backbone_model, FAMILIES["t5"].inputs()), logits(FAMILIES["t5"].build(), FAMILIES["t5"].inputs())
    )


@both_ways
def test_two_prefixes_at_once(reparameterize: bool) -> None:
    family = FAMILIES["llama"]
    backbone, inputs = family.build(), family.inputs()
    plain = logits(backbone, inputs)
    first = put(backbone, reparameterize, seed=1)
    alone = logits(backbone, inputs)
    second = put(backbone, reparameterize, seed=2, prefix_token_num=2)
    both = logits(backbone, inputs)
    assert not torch.allclose(both, alone, atol=1e-3)
    first.detach()
    second_alone = logits(backbone, inputs)
    first.attach()
    assert torch.equal(logits(backbone, inputs), both)
    second.detach()
    assert torch.equal(logits(backbone, inputs), alone)
    first.detach()
    assert torch.equal(logits(backbone, inputs), plain)
    second.attach()
    assert torch.equal(logits(backbone, inputs), second_alone)
    # Two prefixes are one that is as long as both.
    if not reparameterize:
        second.detach()
        merged = put(backbone, prefix_token_num=LENGTH + 2)
        with torch.no_grad():
            for key, value in merged.delta_tensors().items():
                value.copy_(torch.cat([first.delta_tensors()[key], second.delta_tensors()[key]]))
        torch.testing.assert_close(logits(backbone, inputs), both)


@both_ways
@pytest.mark.parametrize("name", FAMILIES)
def test_a_copy_has_its_own_prefix(name: str, reparameterize: bool) -> None:
    backbone, inputs = FAMILIES[name].build(), FAMILIES[name].inputs()
    plain = logits(backbone, inputs)
    delta_model = put(backbone, reparameterize)
    expected = logits(backbone, inputs)
    copies = [copy.deepcopy(delta_model), pickle.loads(pickle.dumps(delta_model))]
    with torch.no_grad():
        for value in delta_model.delta_tensors().values():
            value.zero_()
    delta_model.detach()
    for twin in copies:
        assert same(twin.delta_tensors(), values(twin.delta_tensors()))
        assert torch.equal(logits(twin.backbone_model, inputs), expected)
        twin.detach()
        assert torch.equal(logits(twin.backbone_model, inputs), plain)


def test_opendelta_positions_of_t5() -> None:
    """The prefix is at 0 .. P - 1 for the layer that makes the relative bias, and later layers have no bias."""
    family = FAMILIES["t5"]
    backbone, inputs = family.build(), family.inputs()
    delta_model = put(backbone)
    ours = logits(backbone, inputs)
    for attachment in delta_model.attachments:
        attachment.layer.opendelta_positions = True
    theirs = logits(backbone, inputs)
    assert not torch.allclose(theirs, ours, atol=1e-4)
    keys = {"max_new_tokens": 6, "do_sample": False, "input_ids": inputs["input_ids"]}
    assert torch.equal(backbone.generate(**keys), backbone.generate(**keys, use_cache=False))

    core, x = backbone.encoder.block[0].layer[0].SelfAttention, torch.randn(1, 4, 16)
    query, key, value = (projection(x).view(4, 2, 6).transpose(0, 1) for projection in (core.q, core.k, core.v))
    past_key, past_value = (part.view(LENGTH, 2, 6).transpose(0, 1) for part in delta_model.attachments[0].layer())
    bias = core.compute_bias(LENGTH + 4, LENGTH + 4)[0, :, LENGTH:]
    weights = (query @ torch.cat([past_key, key], 1).mT + bias).softmax(-1)
    expected = core.o((weights @ torch.cat([past_value, value], 1)).transpose(0, 1).reshape(1, 4, 12))
    found, position_bias, _ = core(x)
    torch.testing.assert_close(found, expected)
    assert position_bias is None
    later = backbone.encoder.block[1].layer[0].SelfAttention
    torch.testing.assert_close(later(x, position_bias=bias[None, ..., LENGTH:])[0], later(x)[0])


def test_what_cannot_carry_a_prefix_is_refused() -> None:
    for kind, name in (("classification", "deberta-v2"), ("causal", "bloom"), ("causal", "mamba")):
        backbone = tiny_model(kind, name)
        names = [key for key, _ in backbone.named_modules()]
        with pytest.raises(AddressingError, match="attention interface"):
            put(backbone)
        assert [key for key, _ in backbone.named_modules()] == names
    with pytest.raises(AddressingError, match="depends on the name"):
        put(tiny_model("causal", "deepseek_v32"))
    llama = FAMILIES["llama"].build()
    with pytest.raises(AddressingError, match=r"q_proj.*is none"):
        put(llama, modified_modules=["q_proj"])
    with pytest.raises(AddressingError, match=r"holds 2 attentions.*layers.0.self_attn"):
        put(llama, modified_modules=["model"])
    with pytest.raises(AddressingError, match="down_proj"):
        put(llama, modified_modules=["self_attn", "down_proj"])
    for key in ("prefix_token_num", "embed_dim", "mid_dim"):
        with pytest.raises(ConfigError, match=key):
            AutoDeltaConfig.from_dict({"delta_type": "prefix", key: 0})


def test_rows_with_different_deltas_are_refused_where_a_prefix_changes_others() -> None:
    backbone: Any = FAMILIES["llama"].build()
    delta_model = put(backbone, prefix_positions="shifted")
    with pytest.raises(DeltaExpError, match="cannot be limited to some rows"), route([delta_model, None]):
        pass
    delta_model.detach()
    delta_model = put(backbone)
    delta_model.attachments[0].layer.opendelta_positions = True
    with pytest.raises(DeltaExpError, match="cannot be limited to some rows"), route([delta_model, None]):
        pass
    delta_model.attachments[0].layer.opendelta_positions = False
    mask = create_block_mask(lambda batch, head, q, k: q >= k, 2, None, 7, 7, device="cpu")
    x = torch.zeros(2, 4, 7, 4)
    with pytest.raises(DeltaExpError, match="cannot go with flex attention"), route([delta_model, None]):
        attend(backbone.model.layers[0].self_attn, x, x[:, :2], x[:, :2], mask)


def test_the_default_leaves_out_what_is_no_attention_of_the_interface() -> None:
    backbone = nn.ModuleDict({"text": FAMILIES["llama"].build(), "other": tiny_model("causal", "bloom")})
    delta_model = put(backbone, reparameterize=True)
    assert [a.site for a in delta_model.attachments] == [f"text.model.layers.{n}.self_attn" for n in (0, 1)]


@both_ways
def test_saved_and_loaded(reparameterize: bool, tmp_path: Path) -> None:
    family = FAMILIES["t5"]
    backbone, inputs = family.build(), family.inputs()
    delta_model = put(backbone, reparameterize)
    delta_model.save_finetuned(tmp_path)
    fresh = family.build()
    AutoDeltaModel.from_finetuned(tmp_path, fresh)
    assert torch.equal(logits(fresh, inputs), logits(backbone, inputs))


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_positions_behind_the_prefix(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    backbone, inputs = family.build(), family.inputs()
    plain, digest = logits(backbone, inputs), md5(backbone)
    delta_model = attach(backbone, "prefix", reparameterize=False, prefix_positions="shifted", prefix_token_num=LENGTH)
    shifted = logits(backbone, inputs)
    # What the caller counts is counted from there as well.
    positions = torch.arange(7).expand(2, 7)
    torch.testing.assert_close(logits(backbone, {**inputs, "position_ids": positions}), shifted)
    delta_model.save_finetuned(tmp_path)
    fresh = family.build()
    loaded = AutoDeltaModel.from_finetuned(tmp_path, fresh)
    assert torch.equal(logits(fresh, inputs), shifted)
    for twin in (copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
        assert torch.equal(logits(twin.backbone_model, inputs), shifted)
        twin.detach()
        assert torch.equal(logits(twin.backbone_model, inputs), plain)

    same_keys = attach(family.build(), "prefix", reparameterize=False, prefix_token_num=LENGTH)
    same_keys.load_tensors(values(delta_model.delta_tensors()), "the other one")
    moved = logits(same_keys.backbone_model, {**inputs, "position_ids": positions + LENGTH})
    torch.testing.assert_close(moved, shifted)
    assert (logits(same_keys.backbone_model, inputs) - shifted).abs().max() > 1e-4

    if name != "bert":
        generated = backbone.generate(inputs["input_ids"], max_new_tokens=4, min_new_tokens=4, do_sample=False)
        ids = inputs["input_ids"]
        for _ in range(4):
            ids = torch.cat([ids, logits(backbone, {"input_ids": ids})[:, -1:].argmax(-1)], dim=1)
        assert torch.equal(generated, ids)
    delta_model.detach()
    assert torch.equal(logits(backbone, inputs), plain)
    assert md5(backbone) == digest


@pytest.mark.parametrize("backbone", ["t5", "opt"])
def test_positions_that_cannot_be_moved(backbone: str) -> None:
    model = FAMILIES["t5"].build() if backbone == "t5" else tiny_model("causal", "opt")
    modules = list(model.named_modules())
    with pytest.raises(AddressingError, match="cannot be moved behind a prefix"):
        attach(model, "prefix", prefix_positions="shifted")
    assert list(model.named_modules()) == modules
    with pytest.raises(ConfigError, match="prefix_positions"):
        AutoDeltaConfig.from_dict({"delta_type": "prefix", "prefix_positions": "moved"})
