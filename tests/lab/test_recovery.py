"""Runs that are interrupted and continued: they end in the bytes of a run that was not."""

import json
from pathlib import Path

import pytest
from models import slow_but
from small import read_results
from transformers import TrainerCallback

from deltaexp import registry
from deltaexp.checksum import file_sha256
from deltaexp.lab import schema, training
from deltaexp.lab.run import Outcome, run

SMALL = [
    "task.train_rows=48", "task.validation_rows=8", "task.test_rows=8", "trainer=smoke", "trainer.progress=false",
    "trainer.max_steps=11", "trainer.save_every=3", "trainer.log_every=4",
]  # fmt: skip
DROPOUT = {
    "lora": ["lora_dropout=0.2"], "adalora": ["adalora_dropout=0.2"], "vera": ["vera_dropout=0.2"],
    "loha": ["loha_dropout=0.2"], "lokr": ["lokr_dropout=0.2"], "reft": ["reft_dropout=0.2"],
    "peft": ["peft.lora_dropout=0.2"], "adapter": ["adapter_drop=1"],
}  # fmt: skip
QUICK = ("lora", "adalora", "soft_prompt")


class InterruptedError_(Exception):
    pass


class Interrupt(TrainerCallback):
    """Raises after a step, where the next one would begin."""

    def __init__(self, step: int, error: BaseException) -> None:
        self.step, self.error = step, error

    def on_step_begin(self, args: object, state: object, control: object, **_: object) -> None:
        if state.global_step == self.step:
            raise self.error


def go(folder: Path, *overrides: str) -> Outcome:
    config, delta = schema.composed(overrides)
    return run(config, delta, folder)


def interrupted(
    monkeypatch: pytest.MonkeyPatch, step: int, folder: Path, *overrides: str, error: BaseException | None = None
) -> None:
    """Begin or continue a run that breaks off after a step."""
    build, error = training.build, error or InterruptedError_()

    def with_callback(*arguments: object) -> training.DeltaTrainer:
        trainer = build(*arguments)
        trainer.add_callback(Interrupt(step, error))
        return trainer

    with monkeypatch.context() as patch, pytest.raises(type(error)):
        patch.setattr(training, "build", with_callback)
        go(folder, *overrides)
    assert not (folder / "delta").exists()


def digests(folder: Path) -> dict[str, str]:
    return {name: file_sha256(folder / "delta" / name) for name in ("delta_model.safetensors", "config.json")}


@pytest.mark.parametrize("delta_type", slow_but([name for name in registry.known() if name != "none"], QUICK))
def test_a_continued_run_ends_in_the_same_bytes(delta_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [*SMALL, f"delta_type={delta_type}", *DROPOUT.get(delta_type, []), "trainer.gradient_accumulation_steps=2"]
    whole = go(tmp_path / "whole", *words)
    folder = tmp_path / "resumed"
    interrupted(monkeypatch, 7, folder, *words)
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["checkpoint-6"]
    resumed = go(folder, *words, "resume=true")
    assert digests(folder) == digests(tmp_path / "whole")
    assert resumed.results["metrics"] == whole.results["metrics"]
    logs = [[entry for entry in each.results["training_log"] if "loss" in entry] for each in (whole, resumed)]
    assert logs[0] == logs[1]
    assert len(logs[0]) == 2
    assert resumed.results["sessions"] == 2
    assert not (folder / "checkpoints").exists()
