"""Attention by plain products is that of PyTorch to the rounding of bfloat16, forward and backward."""

from typing import Any

import pytest
import torch
from models import FAMILIES
from transformers import AttentionInterface

from deltaexp import half_attention
from deltaexp.half_attention import attention, plain, registered

SEEN = (torch.arange(40).view(2, 1, 1, 20) % 7 > 0).expand(2, 1, 16, 20)
CASES: dict[str, tuple[int, int, dict[str, Any]]] = {
    "plain": (20, 4, {}),
    "causal, grouped queries": (16, 2, {"is_causal": True, "enable_gqa": True}),
    "padding": (20, 4, {"attn_mask": SEEN}),
    "bias, own scale": (20, 4, {"attn_mask": torch.linspace(-3, 3, 16 * 20).view(1, 1, 16, 20), "scale": 0.5}),
}


def computed(function: Any, dtype: torch.dtype, keys: int, heads: int, options: dict[str, Any]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 16, 4, 8), (2, keys, heads, 8), (2, keys, heads, 8), (2, 16, 4, 8))
    q, k, v, g = (torch.randn(shape, generator=generator).bfloat16().to(dtype).transpose(1, 2) for shape in shapes)
    inputs = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
    mask = options.get("attn_mask")
    if mask is not None and mask.is_floating_point():
        options = {**options, "attn_mask": mask.to(dtype)}
    out = function(*inputs, **options)
    return [out.detach(), *torch.autograd.grad(out, inputs, g)]


@pytest.mark.parametrize("longest", [512, 8])
@pytest.mark.parametrize("case", CASES)
def test_is_that_of_pytorch(case: str, longest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(half_attention, "LONGEST", longest)
    exact = computed(plain, torch.float64, *CASES[case])
    for own, true in zip(computed(attention, torch.bfloat16, *CASES[case]), exact, strict=True):
        assert own.dtype == torch.bfloat16
        assert (own.double() - true).norm() < 0.015 * true.norm()


def test_dropout_drops_in_both_directions() -> None:
    torch.manual_seed(0)
    v = torch.eye(64).bfloat16().view(1, 1, 64, 64).requires_grad_()
    q = torch.zeros(1, 1, 64, 8, dtype=torch.bfloat16, requires_grad=True)
    out = attention(q, q, v, dropout_p=0.25)  # P itself, as V is one
    assert 0.2 < (out == 0).float().mean() < 0.3
    assert out[out > 0].unique().item() == pytest.approx(1 / 64 / 0.75, rel=0.01)
    out.sum().backward()
    assert torch.allclose(v.grad.float()[0, 0, :, 0], out[0, 0].float().sum(0), rtol=0.02)


def test_what_it_is_not_for_is_left_to_pytorch() -> None:
    q = torch.randn(1, 2, 4, 8, requires_grad=True)
    assert torch.equal(attention(q, q, q), plain(q, q, q))
    half = q.detach().bfloat16()
    assert torch.equal(attention(half, half, half), plain(half, half, half))  # nothing is trained


def test_models_call_it_while_it_is_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    apply = half_attention._Attention.apply
    monkeypatch.setattr(half_attention._Attention, "apply", lambda *args: (calls.append(1), apply(*args))[1])
    before = AttentionInterface._global_mapping["sdpa"]
    for family in ("bert", "llama", "t5"):
        backbone = FAMILIES[family].build().train(False)
        backbone.set_attn_implementation("sdpa")
        inputs = FAMILIES[family].inputs()
        with registered(), torch.autocast("cpu", torch.bfloat16):
            logits = backbone(**inputs).logits
        assert calls
        calls.clear()
        with torch.no_grad():
            true = backbone(**inputs).logits
        assert (logits.float() - true).norm() < 0.03 * true.norm()
        logits.float().square().mean().backward()
        assert not calls
    assert AttentionInterface._global_mapping["sdpa"] is before
