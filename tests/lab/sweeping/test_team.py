"""Jobs of a sweep that are trained in one."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from deltaexp.__main__ import main
from deltaexp.errors import ConfigError
from deltaexp.lab import joint_step, recovery, schema, sharing
from deltaexp.lab.sweeping import grid, record, team

SMALL = [
    "task.train_rows=20", "task.validation_rows=4", "task.test_rows=4", "task.max_target_length=8", "trainer=smoke",
    "trainer.progress=false",
]  # fmt: skip
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


def formed(*words: str) -> list[list[str]]:
    planned = grid.plan(tuple(grid.words_for_hydra(("task=dates", *JOINT, *words))))
    assert planned is not None
    return [[one.name for one in together] for together in team.formed(planned.jobs)]


def test_who_goes_together() -> None:
    assert formed("delta_type=lora,ia3", "seed=1,2") == [
        [f"delta_type={kind} task=dates trainer.batch_size=4 seed={seed}" for kind in ("lora", "ia3") for seed in (1, 2)]
    ]
    rates = formed("trainer.learning_rate=1e-3,1e-4", "task.train_rows=10,20")
    assert [len(one) for one in rates] == [2, 2]
    assert all(len({name.split("task.train_rows=")[1] for name in one}) == 1 for one in rates)
    seeds = "seed=" + ",".join(map(str, range(10)))
    assert [len(one) for one in formed(seeds)] == [team.MOST, 2]
    assert [len(one) for one in formed("seed=1,2,3", "trainer.batch_size=32")] == [2, 1]
    assert [len(one) for one in formed("seed=1,2", "trainer.batch_size=64")] == [1, 1]
    for word in ("trainer.speed=auto", "trainer.compile=true", "sweep.joint=off", "tracker=wandb", "trainer.batch_size=4,8"):
        assert {len(one) for one in formed("seed=1,2", word)} <= ({1} if "," not in word else {2}), word
    with pytest.raises(ConfigError, match=r"no sweep\.joint .on.\. Known: auto, off"):
        schema.composed(["sweep.joint=on"])


@pytest.mark.slow
@pytest.mark.usefixtures("_here")
def test_a_sweep_in_teams(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(joint_step, "FASTER", 1e9)
    words = [*SMALL, "delta_type=lora,bitfit,prefix", "seed=1,2", "trainer.batch_size=4"]
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
    # They are the jobs of a sweep that trains each by itself.
    assert sweep(*words) == 0
    assert "0 of them to do" in capfd.readouterr().out
    assert sweep(*words, "sweep.joint=auto", "hydra/launcher=joblib", folder="other") == 0
    assert "sweep.joint=auto changes nothing" in capfd.readouterr().out
    for one, entry in zip(results, jobs(), strict=True):
        other = json.loads(Path("other", entry.folder, recovery.DELTA, "results.json").read_text())
        assert one["metrics"]["after"] == pytest.approx(other["metrics"]["after"], rel=1e-3)
