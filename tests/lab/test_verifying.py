"""The command ``verify``: what it finds right, what it finds wrong, and what it says where nothing can be known."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hub_fixtures import HubClient
from models import FAMILIES
from safetensors.torch import load_file, save_file
from transformers import BertForSequenceClassification, PreTrainedModel, T5ForConditionalGeneration

from deltaexp import AutoDeltaConfig, AutoDeltaModel, hub
from deltaexp.__main__ import main
from deltaexp.lab.backbones import location

WEIGHTS = "delta_model.safetensors"


def saved(model: PreTrainedModel, folder: Path, **keys: object) -> Path:
    delta_model = AutoDeltaModel.from_config(AutoDeltaConfig.from_dict({"delta_type": "lora", **keys}), model)
    delta_model.freeze_module()
    torch.manual_seed(1)
    for tensor in delta_model.delta_tensors().values():
        torch.nn.init.normal_(tensor, std=0.1)
    inputs = FAMILIES["t5" if isinstance(model, T5ForConditionalGeneration) else "bert"].inputs()
    inputs = {name: value.clamp(max=9) for name, value in inputs.items()}
    delta_model.save_finetuned(folder, probe=inputs)
    delta_model.detach()
    return folder


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = T5ForConditionalGeneration.from_pretrained(location("embedded:tiny_t5"), dtype=torch.float32)
    return saved(model, tmp_path_factory.mktemp("verifying") / "delta")


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "delta"))


def test_without_a_backbone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "4 files have the sha256 that was recorded" in said
    assert "not asked" in said
    assert "verified in" in said


def test_with_the_backbone_and_the_probe(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(folder), "backbone=tiny_t5", "probe=true"]) == 0
    said = capsys.readouterr().out
    assert "are those of the trained T5ForConditionalGeneration" in said
    assert "logits differ by 0 of the largest" in said


def test_a_classifier_whose_head_is_the_deltas(tmp_path: Path, small_bert: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = BertForSequenceClassification.from_pretrained(small_bert, num_labels=5)
    folder = saved(model, tmp_path / "delta", unfrozen_modules=["deltas", "classifier"])
    words = ["verify", str(folder), "backbone=local", f"backbone.source={small_bert}", "backbone.name=small", "probe=true"]
    assert main(words) == 0
    assert "verified" in capsys.readouterr().out


def test_another_backbone(folder: Path, small_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other"
    model = T5ForConditionalGeneration.from_pretrained(location("embedded:tiny_t5"), dtype=torch.float32)
    model.shared.weight.data[3, 3] += 1
    model.save_pretrained(other)
    assert main(["verify", str(folder), "backbone=local", f"backbone.source={other}", "backbone.name=other"]) == 1
    said = capsys.readouterr().err
    assert "The backbone is not the one" in said
    assert "shared.weight (other values)" in said


@pytest.mark.parametrize("name", ["config.json", WEIGHTS, "manifest.json", "README.md", "probe.safetensors"])
def test_a_flipped_bit_in_any_file(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = (folder / name).read_bytes()
    for position in (0, len(data) // 2, len(data) - 1):
        (folder / name).write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        assert main(["verify", str(folder)]) == 1
        said = capsys.readouterr().err
        assert name in said
        assert "Traceback" not in said


@pytest.mark.parametrize("name", ["config.json", WEIGHTS, "README.md", "probe.safetensors"])
def test_any_file_missing(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / name).unlink()
    assert main(["verify", str(folder)]) == 1
    assert name in capsys.readouterr().err


def test_what_cannot_be_known_is_not_verified(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "manifest.json").unlink()
    values = json.loads((folder / "config.json").read_text())
    values.pop("backbone_hash")
    (folder / "config.json").write_text(json.dumps(values))
    assert main(["verify", str(folder)]) == 1
    assert "not verified: nothing was recorded" in capsys.readouterr().out
    assert main(["verify", str(folder), "backbone=tiny_t5"]) == 1
    said = capsys.readouterr().out
    assert "unknown" in said
    assert "not verified" in said


def test_other_files_are_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"a pickle, for all we know")
    assert main(["verify", str(folder)]) == 0
    assert "no part of the delta, and not looked at: pytorch_model.bin" in capsys.readouterr().out


def test_a_folder_of_opendelta(capsys: pytest.CaptureFixture[str]) -> None:
    golden = Path(__file__).resolve().parents[1] / "golden" / "bert" / "lora_alpha_dropout"
    assert main(["verify", str(golden)]) == 1
    assert "OpenDelta" in capsys.readouterr().out


def test_a_repository(folder: Path, hub_client: HubClient, capsys: pytest.CaptureFixture[str]) -> None:
    from deltaexp import publishing

    publishing.push(folder, "DeltaHub/verified")
    assert main(["verify", "DeltaHub/verified", "backbone=tiny_t5", "probe=true"]) == 0
    assert "are those of the trained" in capsys.readouterr().out
    assert hub.fetch("DeltaHub/verified", needs="all").is_dir()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["verify"], "takes 1 words"),
        (["verify", "./nowhere"], "There is no folder './nowhere'"),
        (["verify", "a", "b"], "takes 1 words"),
        (["verify", ".", "probe=true"], "add backbone="),
        (["verify", ".", "probe=perhaps", "backbone=tiny_t5"], "true or false"),
        (["verify", ".", "bakbone=tiny_t5"], "add backbone="),
        (["verify", ".", "backbone=tiny_t6"], "tiny_t5"),
    ],
)
def test_mistakes(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert said in capsys.readouterr().err


def test_a_tensor_that_was_exchanged_with_all_digests(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever exchanges a tensor has to change file, manifest and config; less than that is noticed without the backbone."""
    tensors = load_file(folder / WEIGHTS)
    name = next(iter(tensors))
    save_file({**tensors, name: tensors[name] + 1}, folder / WEIGHTS)
    assert main(["verify", str(folder)]) == 1
    assert "is not the file that was saved" in capsys.readouterr().err
