"""The low-rank adapter's formula and keys; parity with OpenDelta is in tests/interop/test_opendelta.py."""

from __future__ import annotations

import pytest
import torch
from models import FAMILIES, attach

from deltaexp import AutoDeltaConfig
from deltaexp.errors import ConfigError


@pytest.mark.parametrize("rank", [1, 2])
def test_formula(rank: int) -> None:
    delta_model = attach(
        FAMILIES["bert"].build(), "low_rank_adapter", low_rank_rank=rank, reduction_factor=4, non_linearity="tanh"
    )
    layer = delta_model.attachments[0].layer
    shapes = {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()}
    assert shapes == {
        "down_sampler.W_left": (16, rank), "down_sampler.W_right": (rank, 4), "down_sampler.b": (4,),
        "up_sampler.W_left": (4, rank), "up_sampler.W_right": (rank, 16), "up_sampler.b": (16,),
    }  # fmt: skip
    p = dict(layer.named_parameters())
    h = torch.randn(2, 3, 16)
    down, up = (sum(torch.outer(p[f"{s}.W_left"][:, i], p[f"{s}.W_right"][i]) for i in range(rank)) for s in
                ("down_sampler", "up_sampler"))  # fmt: skip
    expected = h + torch.tanh(h @ down + p["down_sampler.b"]) @ up + p["up_sampler.b"]
    torch.testing.assert_close(layer(h), expected)


@pytest.mark.parametrize("init", ["glorot-uniform", "glorot-normal"])
def test_start(init: str) -> None:
    layer = attach(FAMILIES["bert"].build(), "low_rank_adapter", low_rank_w_init=init, seed=None).attachments[0].layer
    assert layer.down_sampler.W_right.shape == (1, 1)  # 16 // 32, and at least one
    spread = (2 * 2 / (16 + 1)) ** 0.5
    assert spread / 3 < layer.down_sampler.W_left.std() < spread * 2
    assert (layer.down_sampler.W_left.abs().max() <= spread * 3**0.5) or init == "glorot-normal"
    assert not layer.up_sampler.b.any()


@pytest.mark.parametrize("keys", [{"low_rank_rank": 0}, {"reduction_factor": 0}, {"low_rank_w_init": "glorot"}])
def test_refusals(keys: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(keys))):
        AutoDeltaConfig.from_dict({"delta_type": "low_rank_adapter", **keys})
