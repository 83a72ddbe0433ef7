"""(IA)^3 against PEFT's, an independent implementation: equal outputs and gradients at equal weights."""

from __future__ import annotations

import peft
import pytest
import torch
from models import FAMILIES, attach, logits
from torch.nn.functional import linear

from deltaexp.errors import AddressingError

CASES = {
    "t5": None,
    "bert": None,
    "llama": None,
    "gpt2": ["c_attn", "mlp.c_proj"],  # PEFT scales the whole fused projection, queries included
}


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_equal_pefts(name: str) -> None:
    family, inputs = FAMILIES[name], FAMILIES[name].inputs()
    ours, theirs = family.build().double(), family.build().double()
    delta_model = attach(ours, "ia3", modified_modules=CASES[name])
    inside = [a.site for a in delta_model.attachments if a.layer.insertion == "input"]
    assert len(inside) == {"t5": 4}.get(name, 2)
    peft.inject_adapter_in_model(
        peft.IA3Config(
            target_modules=[attachment.site for attachment in delta_model.attachments],
            feedforward_modules=inside,
            fan_in_fan_out=name == "gpt2",
        ),
        theirs,
    )
    pairs = {}
    for attachment in delta_model.attachments:
        assert f"{attachment.prefix}.ia3_l" in delta_model.delta_tensors()
        pairs[attachment.site] = attachment.layer.ia3_l, theirs.get_submodule(attachment.site).ia3_l["default"]
    assert len([p for p in theirs.parameters() if p.requires_grad]) == len(pairs) == len(delta_model.delta_tensors())
    with torch.no_grad():
        for own, other in pairs.values():
            other.copy_(own.view(other.shape))
    outputs = []
    for model in (ours, theirs):
        outputs.append(model(**inputs))
        outputs[-1].loss.backward()
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits)
    for site, (own, other) in pairs.items():
        assert own.grad.abs().max() > 0, site
        torch.testing.assert_close(own.grad, other.grad.flatten(), msg=site)


def test_default_modules_and_start() -> None:
    family = FAMILIES["t5"]
    backbone, inputs = family.build(), family.inputs()
    plain = logits(backbone, inputs)
    delta_model = attach(backbone, "ia3", seed=None)
    assert torch.equal(logits(backbone, inputs), plain)
    kinds = {attachment.site.split(".", 5)[-1] for attachment in delta_model.attachments}
    assert kinds == {f"{a}.{p}" for a in ("SelfAttention", "EncDecAttention") for p in "kv"} | {"DenseReluDense.wo"}


def test_keys_and_values_of_a_fused_projection() -> None:
    backbone = FAMILIES["gpt2"].build()
    c_attn = backbone.transformer.h[1].attn.c_attn
    x = torch.randn(3, 16)
    before = c_attn(x)
    attach(backbone, "ia3")
    scale = torch.cat([torch.ones(16), c_attn.ia3_k.ia3_l, c_attn.ia3_v.ia3_l])
    torch.testing.assert_close(c_attn(x), before * scale)


def test_merged() -> None:
    backbone = FAMILIES["bert"].build()
    delta_model = attach(backbone, "ia3")
    for attachment in delta_model.attachments:
        module = attachment.module
        x = torch.randn(3, module.in_features)
        torch.testing.assert_close(linear(x, *attachment.layer.merged(module.weight, module.bias)), module(x))
        weight, bias = attachment.layer.merged(module.weight, None)
        assert bias is None
        assert weight.shape == module.weight.shape


def test_modules_whose_input_is_scaled() -> None:
    def inputs_of(**keys: object) -> set[str]:
        delta_model = attach(FAMILIES["bert"].build(), "ia3", **keys)
        return {a.site.rsplit(".", 2)[-2] for a in delta_model.attachments if a.layer.insertion == "input"}

    assert inputs_of() == {"output"}
    assert inputs_of(ia3_feedforward_modules=[]) == set()
    assert inputs_of(modified_modules=["query", "intermediate.dense"], ia3_feedforward_modules=["dense"]) == {"intermediate"}
    assert inputs_of(ia3_feedforward_modules=["attn.k"]) == {"self"}
    with pytest.raises(AddressingError, match="'query' in ia3_feedforward_modules means none"):
        inputs_of(ia3_feedforward_modules=["key", "query"])
