"""Deltas exported as OpenDelta saves them: against its own files, and read back."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import FAMILIES, attach, logits, slow_but, snapshot
from safetensors.torch import load_file
from torch import nn

from deltaexp import AutoDeltaModel, DeltaModel, interop
from deltaexp.errors import CheckpointError
from deltaexp.interop.opendelta import ATTRIBUTES, PICKLED

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = sorted(path.parent.relative_to(GOLDEN).as_posix() for path in GOLDEN.glob("*/*/golden.safetensors"))
CASES = [case for case in CASES if not case.startswith("backbones/")]
QUICK = {
    *("bert/adapter_relu_unfrozen_classifier", "bert/compacter_gelu_dense", "bart/parallel_adapter", "distilbert/lora_regex"),
    *("gpt2/bitfit", "gpt2/low_rank_adapter", "roberta/prefix_reparam", "t5/soft_prompt", "t5_square/prefix"),
}
NOT_WRITTEN = {"backbone_hash", "sequential", "bottleneck_dim", "scaled"}
"""Keys that OpenDelta fills itself, or writes as null and does not use."""


@cache
def loaded(name: str, backbone_class: str) -> nn.Module:
    options = {"attn_implementation": "eager"} if name.startswith("deberta") else {}
    return getattr(transformers, backbone_class).from_pretrained(GOLDEN / "backbones" / name, **options).eval()


def backbone_for(case: str) -> nn.Module:
    facts = json.loads((GOLDEN / case / "golden.json").read_text())
    return copy.deepcopy(loaded(case.split("/")[0], facts["backbone_class"]))


def inputs_of(case: str) -> dict[str, torch.Tensor]:
    own = load_file(GOLDEN / case / "golden.safetensors")
    own.pop("logits")
    shared = load_file(GOLDEN / "backbones" / case.split("/")[0] / "golden.safetensors")
    shared.pop("logits_backbone")
    return own or shared


def unchecked(folder: Path, backbone: nn.Module) -> DeltaModel:
    with pytest.warns(UserWarning, match=r"saved by OpenDelta 0\.3\.0.* unknown"):
        return AutoDeltaModel.from_finetuned(folder, backbone_model=backbone)


def content(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    tensors = torch.load(folder / PICKLED, weights_only=True)
    return tensors, json.loads((folder / "config.json").read_text())


def equal(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("case", slow_but(CASES, QUICK))
def test_import_export_import(case: str, tmp_path: Path) -> None:
    backbone, inputs = backbone_for(case), inputs_of(case)
    delta_model = unchecked(GOLDEN / case, backbone)
    expected, before = logits(backbone, inputs), snapshot(backbone)
    interop.export(delta_model, tmp_path / "out", "opendelta")
    assert snapshot(backbone) == before

    # The same tensors under the same names as in OpenDelta's own file, and a config with its keys.
    (theirs, their_config), (ours, our_config) = content(GOLDEN / case), content(tmp_path / "out")
    if case == "roberta/low_rank_adapter_no_width":  # which has empty tensors there
        assert theirs.keys() == ours.keys()
    else:
        assert equal(theirs, ours)
    assert their_config.keys() - NOT_WRITTEN <= our_config.keys() - NOT_WRITTEN
    assert our_config.keys() - their_config.keys() - NOT_WRITTEN <= {"common_structure"}
    assert "modified_modules" in our_config
    same = their_config.keys() - NOT_WRITTEN - {"modified_modules", "common_structure", "exclude_modules", "unfrozen_modules"}
    assert {key: our_config[key] for key in same - {"transformers_version"}} == {
        key: their_config[key] for key in same - {"transformers_version"}
    }

    again = backbone_for(case)
    back = unchecked(tmp_path / "out", again)
    assert torch.equal(logits(again, inputs), expected)
    assert equal(back.delta_tensors(), delta_model.delta_tensors())


KEYS: dict[str, dict[str, Any]] = {
    "adapter": {},
    "bitfit": {},
    "compacter": {"reduction_factor": 2},
    "lora": {},
    "low_rank_adapter": {"reduction_factor": 2},
    "parallel_adapter": {},
    "prefix": {"embed_dim": 4, "mid_dim": 4},
    "soft_prompt": {"soft_token_num": 3},
}


@pytest.mark.parametrize("name", slow_but(FAMILIES, ["bert", "gpt2"]))
@pytest.mark.parametrize("delta_type", KEYS)
def test_a_delta_of_ours(delta_type: str, name: str, tmp_path: Path) -> None:
    assert KEYS.keys() == ATTRIBUTES.keys()
    keys = dict(KEYS[delta_type])
    if (delta_type, name) == ("prefix", "t5"):
        keys["opendelta_positions"] = True
    elif (delta_type, name) == ("lora", "gpt2"):
        keys["modified_modules"] = ["c_attn", "c_proj"]
    elif delta_type == "bitfit" and name in ("t5", "llama"):
        keys["modified_modules"] = [
            "attn.q",
            "attn.v",
            "ff.w2",
        ]  # their norms have no bias, and would get one that is not saved
    family = FAMILIES[name]
    backbone, inputs = family.build(), family.inputs()
    if name == "bert":
        keys["unfrozen_modules"] = ["deltas", "classifier"]
    delta_model = attach(backbone, delta_type, **keys)
    expected = logits(backbone, inputs)
    interop.export(delta_model, tmp_path / "out", "opendelta")
    again = family.build()
    back = unchecked(tmp_path / "out", again)
    torch.testing.assert_close(logits(again, inputs), expected, atol=1e-6, rtol=0)
    assert equal(back.delta_tensors(), delta_model.delta_tensors())


REFUSED: list[tuple[str, str, dict[str, Any], str]] = [
    ("llama", "vera", {}, "OpenDelta has only lora, adapter"),
    ("llama", "lora", {"lora_dora": True}, "no lora_dora"),
    ("llama", "lora", {"lora_scaling": "rslora"}, "no lora_scaling, which is 'rslora'"),
    ("llama", "lora", {"lora_r_pattern": {"attn.q": 2}}, "no lora_r_pattern"),
    ("llama", "lora", {"lora_init": "pissa"}, "lora_init=pissa"),
    ("llama", "adapter", {"adapter_variant": "pfeiffer"}, "no adapter_variant"),
    ("llama", "prefix", {"prefix_positions": "shifted"}, "no prefix_positions"),
    ("gpt2", "lora", {}, "slice of a fused projection"),
    ("t5", "prefix", {}, "opendelta_positions=true"),
    ("llama", "bitfit", {}, "does not save the bias that .*norm"),
]


@pytest.mark.parametrize(("name", "delta_type", "keys", "message"), REFUSED, ids=[f"{n}-{t}-{k}" for n, t, k, _ in REFUSED])
def test_what_opendelta_cannot_compute(name: str, delta_type: str, keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    backbone = FAMILIES[name].build()
    delta_model = attach(backbone, delta_type, **keys)
    before = snapshot(backbone)
    with pytest.raises(CheckpointError, match=message):
        interop.export(delta_model, tmp_path / "out", "opendelta")
    assert not list(tmp_path.iterdir())
    assert snapshot(backbone) == before
