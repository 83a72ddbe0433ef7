"""Trackers together: continued runs, and faults of which no run may be lost."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from logs import wandb_logs
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter
from tracked import DATES, TRACKED

from deltaexp.errors import ConfigError
from deltaexp.lab import schema, training
from deltaexp.lab.config import TrackerConfig
from deltaexp.lab.run import run
from deltaexp.lab.tracking import Trackers
from deltaexp.lab.tracking.tensorboard import TensorBoardTracker
from deltaexp.lab.tracking.wandb_file import earlier

LONGER = [*TRACKED, "trainer.max_steps=6", "trainer.save_every=2"]
KILLED = """
import os, signal, subprocess, sys
from deltaexp.lab import callbacks, schema
from deltaexp.lab.run import run
from deltaexp.lab.tracking import Trackers
from deltaexp.lab.tracking.tensorboard import TensorBoardTracker
from deltaexp.lab.tracking.wandb_file import earlier

log = callbacks.LogCallback.on_log

def on_log(self, args, state, control, **options):
    log(self, args, state, control, **options)
    if state.global_step == 5 and sys.argv[1] == "run":
        os.kill(os.getpid(), signal.SIGKILL)
    if state.global_step == 2 and sys.argv[1] == "wandb":
        children = subprocess.run(["ps", "--ppid", str(os.getpid()), "-o", "pid=,comm="], capture_output=True, text=True)
        for line in children.stdout.splitlines():
            if "wandb" in line:
                os.kill(int(line.split()[0]), signal.SIGKILL)

callbacks.LogCallback.on_log = on_log
print("score", run(*schema.composed(sys.argv[3:]), sys.argv[2]).score)
"""


def curve(folder: Path, name: str) -> list[tuple[int, float]]:
    found = EventAccumulator(str(folder / "tensorboard"))
    found.Reload()
    return [(event.step, event.value) for event in found.Scalars(name)]


def check_whole(folder: Path) -> None:
    """Check that the curves of a run in two sessions have every point once, in the same run of W&B."""
    entries = json.loads((folder / "delta/results.json").read_text())["training_log"]
    sessions = wandb_logs(folder, ended=1)
    assert len({session.name.rsplit("-", 1)[1] for session in earlier(folder)}) == 1
    for part, name in (("train/loss", "loss"), ("eval/loss", "eval_loss")):
        logged = [(entry["step"], entry[name]) for entry in entries if name in entry]
        assert [step for step, _ in logged] == [1, 2, 3, 4, 5, 6]
        assert curve(folder, part) == [(step, pytest.approx(value)) for step, value in logged]
        assert sorted(point for session in sessions for point in session.points(part)) == logged


def in_a_process(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run something in a process of its own, which W&B's process for this one has nothing to do with."""
    env = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    return subprocess.run(
        [sys.executable, "-c", KILLED, *words], env={**env, **environment}, capture_output=True, text=True, check=False
    )


class Interruption(Exception):
    pass


@pytest.mark.slow
def test_a_continued_run_goes_on_in_the_same_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    log = training.DeltaTrainer.log

    def breaks_off(self: training.DeltaTrainer, logs: dict, *arguments: object) -> None:
        log(self, logs, *arguments)
        if self.state.global_step == 5:
            raise Interruption

    with monkeypatch.context() as patch:
        patch.setattr(training.DeltaTrainer, "log", breaks_off)
        with pytest.raises(Interruption):
            run(*schema.composed(LONGER), tmp_path)
    run(*schema.composed([*LONGER, "resume=true"]), tmp_path)
    check_whole(tmp_path)


def test_a_full_disk_is_told_once(tmp_path: Path) -> None:
    """The kernel's own answer to a full disk, while training."""
    said: list[str] = []
    trackers = Trackers(said.append)
    trackers.start(TrackerConfig(names=["tensorboard"]), {}, tmp_path, 0)
    tracker = trackers.active["tensorboard"]
    assert isinstance(tracker, TensorBoardTracker)
    tracker.file.close()
    device = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
    tracker.file = RecordWriter(device)
    for step in (1, 2):
        trackers.log({"loss": 1.0}, step)
    trackers.finish(failed=False)
    assert device.closed
    (sentence,) = said
    assert sentence.startswith("TensorBoard failed and is left out from here on: [Errno 28] No space left on device. ")


def test_a_tracker_that_cannot_begin_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("a file where a folder should be")
    said: list[str] = []
    trackers = Trackers(said.append)
    trackers.start(TrackerConfig(names=["tensorboard"]), {}, tmp_path, 0)
    trackers.log({"loss": 1.0}, 1)
    trackers.finish(failed=False)
    assert len(said) == 1
    assert "File exists" in said[0]
    assert said[0].endswith("The results are in the run's folder.")


@pytest.mark.slow
def test_a_killed_run_goes_on_in_the_same_curves(tmp_path: Path) -> None:
    """W&B writes its file every few seconds: what a kill takes from it comes again from the checkpoint."""
    killed = in_a_process("run", str(tmp_path), *LONGER)
    assert killed.returncode == -9, killed.stderr
    done = in_a_process("", str(tmp_path), *LONGER, "resume=true")
    assert done.returncode == 0, done.stderr
    check_whole(tmp_path)


@pytest.mark.slow
def test_neither_a_network_nor_the_process_of_wandb_is_needed(tmp_path: Path) -> None:
    unreachable = {"WANDB_API_KEY": "k" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_INIT_TIMEOUT": "1"}
    done = in_a_process("wandb", str(tmp_path), *DATES, "tracker=wandb", "trainer.log_every=1", **unreachable)
    assert done.returncode == 0, done.stderr
    assert "Weights & Biases cannot be reached: " in done.stdout
    assert f"send it later with: wandb sync {tmp_path}/wandb/offline-run-*" in done.stdout
    assert "Weights & Biases failed and is left out from here on: " in done.stdout
    score = json.loads((tmp_path / "delta/results.json").read_text())["metrics"]["after"]["exact_match"]
    assert f"score {score}" in done.stdout


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["tracker=tensorbord"], "Did you mean 'tensorboard'"),
        (["tracker.names=[wandb,tensorbord]"], "Did you mean 'tensorboard'"),
        (["tracker.mode=offlin"], "Did you mean 'offline'"),
    ],
)
def test_mistakes_are_told(words: list[str], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        schema.composed(words)


def test_a_package_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a folder of that name lies, as W&B's logs do."""
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(ConfigError, match=r'pip install "deltaexp\[wandb\]"'):
        schema.lab_config.requirements.check_trackers(["wandb"])
