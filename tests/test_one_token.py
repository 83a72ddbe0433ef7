"""The last block for the token that is read alone: what a classifier computes, on many architectures, with every delta type."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import FAMILIES, attach, perturb, slow_but, snapshot
from test_frozen import outcome, same
from tiny import quiet, tiny_inputs, tiny_model

from deltaexp import one_token, registry
from deltaexp.model import DeltaModel
from deltaexp.one_token import LastBlock, OneToken

KEYS: dict[str, dict[str, Any]] = {
    "soft_prompt": {"soft_token_num": 2},
    "prefix": {"embed_dim": 8, "mid_dim": 8},
    "vera": {"vera_r": 4},
}
TYPES = [name for name in registry.known() if name != "peft" and not registry.get(name).trains_nothing]
FIRST = ("distilbert", "esm", "gte", "layoutlm", "modernbert", "nomic_bert", "roberta-prelayernorm", "xlm-roberta-xl")
LAST = ("biogpt", "deepseek_v3", "gemma3_text", "glm4", "gpt2", "gpt_bigcode", "gpt_neox", "gptj", "jetmoe", "mistral")
LAST += ("mixtral", "modernbert-decoder", "olmo2", "opt", "persimmon", "phi", "phi3", "qwen2_moe", "qwen3", "stablelm")
ALONE = ("bloom", "convbert", "deberta", "deberta-v2", "falcon", "gpt_neo", "mpnet", "mpt", "openai-gpt", "roformer")
"""Whose attentions do not call the attention interface."""
QUICK = ("deberta-v2", "bloom", "mpnet", "modernbert", "gemma3_text", "gpt2", "gpt_neox", "opt", "qwen3")
PADDING = ("none", "right", "left", "not masked")


def found(model: Any, delta_model: DeltaModel | None = None) -> LastBlock:
    last = one_token.find(model, delta_model.attachments if delta_model else [])
    assert isinstance(last, LastBlock), last
    return last


def lengths(last: LastBlock) -> list[int]:
    """Return a list that grows by the number of tokens that leave the last block, before these are repeated."""
    seen: list[int] = []

    def see(module: Any, args: Any, output: Any) -> None:
        seen.append((output if isinstance(output, torch.Tensor) else output[0]).shape[1])

    last.block.register_forward_hook(see)
    return seen


def check(model: Any, delta_model: DeltaModel, batches: list[dict[str, torch.Tensor]]) -> None:
    last, before = found(model, delta_model), snapshot(model)
    for inputs in batches:
        expected = outcome(model, inputs)
        seen = lengths(last)
        one = OneToken(model, last)
        one.remove()
        one.put()
        one.put()  # changes nothing
        measured = outcome(model, inputs)
        one.remove()
        last.block._forward_hooks.popitem()
        assert seen == [1]
        same(measured, expected)
    model.zero_grad(set_to_none=True)
    assert snapshot(model) == before


def padded(model: Any, padding: str) -> dict[str, torch.Tensor]:
    inputs = tiny_inputs("classification", model.config)
    where = slice(0, 3) if padding == "left" else slice(-3, None)
    if padding != "none":
        inputs["input_ids"][0, where] = model.config.pad_token_id
        inputs["attention_mask"][0, where] = padding == "not masked"
    return inputs


@pytest.mark.parametrize("delta_type", TYPES)
def test_the_same_outputs_and_gradients(delta_type: str) -> None:
    backbone = FAMILIES["bert"].build()
    delta_model = attach(backbone, delta_type, **KEYS.get(delta_type, {}))
    perturb(delta_model)
    check(backbone, delta_model, [FAMILIES["bert"].inputs()])


@pytest.mark.parametrize("delta_type", TYPES)
def test_in_a_decoder(delta_type: str) -> None:
    backbone: Any = tiny_model("classification", "llama")
    check(backbone, attach(backbone, delta_type, **KEYS.get(delta_type, {})), [padded(backbone, "right")])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("model_type", slow_but((*FIRST, *LAST, *ALONE), QUICK))
def test_architectures(model_type: str, attention: str) -> None:
    backbone: Any = tiny_model("classification", model_type)
    backbone.set_attn_implementation(attention)
    with quiet():
        delta_model = attach(backbone, "lora")
        last = found(backbone, delta_model)
        assert (last.core is None) == (model_type in ALONE)
        assert model_type in ALONE or last.read == ("first" if model_type in FIRST else "last")
        check(backbone, delta_model, [padded(backbone, padding) for padding in PADDING])


def test_what_only_queries_need_is_left_out() -> None:
    backbone: Any = tiny_model("classification", "llama")
    last = found(backbone)
    query, seen = last.core.q_proj, []
    assert last.part == (last.core, "q_proj")
    query.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    last.core.k_proj.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    OneToken(backbone, last)
    backbone(**tiny_inputs("classification", backbone.config))
    assert seen == [8, 1, 1]
    assert last.core.q_proj is query
    assert found(tiny_model("classification", "gpt2")).part is None  # made together with keys and values


@pytest.mark.parametrize("pair", [("q_proj", "v_proj"), ("v_proj", "o_proj")])
def test_adapters_that_lead_past_the_attention(pair: tuple[str, str]) -> None:
    backbone: Any = tiny_model("classification", "llama")
    delta_model = attach(backbone, "parallel_adapter", modified_modules=list(pair))
    assert (found(backbone, delta_model).part is None) == (pair[0] == "q_proj")
    check(backbone, delta_model, [padded(backbone, "left")])


def test_all_tokens_are_computed_where_dropout_would_be_another() -> None:
    backbone: Any = FAMILIES["bert"].build()
    last = found(backbone)
    assert last.random == "dropout of 0.1 in bert.encoder.layer.1.attention.self.dropout"
    seen = lengths(last)
    OneToken(backbone, last)
    for training in (True, False):
        backbone.train(training)(**FAMILIES["bert"].inputs())
    assert seen == [7, 1]


def test_all_tokens_are_computed_where_more_is_asked_for() -> None:
    backbone: Any = tiny_model("classification", "llama")
    last, inputs = found(backbone), tiny_inputs("classification", backbone.config)
    expected = backbone(**inputs, output_hidden_states=True, use_cache=True)
    seen = lengths(last)
    OneToken(backbone, last)
    embedded = {**inputs, "input_ids": None, "inputs_embeds": backbone.get_input_embeddings()(inputs["input_ids"])}
    measured = backbone(**inputs, output_hidden_states=True)
    assert torch.equal(measured.hidden_states[-1], expected.hidden_states[-1])
    assert backbone(**inputs, use_cache=True).cache.get_seq_length() == 8
    with quiet():
        backbone(**embedded)
    backbone.model(**tiny_inputs("classification", backbone.config))
    assert seen == [8, 8, 8, 8]
    assert backbone(inputs["input_ids"], inputs["attention_mask"]).cache is None
    assert seen[4:] == [1]


def test_a_pass_that_breaks_off_leaves_nothing_behind() -> None:
    backbone: Any = tiny_model("classification", "llama")
    last, inputs = found(backbone), tiny_inputs("classification", backbone.config)
    expected, config = backbone(**inputs).logits, last.core.config
    OneToken(backbone, last)
    for module in (last.core.k_proj, last.core.o_proj):
        handle = module.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            backbone(**inputs)
        handle.remove()
        assert last.core.config is config
        torch.testing.assert_close(backbone(**inputs).logits, expected)


def test_where_it_cannot_be() -> None:
    reft = attach(FAMILIES["bert"].build(), "reft", reft_positions="f1+l1")
    assert "ReftLayer in its last block" in str(one_token.find(reft.backbone_model, reft.attachments))
    assert "2 stacks of blocks, not 1" in str(one_token.find(tiny_model("classification", "t5"), []))
    assert "no attention that is a module of its own" in str(one_token.find(tiny_model("classification", "xlnet"), []))
    assert "reads more than one token" in str(one_token.find(FAMILIES["llama"].build(), []))
    bloom = attach(
        tiny_model("classification", "bloom"), "parallel_adapter", modified_modules=["query_key_value", "dense_h_to_4h"]
    )
    assert "leads out of the attention" in str(one_token.find(bloom.backbone_model, bloom.attachments))
    llama: Any = tiny_model("classification", "llama")
    llama.set_attn_implementation("flex_attention")
    assert found(llama).core is None
