"""LoRA against PEFT's, an independent implementation: equal outputs and gradients at equal weights."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from models import FAMILIES, attach

CASES = {
    "t5": ["q", "v", "wi", "wo"],
    "bert": ["query", "key", "value", "dense"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
RANK, ALPHA = 3, 7


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_outputs_and_gradients(name: str, training: bool) -> None:
    family, inputs = FAMILIES[name], FAMILIES[name].inputs()
    ours = family.build().double()
    delta_model = attach(ours, "lora", modified_modules=CASES[name], lora_r=RANK, lora_alpha=ALPHA)
    theirs = family.build().double()
    peft.inject_adapter_in_model(
        peft.LoraConfig(
            target_modules=[attachment.site for attachment in delta_model.attachments],
            r=RANK,
            lora_alpha=ALPHA,
            lora_dropout=0.0,
            fan_in_fan_out=name == "gpt2",  # its Conv1D keeps its weight transposed
        ),
        theirs,
    )
    pairs = {}
    for attachment in delta_model.attachments:
        module = theirs.get_submodule(attachment.site)
        for side in "AB":
            pairs[f"{attachment.prefix}.lora_{side}"] = (
                getattr(attachment.layer, f"lora_{side}"),
                getattr(module, f"lora_{side}")["default"].weight,
            )
    assert len(pairs) == 2 * len(delta_model.attachments) == len(delta_model.delta_tensors())
    assert len([p for p in theirs.parameters() if p.requires_grad]) == len(pairs)
    with torch.no_grad():
        for own, other in pairs.values():
            other.copy_(own)

    outputs = []
    for model in (ours, theirs):
        model.train(training)
        torch.manual_seed(5)  # the backbones' own dropouts draw the same masks
        outputs.append(model(**inputs))
        outputs[-1].loss.backward()
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits)
    torch.testing.assert_close(outputs[0].loss, outputs[1].loss)
    for parameter, (own, other) in pairs.items():
        assert own.grad.abs().max() > 0, parameter
        torch.testing.assert_close(own.grad, other.grad, msg=lambda text, name=parameter: f"{name}: {text}")


def test_dropout() -> None:
    """The mask falls on the input of A, and is scaled; both draw it from the same generator."""
    family, inputs = FAMILIES["llama"], FAMILIES["llama"].inputs()
    ours, theirs = family.build(), family.build()
    delta_model = attach(ours, "lora", modified_modules=["q_proj"], lora_r=RANK, lora_alpha=ALPHA, lora_dropout=0.4)
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj"], r=RANK, lora_alpha=ALPHA, lora_dropout=0.4), theirs)
    with torch.no_grad():
        for attachment in delta_model.attachments:
            module = theirs.get_submodule(attachment.site)
            module.lora_A["default"].weight.copy_(attachment.layer.lora_A)
            module.lora_B["default"].weight.copy_(attachment.layer.lora_B)
    results = []
    for model in (ours, theirs):
        model.train()
        torch.manual_seed(5)
        results.append(model(**inputs).logits)
    torch.testing.assert_close(results[0], results[1])
    ours.eval()
    assert not torch.allclose(ours(**inputs).logits, results[0])
    twin = copy.deepcopy(ours)
    assert torch.equal(twin(**inputs).logits, ours(**inputs).logits)  # no mask in eval mode
