"""Whole runs in this process: what they leave behind, that they repeat, and what they survive."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from models import slow_but
from safetensors.torch import load_file
from small import read_results
from transformers import AutoModelForSequenceClassification, AutoTokenizer, T5ForConditionalGeneration

from deltaexp import AutoDeltaModel, HashCheck, checkpoint, registry
from deltaexp.__main__ import main
from deltaexp.checksum import file_sha256
from deltaexp.errors import CheckpointError, HubError
from deltaexp.lab import backbones, schema
from deltaexp.lab.run import Outcome, run

DATES = ["task.train_rows=48", "task.validation_rows=8", "task.test_rows=8", "trainer=smoke", "trainer.progress=false"]


def go(folder: Path, *overrides: str) -> Outcome:
    config, delta = schema.composed(overrides)
    return run(config, delta, folder)


def reviews(bert: Path, data: Path) -> list[str]:
    return [
        "task=sst2", f"task.data={data}", "backbone=local", "backbone.name=small", f"backbone.source={bert}",
        "trainer=smoke", "trainer.progress=false", "trainer.batch_size=16",
    ]  # fmt: skip


QUICK = ("lora", "adapter", "adalora", "bitfit", "none")


@pytest.mark.parametrize("delta_type", slow_but(registry.known(), QUICK))
def test_a_run_leaves_a_verified_delta(delta_type: str, tmp_path: Path) -> None:
    outcome = go(tmp_path, f"delta_type={delta_type}", *DATES)
    assert outcome.folder == tmp_path / "delta"
    names = {"config.json", "delta_model.safetensors", "manifest.json", "README.md", "results.json", "structure.svg"}
    names |= {"probe.safetensors"}
    assert {path.name for path in outcome.folder.iterdir()} == names
    assert not list(tmp_path.glob(".delta*"))
    manifest = checkpoint.read_manifest(outcome.folder)
    assert manifest is not None
    checkpoint.check_files(outcome.folder, manifest, tuple(names - {"manifest.json"}))
    results = read_results(outcome.folder)
    assert results["verification"] == {"hash": "match", "max_logit_difference": 0.0, "probe_rows": 4}
    assert set(results["metrics"]["before"]) == {"loss", "exact_match"}
    assert results["seeds"] == {"init": 42, "data": 42, "dropout": 42}
    assert {"train", "evaluate before", "evaluate after", "save", "verify", "total"} <= set(results["seconds"])
    assert results["parameters"]["trainable"] <= results["parameters"]["delta"]  # which has fixed tensors in some types
    assert results["digests"]["delta_model.safetensors"] == file_sha256(outcome.folder / "delta_model.safetensors")
    assert len(results["data_fingerprint"]) == 64
    assert results["peak_memory_bytes"]["process"] > 1e8

    # And whoever follows the model card gets the same model.
    card = (outcome.folder / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0].replace("PATH_OR_REPO", str(outcome.folder))
    scope: dict = {}
    exec(code, scope)
    assert scope["delta_model"].hash_check is HashCheck.MATCH
    assert str(tmp_path) not in card


@pytest.mark.parametrize("delta_type", slow_but(["lora", "adalora", "vera", "prefix", "peft", "full"], ("lora",)))
def test_the_same_run_twice_gives_the_same_bytes(delta_type: str, tmp_path: Path) -> None:
    first, second = (go(tmp_path / name, f"delta_type={delta_type}", *DATES).folder for name in "ab")
    other = go(tmp_path / "c", f"delta_type={delta_type}", *DATES, "seed=1").folder
    for name in ("delta_model.safetensors", "config.json"):
        assert file_sha256(first / name) == file_sha256(second / name)
    assert file_sha256(first / "delta_model.safetensors") != file_sha256(other / "delta_model.safetensors")


@pytest.mark.slow
def test_every_seed_matters_for_its_own_purpose(tmp_path: Path) -> None:
    base, init, data = (
        load_file(go(tmp_path / name, *DATES, override).folder / "delta_model.safetensors")
        for name, override in (("a", "seed=42"), ("b", "seeds.init=1"), ("c", "seeds.data=1"))
    )
    name = next(name for name in base if name.endswith("lora_A"))
    assert not torch.allclose(base[name], init[name], atol=0.05)  # another start
    assert torch.allclose(base[name], data[name], atol=0.05)  # the same start, other batches
    assert not torch.equal(base[name], data[name])


def test_the_default_learns(tmp_path: Path) -> None:
    """A few dozen steps of the default run lower the loss well below the untouched backbone's."""
    outcome = go(tmp_path, "lora_r=4", *DATES[1:3], "task.train_rows=600", "trainer.max_steps=40", "trainer.progress=false")
    metrics = outcome.results["metrics"]
    assert metrics["after"]["loss"] < 0.8 * metrics["before"]["loss"]


@pytest.mark.slow
def test_the_default_command_reaches_its_goal(tmp_path: Path) -> None:
    outcome = go(tmp_path, "delta_type=lora", "lora_r=4", "trainer.progress=false")
    assert outcome.results["metrics"]["before"]["exact_match"] < 0.2
    assert outcome.score >= 0.9


def test_a_new_head_is_found_trained_saved_and_restored(tmp_path: Path, small_bert: Path, small_reviews: Path) -> None:
    outcome = go(tmp_path, *reviews(small_bert, small_reviews), "trainer.max_steps=40", "trainer.learning_rate=0.01")
    results = outcome.results
    assert results["new_parameters"] == ["classifier"]
    assert results["evaluated_on"] == "validation"
    assert outcome.score == 1.0  # one word tells the label
    saved = load_file(outcome.folder / "delta_model.safetensors")
    assert {"classifier.weight", "classifier.bias"} <= set(saved)
    torch.manual_seed(123)  # another random head than the run's
    model = AutoModelForSequenceClassification.from_pretrained(small_bert)
    loaded = AutoDeltaModel.from_finetuned(outcome.folder, backbone_model=model)
    assert loaded.hash_check is HashCheck.MATCH
    assert torch.equal(model.classifier.weight, saved["classifier.weight"])


def test_a_head_for_other_classes_makes_way_for_a_new_one(tmp_path: Path, small_bert: Path, small_reviews: Path) -> None:
    other = AutoModelForSequenceClassification.from_pretrained(small_bert, num_labels=7)
    other.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(small_bert).save_pretrained(tmp_path / "other")
    outcome = go(tmp_path / "run", *reviews(tmp_path / "other", small_reviews))
    assert outcome.results["new_parameters"] == ["classifier"]
    assert load_file(outcome.folder / "delta_model.safetensors")["classifier.weight"].shape[0] == 2
    scope: dict = {}
    exec(
        (outcome.folder / "README.md")
        .read_text()
        .split("```python\n")[1]
        .split("```")[0]
        .replace("PATH_OR_REPO", str(outcome.folder))
        .replace("FOLDER_OF_THE_BACKBONE", str(tmp_path / "other")),
        scope,
    )
    assert scope["delta_model"].hash_check is HashCheck.MATCH
    assert (
        main(["verify", str(outcome.folder), "backbone=local", "backbone.name=other", f"backbone.source={tmp_path / 'other'}"])
        == 0
    )


def test_early_stopping_takes_the_best_checkpoint(tmp_path: Path, small_bert: Path, small_reviews: Path) -> None:
    outcome = go(
        tmp_path, *reviews(small_bert, small_reviews), "trainer.max_steps=60", "trainer.eval_every=5",
        "trainer.early_stopping_patience=2", "trainer.learning_rate=0.02", "trainer.keep_checkpoints=true",
    )  # fmt: skip
    evaluated = [entry["eval_accuracy"] for entry in outcome.results["training_log"] if "eval_accuracy" in entry]
    assert outcome.results["steps"] < 60
    assert outcome.score == max(evaluated)
    # A checkpoint holds the delta, not the backbone; the newest is kept, and the best that the run went back to.
    kept = sorted(tmp_path.glob("checkpoints/*/delta_model.safetensors"))
    assert len(kept) == 2
    for weights in kept:
        assert set(load_file(weights)) == set(load_file(outcome.folder / "delta_model.safetensors"))


def test_a_truncated_source_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = go(tmp_path, *DATES, "task.max_source_length=8")
    assert outcome.results["truncated"] == {"train": 48, "validation": 8, "test": 8}
    assert "48 of 48 rows of train are longer" in capsys.readouterr().out


def test_a_delta_of_a_run_is_refused_by_another_backbone(tmp_path: Path) -> None:
    outcome = go(tmp_path, *DATES)
    other = T5ForConditionalGeneration.from_pretrained(backbones.location("embedded:tiny_t5"), dtype=torch.float32)
    with torch.no_grad():
        other.shared.weight[5, 5] += 1
    with pytest.raises(CheckpointError, match=r"1 of \d+ tensors differ: shared.weight"):
        AutoDeltaModel.from_finetuned(outcome.folder, backbone_model=other)


def test_a_run_never_writes_over_another(tmp_path: Path) -> None:
    (tmp_path / "delta").mkdir()
    with pytest.raises(CheckpointError, match="exists already"):
        go(tmp_path, *DATES)


def test_a_push_reads_back_what_it_uploaded(tmp_path: Path, hub, hub_client) -> None:
    outcome = go(tmp_path, *DATES, "hub.push=true", "hub.repo_id=DeltaHub/lora-dates")
    stored = hub.read("DeltaHub/lora-dates")
    for path in outcome.folder.iterdir():
        assert stored[path.name] == path.read_bytes()
    model = T5ForConditionalGeneration.from_pretrained(backbones.location("embedded:tiny_t5"), dtype=torch.float32)
    loaded = AutoDeltaModel.from_finetuned("DeltaHub/lora-dates", backbone_model=model)
    assert loaded.hash_check is HashCheck.MATCH


def test_the_delta_survives_a_push_that_fails(tmp_path: Path, hub, hub_client) -> None:
    hub_client.logout()
    with pytest.raises(HubError, match="push it later with: python -m deltaexp push") as caught:
        go(tmp_path, *DATES, "hub.push=true", "hub.repo_id=DeltaHub/lora-dates")
    assert str(tmp_path / "delta") in str(caught.value)
    checkpoint.read(tmp_path / "delta")


@pytest.mark.slow
def test_the_cache_of_tokenised_data_is_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELTAEXP_CACHE", str(tmp_path / "cache"))
    go(tmp_path / "a", *DATES)
    made = sorted((tmp_path / "cache" / "tokenised").iterdir())
    stamps = [(path / "dataset_dict.json").stat().st_mtime_ns for path in made]
    go(tmp_path / "b", *DATES, "delta_type=adapter")
    assert sorted((tmp_path / "cache" / "tokenised").iterdir()) == made
    assert [(path / "dataset_dict.json").stat().st_mtime_ns for path in made] == stamps
    go(tmp_path / "c", *DATES, "task.data_seed=1")
    assert len(list((tmp_path / "cache" / "tokenised").iterdir())) == 2
    shutil.rmtree(tmp_path / "cache")
    assert json.loads((tmp_path / "a/delta/results.json").read_text())["rows"]["train"] == 48


def test_in_half_precision_and_without_the_evaluation_before(tmp_path: Path, small_bert: Path, small_reviews: Path) -> None:
    words = [*reviews(small_bert, small_reviews), "trainer.precision=bf16"]
    outcome = go(tmp_path / "short", *words, "trainer.evaluate_before=false")
    results = read_results(outcome.folder)
    assert set(results["metrics"]) == {"after"}
    assert "evaluate before" not in results["seconds"]
    assert results["precision"] == "bf16"
    assert results["config"]["trainer"]["precision"] == "bf16"
    assert results["verification"]["max_logit_difference"] == 0.0
    assert "| precision | bf16 |" in (outcome.folder / "README.md").read_text()
    # What is trained does not depend on what was evaluated before.
    whole = go(tmp_path / "whole", *words)
    weights = "delta_model.safetensors"
    assert file_sha256(outcome.folder / weights) == file_sha256(whole.folder / weights)
    assert set(read_results(whole.folder)["metrics"]) == {"before", "after"}
