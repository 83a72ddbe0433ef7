"""Deltas merged into plain checkpoints that transformers loads, without deltaexp and with equal logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import FAMILIES, attach, logits, slow_but, snapshot
from torch import nn
from transformers import ByT5Tokenizer, GenerationConfig

from deltaexp import interop
from deltaexp.errors import CheckpointError

TYPES: dict[str, dict[str, Any]] = {
    "lora": {},
    "adalora": {},
    "vera": {"vera_r": 4},
    "loha": {},
    "lokr": {},
    "ia3": {},
    "ln_tuning": {},
    "full": {},
}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("delta_type", slow_but(TYPES, ["lora", "ia3", "full"]))
def test_transformers_loads_it(delta_type: str, name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    backbone, inputs = family.build(), family.inputs()
    keys = dict(TYPES[delta_type])
    if name == "bert":
        keys["unfrozen_modules"] = ["deltas", "classifier"]
    delta_model = attach(backbone, delta_type, **keys)
    expected, before = logits(backbone, inputs), snapshot(backbone)
    report = interop.export(delta_model, tmp_path / "out", "merged")
    assert snapshot(backbone) == before
    assert torch.equal(logits(backbone, inputs), expected)
    plain = type(backbone).from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(logits(plain, inputs), expected, atol=1e-5, rtol=0)
    assert list(plain.state_dict()) == list(family.build().state_dict())
    assert "logits: off by at most" in report


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_error_of_rounding_is_told(dtype: torch.dtype, tmp_path: Path) -> None:
    family = FAMILIES["llama"]
    backbone, inputs = family.build().to(dtype), family.inputs()
    delta_model = attach(backbone)
    expected = logits(backbone, inputs).float()
    report = interop.export(delta_model, tmp_path / "out", "merged")
    plain = type(backbone).from_pretrained(tmp_path / "out", dtype=dtype).eval()
    error = (logits(plain, inputs).float() - expected).abs().max().item()
    told = float(report.split("logits: off by at most ")[1].split(",")[0])
    assert 0 < error < 0.3
    assert told / 5 < error < told * 5  # of another batch


@pytest.mark.parametrize("delta_type", ["adapter", "soft_prompt", "prefix", "reft", "bitfit"])
def test_what_cannot_be_merged(delta_type: str, tmp_path: Path) -> None:
    backbone = FAMILIES["llama"].build()
    keys: dict[str, Any] = {"soft_token_num": 3} if delta_type == "soft_prompt" else {}
    delta_model = attach(backbone, delta_type, **keys)
    before = snapshot(backbone)
    with pytest.raises(CheckpointError, match="cannot be exported as a plain checkpoint.*can be merged are"):
        interop.export(delta_model, tmp_path / "out", "merged")
    assert not list(tmp_path.iterdir())
    assert snapshot(backbone) == before


def test_beside_another_delta(tmp_path: Path) -> None:
    backbone = FAMILIES["llama"].build()
    first = attach(backbone, modified_modules=["q_proj"])
    second = attach(backbone, "adapter")
    before = snapshot(backbone)
    with pytest.raises(CheckpointError, match="Another delta is attached"):
        interop.export(first, tmp_path / "out", "merged")
    assert snapshot(backbone) == before
    second.detach()
    interop.export(first, tmp_path / "out", "merged")


def test_what_lies_beside_the_weights(tmp_path: Path) -> None:
    (tmp_path / "secret").mkdir()
    backbone: Any = FAMILIES["llama"].build()
    backbone.config._name_or_path = str(tmp_path / "secret")
    backbone.generation_config = GenerationConfig(max_new_tokens=5, bos_token_id=0, pad_token_id=0)
    delta_model = attach(backbone)
    delta_model.detach()
    interop.export(delta_model, tmp_path / "out", "merged", tokenizer=ByT5Tokenizer())
    assert not delta_model.attached
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files >= {"config.json", "model.safetensors", "generation_config.json", "tokenizer_config.json"}
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["max_new_tokens"] == 5
    for path in (tmp_path / "out").iterdir():
        assert b"secret" not in path.read_bytes()
    assert isinstance(ByT5Tokenizer.from_pretrained(tmp_path / "out")("a")["input_ids"], list)


def test_a_module_that_is_no_model_of_transformers(tmp_path: Path) -> None:
    backbone = nn.Sequential(nn.Linear(4, 4))
    delta_model = attach(backbone, modified_modules=["0"])
    with pytest.raises(CheckpointError, match="no save_pretrained"):
        interop.export(delta_model, tmp_path / "out", "merged")
