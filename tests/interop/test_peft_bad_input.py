"""Adapters that are damaged, hostile or another backbone's: one clear error each, and the backbone as it was."""

from __future__ import annotations

import json
import os
import pickle
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from models import FAMILIES, snapshot
from peft_adapters import TARGETS, lora, made, quiet
from safetensors.torch import load_file, save_file

from deltaexp import AutoDeltaConfig, AutoDeltaModel
from deltaexp.errors import (
    CheckpointError,
    DamagedFileError,
    DeltaExpError,
    EmptyTensorError,
    ExtraTensorError,
    MissingFileError,
    MissingTensorError,
    TensorDtypeError,
    TensorError,
    TensorShapeError,
    UnsafeFileError,
)

A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
B = A.replace("lora_A", "lora_B")
Damage = Callable[[dict[str, Any], dict[str, torch.Tensor]], None]


def changed(key: str, value: Any) -> Damage:
    """Change a key of the config."""
    return lambda values, tensors: values.update({key: value})


def replaced(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    """Change a tensor."""
    return lambda values, tensors: tensors.update({name: change(tensors[name])})


def renamed(old: str, new: str) -> Damage:
    """Give a tensor another name."""
    return lambda values, tensors: tensors.update({new: tensors.pop(old)})


def added(name: str, tensor: torch.Tensor) -> Damage:
    """Add a tensor."""
    return lambda values, tensors: tensors.update({name: tensor})


LORA: dict[str, tuple[Damage, type[DeltaExpError], str]] = {
    "missing_a": (lambda v, t: t.pop(A), MissingTensorError, "lacks .*q_proj.lora_A.weight"),
    "missing_module": (lambda v, t: (t.pop(A), t.pop(B)), MissingTensorError, "no tensors for model.layers.0.self_attn.q_proj"),
    "extra": (added("base_model.model.model.norm.weight", torch.ones(16) * 2), ExtraTensorError, "config does not own"),
    "extra_nowhere": (added("base_model.model.nothing.weight", torch.ones(16)), ExtraTensorError, "has no place for"),
    "renamed": (renamed(A, "__class__"), ExtraTensorError, "'__class__'"),
    "traversal": (renamed(A, A.replace("q_proj", "../q_proj")), CheckpointError, "no module"),
    "other_module": (renamed(A, A.replace("self_attn", "attention")), CheckpointError, "has no module"),
    "shape_in": (replaced(A, lambda t: t[:, 1:].contiguous()), TensorShapeError, "does not fit this backbone"),
    "shape_out": (replaced(B, lambda t: t[1:].contiguous()), TensorShapeError, "does not fit this backbone"),
    "rank": (replaced(A, lambda t: t[:1].contiguous()), TensorShapeError, "tensors of rank 1, 2"),
    "flat": (replaced(A, lambda t: t.flatten()), TensorError, "q_proj"),
    "scalar": (replaced(A, lambda t: t.sum()), TensorShapeError, "single number"),
    "empty": (replaced(A, lambda t: t[:0]), EmptyTensorError, "without elements"),
    "integers": (replaced(A, lambda t: t.to(torch.int8)), TensorDtypeError, "no floating-point numbers"),
    "magnitude": (added(A.replace("lora_A.weight", "lora_magnitude_vector"), torch.ones(16)), TensorShapeError, "use_dora"),
    "dora": (changed("use_dora", True), MissingTensorError, "lora_magnitude_vector"),
    "huge_r": (changed("r", 10**9), TensorShapeError, "tensors of rank 2, where its config says 1000000000"),
    "huge_pattern": (changed("rank_pattern", {"q_proj": 10**12}), TensorShapeError, "of rank 2"),
    "r_text": (changed("r", "8"), CheckpointError, "'r' .* must be a whole number"),
    "r_negative": (changed("r", -1), CheckpointError, "whole number of at least 1"),
    "alpha_nan": (changed("lora_alpha", float("nan")), CheckpointError, "'lora_alpha' .* must be a number"),
    "dropout": (changed("lora_dropout", 7), CheckpointError, "lora_dropout is 7"),
    "slow_pattern": (changed("rank_pattern", {"(a+)+b": 2}), UnsafeFileError, "may take for ever"),
    "bad_pattern": (changed("alpha_pattern", {"(": 2}), CheckpointError, "regular expression"),
    "pattern_list": (changed("rank_pattern", [1]), CheckpointError, "mapping of patterns"),
    "targets_number": (changed("target_modules", 7), CheckpointError, "list of texts"),
    "targets_more": (changed("target_modules", [*TARGETS["llama"], "k_proj"]), MissingTensorError, "k_proj"),
    "head_asked": (changed("modules_to_save", ["lm_head"]), MissingTensorError, "lm_head.weight"),
    "method": (changed("peft_type", "LORAX"), CheckpointError, "no peft_type 'LORAX'. Did you mean 'LORA'"),
    "method_number": (changed("peft_type", 3), DamagedFileError, "names no peft_type"),
    "method_elsewhere": (changed("peft_type", "XLORA"), CheckpointError, "PEFT's XLORA, which cannot be loaded here"),
    "method_other": (changed("peft_type", "IA3"), MissingTensorError, "no tensors of IA3"),
    "init": (changed("init_lora_weights", "loftq"), CheckpointError, "init_lora_weights='loftq'"),
    "unusual": (changed("alora_invocation_tokens", [1]), CheckpointError, "'alora_invocation_tokens'"),
    "bias_unknown": (added("base_model.model.model.layers.0.mlp.up_proj.weight", torch.zeros(24, 16)), ExtraTensorError, "own"),
}


def put(folder: Path, damage: Damage) -> None:
    """Damage an adapter."""
    config, file = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    values, tensors = json.loads(config.read_text()), load_file(file)
    damage(values, tensors)
    config.write_text(json.dumps(values))
    save_file(tensors, file)


def refused(folder: Path, kind: type[DeltaExpError], message: str, name: str = "llama") -> None:
    """Load an adapter, which must be refused without a trace."""
    backbone = FAMILIES[name].build()
    before = snapshot(backbone)
    with pytest.raises(kind, match=message):
        AutoDeltaModel.from_finetuned(folder, backbone_model=backbone)
    assert snapshot(backbone) == before
    assert "_deltaexp_owned" not in vars(backbone)


@quiet
@pytest.mark.parametrize("fault", LORA)
def test_a_damaged_lora(fault: str, tmp_path: Path) -> None:
    made("llama", lora("llama"), tmp_path)
    damage, kind, message = LORA[fault]
    put(tmp_path, damage)
    refused(tmp_path, kind, message)


OTHERS: dict[str, tuple[Callable[[], peft.PeftConfig], Damage, type[DeltaExpError], str]] = {
    "prompt_huge": (
        lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        changed("num_virtual_tokens", 10**12),
        TensorShapeError,
        "shape \\[3, 16\\], where 1000000000000 x 1",
    ),
    "prefix_huge": (
        lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        changed("num_virtual_tokens", 10**12),
        TensorShapeError,
        "rows are due",
    ),
    "prefix_blocks": (
        lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        changed("num_layers", 7),
        TensorShapeError,
        "none for 2 attentions",
    ),
    "adalora_huge": (
        lambda: peft.AdaLoraConfig(init_r=3, target_r=2, total_step=10, target_modules=TARGETS["llama"]),
        changed("init_r", 10**9),
        TensorShapeError,
        "where init_r is 1000000000",
    ),
    "vera_huge": (
        lambda: peft.VeraConfig(r=3, target_modules=TARGETS["llama"], save_projection=False),
        changed("r", 10**9),
        TensorShapeError,
        "of rank 3, where its config says 1000000000",
    ),
    "vera_without_matrices": (
        lambda: peft.VeraConfig(r=3, target_modules=TARGETS["llama"], save_projection=False),
        changed("save_projection", True),
        MissingTensorError,
        "vera_A",
    ),
    "loha_huge": (
        lambda: peft.LoHaConfig(r=3, target_modules=TARGETS["llama"]),
        changed("r", 10**9),
        TensorShapeError,
        "of rank 3",
    ),
    "ia3_column": (
        lambda: peft.IA3Config(target_modules=TARGETS["llama"], feedforward_modules=["down_proj"]),
        changed("feedforward_modules", []),
        TensorShapeError,
        "must be a column",
    ),
    "hra_huge": (
        lambda: peft.HRAConfig(r=2, target_modules=TARGETS["llama"]),
        changed("r", 10**9),
        UnsafeFileError,
        "r=1000000000, and no side of its tensors",
    ),
    "hra_slow_pattern": (
        lambda: peft.HRAConfig(r=2, target_modules=TARGETS["llama"]),
        changed("target_modules", "(.*a)*(.*b)+$"),
        UnsafeFileError,
        "may take for ever",
    ),
    "hra_key": (
        lambda: peft.HRAConfig(r=2, target_modules=TARGETS["llama"]),
        changed("rank", 2),
        CheckpointError,
        "no key 'rank'",
    ),
    "hra_targets": (
        lambda: peft.HRAConfig(r=2, target_modules=TARGETS["llama"]),
        changed("target_modules", ["nothing"]),
        CheckpointError,
        "nothing",
    ),
    "hra_more": (
        lambda: peft.HRAConfig(r=2, target_modules=TARGETS["llama"]),
        changed("target_modules", [*TARGETS["llama"], "k_proj"]),
        MissingTensorError,
        "k_proj",
    ),
}


@quiet
@pytest.mark.parametrize("fault", OTHERS)
def test_another_damaged_adapter(fault: str, tmp_path: Path) -> None:
    config, damage, kind, message = OTHERS[fault]
    made("llama", config(), tmp_path)
    put(tmp_path, damage)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(tmp_path, kind, message)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 200_000  # KiB: nothing of that size was made


@quiet
@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_an_adapter_of_another_backbone(name: str, tmp_path: Path) -> None:
    made("llama", lora("llama"), tmp_path)
    refused(tmp_path, CheckpointError, "has no module.*the backbone it was trained on", name)


@quiet
def test_a_prompt_for_another_width(tmp_path: Path) -> None:
    made("llama", peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), tmp_path)
    put(tmp_path, lambda values, tensors: tensors.update(prompt_embeddings=torch.zeros(3, 8)))
    refused(tmp_path, TensorShapeError, "does not fit this backbone")


@quiet
@pytest.mark.parametrize("keep", [0, 7, 100, 0.5, 0.99])
def test_a_truncated_file(keep: float, tmp_path: Path) -> None:
    made("llama", lora("llama"), tmp_path)
    for name, message in (("adapter_model.safetensors", "read as safetensors"), ("adapter_config.json", "not valid JSON")):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: int(keep if keep >= 7 else keep * len(whole))])
        refused(tmp_path, DamagedFileError, message)
        (tmp_path / name).write_bytes(whole)


@quiet
def test_a_missing_file(tmp_path: Path) -> None:
    made("llama", lora("llama"), tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    refused(tmp_path, MissingFileError, "no adapter_model.safetensors")


def test_a_config_that_is_no_object(tmp_path: Path) -> None:
    for text in ("[]", "3", '{"r": 8}', "[" * 100_000):
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(DamagedFileError, match="adapter_config.json"):
            AutoDeltaConfig.from_finetuned(tmp_path)


class Hostile:
    """What runs a command where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.mark),)


@quiet
def test_a_pickle_that_wants_more_than_tensors(tmp_path: Path) -> None:
    made("llama", lora("llama"), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    file.unlink()
    mark = tmp_path / "mark"
    for payload in ({**tensors, "more": Hostile(mark)}, [tensors], {"a": 3}):
        torch.save(payload, tmp_path / "adapter_model.bin")
        refused(tmp_path, UnsafeFileError, "adapter_model.bin")
    (tmp_path / "adapter_model.bin").write_bytes(pickle.dumps(Hostile(mark)))
    refused(tmp_path, UnsafeFileError, "nothing else in a pickle is ever")
    assert not mark.exists()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    folder = tmp_path_factory.mktemp("whole")
    made("llama", lora("llama"), folder)
    return (folder / "adapter_config.json").read_bytes(), (folder / "adapter_model.safetensors").read_bytes()


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**18), 10**18),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers(), max_size=3),
)


@quiet
@pytest.mark.filterwarnings("ignore:.*right backbone is unknown:UserWarning")
@hypothesis_settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
@given(data=st.data())
def test_random_changes(data: st.DataObject, whole: tuple[bytes, bytes], tmp_path: Path) -> None:
    config, tensors = json.loads(whole[0]), bytearray(whole[1])
    for key in data.draw(st.lists(st.sampled_from(sorted(config)), max_size=2), label="keys"):
        config[key] = data.draw(JUNK, label=key)
    header = int.from_bytes(tensors[:8], "little")
    for place in data.draw(st.lists(st.integers(0, header + 7), max_size=2), label="bytes"):
        tensors[place] = data.draw(st.integers(0, 255))
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "adapter_model.safetensors").write_bytes(tensors)
    backbone = FAMILIES["llama"].build()
    before = snapshot(backbone)
    try:
        AutoDeltaModel.from_finetuned(tmp_path, backbone_model=backbone)
    except DeltaExpError:
        assert snapshot(backbone) == before
