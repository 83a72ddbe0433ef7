"""Optuna's studies, kept on disk and asked and told from outside."""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("optuna", reason="needs the extra search")

from optuna.distributions import CategoricalDistribution, FloatDistribution

from deltaexp.errors import ConfigError, RunError
from deltaexp.lab.sweeping.study import TRIAL, Method, Study, Trial, place

SPACE = {"rate": FloatDistribution(1e-3, 1.0, log=True), "rank": CategoricalDistribution(["2", "4"])}


def study(folder: Path, budget: int = 4, **options: Any) -> Study:
    values = {"method": Method(seed=7), "space": SPACE, "maximise": False, **options}
    return Study("one", place(None, folder), budget=budget, **values)


def loss(trial: Trial) -> float:
    return (trial.params["rate"] - 0.1) ** 2 + (trial.params["rank"] == "2")


def spend(searched: Study) -> list[Any]:
    while (trial := searched.ask()) is not None:
        searched.tell(trial.number, "complete", loss(trial))
    return [trial.params for trial in searched.trials]


def finish(searched: Study) -> None:
    for trial in searched.unfinished():
        searched.tell(trial.number, "complete", loss(trial))


def test_the_budget_is_spent_and_no_more(tmp_path: Path) -> None:
    first = {"rate": 0.5, "rank": "2"}
    searched = study(tmp_path, first=first)
    params = spend(searched)
    assert len(params) == 4
    assert params[0] == first
    assert searched.best() == min(searched.trials, key=lambda trial: (trial.value, trial.number))


def test_a_search_that_is_taken_up_again_asks_for_what_it_would_have_asked_for(tmp_path: Path) -> None:
    whole = spend(study(tmp_path / "whole", budget=14))
    for _ in range(5):  # each ends while a trial is under way
        searched = study(tmp_path / "parts", budget=14)
        finish(searched)
        for _ in range(2):
            if (trial := searched.ask()) is not None:
                searched.tell(trial.number, "complete", loss(trial))
        searched.ask()
    searched = study(tmp_path / "parts", budget=14)
    finish(searched)
    assert [trial.params for trial in searched.trials] == whole
    assert len(spend(study(tmp_path / "parts", budget=16))) == 16


def test_a_trial_that_was_only_half_asked_for_does_not_count(tmp_path: Path) -> None:
    searched = study(tmp_path)
    searched._study.ask()  # killed before its values were chosen
    assert searched.unfinished() == []
    assert len(spend(study(tmp_path))) == 4


def test_failed_trials_count_unless_they_are_tried_again(tmp_path: Path) -> None:
    searched = study(tmp_path, budget=2)
    failed = searched.ask()
    assert failed is not None
    searched.tell(failed.number, "complete", float("nan"))
    spend(searched)
    assert [trial.state for trial in searched.trials] == ["fail", "complete"]
    assert searched.retry() == 1
    again = searched.ask()
    assert again is not None
    assert again.params == failed.params
    searched.tell(again.number, "complete", 0.5)
    assert [trial.state for trial in searched.trials] == ["complete", "complete"]
    assert searched.ask() is None


def test_a_pruned_trial_is_none_of_the_best(tmp_path: Path) -> None:
    searched = study(tmp_path, budget=2)
    for state, value in (("complete", 1.0), ("pruned", 0.1)):
        trial = searched.ask()
        assert trial is not None
        searched.tell(trial.number, state, value)
    assert [(trial.state, trial.value) for trial in searched.trials] == [("complete", 1.0), ("pruned", 0.1)]
    best = searched.best()
    assert best is not None
    assert best.number == 0


def test_a_study_of_something_else_is_not_gone_on_with(tmp_path: Path) -> None:
    study(tmp_path, about={"metric": "loss", "config": {"seed": 1, "task": "dates"}})
    with pytest.raises(ConfigError, match="made for something else: metric"):
        study(tmp_path, about={"metric": "f1"})
    with pytest.raises(ConfigError, match=r"made for something else: config seed \(1, now 2\)\."):
        study(tmp_path, about={"config": {"seed": 2, "task": "dates"}})
    with pytest.raises(ConfigError, match="made for something else: searched"):
        study(tmp_path, about={"metric": "loss"}, space={"rate": FloatDistribution(0.1, 1.0)})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "tpee"}, "Did you mean 'tpe'"),
        ({"pruner": "medium"}, "Did you mean 'median'"),
        ({"sampler_options": {"n_startup_trial": 1}}, "Did you mean 'n_startup_trials'"),
        ({"pruner": "percentile"}, "percentile"),
    ],
)
def test_a_method_that_there_is_not_is_told(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Method(**options)


def test_where_studies_are_kept(tmp_path: Path) -> None:
    assert place(None, tmp_path) == str(tmp_path / "optuna.log")
    with pytest.raises(ConfigError, match="password"):
        place("mysql://me:secret@host/studies", tmp_path)
    with pytest.raises(RunError, match="cannot be opened"):
        Study("one", "nonsense://host", Method(), SPACE, 1, True)
    searched = Study("one", place(f"sqlite:///{tmp_path}/studies.db", tmp_path), Method(sampler="random"), SPACE, 2, True)
    assert len(spend(searched)) == 2


def test_a_runs_folder_says_which_trial_it_is(tmp_path: Path) -> None:
    searched = study(tmp_path, method=Method(pruner="median"))
    trial = searched.ask()
    assert trial is not None
    searched.hand_out(trial.number, tmp_path / "run", "f1")
    values = json.loads((tmp_path / "run" / TRIAL).read_text())
    assert (values["metric"], values["number"], values["pruner"]) == ("f1", 0, "median")
