"""Searches by Optuna: what they plan, and what becomes of their trials."""

import json
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("optuna", reason="needs the extra search")

from forking import Server
from test_recovery import SMALL, digests

from deltaexp import registry
from deltaexp.errors import ConfigError
from deltaexp.lab import schema
from deltaexp.lab.sweeping import design, grid, record, search, study
from deltaexp.lab.sweeping.study import opened, place

RATE = "trainer.learning_rate=tag(log,relative,interval(0.1,10))"
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks processes")


def planned(*words: str, search_path: tuple[str, ...] = ()) -> tuple[list[design.Planned], list[str]]:
    schema.register_schemas(search_path)
    told = grid.words_for_hydra(["hydra/sweeper=optuna", *words])
    root = schema.compose_root(told, search_path, return_hydra_config=True)
    return design.plan(grid.asked_for(told, root), root.hydra.sweeper.per, search_path)


def test_there_is_a_study_for_each_delta_type_with_the_keys_that_it_has() -> None:
    studies, notes = planned("delta_type=lora,adapter", "lora_r=choice(2,8)", RATE, "trainer.max_steps=3")
    assert [(one.label, sorted(one.space)) for one in studies] == [
        ("lora", ["lora_r", "trainer.learning_rate"]), ("adapter", ["trainer.learning_rate"]),
    ]  # fmt: skip
    assert notes == ["lora_r goes to lora; the other delta types have no such key"]
    assert {one.base.run.trainer.max_steps for one in studies} == {3}
    # The test split has no say in what is chosen.
    assert {one.base.run.task.test_split for one in studies} == {None}
    assert studies[0].first == {"lora_r": "8", "trainer.learning_rate": 5e-3}


def test_the_budget_is_equal_around_what_is_recommended_for_each_type() -> None:
    studies, _ = planned("experiment=equal_budget")
    assert len(studies) >= 8
    for one in studies:
        recommended = registry.get(one.label).learning_rate
        rate: Any = one.space["trainer.learning_rate"]
        assert math.sqrt(rate.low * rate.high) == pytest.approx(recommended)
        assert one.first == {"trainer.learning_rate": recommended}
        assert one.base.run.trainer.max_steps == studies[0].base.run.trainer.max_steps


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["delta_type=lora,ia3"], "Nothing is searched for lora"),
        ([RATE, "seed=1,2"], r"hydra.sweeper.final_seeds=\[1,2,3\]"),
        ([RATE, "delta_type=ia3,bitfit", "lora_r=choice(2,4)"], "None of ia3, bitfit has a key 'lora_r'"),
        ([RATE, "delta_type=lora,bitfitt"], "Did you mean 'bitfit'"),
    ],
)
def test_what_cannot_be_searched(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        planned(*words)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n_trials": 0}, "n_trials is 0"),
        ({"final_seeds": [1, 1]}, "different whole numbers"),
        ({"sampler": "tpa"}, "Did you mean 'tpe'"),
    ],
)
def test_options_that_cannot_be(values: dict[str, Any], message: str) -> None:
    root = schema.compose_root(["hydra/sweeper=optuna"], return_hydra_config=True).hydra.sweeper
    plain = {key: root[key] if key != "final_seeds" else list(root[key]) for key in root if key not in ("_target_", "params")}
    with pytest.raises(ConfigError, match=message):
        search.options_of({**plain, **values})


def test_a_search_without_optuna_names_the_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from deltaexp.__main__ import main

    monkeypatch.setattr(study, "find_spec", lambda package: None)
    assert main(["-m", RATE, "hydra/sweeper=optuna"]) == 2
    assert 'pip install "deltaexp[search]"' in capsys.readouterr().err


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as running:
        yield running


def tried(folder: Path) -> list[tuple[Any, str]]:
    """Return the values and the states of a search's only study."""
    import optuna

    kept = optuna.load_study(study_name=None, storage=opened(place(None, folder)))
    return [(trial.params, trial.state.name.lower()) for trial in kept.trials]


@LINUX
@pytest.mark.slow
def test_trials_are_pruned_and_a_killed_search_ends_as_one_that_was_not(server: Server, tmp_path: Path) -> None:
    words = [
        "-m", "hydra/sweeper=optuna", *SMALL, RATE.replace("0.1", "0.001"), "lora_r=choice(2,8)", "trainer.metric=loss",
        "trainer.eval_every=2", "hydra.sweeper.n_trials=4",
        "hydra.sweeper.pruner_options={n_startup_trials: 1}", "hydra.sweep.dir=one",
    ]  # fmt: skip
    code, said = server.run(words, tmp_path / "whole")
    assert code == 0, said
    whole, parts = tmp_path / "whole" / "one", tmp_path / "parts" / "one"
    states = [state for _, state in tried(whole)]
    assert len(states) == 4
    assert set(states) == {"complete", "pruned"}
    entries = record.read(whole / "trials").values()
    assert sorted(entry.status for entry in entries) == sorted({"complete": "finished"}.get(state, state) for state in states)
    assert "pruned after step 2: with loss" in said
    first = next(entry for entry in entries if entry.status == "finished")
    results = json.loads((whole / "trials" / first.folder / "delta" / "results.json").read_text())
    assert (results["evaluated_on"], results["rows"].keys()) == ("validation", {"train", "validation"})

    process = server.start(words, tmp_path / "parts")
    while not any(path.parent.name == "checkpoints" for path in (parts / "trials").rglob("checkpoint-4")):
        time.sleep(0.02)
    os.kill(process, signal.SIGKILL)
    assert server.wait()[0] == -signal.SIGKILL
    code, said = server.run(words, tmp_path / "parts")
    assert code == 0, said
    assert tried(parts) == tried(whole)
    for entry in entries:
        if entry.status == "finished":
            assert digests(parts / "trials" / entry.folder) == digests(whole / "trials" / entry.folder)

    code, said = server.run([*words, "hydra.sweeper.n_trials=5"], tmp_path / "parts")
    assert code == 0, said
    assert tried(parts)[:4] == tried(whole)
    assert len(tried(parts)) == 5
    assert said.count("=== job") == 1


@LINUX
@pytest.mark.slow
def test_an_equal_budget_ends_in_runs_over_seeds_on_the_test_split(server: Server, tmp_path: Path) -> None:
    words = ["-m", "experiment=equal_budget", "delta_type=lora,bitfit", *SMALL, "hydra.sweeper.n_trials=2"]
    code, said = server.run([*words, "hydra.sweeper.final_seeds=[1,2]", "hydra.sweep.dir=one"], tmp_path)
    assert code == 0, said
    folder = tmp_path / "one"
    studies = {one["study"]: one for one in json.loads((folder / "search.json").read_text())["studies"]}
    assert {name: one["trials"] for name, one in studies.items()} == {"lora": 2, "bitfit": 2}
    for path in (folder / "trials").glob("*/delta/results.json"):
        assert json.loads(path.read_text())["evaluated_on"] == "validation"
    final = [json.loads(path.read_text()) for path in sorted((folder / "final").glob("*/delta/results.json"))]
    found = {(one["config"]["delta_type"], one["config"]["seed"]): one for one in final}
    assert found.keys() == {("lora", 1), ("lora", 2), ("bitfit", 1), ("bitfit", 2)}
    for (name, _), one in found.items():
        assert one["evaluated_on"] == "test"
        assert one["config"]["trainer"]["learning_rate"] == studies[name]["best"]["params"]["trainer.learning_rate"]
    assert "lora: " in said
    assert "over 2 seeds" in said
