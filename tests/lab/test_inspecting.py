"""``deltaexp structure`` shows the names that patterns may use, without loading weights."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from small import bert

from deltaexp.__main__ import main


def test_the_embedded_backbone(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(transformers.AutoModelForSeq2SeqLM, "from_pretrained", refuse)
    assert main(["structure"]) == 0
    text = capsys.readouterr().out
    for row in (
        ["attn.q", "encoder.block.*.layer.*.SelfAttention.q", "2", "128 -> 128"],
        ["crossattn.v", "decoder.block.*.layer.*.EncDecAttention.v", "2", "128 -> 128"],
        ["ff.gate", "encoder.block.*.layer.*.DenseReluDense.wi_0", "2", "128 -> 384"],
        ["lm_head", "lm_head", "1", "128 -> 384"],
    ):
        assert any([cell.strip() for cell in line.split("│")[1:-1]] == row for line in text.splitlines()), row
    assert "layers=0-1: encoder.block.0 to encoder.block.1" in text
    assert "1,033,984 parameters" in text


def test_slices_of_a_fused_projection(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, num_labels=2).save_pretrained(tmp_path)
    words = ["backbone=local", f"backbone.source={tmp_path}", "backbone.name=mine", "task=sst2", "task.data=nothing"]
    assert main(["structure", *words]) == 0
    text = capsys.readouterr().out
    assert "16 -> 48, elements 0 to 15" in text
    assert "16 -> 48, elements 32 to 47" in text


def test_what_cannot_be_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = bert(tmp_path / "bert")
    words = ["structure", "backbone=local", f"backbone.source={folder}", "backbone.name=mine"]
    assert main(words) == 2  # an encoder cannot do the default task
    assert "encoder-decoder" in capsys.readouterr().err
    (folder / "config.json").write_text(json.dumps({"model_type": "no_such_model"}))
    assert main([*words, "task=sst2", "task.data=nothing"]) == 1
    assert "could not be loaded" in capsys.readouterr().err
    assert torch.get_default_device().type == "cpu"
