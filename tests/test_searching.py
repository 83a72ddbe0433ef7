"""Finding deltas on the Hub by their cards' tags."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hub_fixtures import HubClient, naps
from huggingface_hub import CommitOperationAdd, EvalResult

from deltaexp import card
from deltaexp.__main__ import main
from deltaexp.errors import ConfigError, HubError
from deltaexp.searching import search


def delta(client: HubClient, repo: str, delta_type: str, task: str, base: str | None, score: float, **more: Any) -> None:
    """Put a card on the Hub, as a push makes it."""
    results = [
        EvalResult("text-classification", "nyu-mll/glue", task, "accuracy", score, metric_name="accuracy"),
        EvalResult("text-classification", "nyu-mll/glue", task, "loss", 0.5, metric_name="loss"),
    ]
    front = card.front(
        tags=card.tags(delta_type, task, f"task:{task}", f"backbone:{more.pop('backbone', 'mine')}"),
        base_model=base,
        model_name=repo,
        eval_results=results,
    )
    client.api.create_repo(repo, private=more.pop("private", None))
    client.api.create_commit(repo, [CommitOperationAdd("README.md", front.encode())], commit_message="A delta")


__all__ = ["naps"]


@pytest.fixture
def shelf(hub_client: HubClient) -> HubClient:
    """A Hub with five deltas, and a model that is none."""
    delta(hub_client, "DeltaHub/lora-sst2", "lora", "sst2", "google-t5/t5-base", 0.93)
    delta(hub_client, "DeltaHub/lora-rte", "lora", "rte", "google-t5/t5-base", 0.71)
    delta(hub_client, "DeltaHub/adapter-sst2", "adapter", "sst2", "google-t5/t5-small", 0.91)
    delta(hub_client, "ada/lora-sst2", "lora", "sst2", None, 0.8, backbone="t5_base")
    delta(hub_client, "ada/secret", "lora", "sst2", "google-t5/t5-base", 0.99, private=True)
    hub_client.api.create_repo("DeltaHub/t5-sst2")
    plain = b"---\nlibrary_name: peft\ntags: [lora, 'task:sst2']\nbase_model: google-t5/t5-base\n---\n"
    hub_client.api.create_commit("DeltaHub/t5-sst2", [CommitOperationAdd("README.md", plain)], commit_message="No delta")
    return hub_client


def names(**wanted: Any) -> set[str]:
    return {one.repo for one in search(**wanted)}


def test_by_everything(shelf: HubClient) -> None:
    everything = {"DeltaHub/lora-sst2", "DeltaHub/lora-rte", "DeltaHub/adapter-sst2", "ada/lora-sst2", "ada/secret"}
    assert names() == everything
    assert names(task="sst2") == everything - {"DeltaHub/lora-rte"}
    assert names(delta_type="adapter") == {"DeltaHub/adapter-sst2"}
    assert names(author="DeltaHub", task="sst2") == {"DeltaHub/lora-sst2", "DeltaHub/adapter-sst2"}
    assert names(base="google-t5/t5-base") == {"DeltaHub/lora-sst2", "DeltaHub/lora-rte", "ada/secret"}
    # By the last part of the name, and by the name that the lab has for a backbone.
    assert names(base="t5-base") == {"DeltaHub/lora-sst2", "DeltaHub/lora-rte", "ada/secret", "ada/lora-sst2"}
    assert names(base="T5_base", task="sst2", delta_type="lora", author="DeltaHub") == {"DeltaHub/lora-sst2"}
    assert names(base="t5-large") == set()
    shelf.logout()
    assert names() == everything - {"ada/secret"}


def test_what_is_told(shelf: HubClient) -> None:
    (found,) = search(task="rte")
    assert found.to_dict() | {"updated": None} == {
        "repo": "DeltaHub/lora-rte", "delta_type": "lora", "base": "google-t5/t5-base", "task": "rte", "metric": "accuracy",
        "value": 0.71, "updated": None, "private": False,
    }  # fmt: skip
    assert found.updated
    assert search()[0].repo == "ada/secret"  # the newest first
    assert [one.private for one in search(author="ada")] == [True, False]


def test_limits_and_pages(shelf: HubClient) -> None:
    shelf.hub.page_size = 2
    assert len(search()) == 5
    assert len(search(limit=3)) == 3
    assert names(base="t5-small") == {"DeltaHub/adapter-sst2"}  # on the second page
    with pytest.raises(ConfigError, match="limit is 0"):
        search(limit=0)


def test_cards_of_others_may_say_anything(hub_client: HubClient) -> None:
    hub_client.api.create_repo("ada/odd")
    odd = b"---\nlibrary_name: deltaexp\ntags: ['delta_type:', 'task:[red]x\\x1b[31m']\nmodel-index: [{results: 7}]\n---\n"
    hub_client.api.create_commit("ada/odd", [CommitOperationAdd("README.md", odd)], commit_message="Odd")
    (found,) = search()
    assert (found.repo, found.metric, found.value, found.base) == ("ada/odd", None, None, None)
    assert main(["list"]) == 0


def test_a_hub_that_fails(shelf: HubClient, naps: list[float]) -> None:
    fault = shelf.hub.faults.add("status", path_regex="/api/models", status=500)
    assert len(search()) == 5
    assert fault.hits == 1
    shelf.hub.stop()
    with pytest.raises(HubError, match="could not be searched"):
        search()


def test_the_command(shelf: HubClient, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--base", "t5-base", "--task=sst2", "--delta-type", "lora", "author=DeltaHub"]) == 0
    shown = capsys.readouterr().out
    for text in ("DeltaHub/lora-sst2", "google-t5/t5-base", "accuracy 0.9300", "1 deltas on the Hub"):
        assert text in shown
    assert "rte" not in shown
    assert main(["list", "author=ada", "--json"]) == 0
    assert [one["repo"] for one in json.loads(capsys.readouterr().out)] == ["ada/secret", "ada/lora-sst2"]
    assert main(["list", "task=nothing"]) == 0
    assert "No delta on the Hub fits" in capsys.readouterr().out
    assert main(["list", "task=nothing", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["--tsk", "sst2"], "Did you mean 'task'"),
        (["limit=many"], "limit must be a whole number"),
        (["limit=0"], "limit is 0"),
        (["--task"], "--task needs a value"),
        (["sst2"], "write: deltaexp list"),
    ],
)
def test_mistakes(hub_client: HubClient, capsys: pytest.CaptureFixture[str], words: list[str], what: str) -> None:
    assert main(["list", *words]) == 2
    assert what in capsys.readouterr().err
    assert hub_client.hub.requests == []
