"""``deltaexp plan``: what a run would train and take, from the backbone's config alone."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from models import slow_but

from deltaexp import AutoDeltaModel, registry
from deltaexp.__main__ import main
from deltaexp.errors import AddressingError, ConfigError, DeltaExpError
from deltaexp.lab import backbones, blueprint, plan, schema, speeding
from deltaexp.lab.costs import Sizes
from deltaexp.lab.estimate import CASTS, WEIGHTS
from deltaexp.lab.plan import Plan

SMALL = ["trainer.batch_size=4", "trainer.eval_batch_size=4", "task.max_source_length=16", "task.max_target_length=8"]
KEYS = {"prefix": ["embed_dim=8", "mid_dim=8"], "soft_prompt": ["soft_token_num=4"]}


@pytest.fixture(scope="module")
def configs(backbone_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders that hold the backbones' configs and nothing else."""
    root = tmp_path_factory.mktemp("configs")
    for name, folder in backbone_folders.items():
        (root / name).mkdir()
        shutil.copy(folder / "config.json", root / name)
    return {name: root / name for name in backbone_folders}


def words(folder: Path, *more: str) -> list[str]:
    task = ["task=sst2", "task.data=nowhere"] if folder.name in ("bert", "small_bert") else ["task=dates"]
    return ["backbone=local", f"backbone.source={folder}", "backbone.name=mine", *task, *SMALL, *more]


def planned(folder: Path, *more: str, sizes: Sizes | None = None) -> Plan:
    return plan.make(*schema.composed(words(folder, *more)), sizes)


@pytest.mark.parametrize("delta_type", slow_but(registry.known(), ("lora",)))
def test_every_type_without_weights(delta_type: str, configs: dict[str, Path], backbone_folders: dict[str, Path]) -> None:
    keys = KEYS.get(delta_type, [])
    found = planned(configs["t5"], f"delta_type={delta_type}", *keys)
    assert not found.checkpoint.here
    config, delta_config = schema.composed(words(backbone_folders["t5"], f"delta_type={delta_type}", *keys))
    backbone = backbones.load(config.backbone, config.task)
    delta_model = AutoDeltaModel.from_config(delta_config, backbone_model=backbone.model)
    delta_model.freeze_module(exclude=[*delta_config.unfrozen_modules, *backbone.new])
    counts = delta_model.counts()
    assert (found.parameters("trainable"), found.parameters("saved")) == (counts["trainable"], counts["delta"])
    assert found.parts["the backbone's own"]["total"] == counts["backbone"]
    assert {pattern: sum(alike.count for alike in alikes) for pattern, alikes in found.patterns.items()} == {
        pattern: len(names) for pattern, names in delta_model.targets.items()
    }
    for memory in found.memory.values():
        assert memory.gradients == 4 * counts["trainable"] - 4 * idle(delta_model)
        assert sum(memory.training.values()) <= memory.peak
    assert set(found.memory) == {"cpu", "gpu"}
    assert found.flops["step"] == found.flops["forward"] + found.flops["backward"] > 0
    assert (found.flops["backward"] == 0) == (delta_type == "none")


def idle(delta_model: AutoDeltaModel) -> int:
    """Return how many trainable parameters get no gradient in a step."""
    if not delta_model.trainable_parameters():
        return 0
    ids = torch.arange(8).reshape(1, 8)
    delta_model.backbone_model(input_ids=ids, labels=ids).loss.backward()
    return sum(p.numel() for p in delta_model.trainable_parameters().values() if p.grad is None)


def test_only_the_config_is_read(configs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", refuse)
    assert planned(configs["llama"]).patterns["attn.q"][0] == plan.Alike("model.layers.*.self_attn.q_proj", 2, "32 -> 32")


@pytest.mark.slow
def test_a_new_head_is_told_as_in_a_run(configs: dict[str, Path], backbone_folders: dict[str, Path]) -> None:
    config, _ = schema.composed(words(backbone_folders["bert"]))
    loaded = backbones.load(config.backbone, config.task)
    assert blueprint.make(config.backbone, config.task).new == loaded.new == ["classifier"]
    found = planned(configs["bert"])
    assert found.new == loaded.new
    assert found.parts["new in the backbone"] == {"total": 66, "trainable": 66, "saved": 66}
    for name in ("gpt2", "llama", "t5"):  # a head for classes beside the language model that was saved
        config, _ = schema.composed(words(backbone_folders[name], "task=sst2", "task.data=nowhere", "task.answer=head"))
        assert blueprint.make(config.backbone, config.task).new == backbones.load(config.backbone, config.task).new != []


def test_a_config_that_names_no_class(configs: dict[str, Path], tmp_path: Path) -> None:
    values = json.loads((configs["bert"] / "config.json").read_text("utf-8"))
    del values["architectures"]
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text(json.dumps(values))
    found = planned(tmp_path / "bert")
    assert found.new == ["classifier"]
    assert any("does not say which class" in remark for remark in found.remarks)


@pytest.mark.parametrize(
    ("typed", "error", "told"),
    [
        ("modified_modules=[SelfAttention.qq]", AddressingError, "'SelfAttention.q'"),
        ("unfrozen_modules=[deltas,final_layer_nrom]", AddressingError, "final_layer_norm"),
        ("trainer.learning_rates={lro: 1e-3}", ConfigError, "lora"),
        ("layers=7", AddressingError, "2 blocks"),
    ],
)
def test_a_typo_and_its_price(
    typed: str, error: type[DeltaExpError], told: str, backbone_folders: dict[str, Path], configs: dict[str, Path]
) -> None:
    with pytest.raises(error, match=r"(?s)nothing was loaded|Nothing was loaded") as caught:
        planned(backbone_folders["t5"], typed)
    assert told in str(caught.value)
    assert "reading" in str(caught.value)
    with pytest.raises(error, match="downloading"):
        planned(configs["t5"], typed)


@pytest.mark.slow
def test_what_may_not_be_meant_is_remarked(configs: dict[str, Path]) -> None:
    found = planned(configs["t5"], "modified_modules=['[r]0.layer.0.SelfAttention.q']", "exclude_modules=[dense_relu]")
    assert any("1 of 2 blocks of encoder.block" in remark for remark in found.remarks)
    assert any("'dense_relu'" in remark for remark in found.remarks)
    assert not planned(configs["t5"], "layers=0", "modified_modules=[attn.q]").remarks


@pytest.mark.slow
def test_checkpoints_of_activations_cost_flops_and_save_memory(configs: dict[str, Path]) -> None:
    kept, again = (planned(configs["llama"], f"trainer.gradient_checkpointing={on}") for on in ("false", "true"))
    assert again.memory["cpu"].saved_for_backward < kept.memory["cpu"].saved_for_backward
    assert again.flops["backward"] > kept.flops["backward"]
    assert again.flops["forward"] == kept.flops["forward"]


@pytest.mark.slow
@pytest.mark.parametrize("multiplies", [True, False])
def test_what_speed_chooses_is_told(multiplies: bool, configs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speeding, "multiplies_bf16", lambda: multiplies)
    off, auto = (planned(configs["llama"], f"trainer.speed={speed}", "trainer.precision=auto") for speed in ("off", "auto"))
    before, after = off.memory["cpu"], auto.memory["cpu"]
    assert (before.precision, after.precision) == ("fp32", "bf16" if multiplies else "fp32")
    assert any("on the CPU of this machine: " + after.precision in remark for remark in auto.remarks)
    assert (after.saved_for_backward < before.saved_for_backward) == multiplies
    vocabulary = json.loads((configs["llama"] / "config.json").read_text("utf-8"))["vocab_size"]
    # Of 2 blocks: q and o of 32 x 32, k and v of 32 x 16, three of the feed-forward of 32 x 64; and the head.
    assert after.training.get(CASTS, 0) == (2 * (2 * (2 * 1024 + 2 * 512 + 3 * 2048) + 32 * vocabulary) if multiplies else 0)
    assert any("on a GPU: bf16" in remark for remark in auto.remarks)
    assert auto.memory["gpu"].training[CASTS] == 2 * (2 * (2 * 1024 + 2 * 512 + 3 * 2048) + 32 * vocabulary)
    assert CASTS not in off.memory["gpu"].training


@pytest.mark.slow
def test_quantised_weights(configs: dict[str, Path]) -> None:
    pytest.importorskip("bitsandbytes")
    plain, packed = planned(configs["llama"]), planned(configs["llama"], "backbone.quantization=bnb_4bit")
    # Of 2 blocks: q and o of 32 x 32, k and v of 32 x 16, three of the feed-forward of 32 x 64.
    matrices = 2 * (2 * 1024 + 2 * 512 + 3 * 2048)
    scales = 2 * (2 * (16 + 4) + 2 * (8 + 4) + 3 * (32 + 4))
    saved = 4 * matrices - matrices // 2 - scales
    assert plain.memory["gpu"].training[WEIGHTS] - packed.memory["gpu"].training[WEIGHTS] == saved
    with pytest.raises(AddressingError, match="held quantised"):
        planned(configs["llama"], "backbone.quantization=bnb_4bit", "delta_type=full")


@pytest.mark.slow
def test_the_dtype_of_the_checkpoint(configs: dict[str, Path]) -> None:
    half, auto = (planned(configs["llama"], f"backbone.dtype={dtype}") for dtype in ("bfloat16", "auto"))
    assert half.memory["cpu"].training[WEIGHTS] < auto.memory["cpu"].training[WEIGHTS]  # float32 was saved


@pytest.mark.slow
def test_sizes_and_steps(configs: dict[str, Path]) -> None:
    longest = planned(configs["llama"], "trainer.max_steps=-1", "task.train_rows=null")
    assert longest.batch == {"rows": 4, "length": 24}  # source and target in one sequence
    assert longest.steps is None
    found = planned(
        configs["llama"], "trainer.max_steps=-1", "trainer.epochs=2", "trainer.gradient_accumulation_steps=2",
        sizes=Sizes(length=6, target_length=4, rows=100),
    )  # fmt: skip
    assert (found.batch, found.steps) == ({"rows": 4, "length": 10}, 26)
    assert found.flops["run"] == 26 * found.flops["step"]
    assert found.memory["cpu"].saved_for_backward < longest.memory["cpu"].saved_for_backward
    with pytest.raises(ConfigError, match="300 tokens"):
        planned(configs["llama"], sizes=Sizes(length=300))


@pytest.mark.slow
def test_the_command(configs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *words(configs["t5"]), "json=true", "length=8"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["batch"] == {"rows": 4, "length": 8, "target_length": 8}
    assert found["memory"]["cpu"]["peak"] > 0
    assert main(["plan", *words(configs["t5"])]) == 0
    text = capsys.readouterr().out
    for part in ("encoder.block.*.layer.*.SelfAttention.q", "2 of 2 of encoder.block", "to be downloaded", "optimizer states",
                 "activations saved for backward", "A step computes", "notice a typo"):  # fmt: skip
        assert part in text
    assert main(["plan", *words(configs["t5"]), "length=none"]) == 2
    assert "whole number" in capsys.readouterr().err
    assert main(["plan", *words(configs["t5"]), "lora_rank=4"]) == 2
    assert main(["plan", *words(configs["t5"]), "modified_modules=[nowhere]"]) == 1
    assert "matches no module" in capsys.readouterr().err
