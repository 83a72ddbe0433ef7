"""LoReFT: the formula, the rotation, the positions."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from models import FAMILIES, attach, logits, train_step
from torch import nn

from deltaexp import AutoDeltaConfig
from deltaexp.deltas.reft import ReftLayer, positions
from deltaexp.errors import AddressingError, ConfigError


def reference(layer: ReftLayer, h: torch.Tensor) -> torch.Tensor:
    """Edit vectors one by one; R comes from Gram and Schmidt's procedure, which has the signs of `rotation`."""
    rows: list[torch.Tensor] = []
    for row in layer.rotate:
        for other in rows:
            row = row - (row @ other) * other
        rows.append(row / row.norm())
    edited = [
        vector
        + sum(row * (layer.source.weight[i] @ vector + layer.source.bias[i] - row @ vector) for i, row in enumerate(rows))
        for vector in h.flatten(0, -2)
    ]
    return torch.stack(edited).view(h.shape)


def moved(layer: ReftLayer, seed: int = 1) -> ReftLayer:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    return layer


def test_formula_and_gradient() -> None:
    layer = moved(ReftLayer(6, 3).double())
    h = torch.randn(2, 4, 6, dtype=torch.double)
    torch.testing.assert_close(layer(h), reference(layer, h))
    weights = torch.randn_like(h)
    found = torch.autograd.grad((layer(h) * weights).sum(), list(layer.parameters()))
    expected = torch.autograd.grad((reference(layer, h) * weights).sum(), list(layer.parameters()))
    for gradient, other in zip(found, expected, strict=True):
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradient, other)


def test_the_rotation_stays_orthonormal() -> None:
    family = FAMILIES["bert"]
    backbone = family.build()
    delta_model = attach(backbone, "reft")
    assert [a.site for a in delta_model.attachments] == ["bert.encoder.layer.0", "bert.encoder.layer.1"]
    layer = delta_model.attachments[0].layer
    before = layer.rotation()
    for _ in range(3):
        train_step(delta_model, family.inputs())
    assert not torch.allclose(layer.rotation(), before)
    torch.testing.assert_close(layer.rotation() @ layer.rotation().T, torch.eye(4), atol=1e-6, rtol=0)


def test_starts_as_the_identity() -> None:
    for family in FAMILIES.values():
        backbone = family.build()
        plain = logits(backbone, family.inputs())
        attach(backbone, "reft", seed=None)
        torch.testing.assert_close(logits(backbone, family.inputs()), plain, atol=1e-5, rtol=1e-5)


def test_positions() -> None:
    layer = moved(ReftLayer(6, 2))
    h = torch.randn(2, 5, 6)
    everywhere = layer(h)
    for spec, edited in {
        "f2": [0, 1],
        "l1": [4],
        "f1+l2": [0, 3, 4],
        "f3+l2": range(5),
        "f3+l3": range(5),
        "f9": range(5),
    }.items():
        layer.ends = positions(spec)
        expected = h.clone()
        expected[:, list(edited)] = everywhere[:, list(edited)]
        torch.testing.assert_close(layer(h), expected, msg=spec)
        assert torch.equal(layer(h[:, :1]), h[:, :1])  # one token after the other, as in generation
    layer.ends = positions("all")
    torch.testing.assert_close(layer(h[:, :1]), everywhere[:, :1])


@pytest.mark.parametrize("spec", ["", "none", "f", "f0", "2", "f1l2", "f1+", "+l1", "l2+f1", "f1+l1+l1", "f-1"])
def test_misspelt_positions(spec: str) -> None:
    with pytest.raises(ConfigError, match="reft_positions is"):
        AutoDeltaConfig.from_dict({"delta_type": "reft", "reft_positions": spec})


def test_dropout_falls_on_the_edit() -> None:
    torch.manual_seed(0)
    layer = moved(ReftLayer(6, 2, dropout=0.5))
    h = torch.randn(50, 1, 6)
    inside, rotation = layer.source(h) - h @ layer.rotation().T, layer.rotation()
    kept = (layer(h) - h) @ rotation.T / inside
    torch.testing.assert_close(kept, kept.round(), atol=1e-3, rtol=0)
    assert set(kept.round().unique().tolist()) == {0.0, 2.0}
    assert torch.equal(copy.deepcopy(layer).eval()(h), h + inside @ rotation)


def test_width_and_refusals() -> None:
    with pytest.raises(AddressingError, match="reft_r is 17.*16 wide"):
        attach(FAMILIES["bert"].build(), "reft", reft_r=17)
    wide = nn.Sequential(nn.Sequential(nn.Linear(10, 30), nn.Linear(30, 10)))
    delta_model = attach(wide, "reft", modified_modules=["0"])
    assert delta_model.attachments[0].layer.rotate.shape == (4, 10)


def test_width_of_a_stage() -> None:
    """The config's width is that of the last stage, and inside the block both wider and narrower maps are found."""

    class Stages(nn.ModuleList):
        config = SimpleNamespace(hidden_size=40)

    block = nn.ModuleDict({"bias": nn.Linear(2, 8), "q": nn.Linear(10, 10), "w1": nn.Linear(10, 40), "w2": nn.Linear(40, 10)})
    delta_model = attach(Stages([block]), "reft", modified_modules=["0"])
    assert delta_model.attachments[0].layer.rotate.shape == (4, 10)


def test_blocks_can_be_named() -> None:
    backbone = FAMILIES["t5"].build()
    named = attach(backbone, "reft", modified_modules=["block@"], exclude_modules=["encoder"])
    assert [attachment.site for attachment in named.attachments] == ["decoder.block.0", "decoder.block.1"]
    named.detach()
    last = attach(backbone, "reft", layers="last:1")
    assert [attachment.site for attachment in last.attachments] == ["encoder.block.1", "decoder.block.1"]
