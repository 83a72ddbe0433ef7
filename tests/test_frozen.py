"""Going on from known activations: the model's own outputs and gradients, wherever the architecture lets that be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import FAMILIES, attach, perturb, snapshot
from tiny import quiet, tiny_inputs, tiny_model
from torch import nn

from deltaexp import frozen
from deltaexp.frozen import Frozen, Shortcut

OTHERS = {"classification": ("electra", "modernbert"), "causal": ("gemma3_text", "gpt_neox", "opt")}


def found(model: nn.Module) -> Frozen:
    result = frozen.find(model)
    assert isinstance(result, Frozen), result
    return result


def tokens(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in inputs.items() if name in (*frozen.TOKENS, "attention_mask")}


def outcome(model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the outputs where there is no padding, and the gradients."""
    model.zero_grad(set_to_none=True)
    outputs, mask = model(**inputs), inputs["attention_mask"].bool()
    outputs.loss.backward()
    logits = outputs.logits[mask] if outputs.logits.shape[:2] == mask.shape else outputs.logits
    return {"logits": logits.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


def same(measured: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Compare to rounding, which goes by the largest numbers: some gradients are what is left of others."""
    assert measured.keys() == expected.keys()
    largest = max(float(value.abs().max()) for value in expected.values())
    for name, value in expected.items():
        torch.testing.assert_close(measured[name], value, rtol=1e-3, atol=1e-5 * largest, msg=name)


def check(model: nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    """Compare a model with itself when it goes on from activations that were computed without padding."""
    part, before = found(model), snapshot(model)
    inputs = {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}
    inputs["attention_mask"][1, -2:] = 0
    if inputs["labels"].shape == inputs["input_ids"].shape:
        inputs["labels"] = inputs["labels"].masked_fill(inputs["attention_mask"] == 0, -100)
    expected = outcome(model, inputs)
    rows = []
    for row, length in enumerate(inputs["attention_mask"].sum(1).tolist()):
        alone = part.block_inputs({name: value[row : row + 1, :length] for name, value in tokens(inputs).items()})
        assert alone is not None
        rows.append(nn.functional.pad(alone, (0, 0, 0, inputs["input_ids"].shape[1] - length))[0])
    entered = []
    handle = part.blocks[part.depth].register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    shortcut = Shortcut(part, lambda given: torch.stack(rows), training=False)
    measured = outcome(model, inputs)
    handle.remove()
    assert shortcut.used == 1
    assert torch.equal(entered[0], torch.stack(rows))
    assert not entered[0].requires_grad
    shortcut.remove()
    same(measured, expected)
    model.zero_grad(set_to_none=True)
    assert snapshot(model) == before


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_the_same_outputs_and_gradients(name: str) -> None:
    backbone = FAMILIES[name].build()
    delta_model = attach(backbone, "lora", layers="last:1")
    perturb(delta_model)
    check(backbone, FAMILIES[name].inputs())


@pytest.mark.parametrize(("kind", "model_type"), [(kind, name) for kind, names in OTHERS.items() for name in names])
def test_other_architectures(kind: str, model_type: str) -> None:
    backbone = tiny_model(kind, model_type)
    attach(backbone, "adapter", layers="last:1")
    with quiet():
        check(backbone, tiny_inputs(kind, backbone.config))


def test_nothing_below_the_lowest_delta_needs_gradients() -> None:
    backbone: Any = FAMILIES["bert"].build()
    attach(backbone, "lora", layers="last:1")
    entered = []
    backbone.bert.encoder.layer[1].register_forward_pre_hook(lambda module, args: entered.append(args[0].requires_grad))
    backbone.train()(**FAMILIES["bert"].inputs()).loss.backward()
    assert entered == [False]


def test_where_the_frozen_blocks_end() -> None:
    backbone: Any = FAMILIES["bert"].build()
    delta_model = attach(backbone, "lora", layers="last:1")
    delta_model.freeze_module(exclude=["deltas", "classifier"])
    assert (found(backbone).depth, found(backbone).random) == (1, "dropout of 0.1 in bert.embeddings.dropout")
    delta_model.freeze_module(exclude=["classifier"])
    assert found(backbone).depth == 1  # a frozen delta may be exchanged
    delta_model.detach()
    assert found(backbone).depth == 2
    backbone.bert.encoder.layer[1].output.dense.bias.requires_grad_(True)
    assert found(backbone).depth == 1
    for module in backbone.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    assert found(backbone).random is None
    handle = backbone.bert.encoder.layer[0].register_forward_hook(lambda *_: None)
    assert frozen.find(backbone) == "a delta is in the first block"
    handle.remove()
    backbone.bert.embeddings.LayerNorm.weight.requires_grad_(True)
    assert "bert.embeddings.LayerNorm, which lies before" in str(frozen.find(backbone))


def test_where_there_are_none() -> None:
    t5, bert, llama = (FAMILIES[name].build() for name in ("t5", "bert", "llama"))
    for backbone in (t5, bert, llama):
        backbone.requires_grad_(False)
    assert frozen.find(t5) == "the backbone has more than one stack of blocks"
    assert frozen.find(nn.Linear(2, 2)) == "the backbone has no stack of blocks"
    attach(bert, "soft_prompt", soft_token_num=2)
    assert "the whole model, which lies before or around the blocks, is trained" in str(frozen.find(bert))
    attach(llama, "lora")
    assert frozen.find(llama) == "a delta is in the first block"
    tied: Any = FAMILIES["gpt2"].build().requires_grad_(False)
    tied.lm_head.weight.requires_grad_(True)
    assert "transformer.wte, which lies before" in str(frozen.find(tied))


def test_all_is_computed_where_more_is_asked_for() -> None:
    backbone: Any = FAMILIES["llama"].build()
    attach(backbone, "lora", layers="last:1")
    inputs = FAMILIES["llama"].inputs()
    shortcut = Shortcut(found(backbone), lambda given: None, training=False)
    plain = backbone(**inputs).logits
    ids = inputs["input_ids"]
    shortcut.known = lambda given: torch.zeros(*ids.shape, backbone.config.hidden_size)
    assert not torch.equal(backbone(**inputs).logits, plain)
    assert shortcut.used == 1
    positions = torch.arange(ids.shape[1])[None]
    for asked in ({"use_cache": True}, {"output_hidden_states": True}, {"position_ids": positions}):
        torch.testing.assert_close(backbone(**inputs, **asked).logits, plain)
    assert len(backbone.generate(ids, max_new_tokens=1, min_new_tokens=1)) == 2
    backbone.train()
    torch.testing.assert_close(backbone(**inputs).logits, plain)
    assert shortcut.used == 1


def test_blocks_are_back_after_an_error() -> None:
    backbone: Any = FAMILIES["bert"].build()
    attach(backbone, "lora", layers="last:1")
    before = snapshot(backbone)
    shortcut = Shortcut(found(backbone), lambda given: torch.zeros(3, 3, 3), training=False)
    with pytest.raises(RuntimeError):
        backbone(**FAMILIES["bert"].inputs())
    shortcut.remove()
    assert snapshot(backbone) == before
