"""Weights & Biases, offline and read back."""

import json
import os
import struct
from pathlib import Path

from logs import wandb_logs

from deltaexp.checksum import file_sha256
from deltaexp.lab.config import TrackerConfig
from deltaexp.lab.run import Outcome
from deltaexp.lab.tracking import Trackers, wandb_file


def test_the_curves_the_config_and_the_numbers(tracked: Outcome) -> None:
    (log,) = wandb_logs(tracked.folder.parent)
    assert (log.run.run_group, log.run.job_type, log.run.display_name) == ("first", "train", "lora-tiny_t5-dates-seed42")
    assert (log.run.project, list(log.run.tags)) == ("deltaexp", ["quick"])
    assert log.config["lora_r"] == 8
    logged = [entry for entry in tracked.results["training_log"] if "loss" in entry]
    assert log.points("train/loss") == [(entry["step"], entry["loss"]) for entry in logged]
    assert [step for step, _ in log.points("eval/loss")] == [1, 2, 3]
    assert not any("runtime" in name or "per_second" in name for row in log.history for name in row if "/" in name)
    results = tracked.results
    assert log.summary["after/exact_match"] == results["metrics"]["after"]["exact_match"]
    assert log.summary["parameters/trainable"] == results["parameters"]["trainable"]
    assert log.summary["seconds/train"] == results["seconds"]["train"]
    assert log.summary["peak_memory_bytes/process"] == results["peak_memory_bytes"]["process"]


def test_the_tables(tracked: Outcome) -> None:
    (log,) = wandb_logs(tracked.folder.parent)
    metrics = tracked.results["metrics"]
    assert {row["metric"]: (row["before"], row["after"]) for row in log.table("results")} == {
        name: (metrics["before"][name], metrics["after"][name]) for name in metrics["after"]
    }
    kept = [json.loads(line) for line in (tracked.folder.parent / "predictions.jsonl").read_text().splitlines()]
    table = log.table("predictions")
    assert [row["prediction"] for row in table] == [row["prediction"] for row in kept]
    assert [row["text"] for row in table] == [row["inputs"]["text"] for row in kept]


def test_the_artifacts_have_digests_and_lineage(tracked: Outcome) -> None:
    (log,) = wandb_logs(tracked.folder.parent)
    delta = log.artifacts["delta-lora-tiny_t5-dates"]
    assert (delta.type, delta.use_after_commit) == ("delta", False)
    said = json.loads(delta.metadata)
    files = {path.name: path for path in tracked.folder.iterdir()}
    assert said["sha256"] == {name: file_sha256(path) for name, path in files.items()}
    assert {entry.path: entry.local_path for entry in delta.manifest.contents} == {n: str(p) for n, p in files.items()}
    assert said["base_sha256"] == tracked.results["base_sha256"]
    assert said["backbone"]["source"] == "embedded:tiny_t5"
    assert said["exact_match"] == tracked.score
    # What the run used is named by place and digest, and not uploaded.
    for name, kind, place, digest in (
        ("backbone-tiny_t5", "backbone", "embedded:tiny_t5", tracked.results["base_sha256"]),
        ("data-dates", "dataset", "generated:dates", tracked.results["data_fingerprint"]),
    ):
        used = log.artifacts[name]
        assert (used.type, used.use_after_commit) == (kind, True)
        (entry,) = used.manifest.contents
        assert (entry.ref, entry.digest, entry.local_path) == (place, f"sha256:{digest}", "")


def test_no_token_is_written(tracked: Outcome) -> None:
    for path in tracked.folder.parent.rglob("*"):
        assert not path.is_file() or b"k" * 40 not in path.read_bytes(), path


def test_what_came_from_the_hub_is_referred_to_there(tracked: Outcome, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    results = json.loads(json.dumps(tracked.results))
    results["config"]["backbone"].update(name="t5_base", source="google-t5/t5-base")
    results["backbone"]["revision"] = "a" * 40
    results["config"]["task"].update(name="rte", data="nyu-mll/glue")
    trackers = Trackers()
    trackers.start(TrackerConfig(names=["wandb"], mode="offline"), results["config"], tmp_path, 0)
    trackers.summarise(results, tracked.folder)
    trackers.finish(failed=False)
    (log,) = wandb_logs(tmp_path)
    (backbone,), (data,) = (log.artifacts[name].manifest.contents for name in ("backbone-t5_base", "data-rte"))
    assert backbone.ref == f"https://huggingface.co/google-t5/t5-base/tree/{'a' * 40}"
    assert data.ref == "https://huggingface.co/datasets/nyu-mll/glue"
    # The whole log comes with the results, where none was sent before.
    assert [step for step, _ in log.points("train/loss")] == [1, 2, 3]


def test_disabled_keeps_nothing(tracked: Outcome, tmp_path: Path) -> None:
    said: list[str] = []
    trackers = Trackers(said.append)
    trackers.start(TrackerConfig(names=["wandb"], mode="disabled"), tracked.results["config"], tmp_path, 0)
    trackers.summarise(tracked.results, tracked.folder)
    trackers.finish(failed=False)
    assert not said
    assert not list(tmp_path.iterdir())


def test_a_log_that_breaks_off_is_read_up_to_there(tracked: Outcome, tmp_path: Path) -> None:
    (log,) = wandb_logs(tracked.folder.parent)
    assert wandb_file.last_steps(wandb_file.earlier(tracked.folder.parent)) == {"train": 3, "eval": 3}
    raw, broken = log.path.read_bytes(), tmp_path / "wandb/offline-run-20260101_000000-abcdefgh/run-abcdefgh.wandb"
    broken.parent.mkdir(parents=True)
    for size in (0, 7, 9, 100, len(raw) // 2, len(raw) - 1):
        broken.write_bytes(raw[:size])
        found = list(wandb_file.records(broken))
        assert found == log.records[: len(found)]
        assert len(found) < len(log.records)
        assert wandb_file.last_steps(wandb_file.earlier(tmp_path)).get("train", 0) <= 3


def test_a_record_may_lie_in_several_blocks(tmp_path: Path) -> None:
    record = wandb_file.Record()
    record.output_raw.line = os.urandom(50_000).hex()
    raw, pieces, path = record.SerializeToString(), [], tmp_path / "run.wandb"
    place, rest = 7, raw
    while rest:
        space = 32768 - place % 32768 - 7
        piece, rest = rest[:space], rest[space:]
        kind = {(True, True): 1, (True, False): 2, (False, False): 3, (False, True): 4}[not pieces, not rest]
        pieces.append(struct.pack("<IHB", 0, len(piece), kind) + piece)
        place += len(pieces[-1])
    path.write_bytes(b":W&B\xe1\xbe\x00" + b"".join(pieces))
    assert list(wandb_file.records(path)) == [record]
