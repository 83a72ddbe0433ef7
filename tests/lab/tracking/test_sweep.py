"""The runs of a sweep as one table."""

import json
import shutil
from pathlib import Path

import pytest
from logs import wandb_logs
from tracked import DATES

from deltaexp.__main__ import main
from deltaexp.checksum import file_sha256
from deltaexp.lab import tracking
from deltaexp.lab.run import Outcome
from deltaexp.lab.tracking import sweep


@pytest.fixture
def runs(tracked: Outcome, tmp_path: Path) -> Path:
    """A sweep's folder with two finished runs of two seeds and one that failed."""
    folder = tmp_path / "my_sweep"
    for seed in (1, 2):
        place = folder / f"{seed - 1}-lora-seed{seed}"
        shutil.copytree(tracked.folder, place / "delta")
        record = json.loads((tracked.folder.parent / "run.json").read_text())
        record["config"]["tracker"]["group"] = folder.name
        (place / "run.json").write_text(json.dumps(record))
        results = json.loads((place / "delta/results.json").read_text())
        results["config"]["seed"] = seed
        results["config"]["lora_r"] = 8 * seed
        results["metrics"]["after"]["exact_match"] = seed / 4
        (place / "delta/results.json").write_text(json.dumps(results))
    jobs = [{"folder": name, "status": "finished"} for name in ("0-lora-seed1", "1-lora-seed2")]
    jobs += [{"folder": "2-lora-seed3", "status": "failed"}]
    (folder / "sweep.json").write_text(json.dumps({"format": 1, "jobs": jobs}))
    return folder


def test_what_differs_and_what_was_found(runs: Path, tracked: Outcome) -> None:
    first, second, failed = sweep.table(runs)
    assert list(first)[:7] == ["run", "status", "delta_type", "seed", "trainer.learning_rate", "lora_r", "metric"]
    assert (first["run"], first["seed"], first["lora_r"], first["score"]) == ("0-lora-seed1", 1, 8, 0.25)
    assert (second["run"], second["seed"], second["lora_r"], second["score"]) == ("1-lora-seed2", 2, 16, 0.5)
    assert first["parameters/trainable"] == tracked.results["parameters"]["trainable"]
    assert first["seconds/train"] == tracked.results["seconds"]["train"]
    assert first["peak_memory_bytes/process"] == tracked.results["peak_memory_bytes"]["process"]
    assert first["delta_sha256"] == file_sha256(tracked.folder / "delta_model.safetensors")
    assert (failed["run"], failed["status"], failed["score"]) == ("2-lora-seed3", "failed", None)


def test_wandb_gets_it_in_a_run_of_the_group(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    said: list[str] = []
    tracking.summarise_sweep(runs, said.append)
    assert not said
    (log,) = wandb_logs(runs)
    assert (log.run.run_group, log.run.job_type, log.run.display_name) == ("my_sweep", "sweep", "my_sweep")
    assert log.table("runs") == sweep.table(runs)
    assert (log.summary["runs"], log.summary["finished"]) == (3, 2)


def test_only_where_the_runs_were_logged(runs: Path, tmp_path: Path) -> None:
    for path in runs.glob("*/run.json"):
        path.write_text(path.read_text().replace('"wandb"', '"tensorboard"'))
    tracking.summarise_sweep(runs)
    tracking.summarise_sweep(tmp_path / "nothing")
    assert not (runs / "wandb").exists()


def test_a_fault_is_told_and_stops_nothing(runs: Path) -> None:
    (runs / "0-lora-seed1/delta/results.json").write_text("{")
    said: list[str] = []
    tracking.summarise_sweep(runs, said.append)
    (sentence,) = said
    assert sentence.startswith("Weights & Biases failed and is left out from here on: ")


@pytest.mark.slow
def test_a_sweep_is_one_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = tmp_path / "study"
    words = [*DATES, "tracker=wandb", "tracker.mode=offline", "task.train_rows=8", f"hydra.sweep.dir={folder}"]
    assert main(["-m", "delta_type=lora,bitfit", *words]) == 0
    places = [folder, *(path.parent for path in folder.glob("*/run.json"))]
    logs = [log for place in places for log in wandb_logs(place)]
    assert [(log.run.run_group, log.run.job_type) for log in logs] == [("study", kind) for kind in ("sweep", "train", "train")]
    rows = {row["delta_type"]: row for row in logs[0].table("runs")}
    assert {name: row["run"] for name, row in rows.items()} == {
        log.config["delta_type"]: p.name for log, p in zip(logs[1:], places[1:], strict=True)
    }
    # Once more, the sweep is done already, and its table goes on in the same run.
    assert main(["-m", "delta_type=lora,bitfit", *words]) == 0
    assert len({log.run.run_id for log in wandb_logs(folder)}) == 1
