"""Whole runs on a CUDA GPU."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import small
import torch
from safetensors.torch import load_file
from test_joint import QUIET, TOGETHER, close, team, with_head
from test_joint import go as go_as
from test_recovery import SMALL, go, losses
from test_speeding import interrupted
from transformers import TrainerCallback

from deltaexp.__main__ import main
from deltaexp.checkpoint import WEIGHTS
from deltaexp.lab import joint_step, sharing, training
from deltaexp.lab.run import Outcome
from deltaexp.lab.sweeping import record

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU"),
    # The thread of the backward pass finds the context by itself, and tells of it once.
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS, but there was no current CUDA context"),
]

FULL = "trainer.precision=fp32"
HALF = 0.05
"""By how much losses may differ that were computed in bfloat16, in a few steps."""
SENSITIVE = {"prefix": 0.02, "full": 0.1}
"""By how much they may differ where a few steps make much of rounding: on the CPU it is a tenth, or a quarter, of this."""


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a BERT encoder without dropout."""
    folder = tmp_path_factory.mktemp("calm") / "bert"
    return small.bert(folder, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """A run on the CPU."""
    return go(tmp_path_factory.mktemp("cpu") / "run", *SMALL, "trainer.log_every=1", "trainer.cpu=true")


def logged(outcome: Outcome) -> list[float]:
    found = [entry["loss"] for entry in losses(outcome) if "loss" in entry]
    assert len(found) > 1
    return found


def check_replays(results: dict[str, Any]) -> None:
    """Check that all steps were CUDA graphs, where these are chosen."""
    if results["speed"]["asked"] == "auto":
        replays = results["speed"]["replays"]
        assert results["speed"]["cuda_graphs"]
        assert replays["told"] is None, replays
        assert replays["replayed"] == results["steps"]


@pytest.mark.parametrize("words", [[], [FULL], ["trainer.speed=auto"], ["trainer.speed=auto", FULL]], ids=str)
def test_a_run(words: list[str], exact: Outcome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the command line, on the embedded backbone; the delta is measured again, and verified."""
    monkeypatch.chdir(tmp_path)
    assert main([*SMALL, "trainer.log_every=1", *words, "hydra.run.dir=gpu"]) == 0
    results = small.read_results(tmp_path / "gpu/delta")
    assert results["precision"] == ("fp32" if FULL in words else "bf16")
    assert results["verification"]["hash"] == "match"
    assert results["peak_memory_bytes"]["cuda"] > 0
    assert results["base_sha256"] == exact.results["base_sha256"]
    check_replays(results)
    found = [entry["loss"] for entry in results["training_log"] if "loss" in entry]
    assert found == pytest.approx(logged(exact), rel=1e-3 if FULL in words else HALF)
    assert main(["verify", "gpu/delta"]) == 0
    assert main(["eval", "delta=gpu/delta", "trainer.progress=false", "out=measured"]) == 0
    measured = json.loads((tmp_path / "measured/metrics.json").read_text())["deltas"][0]["metrics"]
    assert measured["loss"] == pytest.approx(results["metrics"]["after"]["loss"], rel=HALF)


@pytest.mark.parametrize("delta_type", ["adalora", "adapter", "prefix", "soft_prompt", "reft", "vera", "full"])
def test_types(delta_type: str, tmp_path: Path) -> None:
    words = [*SMALL, FULL, f"delta_type={delta_type}", "trainer.log_every=1"]
    exact, found = go(tmp_path / "cpu", *words, "trainer.cpu=true"), go(tmp_path / "gpu", *words)
    assert logged(found) == pytest.approx(logged(exact), rel=SENSITIVE.get(delta_type, 1e-3))
    assert found.results["peak_memory_bytes"]["cuda"] > 0


@pytest.mark.parametrize("speed", ["off", "auto"])
@pytest.mark.parametrize("kind", ["classification", "tokens", "choices"])
def test_heads(kind: str, speed: str, calm: Path, tmp_path: Path) -> None:
    """With a new head, activations that are kept, and one token in the last block."""
    words = [
        "backbone=local",
        f"backbone.source={calm}",
        *with_head(kind, tmp_path),
        "layers=last:1",
        "delta_type=lora",
        *QUIET,
    ]
    words += ["trainer=smoke", "trainer.max_steps=9", FULL, f"trainer.speed={speed}", "lora_dropout=0"]
    exact, found = go(tmp_path / "cpu", *words, "trainer.cpu=true"), go(tmp_path / "gpu", *words)
    assert logged(found) == pytest.approx(logged(exact), rel=1e-3)
    check_replays(found.results)
    told = found.results["shortcuts"]
    for name in ("frozen_blocks", "while_training", "kept_activations", "last_block"):
        assert told[name] == exact.results["shortcuts"][name], told["told"]
    assert told["while_training"]
    assert (told["last_block"] == "first token") == (kind != "tokens")


class Watch(TrainerCallback):
    """Has whatever lets the host wait for the GPU raise, from the beginning of one step to the end of another."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last, self.seen = first, last, 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.first:
            torch.cuda.set_sync_debug_mode("error")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seen += torch.cuda.get_sync_debug_mode() == 2
        if state.global_step == self.last:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_the_host_runs_ahead(calm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once its steps are replayed, nothing of a run waits for the GPU but what logs, evaluates and saves."""
    words = ["backbone=local", f"backbone.source={calm}", *with_head("classification", tmp_path), "delta_type=lora"]
    words += ["trainer=smoke", "trainer.max_steps=12", "trainer.log_every=100", "trainer.save_every=0", "trainer.speed=auto"]
    watch, build = Watch(3, 7), training.build

    def watched(*arguments: Any) -> Any:
        trainer = build(*arguments)
        trainer.add_callback(watch)
        return trainer

    monkeypatch.setattr(training, "build", watched)
    try:
        found = go(tmp_path / "run", *words, "trainer.progress=false")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    check_replays(found.results)
    assert watch.seen == 4


@pytest.mark.parametrize("words", [[], ["trainer.speed=auto"], [FULL, "trainer.gradient_accumulation_steps=2"]], ids=str)
def test_a_run_that_goes_on(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With dropout, whose random numbers are the GPU's."""
    words = [*SMALL, *words, "lora_dropout=0.2", "trainer.log_every=1"]
    whole = go(tmp_path / "whole", *words)
    interrupted(monkeypatch, tmp_path / "cut", *words)
    found = go(tmp_path / "cut", *words, "resume=true")
    assert found.results["sessions"] == 2
    assert logged(found) == pytest.approx(logged(whole), rel=1e-4)
    one, other = (load_file(outcome.folder / WEIGHTS) for outcome in (found, whole))
    one, other = (torch.cat([each[name].flatten() for name in sorted(each)]) for each in (one, other))
    assert float((one - other).norm() / other.norm()) < 1e-3


@pytest.mark.parametrize("kind", ["text", "classification"])
def test_runs_in_one(kind: str, calm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = ["trainer=smoke", *QUIET, "trainer.max_steps=5", FULL]
    if kind == "text":
        common = list(SMALL)
        common.remove("trainer=smoke")
    else:
        common = ["backbone=local", f"backbone.source={calm}", *with_head(kind, tmp_path), "layers=last:1"]
    jobs = [[*common, *usual, "delta_type=lora", "seed=1"], [*common, *usual, "delta_type=adapter", "seed=2"]]
    found, said = team(tmp_path, jobs, TOGETHER, monkeypatch, usual=["trainer=smoke"])
    assert "2 runs are trained together: a step of all takes" in said[0], said
    for number, words in enumerate(jobs):
        assert found[number].results["trained_together"]["runs"] == 2
        close(found[number], go_as(tmp_path / f"alone{number}", words, usual=["trainer=smoke"]), 1e-3)


@pytest.fixture
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield
    sharing.OF_PROCESS.clear()


@pytest.mark.usefixtures("_here")
@pytest.mark.parametrize("speed", ["off", "auto"])
def test_a_sweep(speed: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """In half precision, as is usual on a GPU, with jobs in one where nothing is chosen for each."""
    monkeypatch.setattr(joint_step, "FASTER", 1e9)
    words = ["-m", "hydra.sweep.dir=s", *SMALL, "delta_type=lora,ia3,soft_prompt", "trainer.batch_size=4"]
    assert main([*words, "sweep.joint=auto", f"trainer.speed={speed}"]) == 0
    assert ("2 runs are trained together" in capfd.readouterr().out) == (speed == "off")
    jobs = list(record.read("s").values())
    assert [entry.status for entry in jobs] == ["finished"] * 3
    results = [small.read_results(Path("s", entry.folder, "delta")) for entry in jobs]
    assert [one["verification"]["hash"] for one in results] == ["match"] * 3
    assert [one["trained_together"] is not None for one in results] == [speed == "off", speed == "off", False]
