"""Runs that share a backbone end in the bytes of runs that do not."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from models import slow_but
from test_recovery import SMALL, digests, losses

from deltaexp import registry
from deltaexp.lab import backbones, schema
from deltaexp.lab.run import Outcome, run
from deltaexp.lab.sharing import Shared

QUICK = ("full",)
LOCAL = ["backbone=local", "task=sst2", "trainer=smoke", "trainer.progress=false", "task.test_split=null"]


def go(folder: Path, words: list[str], shared: Shared | None = None) -> Outcome:
    config, delta = schema.composed(words)
    return run(config, delta, folder, shared=shared)


def same(one: Outcome, other: Outcome) -> None:
    assert digests(one.folder) == digests(other.folder)
    assert one.results["metrics"] == other.results["metrics"]
    if one.results["steps"]:  # the evaluation before training is in the log of runs without any, unless it was made earlier
        assert losses(one) == losses(other)
    assert one.results["verification"] == other.results["verification"]


@pytest.fixture(scope="module")
def shared() -> Shared:
    return Shared()


@pytest.mark.parametrize("delta_type", slow_but(registry.known(), QUICK))
def test_every_type_leaves_the_backbone_to_the_next(delta_type: str, shared: Shared, tmp_path: Path) -> None:
    words = [*SMALL, f"delta_type={delta_type}"]
    kept = go(tmp_path / "shared", words, shared)
    same(kept, go(tmp_path / "alone", words))
    assert shared.loads == 1  # for all of them


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    seen: list[str] = []
    load = backbones.load
    monkeypatch.setattr(backbones, "load", lambda config, task: (seen.append(config.name), load(config, task))[1])
    return seen


@pytest.mark.slow
def test_new_heads_begin_as_they_would(small_bert: Path, small_reviews: Path, tmp_path: Path, loads: list[str]) -> None:
    shared = Shared()
    words = [*LOCAL, f"backbone.source={small_bert}", f"task.data={small_reviews}"]
    for seed, delta_type in enumerate(("lora", "bitfit", "full")):
        more = [f"seed={seed}", f"delta_type={delta_type}"]
        kept = go(tmp_path / f"shared{seed}", [*words, *more], shared)
        if seed:
            same(kept, go(tmp_path / f"alone{seed}", [*words, *more]))
    assert shared.loads == 1
    assert len(loads) == 1 + 2 * 2  # one that is shared; alone, one to train and one to verify


@pytest.mark.slow
def test_what_was_changed_is_loaded_anew(tmp_path: Path) -> None:
    shared = Shared()
    first = go(tmp_path / "a", SMALL, shared)
    assert shared._kept is not None
    with torch.no_grad():
        shared._kept[1].model.shared.weight[0, 0] += 1
    same(first, go(tmp_path / "b", SMALL, shared))
    assert shared.loads == 2


@pytest.mark.slow
@pytest.mark.parametrize(("words", "loads"), [(["trainer.precision=bf16"], 1), (["trainer.gradient_checkpointing=true"], 2)])
def test_ways_of_training(words: list[str], loads: int, tmp_path: Path) -> None:
    shared = Shared()
    go(tmp_path / "first", [*SMALL, *words], shared)
    kept = go(tmp_path / "shared", [*SMALL, *words, "seed=1"], shared)
    same(kept, go(tmp_path / "alone", [*SMALL, *words, "seed=1"]))
    assert shared.loads == loads  # checkpoints of activations leave a trace in the backbone, which is found


@pytest.mark.slow
@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_quantised_backbones_are_loaded_each_time(tmp_path: Path, loads: list[str]) -> None:
    words = [*SMALL, "backbone.quantization=bnb_4bit"]
    shared = Shared()
    for number in range(2):
        kept = go(tmp_path / f"shared{number}", [*words, f"seed={number}"], shared)
        same(kept, go(tmp_path / f"alone{number}", [*words, f"seed={number}"]))
    assert len(loads) == 8
    assert shared.loads == 0
