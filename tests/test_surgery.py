"""Putting layers into modules of every shape, and taking them out again."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from models import FAMILIES, attach, logits, snapshot
from torch import nn

from deltaexp import AdapterModel, LoraModel
from deltaexp.errors import AddressingError, DeltaExpError
from deltaexp.surgery import Site


class Outputs(NamedTuple):
    hidden: torch.Tensor
    more: int


class Wrapper(nn.Module):
    """A linear map whose output is packed in some way."""

    def __init__(self, pack: str) -> None:
        super().__init__()
        self.pack, self.weight = pack, nn.Parameter(torch.eye(3))
        self.in_features = self.out_features = 3

    def forward(self, hidden_states: torch.Tensor) -> object:
        h = hidden_states @ self.weight
        return {"tensor": h, "tuple": (h, None, 7), "named": Outputs(h, 7), "dict": {"h": h}}[self.pack]


@pytest.mark.parametrize("model", [LoraModel, AdapterModel])
@pytest.mark.parametrize("keyword", [False, True], ids=["positional", "keyword"])
@pytest.mark.parametrize("pack", ["tensor", "tuple", "named"])
def test_outputs_that_are_packed(model: type, pack: str, keyword: bool) -> None:
    backbone = nn.ModuleDict({"inner": Wrapper(pack)})
    delta_model = model(backbone, modified_modules=["inner"])
    layer = delta_model.attachments[0].layer
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 3)
    output = backbone["inner"](hidden_states=x) if keyword else backbone["inner"](x)
    hidden = output if pack == "tensor" else output[0]
    torch.testing.assert_close(hidden, x + layer(x) if model is LoraModel else layer(x))
    if pack == "tuple":
        assert output[1:] == (None, 7)
    if pack == "named":
        assert isinstance(output, Outputs)
        assert output.more == 7


def test_an_output_without_hidden_states_is_refused() -> None:
    backbone = nn.ModuleDict({"inner": Wrapper("dict")})
    delta_model = LoraModel(backbone, modified_modules=["inner"])
    with pytest.raises(DeltaExpError, match="returns dict"):
        backbone["inner"](torch.ones(1, 3))
    delta_model.detach()
    assert backbone["inner"](torch.ones(1, 3))["h"].shape == (1, 3)


def test_other_hooks_stay() -> None:
    backbone, calls = FAMILIES["bert"].build(), []
    query = backbone.get_submodule("bert.encoder.layer.0.attention.self.query")
    query.register_forward_hook(lambda *_: calls.append("mine"))
    delta_model = attach(backbone)
    logits(backbone, FAMILIES["bert"].inputs())
    delta_model.detach()
    logits(backbone, FAMILIES["bert"].inputs())
    assert calls == ["mine", "mine"]


def test_a_name_that_is_taken() -> None:
    backbone = FAMILIES["bert"].build()
    first = attach(backbone)
    first.detach()
    second = attach(backbone)
    before = snapshot(backbone)
    with pytest.raises(DeltaExpError, match=r"query\.lora' exists already"):
        first.attach()
    assert not first.attached
    assert snapshot(backbone) == before
    second.detach()
    first.attach()
    assert first.attached


def test_a_second_delta_hangs_under_a_name_of_its_own() -> None:
    backbone = FAMILIES["bert"].build()
    for expected in ("lora", "lora_1", "lora_2"):
        delta_model = attach(backbone, modified_modules=["query"])
        assert {attachment.attribute for attachment in delta_model.attachments} == {expected}
        # In a checkpoint each has the plain name.
        assert all(".query.lora.lora_" in name for name in delta_model.delta_tensors())


@pytest.mark.parametrize("training", [True, False])
def test_layers_follow_the_mode_of_their_module(training: bool) -> None:
    backbone = FAMILIES["bert"].build().train(training)
    delta_model = attach(backbone, lora_dropout=0.5)
    assert {attachment.layer.training for attachment in delta_model.attachments} == {training}
    backbone.train(not training)
    assert {attachment.layer.training for attachment in delta_model.attachments} == {not training}


def test_a_seed_gives_the_same_layers() -> None:
    def layers(seed: int) -> list[torch.Tensor]:
        delta_model = attach(FAMILIES["bert"].build(), seed=seed)
        return list(delta_model.delta_tensors().values())

    assert all(map(torch.equal, layers(3), layers(3)))
    assert not any(map(torch.equal, layers(3), layers(4)))


def test_a_meta_backbone() -> None:
    with torch.device("meta"):
        backbone = FAMILIES["llama"].make()
    delta_model = LoraModel(backbone)
    assert {tensor.device.type for tensor in delta_model.delta_tensors().values()} == {"meta"}


def test_widths_are_asked_of_the_module_first() -> None:
    assert Site("x", nn.Linear(3, 5), hidden_size=9).out_dim("adapter") == 5
    assert Site("x", nn.ReLU(), hidden_size=9).out_dim("adapter") == 9
    assert Site("x", nn.Linear(3, 5)).linear_dims("lora") == (3, 5)
    with pytest.raises(AddressingError, match="'x', which a ReLU does not tell"):
        Site("x", nn.ReLU()).out_dim("adapter")
    with pytest.raises(AddressingError, match=r"'x' is a Sequential\. It contains 0"):
        Site("x", nn.Sequential(nn.Linear(2, 2))).linear_dims("lora")


def test_an_adapter_on_a_whole_block() -> None:
    """T5's SelfAttention returns a tuple, and its width is the config's."""
    family = FAMILIES["t5"]
    backbone, inputs = family.build(), family.inputs()
    plain = logits(backbone, inputs)
    delta_model = attach(backbone, "adapter", modified_modules=["SelfAttention"])
    assert len(delta_model.attachments) == 4
    assert not torch.equal(logits(backbone, inputs), plain)
    delta_model.detach()
    assert torch.equal(logits(backbone, inputs), plain)
