"""Files that somebody else made: whatever is in them, the answer is a delta or a clear error, and nothing else happens."""

from __future__ import annotations

import json
import shutil
import struct
import time
import tracemalloc
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import FAMILIES, attach, same, snapshot, values
from safetensors.torch import load_file, save_file
from torch import nn

from deltaexp import AutoDeltaConfig, AutoDeltaModel, HashCheck, registry
from deltaexp.addressing import matches
from deltaexp.errors import AddressingError, CheckpointError, ConfigError, DamagedFileError, DeltaExpError, UnsafeFileError
from deltaexp.manifest import sealed

BERT = FAMILIES["bert"]
WEIGHTS = "delta_model.safetensors"
KEYS = {"soft_prompt": {"soft_token_num": 2}, "vera": {"vera_r": 4}}
quickly = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("security") / "delta"
    attach(BERT.build(), "lora", unfrozen_modules=["deltas", "classifier"]).save_finetuned(folder, probe=BERT.inputs())
    return folder


@pytest.fixture(scope="module")
def backbone() -> nn.Module:
    return BERT.build()


def load(folder: Path, backbone: nn.Module) -> HashCheck | None:
    """Load, and take out again; None where it was refused. The backbone must be as it was either way."""
    before, state = snapshot(backbone), values(backbone.state_dict())
    result = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with suppress(DeltaExpError):
            delta_model = AutoDeltaModel.from_finetuned(folder, backbone)
            result = delta_model.hash_check
            delta_model.detach()
            backbone.requires_grad_(True)
    assert snapshot(backbone) == before
    assert same(backbone.state_dict(), state)
    return result


def bare(folder: Path, original: Path, config: dict[str, Any] | None = None) -> Path:
    """A copy without a manifest and a hash, as other people's tools might write it: nothing vouches for anything."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(original, folder)
    (folder / "manifest.json").unlink()
    values = json.loads((folder / "config.json").read_text())
    values.pop("backbone_hash")
    (folder / "config.json").write_text(json.dumps({**values, **(config or {})}))
    return folder


# --- random damage ----------------------------------------------------------------------------------------------------


@quickly
@given(data=st.data())
def test_random_damage_to_any_file_is_an_error(
    original: Path, backbone: nn.Module, tmp_path: Path, data: st.DataObject
) -> None:
    folder = tmp_path / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(original, folder)
    name = data.draw(st.sampled_from(["config.json", WEIGHTS, "manifest.json"]))
    before = (folder / name).read_bytes()
    start = data.draw(st.integers(0, len(before)))
    length = data.draw(st.integers(0, 40))
    after = before[:start] + data.draw(st.binary(max_size=40)) + before[start + length :]
    (folder / name).write_bytes(after)
    assert load(folder, backbone) is (HashCheck.MATCH if after == before else None)


@quickly
@given(data=st.data())
def test_random_damage_without_a_manifest_is_a_clear_error_or_harmless(
    original: Path, backbone: nn.Module, tmp_path: Path, data: st.DataObject
) -> None:
    folder = bare(tmp_path / "damaged", original)
    name = data.draw(st.sampled_from(["config.json", WEIGHTS]))
    before = (folder / name).read_bytes()
    most = len(before) if name == "config.json" else 2000  # the header is where the structure is
    start = data.draw(st.integers(0, most))
    after = before[:start] + data.draw(st.binary(max_size=20)) + before[start + data.draw(st.integers(0, 20)) :]
    (folder / name).write_bytes(after)
    assert load(folder, backbone) in (None, HashCheck.UNKNOWN)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@quickly
@given(data=st.data())
def test_hostile_values_in_a_config_are_clear_errors(
    original: Path, backbone: nn.Module, tmp_path: Path, data: st.DataObject
) -> None:
    keys = sorted(json.loads((original / "config.json").read_text()))
    changed = data.draw(st.dictionaries(st.sampled_from(keys) | st.text(max_size=8), json_values, min_size=1, max_size=3))
    assert load(bare(tmp_path / "hostile", original, changed), backbone) in (None, HashCheck.UNKNOWN)


@pytest.mark.parametrize("delta_type", registry.known())
def test_absurd_sizes_are_refused_before_anything_is_allocated(delta_type: str, tmp_path: Path) -> None:
    """Every number of every delta type, made as large as a config can say it."""
    keys = {"unfrozen_modules": ["classifier"]} if delta_type == "none" else KEYS.get(delta_type, {})
    attach(BERT.build(), delta_type, **keys).save_finetuned(tmp_path / "delta")
    backbone = BERT.build()
    config = json.loads((tmp_path / "delta" / "config.json").read_text())
    numbers = {key: value for key, value in config.items() if type(value) is int}
    if delta_type == "peft":
        numbers = {"peft": {**config["peft"], "r": 0}}
    for key, value in numbers.items():
        for absurd in (10**9, 10**15, 2**63 - 1, 10**30, -(10**9)):
            changed: Any = absurd if not isinstance(value, dict) else {**value, "r": absurd}
            folder = bare(tmp_path / "absurd", tmp_path / "delta", {key: changed})
            tracemalloc.start()
            start = time.perf_counter()
            result = load(folder, backbone)
            seconds, peak = time.perf_counter() - start, tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            # A seed, a number of steps or what a layer is multiplied by may be any; a divisor makes things small.
            assert result is None or any(word in key for word in ("seed", "_t", "alpha", "factor", "lokr_r")), (key, absurd)
            assert seconds < 5, (key, absurd)
            assert peak < 1 << 27, (key, absurd)


@pytest.mark.parametrize(
    "changed",
    [
        {"layers": "0-99999999999"},
        {"layers": [10**30]},
        {"modified_modules": [f"[r]{'(' * 3000}q{')' * 3000}"]},
        {"modified_modules": ["[r](([a-z._0-9]+)*)*!"]},
        {"modified_modules": ["[r](a{1,30000}){1,30000}"]},
        {"modified_modules": ["q"] * 3 + ["nowhere"]},
        {"unfrozen_modules": ["[r](.*)*(.*)*(.*)*x!"]},
        {"lora_alpha": float("nan")},
        {"lora_alpha": float("inf")},
        {"lora_dropout": 10**400},
        {"lora_r_pattern": {"q": 10**12}},
        {"delta_type": "../../lora"},
        {"delta_type": ["lora"]},
        {"backbone_class": "os.system"},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_hostile_configs(changed: dict[str, Any], original: Path, backbone: nn.Module, tmp_path: Path) -> None:
    start = time.perf_counter()
    assert load(bare(tmp_path / "hostile", original, changed), backbone) is None
    assert time.perf_counter() - start < 10


def test_json_that_is_nested_too_deeply(original: Path, backbone: nn.Module, tmp_path: Path) -> None:
    folder = bare(tmp_path / "deep", original)
    (folder / "config.json").write_text("[" * 200_000)
    with pytest.raises(DamagedFileError, match="nested too deeply|not valid JSON"):
        AutoDeltaConfig.from_finetuned(folder)


def test_a_config_far_too_large(original: Path, tmp_path: Path) -> None:
    folder = bare(tmp_path / "large", original)
    with (folder / "config.json").open("r+b") as file:
        file.truncate(1 << 32)  # takes no place on the disk
    with pytest.raises(DamagedFileError, match=r"it has 4,294,967,296 bytes"):
        AutoDeltaConfig.from_finetuned(folder)


# --- malformed safetensors --------------------------------------------------------------------------------------------


def header(text: str | bytes, body: bytes = b"", length: int | None = None) -> bytes:
    data = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(data) if length is None else length) + data + body


NAME = "classifier.bias"
MALFORMED = {
    "nothing": b"",
    "a length of its header that is absurd": header("{}", length=2**62),
    "no JSON": header(b"\xff\xfe{"),
    "a list": header("[]"),
    "an unknown dtype": header(json.dumps({NAME: {"dtype": "F7", "shape": [3], "data_offsets": [0, 12]}}), bytes(12)),
    "an absurd shape": header(
        json.dumps({NAME: {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 12]}}), bytes(12)
    ),
    "a negative shape": header(json.dumps({NAME: {"dtype": "F32", "shape": [-3], "data_offsets": [0, 12]}}), bytes(12)),
    "offsets outside of the file": header(
        json.dumps({NAME: {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}}), bytes(4)
    ),
    "offsets that go back": header(json.dumps({NAME: {"dtype": "F32", "shape": [3], "data_offsets": [12, 0]}}), bytes(12)),
    "a hole": header(json.dumps({NAME: {"dtype": "F32", "shape": [3], "data_offsets": [8, 20]}}), bytes(20)),
    "two tensors in one place": header(
        json.dumps({name: {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]} for name in (NAME, "x")}), bytes(12)
    ),
    "a dtype of six bits": header(json.dumps({NAME: {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}), bytes(3)),
    "a nested header": header("{" + '"a":{' * 5000 + "}" * 5001),
}


@pytest.mark.parametrize("content", MALFORMED.values(), ids=MALFORMED)
def test_malformed_safetensors(content: bytes, original: Path, backbone: nn.Module, tmp_path: Path) -> None:
    folder = bare(tmp_path / "delta", original)
    (folder / WEIGHTS).write_bytes(content)
    before = snapshot(backbone)
    with pytest.raises(CheckpointError, match="delta_model|lacks"):
        AutoDeltaModel.from_finetuned(folder, backbone)
    assert snapshot(backbone) == before


# --- what a delta may reach -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delta_type", [name for name in registry.known() if name not in ("none", "full", "peft")])
def test_a_delta_writes_only_what_its_config_owns(delta_type: str, tmp_path: Path) -> None:
    """A tensor of the backbone that a file brings along is refused, however consistent the file is."""
    attach(BERT.build(), delta_type, **KEYS.get(delta_type, {})).save_finetuned(tmp_path / "delta")
    folder = bare(tmp_path / "more", tmp_path / "delta")
    tensors = load_file(folder / WEIGHTS)
    foreign = "bert.embeddings.word_embeddings.weight"
    save_file({**tensors, foreign: torch.ones(32, 16)}, folder / WEIGHTS)
    backbone = BERT.build()
    before = values(backbone.state_dict())
    with pytest.raises(CheckpointError, match=foreign.replace(".", r"\.")):
        AutoDeltaModel.from_finetuned(folder, backbone)
    assert same(backbone.state_dict(), before)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "a/b", "..", "", "C:\\x", "a\0b"])
def test_a_manifest_names_no_file_outside_of_its_folder(name: str, original: Path, backbone: nn.Module, tmp_path: Path) -> None:
    folder = tmp_path / "delta"
    shutil.copytree(original, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["sha256"]
    manifest["files"][name] = "ab" * 32
    (folder / "manifest.json").write_text(sealed(manifest))
    with pytest.raises(UnsafeFileError, match="plain names"):
        AutoDeltaModel.from_finetuned(folder, backbone)


def test_regular_expressions_that_would_never_end() -> None:
    start = time.perf_counter()
    with pytest.raises(AddressingError, match="still searching"):
        matches("[r](a|a)*b|(x+x+)+y", "a" * 60)
    peft = {"peft_type": "LORA", "target_modules": r"((\w|\w\w|\.)*)*[!?]"}
    config = AutoDeltaConfig.from_dict({"delta_type": "peft", "peft": peft})
    with pytest.raises(AddressingError, match="still searching|not found"):
        AutoDeltaModel.from_config(config, BERT.build())
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 10**400])
def test_numbers_are_finite(value: float) -> None:
    with pytest.raises(ConfigError, match="lora_alpha"):
        AutoDeltaConfig.from_dict({"delta_type": "lora", "lora_alpha": value})


# --- code and configuration that come with a checkpoint -------------------------------------------------------------------


def with_code(folder: Path, sprung: Path) -> Path:
    """A backbone whose folder brings a class of its own; importing it leaves a file."""
    folder.mkdir()
    BERT.build().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "their_own",
        "auto_map": {"AutoConfig": "code.Theirs", "AutoModelForSequenceClassification": "code.T"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(
        f"from pathlib import Path\nPath({str(sprung)!r}).touch()\n"
        "from transformers import BertConfig\n\nclass Theirs(BertConfig):\n    model_type = 'their_own'\n\nclass T:\n    pass\n"
    )
    return folder


def test_the_code_of_a_backbone_runs_only_where_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from deltaexp.lab import backbones, schema

    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    sprung = tmp_path / "sprung"
    folder = with_code(tmp_path / "theirs", sprung)
    words = ["backbone=local", "backbone.name=theirs", f"backbone.source={folder}", "task=sst2", f"task.data={tmp_path}"]
    config, _ = schema.composed(words)
    with pytest.raises(DeltaExpError, match=r"code of its own.*backbone\.trust_remote_code=true"):
        backbones.load(config.backbone, config.task)
    assert not sprung.exists()
    config, _ = schema.composed([*words, "backbone.trust_remote_code=true"])
    with suppress(Exception):  # its class is none, but its code was run
        backbones.load(config.backbone, config.task)
    assert sprung.exists()


def test_yaml_runs_no_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from deltaexp.__main__ import main

    sprung = tmp_path / "sprung"
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "theirs.yaml").write_text(f"# @package task\nname: !!python/object/apply:os.mkdir ['{sprung}']\n")
    assert main(["--config-dir", str(tmp_path), "task=theirs"]) == 2
    assert not sprung.exists()
    assert "Traceback" not in capsys.readouterr().err
