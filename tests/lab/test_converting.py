"""The commands ``export`` and ``import``: from a delta to another library's folder and back, and what they refuse."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers
from models import attach, logits
from peft_adapters import quiet
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification, T5ForConditionalGeneration

from deltaexp import AutoDeltaModel, HashCheck
from deltaexp.__main__ import main
from deltaexp.lab.backbones import location


def t5() -> T5ForConditionalGeneration:
    return T5ForConditionalGeneration.from_pretrained(location("embedded:tiny_t5"), dtype=torch.float32)


INPUTS = {"input_ids": torch.tensor([[104, 105, 1]]), "decoder_input_ids": torch.tensor([[0, 9]])}


@pytest.fixture(scope="module")
def delta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converting") / "delta"
    backbone = t5()
    delta_model = attach(backbone)
    delta_model.save_finetuned(folder, backbone_name="tiny_t5")
    torch.save(logits(backbone, INPUTS), folder.parent / "logits")
    return folder


@pytest.fixture(scope="module")
def expected(delta: Path) -> torch.Tensor:
    return torch.load(delta.parent / "logits")


@quiet
def test_to_peft_and_back(delta: Path, expected: torch.Tensor, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["export", str(delta), "--to=peft", f"out={tmp_path / 'adapter'}", "backbone=tiny_t5"]) == 0
    assert "Wrote an adapter of PEFT's method LORA" in capsys.readouterr().out
    model = peft.PeftModel.from_pretrained(t5(), str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(logits(model, INPUTS), expected, atol=1e-5, rtol=0)

    assert main(["import", str(tmp_path / "adapter"), f"out={tmp_path / 'again'}", "backbone=tiny_t5"]) == 0
    said = capsys.readouterr().out
    assert "Saved a lora delta of PEFT" in said
    assert "tiny_t5, is unknown" in said
    backbone = t5()
    loaded = AutoDeltaModel.from_finetuned(tmp_path / "again", backbone)
    assert loaded.hash_check is HashCheck.MATCH
    assert torch.equal(logits(backbone, INPUTS), expected)
    record = json.loads((tmp_path / "again" / "config.json").read_text())
    assert (record["origin"], record["backbone_checkpoint_name"]) == ("PEFT", "tiny_t5")
    assert main(["verify", str(tmp_path / "again"), "backbone=tiny_t5"]) == 0
    assert main(["export", str(tmp_path / "again"), "--to", "opendelta", "backbone=tiny_t5"]) == 0
    assert (tmp_path / "again-opendelta" / "pytorch_model.bin").exists()
    assert main(["import", str(tmp_path / "again-opendelta"), f"out={tmp_path / 'third'}", "backbone=tiny_t5"]) == 0
    assert main(["verify", str(tmp_path / "third"), "backbone=tiny_t5"]) == 0


def test_merged_has_the_tokenizer(
    delta: Path, expected: torch.Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(delta), "to=merged", f"out={tmp_path / 'plain'}", "backbone=tiny_t5"]) == 0
    assert "logits: off by at most" in capsys.readouterr().out
    plain = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "plain").eval()
    torch.testing.assert_close(logits(plain, INPUTS), expected, atol=1e-4, rtol=0)
    assert (tmp_path / "plain" / "tokenizer_config.json").exists()


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory, small_bert: Path) -> tuple[Path, Path]:
    """Return the folders of a BERT without a head, and of a delta with one for three labels."""
    home = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(0)
    backbone = BertForSequenceClassification.from_pretrained(small_bert, num_labels=3)
    attach(backbone, unfrozen_modules=["deltas", "classifier"]).save_finetuned(home / "delta")
    backbone_config = {"name": "bert", "source": "package:somewhere/else"}
    task = {"labels": ["bad", "fair", "good"]}
    (home / "delta" / "results.json").write_text(json.dumps({"config": {"backbone": backbone_config, "task": task}}))
    return small_bert, home / "delta"


@quiet
def test_a_classifier_keeps_class_and_labels(classifier: tuple[Path, Path], tmp_path: Path) -> None:
    base, delta = classifier
    there = ["backbone=local", f"backbone.source={base}", "backbone.name=bert"]
    for to in ("peft", "merged"):
        assert main(["export", str(delta), "--to", to, f"out={tmp_path / to}", *there]) == 0
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert merged.config.id2label == {0: "bad", 1: "fair", 2: "good"}
    torch.manual_seed(5)  # the head is the adapter's, whatever the backbone's is
    backbone = BertForSequenceClassification.from_pretrained(base, num_labels=3)
    served = peft.PeftModel.from_pretrained(backbone, str(tmp_path / "peft")).eval()
    inputs = {"input_ids": torch.tensor([[2, 5, 7, 3]])}
    torch.testing.assert_close(logits(served, inputs), logits(merged, inputs), atol=1e-5, rtol=0)

    assert main(["import", str(tmp_path / "peft"), f"out={tmp_path / 'again'}", *there]) == 0
    again = BertForSequenceClassification.from_pretrained(base, num_labels=3).eval()
    AutoDeltaModel.from_finetuned(tmp_path / "again", again)
    torch.testing.assert_close(logits(again, inputs), logits(merged, inputs), atol=1e-5, rtol=0)


def test_the_backbone_of_the_run_is_taken(delta: Path, tmp_path: Path) -> None:
    copy = tmp_path / "delta"
    copy.mkdir()
    for path in delta.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    recorded = {"config": {"backbone": {"name": "tiny_t5", "source": "embedded:tiny_t5"}}}
    (copy / "results.json").write_text(json.dumps(recorded))
    assert main(["export", str(copy), "--to", "opendelta"]) == 0
    assert (tmp_path / "delta-opendelta" / "pytorch_model.bin").exists()


MISTAKES = [
    (["export", "FOLDER"], "needs a format: --to peft|opendelta|merged"),
    (["export", "FOLDER", "--to", "pefft"], "no format 'pefft'. Did you mean 'peft'"),
    (["export", "FOLDER", "--to", "peft"], "none is named: add backbone="),
    (["export", "FOLDER", "--to", "peft", "backbone=tiny_t6"], "tiny_t6"),
    (["export", "FOLDER", "--to", "peft", "lora_r=3"], "'lora_r=3' is none"),
    (["export", "FOLDER", "--to", "peft", "out=FOLDER", "backbone=tiny_t5"], "exists already"),
    (["export", "./nothing", "--to", "peft", "backbone=tiny_t5"], "There is no folder './nothing'"),
    (["export", "--to", "peft", "backbone=tiny_t5"], "write: deltaexp export DIR_OR_REPO"),
    (["import", "FOLDER", "backbone=tiny_t5"], "add out=FOLDER"),
    (["import", "FOLDER", "out=new"], "none is named: add backbone="),
    (["import", "FOLDER", "out=FOLDER", "backbone=tiny_t5"], "exists already"),
]


def test_mistakes_are_answered_without_torch(delta: Path, tmp_path: Path) -> None:
    calls = [[word.replace("FOLDER", str(delta)) for word in words] for words, _ in MISTAKES]
    code = (
        "import contextlib, io, sys; from deltaexp.__main__ import main\n"
        f"for words in {calls!r}:\n"
        "    text = io.StringIO()\n"
        "    with contextlib.redirect_stderr(text):\n"
        "        assert main(words) == 2, words\n"
        "    print(text.getvalue(), end='')\n"
        "heavy = {'torch', 'transformers', 'peft'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(MISTAKES)
    for line, (_, message) in zip(lines, MISTAKES, strict=True):
        assert message in line
    assert not list(tmp_path.iterdir())


def test_another_backbone_is_refused(
    classifier: tuple[Path, Path], delta: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    base, _ = classifier
    there = ["backbone=local", f"backbone.source={base}", "backbone.name=bert"]
    assert main(["export", str(delta), "--to", "peft", f"out={tmp_path / 'out'}", *there]) == 1
    assert main(["import", str(delta), f"out={tmp_path / 'out'}", "backbone=tiny_t5"]) == 1
    said = capsys.readouterr().err
    assert "was trained on a T5ForConditionalGeneration, and the backbone 'bert' is a bert model" in said
    assert "holds a delta of deltaexp already" in said
    assert not list(tmp_path.iterdir())


def test_a_classifier_of_opendelta(tmp_path: Path) -> None:
    golden = Path(__file__).parents[1] / "golden"
    base = golden / "backbones" / "bert"
    there = ["backbone=local", f"backbone.source={base}", "backbone.name=bert"]
    delta = golden / "bert" / "adapter_relu_unfrozen_classifier"
    assert main(["import", str(delta), f"out={tmp_path / 'ours'}", *there]) == 0
    assert main(["verify", str(tmp_path / "ours"), *there]) == 0
    assert main(["export", str(tmp_path / "ours"), "--to", "opendelta", f"out={tmp_path / 'back'}", *there]) == 0
    first, second = (torch.load(folder / "pytorch_model.bin", weights_only=True) for folder in (delta, tmp_path / "back"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
