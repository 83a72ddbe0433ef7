"""Jobs of a sweep that are trained in one."""

import json
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from deltaexp.__main__ import main
from deltaexp.checkpoint import WEIGHTS
from deltaexp.errors import ConfigError
from deltaexp.lab import joint_step, recovery, schema, sharing
from deltaexp.lab.sweeping import grid, record, team
from deltaexp.lab.sweeping.job import Job

SMALL = [
    "task.train_rows=20", "task.validation_rows=4", "task.test_rows=4", "task.max_target_length=8", "trainer=smoke",
    "trainer.progress=false",
]  # fmt: skip
KILLS = """
import os, pathlib, signal

def once(rows, task):
    if rows and not pathlib.Path(__file__).with_name("killed").exists():
        pathlib.Path(__file__).with_name("killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return rows
"""
JOINT = ["sweep.joint=auto", "trainer.batch_size=4"]


@pytest.fixture
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield
    sharing.OF_PROCESS.clear()


def sweep(*words: str, folder: str = "s") -> int:
    return main(["-m", f"hydra.sweep.dir={folder}", *words])


def jobs() -> list[record.Entry]:
    return list(record.read("s").values())


def planned(*words: str) -> list[Job]:
    found = grid.plan(tuple(grid.words_for_hydra(("task=dates", *JOINT, *words))))
    assert found is not None
    return list(found.jobs)


def formed(*words: str) -> list[list[str]]:
    return [[one.name for one in together] for together in team.formed(planned(*words))]


def test_who_goes_together() -> None:
    assert formed("delta_type=lora,ia3", "seed=1,2") == [
        [f"delta_type={kind} task=dates trainer.batch_size=4 seed={seed}" for kind in ("lora", "ia3") for seed in (1, 2)]
    ]
    rates = formed("trainer.learning_rate=1e-3,1e-4", "task.train_rows=10,20")
    assert [len(one) for one in rates] == [2, 2]
    assert all(len({name.split("task.train_rows=")[1] for name in one}) == 1 for one in rates)
    ten = planned("seed=" + ",".join(map(str, range(10))))
    sizes = {processes: [len(one) for one in team.formed(ten, processes)] for processes in (1, 2, 3, 10)}
    assert sizes == {1: [team.MOST, 2], 2: [5, 5], 3: [4, 4, 2], 10: [1] * 10}
    assert [len(one) for one in formed("seed=1,2,3", "trainer.batch_size=32")] == [2, 1]
    assert [len(one) for one in formed("seed=1,2", "trainer.batch_size=64")] == [1, 1]
    for word in ("trainer.speed=auto", "trainer.compile=true", "sweep.joint=off", "tracker=wandb", "trainer.batch_size=4,8"):
        assert {len(one) for one in formed("seed=1,2", word)} <= ({1} if "," not in word else {2}), word
    for word in (
        "trainer.speed=auto",
        "trainer.compile=true",
        "backbone.device_map=auto",
        "tracker=wandb",
        "trainer.batch_size=64",
    ):
        assert team.hindrances(planned("seed=1,2", word)[0].run) == [word]
    with pytest.raises(ConfigError, match=r"no sweep\.joint .on.\. Known: auto, off"):
        schema.composed(["sweep.joint=on"])


@pytest.mark.slow
@pytest.mark.usefixtures("_here")
def test_a_sweep_in_teams(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(joint_step, "FASTER", 1e9)
    words = [*SMALL, "delta_type=lora,prefix,soft_prompt", "seed=1,2", "trainer.batch_size=4"]
    assert sweep(*words, "sweep.joint=auto") == 0
    said = capfd.readouterr().out
    assert said.count("=== job ") == 1
    assert "4 runs are trained together: a step of all takes" in said
    assert said.count("it is trained by itself: ") == 2
    assert [entry.status for entry in jobs()] == ["finished"] * 6
    assert [entry.seconds is not None for entry in jobs()] == [True] * 6
    logs = [Path("s", entry.folder, "deltaexp.log").read_text() for entry in jobs()]
    assert all(log.count("training for") == 1 for log in logs)
    results = [json.loads(Path("s", entry.folder, recovery.DELTA, "results.json").read_text()) for entry in jobs()]
    assert [one["trained_together"] is not None for one in results] == [True] * 4 + [False] * 2
    # They are the jobs of a sweep that trains each by itself, and says so where the config alone tells.
    assert sweep(*words) == 0
    assert "0 of them to do" in capfd.readouterr().out
    assert sweep(*words, "sweep.joint=auto", "tracker=wandb") == 0
    assert "sweep.joint=auto: 6 of these jobs train by themselves, because of tracker=wandb\n" in capfd.readouterr().out


@pytest.mark.slow
@pytest.mark.usefixtures("_here")
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_teams_in_other_processes(launcher: str, capfd: pytest.CaptureFixture[str]) -> None:
    if find_spec(launcher.partition("_")[0]) is None:
        pytest.skip(f"{launcher} needs a package that is not installed")
    words = [*SMALL, "delta_type=lora", "seed=1,2", "trainer.batch_size=4", "sweep.joint=auto", "trainer.max_steps=3"]
    killed = launcher == "submitit_local" and sys.platform.startswith("linux")
    if killed:  # with both jobs in it, which go on one by one
        Path("kills.py").write_text(KILLS)
        words.append("task.prepare=kills.py:once")
    assert sweep(*words, f"hydra/launcher={launcher}", "hydra.launcher.n_jobs=1") == 0
    assert "changes nothing" not in capfd.readouterr().out
    assert [entry.status for entry in jobs()] == ["finished"] * 2
    logs = [Path("s", entry.folder, "deltaexp.log").read_text() for entry in jobs()]
    assert ["2 runs are trained " in log for log in logs] == [not killed] * 2
    if launcher == "submitit_local":  # the same, where nothing is left to do
        assert sweep(*words, "hydra/launcher=submitit_slurm") == 0
        assert "sweep.joint=auto changes nothing" in capfd.readouterr().out


@pytest.mark.slow
@pytest.mark.usefixtures("_here")
def test_what_a_step_of_all_raises_ends_no_sweep(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    real, calls = joint_step.forward, list[int]()

    def fails(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 2 + joint_step.ROUNDS + 2:
            raise RuntimeError("not enough memory")
        return real(*arguments, **options)

    words = [*SMALL, "delta_type=lora", "seed=1,2", "trainer.batch_size=4", "trainer.save_every=0", "trainer.max_steps=5"]
    assert sweep(*words) == 0
    expected = [(Path("s", entry.folder, recovery.DELTA, WEIGHTS)).read_bytes() for entry in jobs()]
    capfd.readouterr()
    monkeypatch.setattr(joint_step, "FASTER", 1e9)
    monkeypatch.setattr(joint_step, "forward", fails)
    assert sweep(*words, "sweep.joint=auto", folder="other") == 0
    said = capfd.readouterr().out
    assert "2 runs are trained together" in said
    assert "2 runs go on one by one: not enough memory" in said
    found = [(Path("other", entry.folder, recovery.DELTA, WEIGHTS)).read_bytes() for entry in record.read("other").values()]
    assert found == expected
