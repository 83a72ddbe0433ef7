"""Deltas exported as adapters that PEFT itself loads with equal logits, and read back with equal tensors."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models import FAMILIES, attach, logits, same, snapshot, values
from peft_adapters import loaded_by_peft, quiet, unchecked
from safetensors.torch import load_file
from tiny import tiny_model
from torch import nn
from transformers import AutoModelForCausalLM

from deltaexp import DeltaModel, interop
from deltaexp.errors import CheckpointError, ConfigError

TOLERANCE = 2e-5
CASES: dict[str, dict[str, Any]] = {
    "lora": {"delta_type": "lora", "lora_r": 2},
    "rslora_pattern": {"delta_type": "lora", "lora_r": 3, "lora_scaling": "rslora", "lora_r_pattern": {"attn.q": 2}},
    "alpha_pattern": {"delta_type": "lora", "lora_r": 3, "lora_alpha": 5, "lora_alpha_pattern": {"attn.q": 2}},
    "dora": {"delta_type": "lora", "lora_r": 3, "lora_dora": True},
    "pissa": {"delta_type": "lora", "lora_r": 3, "lora_init": "pissa"},
    "olora_dora": {"delta_type": "lora", "lora_r": 2, "lora_init": "olora", "lora_dora": True},
    "lora_plus": {"delta_type": "lora", "lora_plus_ratio": 16.0},
    "all_linear": {"delta_type": "lora", "modified_modules": ["all-linear"], "exclude_modules": []},
    "some_blocks": {"delta_type": "lora", "layers": [1]},
    "adalora": {"delta_type": "adalora", "adalora_init_r": 4, "adalora_target_r": 3},
    "vera": {"delta_type": "vera", "vera_r": 4},
    "loha": {"delta_type": "loha", "loha_r": 3},
    "lokr": {"delta_type": "lokr", "lokr_r": 1, "lokr_decompose_both": True},
    "ia3": {"delta_type": "ia3"},
    "ln_tuning": {"delta_type": "ln_tuning"},
    "soft_prompt": {"delta_type": "soft_prompt", "soft_token_num": 3},
    "prefix": {"delta_type": "prefix", "prefix_positions": "shifted", "embed_dim": 4, "mid_dim": 4},
    "prefix_turned": {"delta_type": "prefix", "reparameterize": False},
    "bias": {"delta_type": "lora", "unfrozen_modules": ["deltas", "bias"]},
    "peft": {"delta_type": "peft", "peft": {"peft_type": "HRA", "r": 2, "target_modules": "all-linear"}},
}
REFUSED = {
    ("gpt2", "lokr"): "Conv1D",
    ("t5", "prefix_turned"): "prefixes of one width into every block",
    ("bert", "prefix_turned"): "prefix_positions=shifted",
    ("gpt2", "prefix_turned"): "prefix_positions=shifted",
}
NOT_HERE = {("t5", "prefix"), ("t5", "bias"), ("llama", "bias"), ("gpt2", "peft")}
QUICK = {
    *(("llama", "lora"), ("gpt2", "dora"), ("gpt2", "rslora_pattern"), ("bert", "ia3"), ("t5", "vera"), ("llama", "adalora")),
    *(
        ("llama", "prefix_turned"),
        ("bert", "bias"),
        ("bert", "soft_prompt"),
        ("llama", "olora_dora"),
        ("llama", "peft"),
        ("gpt2", "loha"),
    ),
}
EQUAL = {
    "lora",
    "rslora_pattern",
    "alpha_pattern",
    "dora",
    "lora_plus",
    "all_linear",
    "some_blocks",
    "vera",
    "loha",
    "lokr",
} | {*("ia3", "ln_tuning", "bias", "peft")}
"""Cases in which what is read back has the same names and tensors, as long as no slices of projections are joined."""


def cases(which: set[tuple[str, str]]) -> list[Any]:
    return [
        pytest.param(name, case, marks=[] if (name, case) in QUICK else pytest.mark.slow, id=f"{name}-{case}")
        for name in FAMILIES
        for case in CASES
        if (name, case) in which
    ]


EVERY = {(name, case) for name in FAMILIES for case in CASES} - NOT_HERE


@quiet
@pytest.mark.parametrize(("name", "case"), cases(EVERY - set(REFUSED)))
def test_peft_loads_it(name: str, case: str, tmp_path: Path) -> None:
    keys = dict(CASES[case])
    family = FAMILIES[name]
    backbone, inputs = family.build(), family.inputs()
    delta_model = attach(backbone, keys.pop("delta_type"), **keys)
    expected, before = logits(backbone, inputs), snapshot(backbone)
    interop.export(delta_model, tmp_path / "theirs", "peft")
    assert snapshot(backbone) == before
    torch.testing.assert_close(loaded_by_peft(name, tmp_path / "theirs"), expected, atol=TOLERANCE, rtol=0)

    fresh = family.build()
    back = unchecked(tmp_path / "theirs", fresh)
    torch.testing.assert_close(logits(fresh, inputs), expected, atol=TOLERANCE, rtol=0)
    sliced = any(attachment.rows is not None for attachment in delta_model.attachments)
    if case in EQUAL and not sliced:
        assert same(values(back.delta_tensors()), values(delta_model.delta_tensors()))
    # And once more: what PEFT has is the same to the last bit.
    interop.export(back, tmp_path / "again", "peft")
    first, second = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("theirs", "again"))
    assert same(first, second)


@pytest.mark.parametrize(("name", "case"), [pytest.param(*pair, id="-".join(pair)) for pair in REFUSED])
def test_what_peft_has_no_layer_for(name: str, case: str, tmp_path: Path) -> None:
    keys = dict(CASES[case])
    backbone = FAMILIES[name].build()
    delta_model = attach(backbone, keys.pop("delta_type"), **keys)
    before = snapshot(backbone)
    with pytest.raises(CheckpointError, match=REFUSED[name, case]):
        interop.export(delta_model, tmp_path / "out", "peft")
    assert not list(tmp_path.iterdir())
    assert snapshot(backbone) == before


@pytest.mark.parametrize(
    ("delta_type", "advice"),
    [("bitfit", "can be used with"), ("full", "to=merged"), ("reft", "can be used"), ("adapter", "used")],
)
def test_types_that_peft_does_not_have(delta_type: str, advice: str, tmp_path: Path) -> None:
    delta_model = attach(FAMILIES["llama"].build(), delta_type)
    with pytest.raises(CheckpointError, match=f"PEFT has no method.*{advice}"):
        interop.export(delta_model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@quiet
@pytest.mark.parametrize("delta_type", ["lora", pytest.param("prefix", marks=pytest.mark.slow)])
def test_a_head_becomes_a_module_to_save(delta_type: str, tmp_path: Path) -> None:
    family = FAMILIES["bert"]
    backbone, inputs = family.build(), family.inputs()
    keys: dict[str, Any] = {"reparameterize": False, "prefix_positions": "shifted"} if delta_type == "prefix" else {}
    delta_model = attach(backbone, delta_type, unfrozen_modules=["deltas", "classifier"], **keys)
    expected = logits(backbone, inputs)
    interop.export(delta_model, tmp_path / "out")
    written = config(tmp_path / "out")
    assert (written["modules_to_save"], written["task_type"]) == (["classifier"], "SEQ_CLS")
    torch.testing.assert_close(loaded_by_peft("bert", tmp_path / "out"), expected, atol=TOLERANCE, rtol=0)
    back = unchecked(tmp_path / "out", family.build())
    assert same(values(back.delta_tensors()), values(delta_model.delta_tensors()))


def test_a_tied_head_is_refused(tmp_path: Path) -> None:
    delta_model = attach(FAMILIES["gpt2"].build(), unfrozen_modules=["deltas", "wte"])
    with pytest.raises(CheckpointError, match="tied to another parameter"):
        interop.export(delta_model, tmp_path / "out")


def config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


@quiet
def test_what_others_read_of_the_config(tmp_path: Path) -> None:
    backbone = FAMILIES["llama"].build()
    backbone.config._name_or_path = str(tmp_path)  # a folder of this machine
    delta_model = attach(backbone, lora_r=4, lora_alpha=8)
    interop.export(delta_model, tmp_path / "out")
    written = config(tmp_path / "out")
    assert (written["peft_type"], written["r"], written["lora_alpha"]) == ("LORA", 4, 8)
    assert written["target_modules"] == ["q_proj", "v_proj"]
    assert written["task_type"] == "CAUSAL_LM"
    assert written["base_model_name_or_path"] == tmp_path.name
    for path in (tmp_path / "out").iterdir():
        assert str(tmp_path).encode() not in path.read_bytes()
    names = [name for name in load_file(tmp_path / "out" / "adapter_model.safetensors") if ".0." in name and "q_proj" in name]
    assert names == [f"base_model.model.model.layers.0.self_attn.q_proj.lora_{letter}.weight" for letter in "AB"]
    assert stat.S_IMODE(os.stat(tmp_path / "out").st_mode) == 0o755


@quiet
def test_peft_finds_the_backbone_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = FAMILIES["llama"]
    family.build().save_pretrained(tmp_path / "base")
    backbone = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    delta_model = attach(backbone)
    expected = logits(backbone, family.inputs())
    interop.export(delta_model, tmp_path / "out")
    monkeypatch.chdir(tmp_path)  # where "base" is a name that leads there
    found = peft.AutoPeftModelForCausalLM.from_pretrained("out").eval()
    with torch.no_grad():
        torch.testing.assert_close(found(**family.inputs()).logits, expected, atol=TOLERANCE, rtol=0)


@quiet
def test_slices_of_a_fused_projection_are_blocks(tmp_path: Path) -> None:
    delta_model = attach(FAMILIES["gpt2"].build(), lora_r=2, lora_alpha=8)
    interop.export(delta_model, tmp_path / "out")
    assert config(tmp_path / "out")["target_modules"] == ["c_attn"]
    assert (config(tmp_path / "out")["r"], config(tmp_path / "out")["lora_alpha"]) == (4, 16)
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    up = tensors["base_model.model.transformer.h.0.attn.c_attn.lora_B.weight"]
    own = values(delta_model.delta_tensors())
    assert up.shape == (48, 4)
    assert torch.equal(up[:16, :2], own["transformer.h.0.attn.c_attn.lora_q.lora_B"])
    assert torch.equal(up[32:, 2:], own["transformer.h.0.attn.c_attn.lora_v.lora_B"])
    assert not up[16:32].any()
    assert not up[:16, 2:].any()


@quiet
@pytest.mark.parametrize(("delta_type", "kernel"), [("lora", 1), ("lora", 3), ("adalora", 1)])
@pytest.mark.slow
def test_convolutions(delta_type: str, kernel: int, tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first = nn.Conv2d(3, 4, 3, padding=1)
            self.second = nn.Conv2d(4, 4, kernel, stride=2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(torch.relu(self.first(x)))

    net, x = Net(), torch.randn(2, 3, 8, 8)
    delta_model: DeltaModel = attach(net, delta_type, modified_modules=["first", "second"])
    with torch.no_grad():
        expected = net(x)
        interop.export(delta_model, tmp_path / "out")
        found = peft.PeftModel.from_pretrained(Net(), str(tmp_path / "out"))(x)
        torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)
        fresh = Net()
        unchecked(tmp_path / "out", fresh)
        torch.testing.assert_close(fresh(x), expected, atol=TOLERANCE, rtol=0)


@quiet
@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2", "mistral", "gemma"])
def test_prefixes_on_other_rotary_models(name: str, tmp_path: Path) -> None:
    backbone = tiny_model("causal", name)
    ids = torch.randint(1, 20, (2, 7), generator=torch.Generator().manual_seed(0))
    attached = attach(backbone, "prefix", reparameterize=False)
    expected = logits(backbone, {"input_ids": ids})
    interop.export(attached, tmp_path / "out")
    with torch.no_grad():
        found = peft.PeftModel.from_pretrained(tiny_model("causal", name), str(tmp_path / "out")).eval()(input_ids=ids).logits
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


def test_nothing_is_written_over(tmp_path: Path) -> None:
    delta_model = attach(FAMILIES["llama"].build())
    (tmp_path / "out").mkdir()
    for to in interop.FORMATS:
        with pytest.raises(ConfigError, match="exists already"):
            interop.export(delta_model, tmp_path / "out", to)
    assert not list((tmp_path / "out").iterdir())
    with pytest.raises(ConfigError, match="no format 'pefft'. Did you mean 'peft'"):
        interop.export(delta_model, tmp_path / "other", "pefft")


@pytest.mark.parametrize("to", interop.FORMATS)
def test_a_full_disk_leaves_nothing_behind(to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = FAMILIES["llama"].build()
    delta_model = attach(backbone)
    before = snapshot(backbone)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left on device.*Nothing was left behind"):
        interop.export(delta_model, tmp_path / "out", to)
    assert not list(tmp_path.iterdir())
    assert snapshot(backbone) == before


@quiet
def test_a_merged_or_detached_delta(tmp_path: Path) -> None:
    family = FAMILIES["llama"]
    backbone = family.build()
    delta_model = attach(backbone)
    expected = logits(backbone, family.inputs())
    delta_model.merge()
    with pytest.raises(CheckpointError, match="unmerge"):
        interop.export(delta_model, tmp_path / "out")
    delta_model.detach()
    interop.export(delta_model, tmp_path / "out")
    assert not delta_model.attached
    torch.testing.assert_close(loaded_by_peft("llama", tmp_path / "out"), expected, atol=TOLERANCE, rtol=0)
