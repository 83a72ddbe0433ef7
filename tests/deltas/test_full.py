"""The baselines: full fine-tuning as a delta, and no delta at all."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from models import FAMILIES, attach, logits, md5, train_step, values
from safetensors.torch import load_file

from deltaexp import AutoDeltaConfig, AutoDeltaModel, HashCheck
from deltaexp.errors import AddressingError, ConfigError


@pytest.mark.parametrize("name", FAMILIES)
def test_full_is_the_training_of_the_backbone_itself(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    backbone, plain_backbone, inputs = family.build(), family.build(), family.inputs()
    plain, digest = logits(backbone, inputs), md5(backbone)
    delta_model = attach(backbone, "full", seed=None)
    train_step(delta_model, inputs)
    plain_backbone(**inputs).loss.backward()
    torch.optim.SGD(plain_backbone.parameters(), lr=0.5).step()
    expected = values(dict(plain_backbone.named_parameters()))
    assert list(delta_model.delta_tensors()) == list(expected)
    for parameter, value in delta_model.delta_tensors().items():
        assert torch.equal(value, expected[parameter]), parameter

    trained = logits(backbone, inputs)
    delta_model.save_finetuned(tmp_path)
    assert set(load_file(tmp_path / "delta_model.safetensors")) == set(expected)
    fresh = family.build()
    loaded = AutoDeltaModel.from_finetuned(tmp_path, fresh)
    assert loaded.hash_check is HashCheck.MATCH
    assert torch.equal(logits(fresh, inputs), trained)
    for model in (delta_model, loaded):
        model.detach()
        assert torch.equal(logits(model.backbone_model, inputs), plain)
        assert md5(model.backbone_model) == digest


def test_excluded_modules() -> None:
    backbone = FAMILIES["bert"].build()
    names = [n for n, _ in backbone.named_parameters()]
    delta_model = attach(backbone, "full", exclude_modules=["embeddings", "attn"])
    assert list(delta_model.trainable_parameters()) == [n for n in names if ".embeddings." not in n and ".attention." not in n]
    delta_model.detach()
    # What is tied to an excluded module is excluded, whatever name comes first.
    tied = FAMILIES["gpt2"].build()
    assert tied.lm_head.weight is tied.transformer.wte.weight
    assert "transformer.wte.weight" in attach(tied, "full").delta_tensors()
    tied = FAMILIES["gpt2"].build()
    assert "transformer.wte.weight" not in attach(tied, "full", exclude_modules=["lm_head"]).delta_tensors()
    with pytest.raises(AddressingError, match="leaves none of them"):
        attach(backbone, "full", exclude_modules=["bert", "classifier"])


def test_some_modules_or_layers() -> None:
    backbone = FAMILIES["t5"].build()
    names = [n for n, _ in backbone.named_parameters()]
    some = attach(backbone, "full", modified_modules=["SelfAttention.q", "ff"])
    sublayers = re.compile(r"encoder\.block\.\d\.layer\.1|decoder\.block\.\d\.layer\.2|.*SelfAttention\.q")
    assert list(some.trainable_parameters()) == [name for name in names if sublayers.match(name)]
    some.detach()
    last = attach(backbone, "full", layers="last:1")
    assert list(last.trainable_parameters()) == [n for n in names if ".block.1." in n]
    with pytest.raises(AddressingError, match="belongs to another delta"):
        attach(backbone, "full", modified_modules=["block.1.layer.0"])


def test_none_trains_new_heads_only(tmp_path: Path) -> None:
    family = FAMILIES["bert"]
    backbone, inputs = family.build(), family.inputs()
    plain = logits(backbone, inputs)
    delta_model = attach(backbone, "none", unfrozen_modules=["classifier"])
    assert list(delta_model.trainable_parameters()) == ["classifier.weight", "classifier.bias"]
    train_step(delta_model, inputs)
    expected = logits(backbone, inputs)
    assert not torch.equal(expected, plain)
    delta_model.save_finetuned(tmp_path)
    fresh = family.build()
    assert AutoDeltaModel.from_finetuned(tmp_path, fresh).hash_check is HashCheck.MATCH
    assert torch.equal(logits(fresh, inputs), expected)
    delta_model.detach()
    assert torch.equal(logits(backbone, inputs), plain)


def test_none_may_have_no_parameters_at_all(tmp_path: Path) -> None:
    backbone, inputs = FAMILIES["t5"].build(), FAMILIES["t5"].inputs()
    plain = logits(backbone, inputs)
    delta_model = attach(backbone, "none")
    assert not delta_model.trainable_parameters()
    delta_model.save_finetuned(tmp_path)
    fresh = FAMILIES["t5"].build()
    assert AutoDeltaModel.from_finetuned(tmp_path, fresh).hash_check is HashCheck.MATCH
    assert torch.equal(logits(fresh, inputs), plain)


@pytest.mark.parametrize("keys", [{"modified_modules": ["q"]}, {"layers": [0]}])
def test_none_refuses_what_has_no_effect(keys: dict) -> None:
    with pytest.raises(ConfigError, match=f"modifies nothing, and {next(iter(keys))} is"):
        AutoDeltaConfig.from_dict({"delta_type": "none", **keys})
