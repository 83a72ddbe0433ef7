"""Casts that are kept compute what autocast does, and leave nothing behind."""

import pytest
import torch
from models import FAMILIES, attach
from torch import nn

from deltaexp.casting import CAST, kept
from deltaexp.low_rank import _linear
from deltaexp.speed import configured


def step(model: nn.Module, inputs: dict) -> tuple[torch.Tensor, list[torch.Tensor]]:
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(**inputs).logits
    logits.float().square().mean().backward()
    return logits.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize("fused", [True, False])
def test_kept_casts_compute_what_autocast_does(family: str, fused: bool) -> None:
    backbone = FAMILIES[family].build()
    inputs = FAMILIES[family].inputs()
    attach(backbone, lora_r=2)
    classes = [type(module) for module in backbone.modules()]
    with configured(fused=fused):
        plain, plain_grads = step(backbone, inputs)
        with kept(backbone):
            logits, grads = step(backbone, inputs)
            casts = {id(getattr(p, CAST)[1]) for p in backbone.parameters() if getattr(p, CAST, None)}
            step(backbone, inputs)
            assert casts == {id(getattr(p, CAST)[1]) for p in backbone.parameters() if getattr(p, CAST, None)} != set()
    assert torch.equal(logits, plain)
    for one, other in zip(grads, plain_grads, strict=True):  # the sum of gradients of an input is rounded otherwise
        assert (one - other).norm() <= 0.02 * other.norm() + 1e-9
    assert [type(module) for module in backbone.modules()] == classes
    assert not any(CAST in p.__dict__ for p in backbone.parameters())


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_map_in_half_precision_is_that_of_pytorch(bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, b = (torch.randn(shape, generator=generator).bfloat16() for shape in ((2, 5, 40), (24, 40), (24,)))
    for one in (weight, weight.T.contiguous().T):
        own = _linear(x, one, b if bias else None)
        assert torch.equal(own, nn.functional.linear(x, one, b if bias else None))


def test_a_weight_that_changes_is_cast_anew() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).requires_grad_(False)
    model[1].requires_grad_(True)
    x = torch.randn(2, 4)
    with kept(model), torch.autocast("cpu", torch.bfloat16):
        before = model(x)
        with torch.no_grad():
            model[0].weight.add_(1)
        assert not torch.equal(model(x), before)
        assert getattr(model[1].weight, CAST) is None  # it is trained
        changed = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(x), changed)
