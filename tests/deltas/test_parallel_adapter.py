"""The parallel adapter: what goes from one module to another, and that nothing of it stays (OpenDelta: test_opendelta.py)."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from models import FAMILIES, attach, logits
from torch import nn
from torch.nn.functional import linear

from deltaexp.deltas.parallel_adapter import Passing
from deltaexp.errors import AddressingError, ConfigError, DeltaExpError

PAIR = ["mlp.c_fc", "mlp.c_proj"]


def plain_adapter(layer, x: torch.Tensor) -> torch.Tensor:
    down, up = layer.modulelist.down_proj, layer.modulelist.up_proj
    return linear(linear(x, down.weight, down.bias).relu(), up.weight, up.bias)


def passings(backbone: nn.Module) -> list[Passing]:
    hooks = [h for m in backbone.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    return [hook.keywords["passing"] for hook in hooks if "passing" in getattr(hook, "keywords", {})]


def test_from_the_input_of_one_module_to_the_output_of_another() -> None:
    backbone = FAMILIES["gpt2"].build()
    mlp = backbone.transformer.h[0].mlp
    x = torch.randn(2, 3, 16)
    before = mlp(x)
    delta_model = attach(backbone, "parallel_adapter", modified_modules=PAIR, bottleneck_dim=5, non_linearity="relu")
    assert [attachment.site for attachment in delta_model.attachments] == [f"transformer.h.{b}.mlp.c_fc" for b in (0, 1)]
    assert {p.shape[0] for p in delta_model.attachments[0].layer.parameters()} == {5, 16}
    torch.testing.assert_close(mlp(x), before + plain_adapter(mlp.c_fc.parallel_adapter, x))
    mlp.c_fc.parallel_adapter.scaled = 4.0
    torch.testing.assert_close(mlp(x), before + 4 * plain_adapter(mlp.c_fc.parallel_adapter, x))


def test_scaled_is_a_key() -> None:
    family = FAMILIES["gpt2"]
    results = [logits(b, family.inputs()) for b in (family.build(), family.build(), family.build())]
    for number, scaled in enumerate((None, 1.0, 4.0)):
        backbone = family.build()
        attach(backbone, "parallel_adapter", scaled=scaled)
        results[number] = logits(backbone, family.inputs())
    assert torch.equal(results[0], results[1])
    assert not torch.allclose(results[1], results[2])


def test_around_one_module() -> None:
    backbone = FAMILIES["bert"].build()
    attention = backbone.bert.encoder.layer[0].attention
    x = torch.randn(2, 3, 16)
    before = attention(x)
    delta_model = attach(backbone, "parallel_adapter", modified_modules=["attn", "attn"], non_linearity="relu")
    after = attention(x)
    assert type(after) is type(before)
    torch.testing.assert_close(after[0], before[0] + plain_adapter(attention.parallel_adapter, x))
    assert len(delta_model.attachments) == 2


def test_several_on_the_same_modules() -> None:
    backbone = FAMILIES["gpt2"].build()
    mlp = backbone.transformer.h[0].mlp
    x = torch.randn(2, 3, 16)
    before = mlp(x)
    deltas = [
        attach(backbone, "parallel_adapter", modified_modules=PAIR, non_linearity="relu", bottleneck_dim=b, seed=b)
        for b in (2, 3)
    ]
    parts = [plain_adapter(delta.attachments[0].layer, x) for delta in deltas]
    torch.testing.assert_close(mlp(x), before + parts[0] + parts[1])
    deltas[0].detach()  # the first goes first
    torch.testing.assert_close(mlp(x), before + parts[1])
    deltas[0].attach()
    deltas[1].detach()
    torch.testing.assert_close(mlp(x), before + parts[0])
    deltas[0].detach()
    assert torch.equal(mlp(x), before)
    assert not passings(backbone)
    assert not mlp.c_fc._forward_pre_hooks
    assert not mlp.c_proj._forward_hooks


@pytest.mark.parametrize("checkpointed", [False, True])
def test_nothing_is_kept(checkpointed: bool) -> None:
    backbone = FAMILIES["gpt2"].build().train()
    attach(backbone, "parallel_adapter")
    if checkpointed:
        enable = getattr(backbone, "activation_checkpointing_enable", None) or backbone.gradient_checkpointing_enable
        enable()
    assert len(passings(backbone)) == 4  # two ends in each of two blocks; around attention none is needed
    loss = backbone(**FAMILIES["gpt2"].inputs()).loss
    assert not any(passings(backbone))
    loss.backward()
    assert not any(passings(backbone))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda b: pickle.loads(pickle.dumps(b))], ids=["deepcopy", "pickle"])
def test_a_copy_after_a_forward_pass_that_broke_off(copied) -> None:
    family = FAMILIES["gpt2"]
    backbone, inputs = family.build(), family.inputs()
    attach(backbone, "parallel_adapter")
    expected = logits(backbone, inputs)
    x = torch.randn(2, 3, 16, requires_grad=True) * 2
    backbone.transformer.h[0].mlp.c_fc(x)
    assert sum(map(bool, passings(backbone))) == 2  # seen from both ends
    twin = copied(backbone)
    assert not any(passings(twin))
    assert torch.equal(logits(twin, inputs), expected)
    # The copy's two ends belong together, and to it alone.
    twin.transformer.h[0].mlp.c_fc(x)
    backbone.transformer.h[0].mlp.c_proj(torch.randn(2, 3, 64))
    assert sum(map(bool, passings(twin))) == 2
    assert not any(passings(backbone))


def test_refusals() -> None:
    backbone = FAMILIES["gpt2"].build()
    plain = logits(backbone, FAMILIES["gpt2"].inputs())
    with pytest.raises(ConfigError, match="in pairs"):
        attach(backbone, "parallel_adapter", modified_modules=["attn"])
    with pytest.raises(AddressingError, match="2 and 4 modules"):
        attach(backbone, "parallel_adapter", modified_modules=["mlp.c_fc", "c_proj"])
    with pytest.raises(AddressingError, match="is a Conv2d"):
        attach(nn.Sequential(nn.Conv2d(3, 3, 1)), "parallel_adapter", modified_modules=["0", "0"])
    delta_model = attach(backbone, "parallel_adapter", modified_modules=PAIR[::-1])
    with pytest.raises(DeltaExpError, match="the first is called before the second"):
        backbone(**FAMILIES["gpt2"].inputs())
    delta_model.detach()
    assert torch.equal(logits(backbone, FAMILIES["gpt2"].inputs()), plain)
