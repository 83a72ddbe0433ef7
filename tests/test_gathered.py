"""What is gathered computes what every map computes by itself, and whatever is in the way is left to the maps."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from models import FAMILIES, attach
from torch import nn

from deltaexp import gathered, low_rank, route
from deltaexp.casting import CAST, kept

LORA = {
    "modified_modules": ["attn.q", "attn.k", "attn.v", "attn.proj", "ff.w1", "ff.w2"],
    "common_structure": True,
    "lora_r": 2,
    "lora_alpha": 6,
}
"""A scale of 3, which is no power of two."""


def made(family: str, **keys: Any) -> tuple[Any, Any, dict[str, torch.Tensor]]:
    """Return a backbone, a delta with random values on it, and a batch."""
    backbone = FAMILIES[family].build()
    delta_model = attach(backbone, **{**LORA, **keys})
    torch.manual_seed(1)
    for parameter in delta_model.trainable_parameters().values():
        nn.init.normal_(parameter, std=0.2)
    return backbone, delta_model, FAMILIES[family].inputs()


def step(backbone: Any, delta_model: Any, inputs: dict[str, torch.Tensor], half: bool = True) -> list[torch.Tensor]:
    """Return logits and gradients."""
    backbone.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        logits = backbone(**inputs).logits
    logits.float().square().mean().backward()
    found = delta_model.trainable_parameters().values()
    return [logits.detach(), *(torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in found)]


def check(found: list[torch.Tensor], plain: list[torch.Tensor], exact: list[torch.Tensor]) -> None:
    """Check that numbers are about as far from the exact ones as those that every map has computed by itself."""
    assert [tensor.dtype for tensor in found] == [tensor.dtype for tensor in plain]
    for part in (slice(1), slice(1, None)):
        assert _distance(found[part], exact[part]) <= 2 * _distance(plain[part], exact[part]) <= 0.4


def _distance(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    one_norm, norm = (torch.cat([tensor.flatten().float() for tensor in tensors]) for tensors in (one, other))
    return float((one_norm - norm).norm() / norm.norm())


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of outputs of every unit that was computed."""
    found: list[int] = []
    compute = gathered._computed

    def counting(x: torch.Tensor, weight: torch.Tensor, *others: Any) -> torch.Tensor:
        found.append(len(weight))
        return compute(x, weight, *others)

    monkeypatch.setattr(gathered, "_computed", counting)
    return found


@contextlib.contextmanager
def together(backbone: Any) -> Iterator[list[gathered.Unit]]:
    with kept(backbone), gathered.applied(backbone) as units:
        yield units


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_it_computes_the_same(family: str, small: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, delta_model, inputs = made(family)
    monkeypatch.setattr(low_rank, "SMALL", 1 << 30 if small else 0)
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    exact = step(backbone, delta_model, inputs, half=False)
    with kept(backbone):
        expected = step(backbone, delta_model, inputs)
    with together(backbone):
        found = step(backbone, delta_model, inputs)
        again = step(backbone, delta_model, inputs)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert _distance([backbone(**inputs).logits], exact[:1]) <= 2 * _distance(expected[:1], exact[:1])
    check(found, expected, exact)
    check(again, expected, exact)
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())
    assert not any(gathered.MEMBER in module.__dict__ for module in backbone.modules())
    with kept(backbone):
        assert all(torch.equal(one, other) for one, other in zip(step(backbone, delta_model, inputs), expected, strict=True))


@pytest.mark.parametrize(
    ("family", "modules", "sizes"),
    [
        ("bert", ["attn.q", "attn.k", "attn.v"], [48, 48]),
        ("bert", ["attn.q", "attn.v", "ff.w2"], [32, 16, 32, 16]),
        ("llama", ["attn.q", "attn.k", "attn.v", "attn.proj"], [32, 16, 32, 16]),
        ("llama", ["ff.w1", "ff.gate", "ff.w2"], [48, 16, 48, 16]),
    ],
)
def test_maps_of_one_input_are_one(family: str, modules: list[str], sizes: list[int], computed: list[int]) -> None:
    backbone, delta_model, inputs = made(family, modified_modules=modules)
    with together(backbone):
        step(backbone, delta_model, inputs)
        assert computed == sizes
        weights = gathered.kept(backbone)
        step(backbone, delta_model, inputs)
        assert computed == [*sizes, *sizes]
        assert [id(tensor) for tensor in gathered.kept(backbone)] == [id(tensor) for tensor in weights]
        assert sum(tensor.dim() == 2 for tensor in weights) == 2
    assert not any(getattr(parameter, CAST, None) for parameter in backbone.parameters())


def test_another_input_than_the_neighbours(computed: list[int]) -> None:
    """As in attention to another model's states."""
    backbone, _, _ = made("bert", modified_modules=["attn.q", "attn.k", "attn.v"])
    part = backbone.bert.encoder.layer[0].attention.self
    x, y = torch.randn(2, 3, 16), torch.randn(2, 5, 16)

    def attend() -> list[torch.Tensor]:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return [part.query(x), part.key(y), part.value(y), part.query(y)]

    expected = attend()
    with together(backbone):
        for _ in range(3):
            assert _distance(attend(), expected) < 0.01
        assert computed == [48, 48] * 3


def test_what_stands_in_for_a_neighbour(computed: list[int]) -> None:
    backbone, _, _ = made("bert", modified_modules=["attn.q", "attn.k", "attn.v"])
    part = backbone.bert.encoder.layer[0].attention.self
    x = torch.randn(2, 3, 16)
    with together(backbone) as units, torch.autocast("cpu", torch.bfloat16):
        part.query, query = nn.Identity(), part.query
        part.key(x)
        assert not computed
        part.query = query
        part.key(x)
        assert computed == [48]
        assert set(units[0].waiting) == {0, 2}


def test_an_output_that_nobody_fetched() -> None:
    backbone, delta_model, inputs = made("bert", modified_modules=["attn.q", "attn.k", "attn.v"])
    exact = step(backbone, delta_model, inputs, half=False)
    with kept(backbone):
        expected = step(backbone, delta_model, inputs)
    with together(backbone) as units:
        query = backbone.bert.encoder.layer[0].attention.self.query
        with torch.autocast("cpu", torch.bfloat16):
            query(torch.randn(2, 3, 16))  # and an interruption
        assert units[0].waiting
        check(step(backbone, delta_model, inputs), expected, exact)
        assert not units[0].waiting


def test_an_input_changed_in_place_is_another() -> None:
    backbone, _, _ = made("bert", modified_modules=["attn.q", "attn.k", "attn.v"])
    part = backbone.bert.encoder.layer[0].attention.self
    x = torch.randn(2, 3, 16)
    with together(backbone), torch.autocast("cpu", torch.bfloat16):
        first = part.query(x)
        x.add_(1)
        changed = part.key(x)
    assert _distance([changed.detach()], [part.key(x).detach()]) < 0.01
    assert _distance([first.detach()], [part.query(x - 1).detach()]) < 0.01


def test_factors_that_change_are_cast_anew() -> None:
    backbone, delta_model, inputs = made("llama")
    factor = next(iter(delta_model.trainable_parameters().values()))
    part = backbone.model.layers[0].self_attn
    x = torch.randn(2, 3, 16)
    with together(backbone), torch.autocast("cpu", torch.bfloat16):
        before = part.q_proj(x.clone())
        optimizer = torch.optim.AdamW(delta_model.trainable_parameters().values(), lr=0.5, fused=True)
        step(backbone, delta_model, inputs)
        optimizer.step()
        assert not torch.equal(part.q_proj(x.clone()), before)
        step(backbone, delta_model, inputs)
        logits = backbone(**inputs).logits
        factor.data.add_(1)  # tells nobody; the next forward pass of the model sees it
        assert not torch.equal(backbone(**inputs).logits, logits)
        found = step(backbone, delta_model, inputs)
    check(found, step(backbone, delta_model, inputs), step(backbone, delta_model, inputs, half=False))


def test_weights_that_are_put_elsewhere_are_cast_anew() -> None:
    """As from the CPU onto a GPU, of which a parameter's version tells nothing."""
    backbone, _, _ = made("llama")
    part = backbone.model.layers[0].self_attn
    x = torch.randn(2, 3, 16)
    with together(backbone), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = part.k_proj(x.clone())
        part.k_proj.weight.data = part.k_proj.weight + 1
        after = part.k_proj(x.clone())
    assert _distance([after], [before]) > 0.1
    with torch.no_grad():
        assert _distance([after], [part.k_proj(x)]) < 0.01


def test_what_is_in_the_way_is_computed_by_the_maps(computed: list[int]) -> None:
    backbone, delta_model, inputs = made("bert", modified_modules=["attn.q", "attn.k", "attn.v"])
    query = backbone.bert.encoder.layer[0].attention.self.query
    seen = []
    with together(backbone):
        step(backbone, delta_model, inputs)
        assert computed == [48, 48]
        handle = query.register_forward_hook(lambda *args: seen.append(args[2].shape))
        computed.clear()
        step(backbone, delta_model, inputs)
        assert computed == [48]
        assert len(seen) == 1
        handle.remove()
        computed.clear()
        step(backbone, delta_model, inputs)
        assert computed == [48, 48]
        computed.clear()
        with route({delta_model: [0]}):
            step(backbone, delta_model, inputs)
        backbone(**inputs)  # in full precision
        with torch.autocast("cpu", torch.float16):
            backbone(**inputs)
        delta_model.merge()
        with torch.autocast("cpu", torch.bfloat16):
            backbone(**inputs)
        assert not computed


@pytest.mark.parametrize(
    "keys", [{"lora_dropout": 0.3}, {"delta_type": "adalora"}, {"delta_type": "loha"}, {"lora_dora": True}]
)
def test_layers_of_other_kinds(keys: dict[str, Any], computed: list[int]) -> None:
    backbone, inputs = FAMILIES["bert"].build(), FAMILIES["bert"].inputs()
    delta_model = attach(backbone, **{"delta_type": "lora", **keys})
    backbone.train()
    with together(backbone) as units:
        step(backbone, delta_model, inputs)
        assert not computed
        assert bool(units) == ("lora_dropout" in keys)  # of which evaluations are
        if units:
            backbone.eval()
            step(backbone, delta_model, inputs)
            assert computed


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    backbone, delta_model, inputs = made("llama")
    exact = step(backbone, delta_model, inputs, half=False)
    with kept(backbone):
        expected = step(backbone, delta_model, inputs)
    backbone.train()
    backbone.activation_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        backbone.enable_input_require_grads()
    with together(backbone):
        check(step(backbone, delta_model, inputs), expected, exact)


def test_frozen_factors_and_those_that_nobody_used_have_no_gradient() -> None:
    backbone, delta_model, inputs = made("llama")
    trained = delta_model.trainable_parameters()
    frozen = next(iter(trained.values())).requires_grad_(False)
    lower = backbone.model.layers[0]
    with together(backbone):
        with torch.autocast("cpu", torch.bfloat16):
            out = lower.mlp(torch.randn(2, 3, 16))
        out.float().sum().backward()
    with_gradient = {name for name, parameter in trained.items() if parameter.grad is not None}
    assert with_gradient
    assert all("layers.0.mlp" in name for name in with_gradient)
    with together(backbone):
        step(backbone, delta_model, inputs)
    assert frozen.grad is None
    assert all(parameter.grad is not None for parameter in trained.values() if parameter is not frozen)


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("turned", [False, True])
def test_what_a_gpu_does_in_few_operations(family: str, turned: bool) -> None:
    """All factors are laid out, and their gradients taken out, as one by one, to the last bit."""
    backbone, *_ = made(family)
    with kept(backbone), gathered.applied(backbone) as units:
        casts = gathered.Casts(units)
        expected = gathered._Cast.apply(casts, *casts.factors)
        with torch.no_grad():
            flat = gathered._laid_out(casts, casts.factors)
        for matrix, one in zip(casts.matrices, expected, strict=True):
            assert torch.equal(matrix.of(flat), one)
        gradients = [torch.randn(one.shape).to(one.dtype) for one in expected]
        if turned:
            gradients[1::2] = [one.T.contiguous().T for one in gradients[1::2]]
        plainly = torch.autograd.grad(expected, casts.factors, gradients)
        for _ in range(2):
            assert all(map(torch.equal, gathered._taken_out(casts, gradients), plainly))


def test_biases_that_are_trained_are_not_kept() -> None:
    """A fused AdamW changes tensors without telling it."""
    backbone, delta_model, inputs = made("bert")
    biases = [parameter for name, parameter in backbone.named_parameters() if name.endswith("query.bias")]
    for bias in biases:
        bias.requires_grad_()
    optimizer = torch.optim.AdamW(biases, lr=0.5, fused=True)

    def evaluated() -> torch.Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return backbone.eval()(**inputs).logits

    with together(backbone):
        evaluated()
        step(backbone, delta_model, inputs)
        optimizer.step()
        found = evaluated()
    with together(backbone):
        assert torch.equal(found, evaluated())
