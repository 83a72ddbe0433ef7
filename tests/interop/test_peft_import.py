"""Adapters that PEFT saved, loaded as deltas: equal logits, the backbone as it was, and back to PEFT again."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models import FAMILIES, logits, same, snapshot, values
from peft_adapters import HEADS, KEYS, KNOWN, NORMS, TARGETS, TASKS, loaded_by_peft, lora, made, quiet, settings, unchecked
from safetensors.torch import load_file, save_file

from deltaexp import AutoDeltaConfig, AutoDeltaModel, HashCheck, interop
from deltaexp.errors import CheckpointError

Make = Callable[[str], peft.PeftConfig]
TOLERANCE = 2e-5
"""Of logits of up to 5, in float32."""
METHODS: dict[str, tuple[str, Make]] = {
    "lora": ("lora", lambda n: lora(n, task_type=TASKS[n])),
    "rslora_patterns": (
        "lora",
        lambda n: lora(
            n, r=3, lora_alpha=5, use_rslora=True, rank_pattern={TARGETS[n][0]: 5}, alpha_pattern={rf".*1.*{TARGETS[n][1]}": 7}
        ),
    ),
    "alpha_no_whole_number": ("lora", lambda n: lora(n, lora_alpha=2.5)),
    "dora": ("lora", lambda n: lora(n, use_dora=True)),
    "pissa": ("lora", lambda n: lora(n, init_lora_weights="pissa")),
    "olora": ("lora", lambda n: lora(n, init_lora_weights="olora")),
    "bias_lora_only": ("lora", lambda n: lora(n, bias="lora_only")),
    "bias_all": ("lora", lambda n: lora(n, bias="all")),
    "all_linear": ("lora", lambda n: lora(n, target_modules="all-linear")),
    "regex": ("lora", lambda n: lora(n, target_modules=rf".*\.1\..*{TARGETS[n][0]}")),
    "layers_to_transform": ("lora", lambda n: lora(n, layers_to_transform=[1])),
    "fan_in_fan_out": ("lora", lambda n: lora(n, fan_in_fan_out=True)),
    "head": ("lora", lambda n: lora(n, modules_to_save=[HEADS[n]])),
    "adalora": (
        "adalora",
        lambda n: peft.AdaLoraConfig(init_r=3, target_r=2, total_step=10, lora_alpha=7, target_modules=TARGETS[n]),
    ),
    "ia3": ("ia3", lambda n: peft.IA3Config(target_modules=TARGETS[n], feedforward_modules=TARGETS[n][1:])),
    "vera": ("vera", lambda n: peft.VeraConfig(r=3, target_modules=TARGETS[n])),
    "vera_by_its_seed": (
        "vera",
        lambda n: peft.VeraConfig(r=3, target_modules=TARGETS[n], save_projection=False, projection_prng_key=5),
    ),
    "loha": ("loha", lambda n: peft.LoHaConfig(r=3, alpha=5, target_modules=TARGETS[n])),
    "lokr": ("lokr", lambda n: peft.LoKrConfig(r=1, alpha=5, target_modules=TARGETS[n], decompose_both=True)),
    "ln_tuning": ("ln_tuning", lambda n: peft.LNTuningConfig(target_modules=NORMS[n])),
    "prompt": ("soft_prompt", lambda n: peft.PromptTuningConfig(num_virtual_tokens=3, task_type=TASKS[n])),
    "p_tuning": ("soft_prompt", lambda n: peft.PromptEncoderConfig(num_virtual_tokens=3, task_type=TASKS[n])),
    "prefix": ("prefix", lambda n: peft.PrefixTuningConfig(num_virtual_tokens=3, task_type=TASKS[n])),
    "prefix_projected": (
        "prefix",
        lambda n: peft.PrefixTuningConfig(
            num_virtual_tokens=3, task_type=TASKS[n], prefix_projection=True, encoder_hidden_size=5
        ),
    ),
    "lora_bias": ("peft", lambda n: lora(n, lora_bias=True)),
    "loha_patterns": ("peft", lambda n: peft.LoHaConfig(r=3, target_modules=TARGETS[n], rank_pattern={TARGETS[n][0]: 2})),
}
"""What PEFT is asked for, and the delta type that it becomes."""
NOT_IN_PEFT = {
    *(("gpt2", method) for method in ("loha", "lokr", "loha_patterns")),  # has no such layers for Conv1D
    ("gpt2", "olora"),  # fails on a Conv1D that is not square
    *(("t5", method) for method in ("prefix", "prefix_projected")),  # fails where heads x d_kv is not d_model
    *((name, "head") for name in ("gpt2", "t5")),
    *((name, "fan_in_fan_out") for name in ("llama", "bert", "t5")),  # warns, and takes it back
}
QUICK = {
    ("llama", "rslora_patterns"),
    ("bert", "head"),
    ("gpt2", "dora"),
    ("t5", "prompt"),
    ("llama", "prefix"),
    ("bert", "vera"),
}
CASES = [
    pytest.param(name, method, marks=[] if (name, method) in QUICK else pytest.mark.slow, id=f"{name}-{method}")
    for name in FAMILIES
    for method in METHODS
    if (name, method) not in NOT_IN_PEFT
]


@quiet
@pytest.mark.parametrize(("name", "method"), CASES)
def test_an_adapter_of_peft(name: str, method: str, tmp_path: Path) -> None:
    delta_type, make = METHODS[method]
    expected = made(name, make(name), tmp_path / "theirs")
    family = FAMILIES[name]
    backbone, inputs = family.build(), family.inputs()
    plain, before = logits(backbone, inputs), snapshot(backbone)
    delta_model = unchecked(tmp_path / "theirs", backbone)
    assert delta_model.hash_check is HashCheck.UNKNOWN
    assert delta_model.config.delta_type == delta_type
    assert delta_model.config.saved_with.origin == f"PEFT {peft.__version__}"
    found = logits(backbone, inputs)
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)
    assert found.shape != plain.shape or (found - plain).abs().max() > 1e-3

    # As a delta of deltaexp it has digests, and is checked.
    delta_model.save_finetuned(tmp_path / "ours")
    again = family.build()
    loaded = AutoDeltaModel.from_finetuned(tmp_path / "ours", again)
    assert loaded.hash_check is HashCheck.MATCH
    assert loaded.config.saved_with.origin == f"PEFT {peft.__version__}"
    assert torch.equal(logits(again, inputs), found)

    # Back to PEFT, which computes the same.
    interop.export(loaded, tmp_path / "back", "peft")
    torch.testing.assert_close(loaded_by_peft(name, tmp_path / "back"), expected, atol=TOLERANCE, rtol=0)

    delta_model.detach()
    for parameter, (_, required) in zip(backbone.parameters(), before[2], strict=True):
        parameter.requires_grad_(required)
    assert snapshot(backbone) == before


@quiet
@pytest.mark.parametrize("name", ["llama", pytest.param("bert", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "method", [m if m in ("BOFT", "SHIRA") else pytest.param(m, marks=pytest.mark.slow) for m in KEYS if m in KNOWN]
)
def test_any_other_method_of_peft(method: str, name: str, tmp_path: Path) -> None:
    keys = settings(method, name)
    config_class = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(keys.pop("peft_type"))]
    if "num_virtual_tokens" in keys:
        pytest.skip("prompts are tested above")
    expected = made(name, config_class(**keys), tmp_path / "theirs")
    backbone = FAMILIES[name].build()
    delta_model = unchecked(tmp_path / "theirs", backbone)
    torch.testing.assert_close(logits(backbone, FAMILIES[name].inputs()), expected, atol=TOLERANCE, rtol=0)
    interop.export(delta_model, tmp_path / "back", "peft")
    torch.testing.assert_close(loaded_by_peft(name, tmp_path / "back"), expected, atol=TOLERANCE, rtol=0)
    if delta_model.config.delta_type == "peft":
        theirs, back = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("theirs", "back"))
        assert {n: t for n, t in theirs.items() if "base_layer" not in n}.keys() == back.keys()
        assert all(torch.equal(theirs[tensor], back[tensor]) for tensor in back)


@quiet
@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_lora_on_embeddings(name: str, tmp_path: Path) -> None:
    table = {"llama": "embed_tokens", "gpt2": "wte"}[name]
    expected = made(name, lora(name, target_modules=[table, TARGETS[name][0]]), tmp_path)
    backbone = FAMILIES[name].build()
    unchecked(tmp_path, backbone)
    torch.testing.assert_close(logits(backbone, FAMILIES[name].inputs()), expected, atol=TOLERANCE, rtol=0)


@quiet
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning")  # PEFT's, about its own
def test_ranks_that_adalora_gave_up(tmp_path: Path) -> None:
    made("llama", peft.AdaLoraConfig(init_r=3, target_r=2, total_step=10, target_modules=["q_proj"]), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors, kept = load_file(file), [True, False, True]
    for name, tensor in tensors.items():
        tensors[name] = (tensor[:, kept] if "lora_B" in name else tensor[kept]).contiguous()
    save_file(tensors, file)
    edit(tmp_path, rank_pattern={f"model.layers.{i}.self_attn.q_proj.lora_E": kept for i in (0, 1)})
    backbone, inputs = FAMILIES["llama"].build(), FAMILIES["llama"].inputs()
    delta_model = unchecked(tmp_path, backbone)
    torch.testing.assert_close(logits(backbone, inputs), loaded_by_peft("llama", tmp_path), atol=2e-6, rtol=0)
    assert delta_model.attachments[0].layer.lora_mask.flatten().tolist() == [1, 0, 1]


@quiet
def test_half_precision_is_for_the_file(tmp_path: Path) -> None:
    made("bert", lora("bert", modules_to_save=["classifier"]), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({name: tensor.to(torch.bfloat16) for name, tensor in load_file(file).items()}, file)
    backbone = FAMILIES["bert"].build()
    delta_model = unchecked(tmp_path, backbone)
    assert {tensor.dtype for tensor in delta_model.delta_tensors().values()} == {torch.float32}
    expected = loaded_by_peft("bert", tmp_path)
    torch.testing.assert_close(logits(backbone, FAMILIES["bert"].inputs()), expected, atol=2e-6, rtol=0)


@quiet
def test_a_pickle_with_tensors_only(tmp_path: Path) -> None:
    expected = made("llama", lora("llama"), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    torch.save(load_file(file), tmp_path / "adapter_model.bin")
    file.unlink()
    backbone = FAMILIES["llama"].build()
    unchecked(tmp_path, backbone)
    torch.testing.assert_close(logits(backbone, FAMILIES["llama"].inputs()), expected, atol=2e-6, rtol=0)


@quiet
def test_the_config_alone(tmp_path: Path) -> None:
    made("bert", lora("bert", use_dora=True, lora_dropout=0.1, revision="abc"), tmp_path)
    edit(tmp_path, base_model_name_or_path="/home/somebody/models/bert-tiny")
    config = AutoDeltaConfig.from_finetuned(tmp_path)
    assert (config.delta_type, config.lora_r, config.lora_dora, config.lora_dropout) == ("lora", 2, True, 0.1)
    assert sorted(config.modified_modules) == ["query", "value"]
    assert config.saved_with.backbone_checkpoint_name == "bert-tiny"
    assert config.saved_with.backbone_revision == "abc"


def edit(folder: Path, **keys: Any) -> None:
    """Change keys of an adapter's config."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


@quiet
def test_two_adapters_beside_each_other(tmp_path: Path) -> None:
    family = FAMILIES["llama"]
    backbone, inputs = family.build(), family.inputs()
    first = made("llama", lora("llama"), tmp_path / "a")
    second = made("llama", peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]), tmp_path / "b")
    plain = logits(backbone, inputs)
    one = unchecked(tmp_path / "a", backbone)
    kept = values(one.delta_tensors())
    one.detach()
    other = unchecked(tmp_path / "b", backbone)
    torch.testing.assert_close(logits(backbone, inputs), second, atol=2e-6, rtol=0)
    other.detach()
    one.attach()
    torch.testing.assert_close(logits(backbone, inputs), first, atol=2e-6, rtol=0)
    assert same(values(one.delta_tensors()), kept)
    one.detach()
    assert torch.equal(logits(backbone, inputs), plain)


@quiet
def test_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = made("llama", lora("llama"), tmp_path / "lora")
    made("llama", peft.HRAConfig(r=2, target_modules=["q_proj"]), tmp_path / "hra")
    monkeypatch.setitem(sys.modules, "peft", None)
    backbone, inputs = FAMILIES["llama"].build(), FAMILIES["llama"].inputs()
    delta_model = unchecked(tmp_path / "lora", backbone)
    torch.testing.assert_close(logits(backbone, inputs), expected, atol=TOLERANCE, rtol=0)
    interop.export(delta_model, tmp_path / "back", "peft")
    first, second = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("lora", "back"))
    assert same(first, second)
    with pytest.raises(CheckpointError, match="PEFT's HRA.*pip install.*Without PEFT these can be loaded: ADALORA"):
        AutoDeltaModel.from_finetuned(tmp_path / "hra", backbone_model=FAMILIES["llama"].build())
