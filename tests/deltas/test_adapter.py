"""The adapter's formula, its variants and AdapterDrop; parity with OpenDelta is in tests/interop/test_opendelta.py."""

from __future__ import annotations

import pytest
import torch
from models import FAMILIES, attach, logits
from torch import nn
from torch.nn.functional import conv2d, gelu, linear
from transformers.activations import ACT2FN

from deltaexp import AutoDeltaConfig, AutoDeltaModel
from deltaexp.deltas.adapter import IN_ONE, activation
from deltaexp.errors import ConfigError


def sites(delta_model):
    return [attachment.site for attachment in delta_model.attachments]


def test_formula() -> None:
    backbone = FAMILIES["bert"].build()
    layer = attach(backbone, "adapter", bottleneck_dim=5).attachments[0].layer
    h = torch.randn(2, 3, 16)
    down, up = layer.modulelist.down_proj, layer.modulelist.up_proj
    inside = gelu(linear(h, down.weight, down.bias), approximate="tanh")
    assert inside.shape == (2, 3, 5)
    torch.testing.assert_close(layer(h), h + linear(inside, up.weight, up.bias))


def test_variants() -> None:
    houlsby = attach(FAMILIES["bert"].build(), "adapter")
    pfeiffer = attach(FAMILIES["bert"].build(), "adapter", adapter_variant="pfeiffer")
    layers = [f"bert.encoder.layer.{number}" for number in (0, 1)]
    assert sites(pfeiffer) == [f"{layer}.output.dense" for layer in layers]
    assert sites(houlsby) == [f"{layer}.{part}.dense" for layer in layers for part in ("attention.output", "output")]
    with pytest.raises(ConfigError, match="Did you mean 'pfeiffer'"):
        AutoDeltaConfig.from_dict({"delta_type": "adapter", "adapter_variant": "pfeifer"})


def test_adapter_drop() -> None:
    backbone = FAMILIES["t5"].build()
    delta_model = attach(backbone, "adapter", adapter_drop=1)
    assert {site.split(".layer")[0] for site in sites(delta_model)} == {"encoder.block.1", "decoder.block.1"}
    assert len(sites(delta_model)) == 4
    delta_model.detach()
    plain = logits(backbone, FAMILIES["t5"].inputs())
    with pytest.raises(ConfigError, match="adapter_drop is 2, .* all 8 chosen modules"):
        attach(backbone, "adapter", adapter_drop=2)
    with pytest.raises(ConfigError, match="all 4 chosen modules"):
        attach(backbone, "adapter", adapter_drop=1, layers=[0])
    assert torch.equal(logits(backbone, FAMILIES["t5"].inputs()), plain)


def test_the_channels_of_a_convolution() -> None:
    backbone = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Flatten())
    x = torch.randn(2, 3, 5, 5)
    h = backbone[0](x)
    config = AutoDeltaConfig.from_dict(
        {"delta_type": "adapter", "modified_modules": ["0"], "bottleneck_dim": 2, "non_linearity": "relu"}
    )
    layer = AutoDeltaModel.from_config(config, backbone_model=backbone).attachments[0].layer
    down, up = layer.modulelist.down_proj, layer.modulelist.up_proj
    inside = conv2d(h, down.weight[..., None, None], down.bias).relu()
    expected = h + conv2d(inside, up.weight[..., None, None], up.bias)
    torch.testing.assert_close(backbone[0](x), expected)


@pytest.mark.parametrize("name", IN_ONE)
def test_activations_in_one_operation(name: str) -> None:
    x = torch.linspace(-4, 4, 50)
    torch.testing.assert_close(activation(name)(x), ACT2FN[name](x))


@pytest.mark.parametrize(("name", "function"), [("gelu_orig", gelu), ("leakyrelu", torch.nn.functional.leaky_relu)])
def test_names_of_activations_in_opendelta(name: str, function) -> None:
    layer = attach(FAMILIES["bert"].build(), "adapter", non_linearity=name).attachments[0].layer
    x = torch.linspace(-2, 2, 9)
    torch.testing.assert_close(layer.modulelist.non_linear(x), function(x))
