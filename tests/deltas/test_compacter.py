"""The compacter's formula with all its options; parity with OpenDelta is in tests/interop/test_opendelta.py."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from models import FAMILIES, attach, logits, train_step

from deltaexp import AutoDeltaConfig, AutoDeltaModel, HashCheck
from deltaexp.errors import AddressingError, ConfigError

OPTIONS = {
    "default": {},
    "rank": {"phm_rank": 3, "hypercomplex_division": 2},
    "dense": {"factorized_phm": False, "kronecker_prod": True},
    "factorized rule": {"factorized_phm_rule": True},
    "fixed rule": {"learn_phm": False, "factorized_phm_rule": True},
    "no bias": {"use_bias_up_sampler": False, "use_bias_down_sampler": False},
    "shared": {"shared_phm_rule": True, "shared_W_phm": True},
    "starts": {"phm_c_init": "uniform", "hypercomplex_nonlinearity": "normal", "phm_init_range": 0.5},
}


def projection(tensors: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Apply a projection to vectors, one Kronecker product after the other."""
    n = len(tensors["W"] if "W" in tensors else tensors["W_left"])
    result = tensors.get("b", torch.zeros(()))
    for i in range(n):
        rule = tensors["phm_rule"][i] if "phm_rule" in tensors else tensors["phm_rule_left"][i] @ tensors["phm_rule_right"][i]
        w = tensors["W"][i] if "W" in tensors else tensors["W_left"][i] @ tensors["W_right"][i]
        result = result + x @ torch.kron(rule, w)
    return result


@pytest.mark.parametrize("keys", OPTIONS.values(), ids=OPTIONS)
def test_formula_training_and_loading(keys: dict, tmp_path: Path) -> None:
    family = FAMILIES["bert"]
    backbone, inputs = family.build(), family.inputs()
    delta_model = attach(backbone, "compacter", bottleneck_dim=8, **keys)
    layer = delta_model.attachments[-1].layer
    h = torch.randn(2, 3, 16)
    inside = projection(layer.down_sampler.state_dict(), h).relu()
    assert inside.shape == (2, 3, 8)
    torch.testing.assert_close(layer(h), h + projection(layer.up_sampler.state_dict(), inside))

    gradients = train_step(delta_model, inputs)
    assert set(gradients) == {name for name, _ in backbone.named_parameters() if "compactor" in name}
    assert any("rule" in name for name in gradients) == keys.get("learn_phm", True)
    expected = logits(backbone, inputs)
    delta_model.save_finetuned(tmp_path)
    fresh = family.build()
    with torch.random.fork_rng():
        torch.manual_seed(99)  # what is fixed at random comes from the file
        loaded = AutoDeltaModel.from_finetuned(tmp_path, fresh)
    assert loaded.hash_check is HashCheck.MATCH
    assert torch.equal(logits(fresh, inputs), expected)


def test_what_is_shared_is_one_tensor() -> None:
    backbone = FAMILIES["bert"].build()
    delta_model = attach(backbone, "compacter", bottleneck_dim=8, shared_phm_rule=True, shared_W_phm=True)
    for model in (delta_model, copy.deepcopy(delta_model)):
        layers = [attachment.layer for attachment in model.attachments]
        assert len({id(s.phm_rule) for layer in layers for s in (layer.down_sampler, layer.up_sampler)}) == 1
        assert len({id(layer.down_sampler.W_left) for layer in layers}) == 1
        assert len({id(layer.down_sampler.b) for layer in layers}) == len(layers)
    names = list(delta_model.delta_tensors())
    assert [name.rsplit(".", 1)[1] for name in names].count("phm_rule") == 1
    assert len(names) == 1 + 2 * 2 + 2 * len(layers)
    # Another delta of the type shares nothing with this one.
    other = attach(FAMILIES["bert"].build(), "compacter", bottleneck_dim=8, shared_phm_rule=True)
    assert other.attachments[0].layer.down_sampler.phm_rule is not delta_model.attachments[0].layer.down_sampler.phm_rule


def test_width_of_the_bottleneck() -> None:
    def width(**keys: object) -> int:
        return attach(FAMILIES["bert"].build(), "compacter", **keys).attachments[0].layer.down_sampler.b.numel()

    assert width() == 4  # 16 // 16, and at least one column for each of the four products
    assert width(hypercomplex_division=2, reduction_factor=3) == 4  # 5, rounded down to a multiple of 2
    assert width(hypercomplex_division=2, bottleneck_dim=6) == 6
    with pytest.raises(ConfigError, match="multiple of hypercomplex_division, which is 4"):
        AutoDeltaConfig.from_dict({"delta_type": "compacter", "bottleneck_dim": 6})
    with pytest.raises(AddressingError, match="hypercomplex_division is 3.*16 wide"):
        width(hypercomplex_division=3)
