"""Quantised backbones in the lab: what is left out of it, how a run says how it was, and runs from the config to `verify`."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny import tiny_config

from deltaexp import AutoDeltaModel, HashCheck, quantised, verification
from deltaexp.__main__ import main
from deltaexp.errors import ConfigError, DeltaExpError
from deltaexp.lab import backbones, quantisation, requirements, schema
from deltaexp.lab.config import BackboneConfig
from deltaexp.lab.run import run


def ways(*names: str, quick: str | None = None) -> list[Any]:
    """Return parameters for a test, which is skipped where the package is not installed; of which but one may be quick."""
    found = []
    for name in names or requirements.QUANTIZATION:
        package = requirements.QUANTIZATION[name]
        there = importlib.util.find_spec(package) is not None
        marks = [pytest.mark.skipif(not there, reason=f"{package} is not installed")]
        found.append(pytest.param(name, marks=[*marks, *([pytest.mark.slow] if quick not in (None, name) else [])]))
    return found


def local(folder: Path, way: str | None = None) -> list[str]:
    how = [f"backbone.quantization={way}"] if way else []
    return ["backbone=local", f"backbone.source={folder}", "backbone.name=small", *how]


@pytest.mark.parametrize(
    ("auto_class", "model_type", "kept"),
    [
        ("AutoModelForSequenceClassification", "bert", ["classifier"]),
        ("AutoModelForSequenceClassification", "roberta", ["classifier"]),
        ("AutoModelForSequenceClassification", "distilbert", ["classifier", "pre_classifier"]),
        ("AutoModelForSequenceClassification", "llama", ["score"]),
        ("AutoModelForCausalLM", "llama", ["lm_head"]),
        ("AutoModelForCausalLM", "gpt2", ["lm_head", "transformer.wte"]),
        ("AutoModelForImageClassification", "vit", ["classifier"]),
    ],
)
def test_heads_are_left_as_they_are(auto_class: str, model_type: str, kept: list[str]) -> None:
    assert quantisation.heads(getattr(transformers, auto_class), tiny_config(model_type)) == kept


def test_of_t5_only_what_is_tied_is_left() -> None:
    kept = quantisation.heads(transformers.AutoModelForSeq2SeqLM, tiny_config("t5"))
    assert {"lm_head", "shared"} <= set(kept)
    assert not {"encoder", "decoder"} & set(kept)


@pytest.mark.parametrize("way", ways(quick="bnb_4bit"))
def test_a_run_trains_saves_and_verifies(
    way: str, small_bert: Path, small_reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = ["task=sst2", f"task.data={small_reviews}", "trainer=smoke", "trainer.progress=false", "lora_r=4"]
    outcome = run(*schema.composed([*local(small_bert, way), *task]), tmp_path)
    assert outcome.results["verification"] == {"hash": "match", "max_logit_difference": 0.0, "probe_rows": 4}
    assert outcome.results["new_parameters"] == ["classifier"]
    assert outcome.results["config"]["backbone"]["quantization"] == way

    # `verify` loads the backbone as it was, without being told how; where it is told something else, it finds that out.
    capsys.readouterr()
    assert main(["verify", str(outcome.folder), *local(small_bert), "probe=true"]) == 0
    assert "verified" in capsys.readouterr().out

    another = "bnb_8bit" if way != "bnb_8bit" else "bnb_4bit"
    if importlib.util.find_spec("bitsandbytes") is not None:
        assert main(["verify", str(outcome.folder), *local(small_bert, another)]) == 1
        assert "is not the one that the delta" in capsys.readouterr().err

    # So does the code on the card.
    scope: dict[str, Any] = {}
    code = outcome.results["backbone"]["loading_code"]
    assert str(small_bert) not in code
    exec(code.replace("FOLDER_OF_THE_BACKBONE", str(small_bert)), scope)
    loaded = AutoDeltaModel.from_finetuned(outcome.folder, backbone_model=scope["backbone_model"])
    assert loaded.hash_check is HashCheck.MATCH

    assert main(["export", str(outcome.folder), "--to", "merged", f"out={tmp_path / 'merged'}", *local(small_bert)]) == 1
    assert "is quantised by" in capsys.readouterr().err


@pytest.mark.parametrize("way", ways())
def test_what_was_recorded_tells_how(way: str, small_bert: Path) -> None:
    config = BackboneConfig(name="small", source=str(small_bert), quantization=way, bnb_4bit_type="fp4", bnb_4bit_double=False)
    settings = backbones.settings_of(config)
    model, _ = backbones._loaded(config, str(small_bert), transformers.AutoModel, settings, "float32", {})
    found = quantisation.recorded(verification.settings(model))
    four = {"bnb_4bit_type": "fp4", "bnb_4bit_double": False, "bnb_4bit_compute_dtype": "float32"}
    assert found == {"quantization": way, **(four if way == "bnb_4bit" else {})}
    assert quantisation.recorded(verification.settings(transformers.AutoModel.from_pretrained(small_bert))) == {}


@pytest.mark.parametrize("way", ways("torchao_int8"))
def test_a_backbone_without_linear_modules(way: str, tmp_path: Path) -> None:
    transformers.AutoModelForCausalLM.from_config(tiny_config("gpt2")).save_pretrained(tmp_path / "gpt2")
    config = BackboneConfig(name="x", source=str(tmp_path / "gpt2"), quantization=way)
    with pytest.raises(ConfigError, match="no Linear module to quantise in a GPT2LMHeadModel. Take bnb_8bit"):
        backbones._loaded(
            config, config.source, transformers.AutoModelForCausalLM, backbones.settings_of(config), "float32", {}
        )


@pytest.mark.parametrize("way", ways("bnb_4bit"))
def test_a_checkpoint_that_is_quantised_already(way: str, small_bert: Path, tmp_path: Path) -> None:
    plain = BackboneConfig(name="small", source=str(small_bert), quantization=way)
    model, _ = backbones._loaded(plain, plain.source, transformers.AutoModel, backbones.settings_of(plain), "float32", {})
    model.save_pretrained(tmp_path / "packed")
    config = BackboneConfig(name="packed", source=str(tmp_path / "packed"))
    again, _ = backbones._loaded(config, config.source, transformers.AutoModel, backbones.settings_of(config), "float32", {})
    assert quantised.names(again) == quantised.names(model)
    twice = BackboneConfig(name="packed", source=config.source, quantization=way)
    with pytest.raises(ConfigError, match="is quantised already .bitsandbytes."):
        backbones._loaded(twice, twice.source, transformers.AutoModel, backbones.settings_of(twice), "float32", {})


def test_the_trainer_is_told_for_as_long_as_it_asks() -> None:
    model = torch.nn.Linear(2, 2)
    with quantisation.trainable(model):
        assert not hasattr(model, "_hf_peft_config_loaded")


def test_a_new_parameter_must_not_be_quantised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantised, "names", lambda model: ["pooler.dense.weight"])
    with pytest.raises(DeltaExpError, match="has no pooler.dense.weight, which would have to be trained"):
        quantisation.finish(torch.nn.Linear(2, 2), BackboneConfig(name="x", quantization="bnb_8bit"), ["pooler.dense.weight"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")
@pytest.mark.parametrize("way", ways())
def test_a_run_on_a_gpu(way: str, small_bert: Path, small_reviews: Path, tmp_path: Path) -> None:
    task = ["task=sst2", f"task.data={small_reviews}", "trainer=smoke", "trainer.progress=false", "backbone.dtype=bfloat16"]
    outcome = run(*schema.composed([*local(small_bert, way), *task]), tmp_path)
    assert outcome.results["verification"]["hash"] == "match"
