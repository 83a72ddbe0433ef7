"""What is found below folders: finished runs, and why others have no numbers."""

import json
import shutil
from pathlib import Path

import pytest
import studies

from deltaexp import checkpoint
from deltaexp.errors import CheckpointError
from deltaexp.lab import predictions
from deltaexp.lab.report import runs
from deltaexp.lab.sweeping import record


def test_a_trained_run_is_read_whole(real_run: Path) -> None:
    found = runs.collect([real_run])
    assert (found.others, found.commands) == ([], [])
    (run,) = found.runs
    results = json.loads((real_run / "delta" / "results.json").read_text())
    assert (run.name, run.delta_type, run.seed, run.metric) == ("run", "lora", "42", "accuracy")
    assert run.score == results["metrics"]["after"]["accuracy"]
    assert run.validation == results["metrics"]["validation"]["accuracy"]
    assert run.before == results["metrics"]["before"]["accuracy"]
    assert run.size == (real_run / "delta" / "delta_model.safetensors").stat().st_size
    assert run.digest == results["digests"]["delta_model.safetensors"]
    assert [step for step, _ in run.curves["loss"]] == [1, 2, 3]
    assert [step for step, _ in run.curves["validation accuracy"]] == [2, 3]
    assert run.command is not None
    assert run.command.startswith("python -m deltaexp task=sst2 backbone=local")
    assert str(real_run / "delta") in run.loading_code
    compile(run.loading_code, "code", "exec")
    flops = results["inference_flops"]
    assert flops["rows"] == 4
    assert flops["with_delta"] > flops["backbone"] > 0


def test_what_came_to_no_end_is_told(real_run: Path, tmp_path: Path) -> None:
    for name in ("0", "1", "2", "3", "4"):
        shutil.copytree(real_run, tmp_path / "deep" / "sweep" / name)
    folder = tmp_path / "deep" / "sweep"
    (folder / "1" / "delta" / "results.json").write_text("{")
    results = json.loads((folder / "2" / "delta" / "results.json").read_text())
    del results["metrics"]
    (folder / "2" / "delta" / "results.json").write_text(json.dumps(results))
    shutil.rmtree(folder / "3" / "delta")
    shutil.rmtree(folder / "4" / "delta")
    (folder / "4" / "run.json").write_text("{}")
    jobs = [
        {"folder": "0", "identity": "a", "overrides": {"delta_type": "lora", "seed": 1, "x": [1, None], "y": True}}
        | {"status": "finished", "error": None, "seconds": 1.0},
        {"folder": "5", "identity": "b", "overrides": {}, "status": "failed", "error": "no memory", "seconds": 2.0},
        {"folder": "6", "identity": "c", "overrides": {}, "status": "waiting", "error": None, "seconds": None},
    ]
    (folder / "sweep.json").write_text(json.dumps({"format": 1, "command": "python -m deltaexp -m x", "jobs": jobs}))
    found = runs.collect([tmp_path])
    assert [run.name for run in found.runs] == ["deep/sweep/0"]
    assert found.runs[0].command == "python -m deltaexp delta_type=lora seed=1 'x=[1,null]' y=true"
    assert found.commands == ["python -m deltaexp -m x"]
    told = {other.name: (other.status, other.reason) for other in found.others}
    assert told.keys() == {f"deep/sweep/{number}" for number in range(1, 7)}
    assert told["deep/sweep/1"][0] == "unreadable"
    assert told["deep/sweep/2"] == ("unreadable", "results.json lacks 'metrics'")
    assert told["deep/sweep/3"][0] == "unfinished"
    assert told["deep/sweep/3"][1].startswith("begun 2")
    assert told["deep/sweep/4"][0] == "unreadable"
    assert told["deep/sweep/5"] == ("failed", "no memory")
    assert told["deep/sweep/6"] == ("waiting", "it has not begun")
    (folder / "sweep.json").write_text("[]")
    assert ("deep/sweep/sweep.json", "unreadable") in [(other.name, other.status) for other in runs.collect([tmp_path]).others]


def test_files_are_those_that_are_written() -> None:
    assert (runs.RESULTS, runs.WEIGHTS) == (checkpoint.RESULTS, checkpoint.WEIGHTS)
    assert (runs.SWEEP, runs.PREDICTIONS) == (record.FILE, predictions.PREDICTIONS)


def test_secrets_stay_out(real_run: Path, tmp_path: Path) -> None:
    shutil.copytree(real_run, tmp_path / "run")
    token = "hf_" + "a1B2" * 6
    (tmp_path / "run" / ".hydra" / "overrides.yaml").write_text(f"- delta_type=lora\n- some.key={token}\n")
    assert token not in (runs.collect([tmp_path]).runs[0].command or token)


def test_a_run_below_two_folders_counts_once(real_run: Path, tmp_path: Path) -> None:
    shutil.copytree(real_run, tmp_path / "a" / "0")
    found = runs.collect([tmp_path / "a", tmp_path])
    assert [run.name for run in found.runs] == ["a/0"]


def test_a_type_that_stands_for_many_is_told_apart(real_run: Path, tmp_path: Path) -> None:
    studies.grown(real_run, tmp_path / "boft", "peft", 1, [], config={"peft.peft_type": "BOFT"})
    assert runs.collect([tmp_path]).runs[0].delta_type == "peft:BOFT"


def test_folders_without_runs(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no run"):
        runs.collect([tmp_path])
    with pytest.raises(CheckpointError, match="There is no folder"):
        runs.collect([tmp_path, tmp_path / "nowhere"])
