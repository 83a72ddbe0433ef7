"""What trainer.speed=auto chooses, and that a run with it is one like any other."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import small
import torch
from test_recovery import SMALL, Interrupt, digests, go, losses
from torch import nn
from transformers import AttentionInterface

from deltaexp.errors import ConfigError, RunError
from deltaexp.lab import schema, speeding, training
from deltaexp.lab.run import run
from deltaexp.lab.sharing import Shared


@pytest.fixture
def bf16(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A CPU with instructions for products of bf16; others compute the same, slowly."""
    monkeypatch.setattr(speeding, "multiplies_bf16", lambda: True)
    return monkeypatch


def interrupted(patch: pytest.MonkeyPatch, folder: Path, *words: str) -> None:
    """Do a run up to its fifth step."""
    build = training.build

    def interrupting(*args: Any) -> Any:
        trainer = build(*args)
        trainer.add_callback(Interrupt(5, KeyboardInterrupt()))
        return trainer

    with patch.context() as patched:
        patched.setattr(training, "build", interrupting)
        with pytest.raises(KeyboardInterrupt):
            go(folder, *words)


def chosen(*overrides: str, attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> speeding.Choice:
    model: Any = nn.Linear(2, 2, dtype=dtype)
    model.config = SimpleNamespace(_attn_implementation=attention)
    return speeding.choose(schema.composed(["trainer.cpu=true", *overrides])[0], model)


def test_off_is_the_default_and_chooses_nothing(bf16: pytest.MonkeyPatch) -> None:
    choice = chosen()
    assert choice.name == "fp32, adamw"
    assert not choice.reasons
    with pytest.raises(ConfigError, match=r"trainer\.speed.*Did you mean 'auto'"):
        schema.composed(["trainer.speed=autoo"])


def test_auto_takes_what_the_cpu_has(bf16: pytest.MonkeyPatch) -> None:
    bf16.setattr(speeding.memory, "reusable", lambda: True)
    choice = chosen("trainer.speed=auto")
    assert choice.name == "bf16, adamw_fused, kept casts, attention by products"
    assert choice.recorded()["asked"] == "auto"
    assert choice.recorded()["kept_memory"]
    assert len(choice.recorded()["reasons"]) == 5
    bf16.undo()
    bf16.setattr(speeding, "multiplies_bf16", lambda: False)
    bf16.setenv("MALLOC_TRIM_THRESHOLD_", "131072")  # what is set is kept
    choice = chosen("trainer.speed=auto")
    assert not choice.memory
    assert choice.name == "fp32, adamw_fused"
    assert "no instructions" in choice.reasons[0]


@pytest.mark.parametrize(
    ("words", "options", "name"),
    [
        (["trainer.precision=fp32"], {}, "fp32, adamw_fused"),
        (["trainer.optimizer=sgd", "trainer.learning_rate=1"], {}, "bf16, sgd, kept casts, attention by products"),
        (["backbone.attention=sdpa"], {}, "bf16, adamw_fused, kept casts"),
        ([], {"attention": "eager"}, "bf16, adamw_fused, kept casts"),
        (["trainer.compile=true"], {}, "bf16, adamw_fused"),
        (["backbone.dtype=float16"], {"dtype": torch.float16}, "fp32, adamw_fused"),
    ],
)
def test_what_is_set_is_kept(bf16: pytest.MonkeyPatch, words: list[str], options: dict[str, Any], name: str) -> None:
    assert chosen("trainer.speed=auto", *words, **options).name == name


def test_several_processes_are_left_alone(bf16: pytest.MonkeyPatch) -> None:
    bf16.setattr(speeding.processes, "count", lambda: 2)
    choice = chosen("trainer.speed=auto")
    assert choice.name == "fp32, adamw"
    assert "several processes" in choice.reasons[0]


@pytest.mark.slow
def test_a_run_with_auto(bf16: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sdpa = AttentionInterface._global_mapping["sdpa"]
    words = [*SMALL, "trainer.speed=auto"]
    plain = go(tmp_path / "off", *SMALL)
    shared = Shared()
    config, delta = schema.composed(words)
    fast, again = (run(config, delta, tmp_path / name, shared=shared) for name in ("auto", "again"))
    assert shared.loads == 1  # the backbone is what it was
    assert digests(fast.folder) == digests(again.folder)
    assert AttentionInterface._global_mapping["sdpa"] is sdpa
    found = fast.results
    assert found["precision"] == "bf16"
    assert found["speed"]["kept_casts"]
    assert found["speed"]["attention_by_products"]
    assert found["verification"]["hash"] == "match"
    assert found["base_sha256"] == plain.results["base_sha256"]
    # The same learning to what the rounding of bf16, 0.4 % of a number, makes of steps at a large learning rate, which grows.
    logged = [[entry["loss"] for entry in losses(outcome) if "loss" in entry] for outcome in (fast, plain)]
    assert len(logged[0]) > 1
    assert logged[0] == pytest.approx(logged[1], rel=0.01)
    assert found["metrics"]["after"] == pytest.approx(plain.results["metrics"]["after"], rel=0.1)

    # It goes on in the same way, or not at all.
    interrupted(bf16, tmp_path / "cut", *words)
    assert AttentionInterface._global_mapping["sdpa"] is sdpa
    bf16.setattr(speeding, "multiplies_bf16", lambda: False)
    with pytest.raises(RunError, match="changed since it began, from bf16"):
        go(tmp_path / "cut", *words, "resume=true")
    bf16.setattr(speeding, "multiplies_bf16", lambda: True)
    assert digests(go(tmp_path / "cut", *words, "resume=true").folder) == digests(fast.folder)


@pytest.mark.slow
def test_a_classifier_goes_on_in_the_same_way(bf16: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its last block computes one token, and other maps together than the blocks below."""
    source = small.bert(tmp_path / "bert")
    settings = json.loads((source / "config.json").read_text())
    settings |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (source / "config.json").write_text(json.dumps(settings))
    data = small.table(tmp_path / "rows", [{"sentence": " ".join(small.WORDS[n % 7 : 9]), "label": n % 2} for n in range(40)])
    words = [
        "backbone=local", f"backbone.source={source}", "task=sst2", f"task.data={data}", "lora_dropout=0",
        "modified_modules=[attn.q,attn.k,attn.v,ff.w1]", "trainer.speed=auto", "trainer.cpu=true", "trainer.progress=false",
        "trainer.batch_size=8", "trainer.max_steps=9", "trainer.save_every=2", "trainer.learning_rate=1e-2",
    ]  # fmt: skip
    whole = go(tmp_path / "whole", *words)
    assert "computes no other" in " ".join(whole.results["shortcuts"]["told"])
    interrupted(bf16, tmp_path / "cut", *words)
    assert digests(go(tmp_path / "cut", *words, "resume=true").folder) == digests(whole.folder)


def test_denormal_numbers_are_zero_within_a_context_only() -> None:
    small = torch.full((8,), 1e-39)
    if not torch.set_flush_denormal(False):
        pytest.skip("this CPU cannot flush denormal numbers")

    @speeding.without_denormals()
    def inside() -> torch.Tensor:
        return small * 1

    assert (small * 1 > 0).all()
    with speeding.without_denormals():
        assert not (small * 1).any()
        assert not inside().any()
        assert not (small * 1).any()
    assert (small * 1 > 0).all()
    assert (torch.full((8,), 1e-37) * 1 > 0).all()
