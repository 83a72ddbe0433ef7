"""The model card of a run, and pushing a run: what is said is true, and nothing of this machine leaves it."""

from __future__ import annotations

import json
import re
import shutil
import statistics
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hub_fixtures import TOKEN, HubClient, hub_env
from small import read_results
from test_cli import deltaexp
from test_run import DATES, go, reviews
from transformers import BertForSequenceClassification

from deltaexp import AutoDeltaModel, HashCheck, checkpoint
from deltaexp.__main__ import main
from deltaexp.card import check_card
from deltaexp.errors import ConfigError, HubError
from deltaexp.lab import modelcard, pushing, schema
from deltaexp.manifest import check_files, read_manifest

REPO = "DeltaHub/lora_small_sst2"


def metadata(text: str) -> dict[str, Any]:
    return yaml.safe_load(text.split("---\n")[1])


def metrics_of(data: dict[str, Any]) -> dict[str, float]:
    (result,) = data["model-index"][0]["results"]
    return {metric["name"]: metric["value"] for metric in result["metrics"]}


def whole(folder: Path) -> None:
    manifest = read_manifest(folder)
    assert manifest is not None
    check_files(folder, manifest, manifest.files)
    assert {path.name for path in folder.iterdir()} == {*manifest.files, "manifest.json"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a user has all that is theirs: backbone, data and runs."""
    return tmp_path_factory.mktemp("home") / "geheim-ada"


@pytest.fixture(scope="module")
def sweep(home: Path, small_bert: Path, small_reviews: Path) -> dict[int, Path]:
    """The deltas of runs on a local backbone and local data: one config, the seeds 1, 2 and 3, and another config."""
    shutil.copytree(small_bert, home / "models" / "small_bert")
    shutil.copytree(small_reviews, home / "data" / "reviews")
    words = reviews(home / "models" / "small_bert", home / "data" / "reviews")
    hub = ["hub.repo_id=DeltaHub/{delta_type}_{backbone}_{task}-{seed}", "hub.license=apache-2.0", "hub.revision=by-seed"]
    runs = {
        seed: go(
            home / "runs" / str(seed), *words, *hub, "trainer.max_steps=6", "trainer.learning_rate=0.01", f"seed={seed}"
        ).folder
        for seed in (1, 2, 3)
    }
    runs[0] = go(home / "runs" / "other", *words, "seed=4", "trainer.max_steps=2").folder
    return runs


@pytest.fixture
def delta(sweep: dict[int, Path], tmp_path: Path) -> Path:
    """A copy of all runs; the delta of the one with seed 1."""
    shutil.copytree(sweep[1].parents[1], tmp_path / "runs")
    return tmp_path / "runs" / "1" / "delta"


# --- what the card says -----------------------------------------------------------------------------------------------


def test_a_card_states_what_was_found(sweep: dict[int, Path]) -> None:
    folder, results = sweep[0], read_results(sweep[0])
    text = (folder / "README.md").read_text()
    check_card(text)
    data = metadata(text)
    assert data["library_name"] == "deltaexp"
    assert {"deltaexp", "lora", "delta_type:lora", "sst2", "task:sst2", "backbone:small"} <= set(data["tags"])
    assert data["datasets"] == ["nyu-mll/glue"]
    assert data["language"] == ["en"]
    assert data["pipeline_tag"] == "text-classification"
    assert not {"base_model", "license"} & set(data)
    (result,) = data["model-index"][0]["results"]
    assert result["dataset"] == {"name": "sst2", "type": "nyu-mll/glue", "config": "sst2", "split": "validation"}
    found = {name: pytest.approx(value, abs=1e-6) for name, value in results["metrics"]["after"].items()}
    assert metrics_of(data) == found
    assert result["metrics"][0]["type"] == "accuracy"
    for said in (
        results["backbone_hash"],
        results["data_fingerprint"],
        results["digests"]["delta_model.safetensors"],
        f"{results['parameters']['trainable']:,} of {results['parameters']['backbone']:,}",
        results["versions"]["torch"],
        results["versions"]["device"],
        f"{results['seconds']['train']:.1f} s training",
        "init 4, data 4, dropout 4",
        "![The backbone with the delta](structure.svg)",
        "query (Linear)",
        "python -m deltaexp verify PATH_OR_REPO backbone=local backbone.source=FOLDER_OF_THE_BACKBONE",
    ):
        assert said in text, said
    (config,) = re.findall(r"```json\n(.*?)```", text, re.DOTALL)
    assert json.loads(config)["trainer"] == results["config"]["trainer"]
    assert "standard deviation" not in text
    assert modelcard.build(checkpoint.read_config(folder), results, folder) == text  # of the file alone, to the letter
    picture = (folder / "structure.svg").read_text()
    assert picture.startswith("<svg")
    assert "lora_A" in picture.replace("&#160;", " ")
    whole(folder)


def test_a_backbone_of_the_hub_is_the_base_model(sweep: dict[int, Path]) -> None:
    results = read_results(sweep[0])
    results["backbone"] |= {"base_model": "google-bert/bert-base-uncased", "local": False}
    results["config"]["backbone"] |= {"name": "bert_base", "source": "google-bert/bert-base-uncased"}
    text = modelcard.build(checkpoint.read_config(sweep[0]), results, sweep[0], {"repo_id": "DeltaHub/x", "license": "mit"})
    check_card(text)
    data = metadata(text)
    assert data["base_model"] == "google-bert/bert-base-uncased"
    assert data["base_model_relation"] == "adapter"
    assert data["license"] == "mit"
    assert "python -m deltaexp verify DeltaHub/x backbone=bert_base\n" in text


def test_mean_and_spread_over_seeds(delta: Path) -> None:
    modelcard.refresh(delta, {"repo_id": REPO})
    text = (delta / "README.md").read_text()
    check_card(text)
    every = [read_results(delta.parents[1] / str(seed) / "delta")["metrics"]["after"]["accuracy"] for seed in (1, 2, 3)]
    mean, spread = statistics.fmean(every), statistics.stdev(every)
    found = metrics_of(metadata(text))
    assert found["accuracy"] == pytest.approx(every[0], abs=1e-6)
    assert found["accuracy, mean of 3 seeds"] == pytest.approx(mean, abs=1e-6)
    assert found["accuracy, standard deviation of 3 seeds"] == pytest.approx(spread, abs=1e-6)
    assert f"({mean:.4f} ± {spread:.4f} over 3 seeds)" in text
    assert "with the seeds 1, 2, 3, which have the same config and the same data; this delta is the one of seed 1." in text
    assert f'AutoDeltaModel.from_finetuned("{REPO}", backbone_model=backbone_model)' in text
    whole(delta)


def test_only_whole_runs_of_the_same_config_and_other_seeds_count(delta: Path) -> None:
    runs, results = delta.parents[1], read_results(delta)
    assert sorted(one["config"]["seed"] for one in modelcard.siblings(delta, results)) == [2, 3]
    shutil.copytree(runs / "2", runs / "2-again")  # the same seed again tells nothing new
    damaged = runs / "3" / "delta" / "results.json"
    damaged.write_text(damaged.read_text().replace('"accuracy"', '"accuracY"', 1))
    assert [one["config"]["seed"] for one in modelcard.siblings(delta, results)] == [2]
    (runs / "2" / "delta" / "manifest.json").unlink()
    (runs / "2-again" / "delta" / "manifest.json").unlink()
    assert modelcard.siblings(delta, results) == []


def test_the_card_of_a_delta_that_no_run_made_is_left_alone(tmp_path: Path, delta: Path) -> None:
    checkpoint.add_files(delta, {"results.json": '{"accuracy": 1}\n', "README.md": "mine"})
    assert modelcard.refresh(delta, {"repo_id": REPO}) is False
    assert (delta / "README.md").read_text() == "mine"


# --- pushing ----------------------------------------------------------------------------------------------------------


def test_nothing_of_this_machine_reaches_the_hub(hub_client: HubClient, delta: Path, home: Path, small_bert: Path) -> None:
    pushing.push(delta, REPO, {"tag": "v1", "message": "One of three"}, print)
    stored = hub_client.hub.read(REPO)
    assert {name: data for name, data in stored.items() if name != ".gitattributes"} == {
        path.name: path.read_bytes() for path in delta.iterdir()
    }
    local = [str(home), home.name, str(Path.home()) + "/", str(delta.parent), "pytest-of", str(small_bert.parent)]
    commits = hub_client.hub.repos["model", REPO].commits.values()
    blobs = {**stored, **{f"commit {one.oid}": f"{one.title}{one.message}".encode() for one in commits}}
    for name, data in blobs.items():
        for text in local:
            assert text.encode() not in data, (name, text)
    shown = json.loads(stored["results.json"])["config"]
    assert (shown["backbone"]["source"], shown["task"]["data"]) == ("small_bert", "reviews")
    # And whoever has the backbone follows the card.
    code = stored["README.md"].decode().split("```python\n")[1].split("```")[0]
    scope: dict[str, Any] = {}
    torch.manual_seed(5)
    exec(code.replace("FOLDER_OF_THE_BACKBONE", str(small_bert)), scope)
    assert isinstance(scope["backbone_model"], BertForSequenceClassification)
    assert scope["delta_model"].hash_check is HashCheck.MATCH


def test_push_without_a_name_goes_where_the_config_says(
    hub_client: HubClient, delta: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    repo = "DeltaHub/lora_small_sst2-1"
    assert main(["push", str(delta)]) == 0
    assert f"Pushed and verified: {hub_client.hub.endpoint}/{repo}/commit/" in capsys.readouterr().out
    card = hub_client.hub.read(repo, "by-seed")["README.md"].decode()
    assert metadata(card)["license"] == "apache-2.0"
    assert f"from_finetuned(\"{repo}\", backbone_model=backbone_model, revision='by-seed')" in card
    # A name and options that are typed win; the card follows.
    words = ["revision=main", "hub.private=true", "license=mit", "tag=v1"]
    assert main(["push", str(delta), "DeltaHub/other", *words]) == 0
    assert hub_client.api.model_info("DeltaHub/other").private
    assert hub_client.hub.repos["model", "DeltaHub/other"].tags
    card = hub_client.hub.read("DeltaHub/other")["README.md"].decode()
    assert metadata(card)["license"] == "mit"
    assert 'from_finetuned("DeltaHub/other", backbone_model=backbone_model)' in card
    whole(delta)
    assert main(["push", str(delta), "DeltaHub/third"]) == 0
    assert metadata((delta / "README.md").read_text())["license"] == "apache-2.0"  # the run's


def test_a_licence_that_was_given_once_stays(hub_client: HubClient, delta: Path) -> None:
    other = delta.parents[1] / "other" / "delta"  # whose config has none
    assert main(["push", str(other), "DeltaHub/x", "license=mit"]) == 0
    assert main(["push", str(other), "DeltaHub/y"]) == 0
    assert metadata(hub_client.hub.read("DeltaHub/y")["README.md"].decode())["license"] == "mit"


@pytest.mark.slow
def test_a_push_that_fails_at_the_end_of_a_run_is_taken_up(
    hub_client: HubClient, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fault = hub_client.hub.faults.add("status", path_regex="/commit/", times=None, status=500)
    words = [*DATES, "hub.push=true", "hub.repo_id=DeltaHub/{task}", "hub.private=true", "hub.tag=v1"]
    with pytest.raises(HubError) as caught:
        go(tmp_path, *words)
    assert fault.hits > 1
    whole(tmp_path / "delta")
    command = str(caught.value).split("push it later with: python -m deltaexp ")[1]
    assert command == f"push {tmp_path}/delta DeltaHub/dates private=true tag=v1"
    hub_client.hub.faults.clear()
    assert main(command.split()) == 0
    assert hub_client.hub.repos["model", "DeltaHub/dates"].tags
    assert "trying again in" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["nowhere"], "no folder 'nowhere'"),
        (["."], "names no repository"),
        ([".", "a", "b"], "push takes 2 words and 3 were given"),
        ([".", "a"], "'a' is no name of a repository"),
        ([".", "o/a", "privat=true"], "Did you mean 'private'"),
        ([".", "o/a", "private=yes"], "it must be true or false"),
        ([".", "o/a", "license=apache"], "which the Hub does not know. Did you mean 'apache-2.0'"),
        ([".", "o/a", "create_pr=true", "tag=v1"], "only proposes"),
        ([".", "o/a", "message=hf_" + "a" * 34], "message looks like an access token"),
        ([".", "o/a", "token=hf_" + "a" * 34], "no option of push 'token'"),
    ],
)
def test_mistakes_are_answered_before_torch(words: list[str], what: str, tmp_path: Path) -> None:
    done = deltaexp("push", *words, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert what in done.stderr
    assert done.stderr.count("\n") == 1
    assert "hf_aaa" not in done.stderr


@pytest.mark.parametrize(
    ("override", "what"),
    [
        ("hub.repo_id=DeltaHub/{dleta_type}", "no placeholder of hub.repo_id 'dleta_type'. Did you mean 'delta_type'"),
        ("hub.repo_id=DeltaHub/{task", "of which the braces do not match"),
        ("hub.repo_id=DeltaHub/{}", "no placeholder"),
        ("hub.repo_id=DeltaHub", "no name of a repository"),
        ("hub.license=gpl3", "Did you mean 'gpl'"),
        ("task.language=English", "it must be a code of ISO 639"),
        ("task.dataset=my data", "it must be a dataset of the Hub"),
        ("hub.message=hf_" + "a" * 34, "hub.message looks like an access token"),
        ("tracker.project=https://ada:pass@wandb", "tracker.project looks like an access token or holds a password"),
        ("modified_modules=[hf_" + "a" * 34 + "]", "modified_modules looks like an access token"),
    ],
)
def test_a_config_that_cannot_be_pushed(override: str, what: str) -> None:
    with pytest.raises(ConfigError) as caught:
        schema.composed([override if " " not in override and ":" not in override else override.replace("=", "='") + "'"])
    assert what in str(caught.value)
    assert "hf_aaa" not in str(caught.value)
    assert "pass@" not in str(caught.value)


def test_a_name_that_becomes_too_long_is_told_before_the_run() -> None:
    name = "hub.repo_id=DeltaHub/" + "x" * 88 + "-{delta_type}"
    schema.composed([name])  # 93 characters with lora
    with pytest.raises(ConfigError, match="at most 96"):
        schema.composed([name, "delta_type=parallel_adapter"])


def test_the_value_of_a_known_secret_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    with pytest.raises(ConfigError, match=r"tracker\.entity looks like an access token"):
        schema.composed(["tracker.entity=" + "k" * 40])


# --- secrets ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_token_that_the_hub_repeats_is_nowhere(hub, tmp_path: Path) -> None:
    """A whole run in a process of its own, logged in, with a Hub that says the token back and a tracker that keeps files."""
    env = hub_env(hub, tmp_path, TOKEN) | {"WANDB_SILENT": "true", "WANDB_API_KEY": "k" * 40}
    body = f"invalid token {TOKEN}"
    hub.faults.add("status", path_regex="/commit/", times=None, status=400, body=body, headers={"X-Error-Message": body})
    done = deltaexp(
        *DATES, "hub.push=true", "hub.repo_id=DeltaHub/{task}", "tracker=wandb", "tracker.mode=offline",
        f"hydra.run.dir={tmp_path}/run", cwd=tmp_path, env=env,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "invalid token [hidden]" in done.stderr
    assert f"deltaexp push {tmp_path}/run/delta DeltaHub/dates" in done.stderr
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in written)
    for secret in (TOKEN, "k" * 40):
        assert secret not in done.stdout + done.stderr
        for path in written:
            assert secret.encode() not in path.read_bytes(), path
    hub.faults.clear()


def test_a_traceback_shows_no_token(hub_client: HubClient, delta: Path) -> None:
    hub_client.hub.faults.add("status", path_regex="/repos/create", times=None, status=403, body=f"no {TOKEN}",
                              headers={"X-Error-Message": f"no {TOKEN}"})  # fmt: skip
    with pytest.raises(HubError) as caught:
        pushing.push(delta, REPO, {}, print)
    assert TOKEN not in "".join(traceback.format_exception(caught.value))
    with pytest.raises(HubError):
        AutoDeltaModel.from_finetuned("DeltaHub/nothing", torch.nn.Linear(1, 1), token=TOKEN)
