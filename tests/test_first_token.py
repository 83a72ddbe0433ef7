"""The last block for the first token alone: what a classifier computes, with every type of delta."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import FAMILIES, attach, perturb, snapshot
from test_frozen import outcome, same
from tiny import tiny_inputs, tiny_model

from deltaexp import first_token, registry
from deltaexp.first_token import FirstToken, LastBlock
from deltaexp.model import DeltaModel

KEYS: dict[str, dict[str, Any]] = {
    "soft_prompt": {"soft_token_num": 2},
    "prefix": {"embed_dim": 8, "mid_dim": 8},
    "vera": {"vera_r": 4},
}
TYPES = [name for name in registry.known() if name != "peft" and not registry.get(name).trains_nothing]


def check(delta_model: DeltaModel, inputs: dict[str, torch.Tensor]) -> None:
    model: Any = delta_model.backbone_model
    last, before = first_token.find(model, delta_model.attachments), snapshot(model)
    assert isinstance(last, LastBlock), last
    expected = outcome(model, inputs)
    one, lengths = FirstToken(last), []
    handle = last.block.register_forward_hook(lambda module, args, output: lengths.append(output.shape[1]))
    measured = outcome(model, inputs)
    handle.remove()
    one.remove()
    assert lengths == [1]
    same(measured, expected)
    model.zero_grad(set_to_none=True)
    assert snapshot(model) == before


@pytest.mark.parametrize("delta_type", TYPES)
def test_the_same_outputs_and_gradients(delta_type: str) -> None:
    delta_model = attach(FAMILIES["bert"].build(), delta_type, **KEYS.get(delta_type, {}))
    perturb(delta_model)
    check(delta_model, FAMILIES["bert"].inputs())


@pytest.mark.parametrize(("model_type", "attention"), [("distilbert", "sdpa"), ("roberta", "eager")])
def test_other_architectures(model_type: str, attention: str) -> None:
    backbone: Any = tiny_model("classification", model_type)
    backbone.set_attn_implementation(attention)
    inputs = tiny_inputs("classification", backbone.config)
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, -2:] = 0
    check(attach(backbone, "lora"), {**inputs, "attention_mask": mask})


def test_all_tokens_are_computed_where_dropout_would_be_another() -> None:
    backbone: Any = FAMILIES["bert"].build()
    last = first_token.find(backbone, [])
    assert isinstance(last, LastBlock)
    assert last.drops
    FirstToken(last)
    lengths: list[int] = []
    last.block.register_forward_hook(lambda module, args, output: lengths.append(output.shape[1]))
    for training in (True, False):
        backbone.train(training)(**FAMILIES["bert"].inputs())
    assert lengths == [7, 1]


def test_where_it_cannot_be() -> None:
    reft = attach(FAMILIES["bert"].build(), "reft", reft_positions="f1+l1")
    assert "ReftLayer in its last block" in str(first_token.find(reft.backbone_model, reft.attachments))
    assert "more than one stack" in str(first_token.find(FAMILIES["t5"].build(), []))
    assert "not like BERT's" in str(first_token.find(FAMILIES["llama"].build(), []))
    assert "one query, key and value" in str(first_token.find(FAMILIES["gpt2"].build(), []))
