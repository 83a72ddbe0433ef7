"""A delta's folder: written whole or not at all, the same bytes each time, never a pickle."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from models import FAMILIES, attach, logits, same, values
from safetensors import safe_open
from safetensors.torch import load_file

from deltaexp import AutoDeltaConfig, AutoDeltaModel, HashCheck, checkpoint
from deltaexp.checksum import TensorDigest, file_sha256
from deltaexp.errors import CheckpointError, DamagedFileError

BERT = FAMILIES["bert"]
FILES = ["README.md", "config.json", "delta_model.safetensors", "manifest.json"]
WEIGHTS = "delta_model.safetensors"


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_is_written(tmp_path: Path) -> None:
    delta_model = attach(BERT.build())
    manifest = delta_model.save_finetuned(tmp_path / "new" / "delta")
    folder = tmp_path / "new" / "delta"
    assert sorted(content(folder)) == FILES
    assert os.listdir(tmp_path / "new") == ["delta"]
    assert folder.stat().st_mode & 0o777 == 0o755
    assert same(load_file(folder / WEIGHTS), delta_model.delta_tensors())
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert checkpoint.read_manifest(folder) == manifest
    assert manifest.files == {name: file_sha256(folder / name) for name in FILES if name != "manifest.json"}
    assert set(manifest.base) == set(BERT.build().state_dict())
    assert set(manifest.delta) == set(delta_model.delta_tensors())

    config = json.loads((folder / "config.json").read_text())
    assert config["backbone_class"] == "BertForSequenceClassification"
    assert config["delta_type"] == "lora"
    assert config["modified_modules"] == ["attn.q", "attn.v"]
    assert len(config["backbone_hash"]) == 32
    # The file is a config by itself, and strings of versions are no part of the config.
    assert AutoDeltaConfig.from_dict(config) == delta_model.config
    assert AutoDeltaConfig.from_finetuned(folder).saved_with.backbone_hash == config["backbone_hash"]
    assert "backbone_hash" not in delta_model.config.to_dict()
    card = (folder / "README.md").read_text()
    assert card.startswith("---\n")
    assert "library_name: deltaexp" in card
    assert "AutoDeltaModel.from_finetuned" in card


def test_the_card_may_be_given(tmp_path: Path) -> None:
    attach(BERT.build()).save_finetuned(tmp_path, card="# Mine\n")
    assert (tmp_path / "README.md").read_text() == "# Mine\n"


def test_two_saves_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("first", "second"):
        attach(BERT.build(), unfrozen_modules=["deltas", "classifier"]).save_finetuned(tmp_path / name)
    assert content(tmp_path / "first") == content(tmp_path / "second")
    # Also into a folder that holds another delta.
    attach(BERT.build(), "adapter").save_finetuned(tmp_path / "third")
    attach(BERT.build(), unfrozen_modules=["deltas", "classifier"]).save_finetuned(tmp_path / "third")
    assert content(tmp_path / "first") == content(tmp_path / "third")


def test_a_folder_holds_no_name_of_this_machine(tmp_path: Path) -> None:
    BERT.build().save_pretrained(tmp_path / "my-bert")
    backbone = type(BERT.build()).from_pretrained(tmp_path / "my-bert")
    attach(backbone).save_finetuned(tmp_path / "delta")
    for name, data in content(tmp_path / "delta").items():
        assert str(tmp_path).encode() not in data, name
    assert json.loads((tmp_path / "delta" / "config.json").read_text())["backbone_checkpoint_name"] == "my-bert"


class Disk:
    """A disk that refuses one call of a function of ``os``, and counts them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, function: str, refused: int) -> None:
        self.calls, self.refused, self.real = 0, refused, getattr(os, function)
        monkeypatch.setattr(os, function, self)

    def __call__(self, *args: object, **kwargs: object) -> object:
        self.calls += 1
        if self.calls == self.refused:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.real(*args, **kwargs)


@pytest.mark.parametrize("call", [1, 2, 3, 4])
@pytest.mark.parametrize("function", ["replace", "fsync"])
def test_an_old_delta_survives_a_full_disk(function: str, call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = attach(BERT.build())
    old.save_finetuned(tmp_path / "delta")
    before, inputs = content(tmp_path / "delta"), BERT.inputs()
    expected = logits(old.backbone_model, inputs)
    new = attach(BERT.build(), "adapter")
    disk = Disk(monkeypatch, function, call)
    with pytest.raises(CheckpointError, match="No space left on device") as caught:
        new.save_finetuned(tmp_path / "delta")
    monkeypatch.undo()
    assert disk.calls >= call
    assert str(tmp_path / "delta") in str(caught.value)
    assert content(tmp_path / "delta") == before
    assert os.listdir(tmp_path) == ["delta"]
    fresh = BERT.build()
    assert AutoDeltaModel.from_finetuned(tmp_path / "delta", fresh).hash_check is HashCheck.MATCH
    assert torch.equal(logits(fresh, inputs), expected)
    # Once there is room, the same call succeeds.
    new.save_finetuned(tmp_path / "delta")
    assert AutoDeltaModel.from_finetuned(tmp_path / "delta", BERT.build()).config.delta_type == "adapter"
    assert os.listdir(tmp_path) == ["delta"]


def test_a_first_save_leaves_nothing_behind_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    delta_model = attach(BERT.build())
    tensors = values(delta_model.delta_tensors())

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "save_file", refuse)
    with pytest.raises(CheckpointError, match="No space left on device"):
        delta_model.save_finetuned(tmp_path / "delta")
    assert os.listdir(tmp_path) == []
    assert same(delta_model.delta_tensors(), tensors)


def test_a_process_that_dies_while_replacing_leaves_no_mixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two replacements the folder is refused, not read as a mixture of two deltas."""
    attach(BERT.build()).save_finetuned(tmp_path / "delta")
    new, states, real = attach(BERT.build(), seed=8), [], os.replace

    def look(source: Path, target: Path) -> None:
        real(source, target)
        shutil.copytree(tmp_path / "delta", tmp_path / f"state-{len(states)}")
        states.append(tmp_path / f"state-{len(states)}")

    monkeypatch.setattr(os, "replace", look)
    new.save_finetuned(tmp_path / "delta")
    monkeypatch.undo()
    assert len(states) == 4
    olds = attach(BERT.build()).delta_tensors()
    for state in states:
        try:
            loaded = AutoDeltaModel.from_finetuned(state, BERT.build())
        except DamagedFileError:
            assert state != states[-1]
        else:
            assert same(loaded.delta_tensors(), new.delta_tensors() if state == states[-1] else olds)


def test_a_target_that_cannot_be_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for target in (tmp_path / "file", tmp_path / "file" / "delta"):
        with pytest.raises(CheckpointError, match="could not be written"):
            attach(BERT.build()).save_finetuned(target)
    assert (tmp_path / "file").read_text() == "mine"
    assert os.listdir(tmp_path) == ["file"]


def test_more_files(tmp_path: Path) -> None:
    delta_model = attach(BERT.build())
    delta_model.save_finetuned(tmp_path / "delta")
    (tmp_path / "delta" / "notes.txt").write_text("mine")
    checkpoint.add_files(tmp_path / "delta", {"results.json": "{}\n"})
    manifest = checkpoint.read_manifest(tmp_path / "delta")
    assert sorted([*manifest.files, "manifest.json"]) == sorted([*FILES, "results.json"])
    checkpoint.check_files(tmp_path / "delta", manifest, tuple(manifest.files))
    assert same(checkpoint.read(tmp_path / "delta").tensors, delta_model.delta_tensors())
    assert (tmp_path / "delta" / "notes.txt").read_text() == "mine"
    (tmp_path / "delta" / "results.json").write_text("{ }\n")
    with pytest.raises(DamagedFileError, match=r"results\.json"):
        checkpoint.check_files(tmp_path / "delta", manifest, tuple(manifest.files))
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"no manifest\.json"):
        checkpoint.add_files(tmp_path / "empty", {"results.json": "{}"})


def test_a_manifest_is_what_was_written() -> None:
    digest = TensorDigest("float32", (2, 3), "ab" * 32)
    scalar = TensorDigest("bfloat16", (), "cd" * 32)
    manifest = checkpoint.Manifest({"b": digest, "a": scalar}, {"c": digest}, {"config.json": "ef" * 32})
    assert checkpoint.Manifest.from_json(manifest.to_json()) == manifest
    other = checkpoint.Manifest({"a": scalar, "b": digest}, {"c": digest}, {"config.json": "ef" * 32})
    assert other.to_json() == manifest.to_json()


# --- what is no delta of ours -----------------------------------------------------------------------------------------


class Trap:
    """Unpickling it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


def test_a_pickle_is_never_loaded(tmp_path: Path) -> None:
    folder, sprung = tmp_path / "delta", tmp_path / "sprung"
    pickle.loads(pickle.dumps(Trap(sprung)))
    assert sprung.exists()  # the trap works
    sprung.unlink()
    attach(BERT.build()).save_finetuned(folder)
    for name in ("pytorch_model.bin", "results.json", "delta_model.bin"):
        (folder / name).write_bytes(pickle.dumps(Trap(sprung)))
    assert AutoDeltaModel.from_finetuned(folder, BERT.build()).hash_check is HashCheck.MATCH
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).write_bytes(pickle.dumps(Trap(sprung)))
    (folder / "manifest.json").unlink()
    with pytest.raises(DamagedFileError, match="safetensors"):
        AutoDeltaModel.from_finetuned(folder, BERT.build())
    assert not sprung.exists()


def test_folders_that_hold_no_delta(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no folder"):
        AutoDeltaModel.from_finetuned(tmp_path / "nowhere" / "at" / "all", BERT.build())
    with pytest.raises(CheckpointError, match=r"no config\.json.*empty"):
        AutoDeltaModel.from_finetuned(tmp_path, BERT.build())
    attach(BERT.build()).save_finetuned(tmp_path / "delta")
    with pytest.raises(CheckpointError, match="Did you mean") as caught:
        AutoDeltaModel.from_finetuned(tmp_path, BERT.build())
    assert repr(str(tmp_path / "delta")) in str(caught.value)
    BERT.build().save_pretrained(tmp_path / "backbone")
    with pytest.raises(CheckpointError):
        AutoDeltaModel.from_finetuned(tmp_path / "backbone", BERT.build())
    (tmp_path / "delta" / "manifest.json").unlink()
    (tmp_path / "delta" / "config.json").write_text("[]")
    with pytest.raises(DamagedFileError, match="not a JSON object"):
        AutoDeltaModel.from_finetuned(tmp_path / "delta", BERT.build())


def test_the_digest_of_the_base_depends_on_nothing_but_the_base(tmp_path: Path) -> None:
    found = []
    for number, (delta_type, seed) in enumerate([("lora", 1), ("lora", 2), ("adapter", 1), ("bitfit", 1), ("full", 1)]):
        attach(BERT.build(), delta_type, seed=seed).save_finetuned(tmp_path / str(number))
        found.append(AutoDeltaConfig.from_finetuned(tmp_path / str(number)).saved_with)
    assert len({record.base_sha256 for record in found}) == 1
    assert len({record.backbone_hash for record in found}) == 5
    attach(BERT.build(seed=1), "lora").save_finetuned(tmp_path / "other")
    assert AutoDeltaConfig.from_finetuned(tmp_path / "other").saved_with.base_sha256 != found[0].base_sha256


@pytest.mark.skipif(os.name == "nt", reason="has no such permissions")
def test_whoever_may_read_the_folder_may_read_the_files(tmp_path: Path) -> None:
    attach(BERT.build()).save_finetuned(tmp_path / "delta", probe=BERT.inputs())
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "delta").iterdir()} == {0o644}
