"""Going on from known activations: the model's own outputs and gradients, wherever the architecture lets that be."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from models import FAMILIES, attach, perturb, snapshot
from tiny import quiet, tiny_inputs, tiny_model
from torch import nn

from deltaexp import frozen, gathered
from deltaexp.frozen import Frozen, Shortcut
from deltaexp.speed import configured

OTHERS = {
    "classification": ("electra", "modernbert", "deberta", "deberta-v2", "mpnet", "roformer", "t5"),
    "causal": ("gemma3_text", "gpt_neox", "opt", "bloom", "falcon", "gpt_neo", "mpt", "openai-gpt", "mamba"),
    "seq2seq": ("t5", "bart", "marian", "umt5"),
}
QUICK = ("electra", "modernbert", "deberta-v2", "mpnet", "opt", "bloom", "openai-gpt")


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
    entered: list[torch.Tensor] = []
    handles = [
        block.register_forward_pre_hook(lambda module, args: entered.append(args[0]))
        for block in list(part.blocks)[part.depth : part.depth + 1]
    ]
    shortcut = Shortcut(part, lambda given: torch.stack(rows), training=False)
    shortcut.remove()
    shortcut.put()
    shortcut.put()  # changes nothing
    measured = outcome(model, inputs)
    for handle in handles:
        handle.remove()
    assert shortcut.used == 1
    assert len(entered) == len(handles)
    assert all(torch.equal(states, torch.stack(rows)) and not states.requires_grad for states in entered)
    shortcut.remove()
    same(measured, expected)
    model.zero_grad(set_to_none=True)
    assert snapshot(model) == before


@pytest.mark.parametrize("name", FAMILIES)
def test_the_same_outputs_and_gradients(name: str) -> None:
    backbone = FAMILIES[name].build()
    delta_model = attach(backbone, "lora", layers="last:1")
    perturb(delta_model)
    check(backbone, FAMILIES[name].inputs())


def test_gathered_updates_are_no_hindrance() -> None:
    backbone = FAMILIES["bert"].build()
    attach(backbone, "lora", layers="last:1")
    with gathered.applied(backbone) as units:
        assert units
        assert found(backbone).depth == len(found(backbone).blocks) - 1
    backbone.register_forward_pre_hook(lambda module, args: None)
    assert "the whole model" in str(frozen.find(backbone))


@pytest.mark.parametrize(
    ("kind", "model_type"),
    [
        pytest.param(kind, name, marks=[] if name in QUICK else pytest.mark.slow)
        for kind, names in OTHERS.items()
        for name in names
    ],
)
def test_other_architectures(kind: str, model_type: str) -> None:
    backbone = tiny_model(kind, model_type)
    attach(backbone, "adapter", layers="last:1")
    with quiet():
        check(backbone, tiny_inputs(kind, backbone.config))


@pytest.mark.parametrize("model_type", ["t5", "bart"])
def test_an_encoder_without_deltas(model_type: str) -> None:
    backbone: Any = tiny_model("seq2seq", model_type)
    attach(backbone, "lora", modified_modules=[r"[r]decoder\..*(q|q_proj|fc1|wi)$"])
    part, inputs = found(backbone), tiny_inputs("seq2seq", backbone.config)
    assert (part.base, part.depth, part.kind) == (backbone.get_encoder(), 2, "encoder blocks")
    check(backbone, inputs)
    source = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    plain = backbone.generate(**source, max_new_tokens=6, num_beams=2)
    whole = part.block_inputs(source)
    shortcut = Shortcut(part, lambda given: whole, training=False)
    assert torch.equal(backbone.generate(**source, max_new_tokens=6, num_beams=2), plain)
    assert shortcut.used == 1


def test_position_biases_are_made_once_for_a_length() -> None:
    backbone: Any = FAMILIES["t5"].build()
    attach(backbone, "lora", layers="last:1")
    part, computed = found(backbone), []
    shortcut = Shortcut(part, lambda given: torch.zeros(*given["input_ids"].shape, 16), training=False)
    part.blocks[0].register_forward_hook(lambda module, args, output: computed.append(tuple(args[0].shape)))
    for length in (3, 5, 3, *range(6, 6 + frozen.LENGTHS), 3):
        backbone.encoder(torch.ones(2, length, dtype=torch.long))
    assert computed == [(1, length, 16) for length in (3, 5, *range(6, 6 + frozen.LENGTHS), 3)]
    assert len(shortcut._beside) == frozen.LENGTHS


def test_position_biases_that_recorded_operations_read_stay_where_they_are() -> None:
    backbone: Any = FAMILIES["t5"].build()
    attach(backbone, "lora", layers="last:1")
    shortcut = Shortcut(found(backbone), lambda given: torch.zeros(*given["input_ids"].shape, 16), training=False)

    def bias(length: int) -> weakref.ref:
        backbone.encoder(torch.ones(2, length, dtype=torch.long))
        return weakref.ref(next(part for part in shortcut._beside[length] or () if part is not None))

    with configured(recorded=True):
        read = bias(3)
    other = bias(4)
    for length in range(5, 6 + frozen.LENGTHS):
        bias(length)
    assert not {3, 4} & shortcut._beside.keys()
    assert (read() is None, other() is None) == (False, True)


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
    bert, llama = (FAMILIES[name].build().requires_grad_(False) for name in ("bert", "llama"))
    assert frozen.find(tiny_model("classification", "flaubert")) == "the backbone has 2 stacks of blocks, not 1"
    assert frozen.find(nn.Linear(2, 2)) == "the backbone has 0 stacks of blocks, not 1"
    attach(bert, "soft_prompt", soft_token_num=2)
    assert "the whole model, which lies before or around the blocks, is trained" in str(frozen.find(bert))
    attach(llama, "lora")
    assert frozen.find(llama) == "a delta is in the first block"
    tied: Any = FAMILIES["gpt2"].build().requires_grad_(False)
    tied.lm_head.weight.requires_grad_(True)
    assert "transformer.wte, which lies before" in str(frozen.find(tied))


def test_what_lies_before_the_blocks_and_was_made_after_them() -> None:
    backbone: Any = tiny_model("seq2seq", "bart")
    attach(backbone, "lora", layers="last:1")
    inputs = {name: value for name, value in tiny_inputs("seq2seq", backbone.config).items() if name != "labels"}
    assert found(backbone).block_inputs(inputs) is not None
    backbone.model.encoder.layernorm_embedding.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="trained"):
        found(backbone).block_inputs(inputs)


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
