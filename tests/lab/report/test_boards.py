"""Methods over seeds, side by side: what they are called, what is chosen, what is told apart."""

import io
import json
import math
import shutil
from pathlib import Path

import pytest
import studies
from rich.console import Console

from deltaexp.lab import report
from deltaexp.lab.report import boards, runs
from deltaexp.lab.report.boards import Board, Pair


def board(folder: Path, **options: bool) -> Board:
    """Return the only board of the runs below a folder."""
    (found,) = boards.boards(runs.collect([folder]).runs, **options)
    return found


def pair(found: Board, *types: str) -> Pair:
    """Return the comparison of two delta types."""
    return next(pair for pair in found.pairs if {pair.first.delta_type, pair.second.delta_type} == set(types))


def test_seeds_come_together(study: Path) -> None:
    found = board(study)
    assert [(method.label, len(method.runs)) for method in found.methods] == [
        ("full", 1), ("lora", 3), ("adapter", 3), ("bitfit", 3), ("none", 1),
    ]  # fmt: skip
    lora = found.methods[1]
    assert lora.score == pytest.approx(0.95)
    assert lora.spread == pytest.approx(0.0)
    assert found.methods[3].spread == pytest.approx(0.005)
    assert found.methods[0].interval is None
    assert [method.baseline for method in found.methods] == [True, False, False, False, True]


def test_what_is_alike_is_not_separable(study: Path) -> None:
    found = board(study)
    assert not pair(found, "lora", "adapter").separable
    assert pair(found, "lora", "bitfit").separable
    assert pair(found, "bitfit", "none").separable
    compared = pair(found, "lora", "bitfit")
    assert compared.difference is not None
    assert compared.p is not None
    assert compared.p >= compared.difference.p
    assert compared.basis == "200 rows, 3 seeds and 3 seeds"
    assert pair(found, "full", "lora").basis == "200 rows, 1 seed and 3 seeds; one seed says nothing of others"


def test_keys_that_differ_make_methods(real_run: Path, tmp_path: Path) -> None:
    for rank in (4, 8):
        for seed in (1, 2):
            config = {
                "lora_r": rank,
                "trainer.learning_rate": rank / 1000,
                "tracker.mode": f"{seed}",
                "trainer.save_every": seed,
            }
            studies.grown(real_run, tmp_path / f"{rank}-{seed}", "lora", seed, range(rank * 5 + seed), config=config)
    studies.grown(real_run, tmp_path / "other", "adapter", 1, range(9), config={"trainer.learning_rate": 0.5})
    found = board(tmp_path)
    assert [method.label for method in found.methods] == [
        "adapter", "lora · lora_r=4 · learning_rate=0.004", "lora · lora_r=8 · learning_rate=0.008",
    ]  # fmt: skip
    assert [len(method.runs) for method in found.methods] == [1, 2, 2]
    assert found.methods[1].keys == {"lora_r": 4, "trainer.learning_rate": 0.004}


def test_a_repeated_run_is_no_further_seed(real_run: Path, tmp_path: Path) -> None:
    studies.grown(real_run, tmp_path / "0", "lora", 1, range(9))
    shutil.copytree(tmp_path / "0", tmp_path / "1")
    found = board(tmp_path)
    assert [len(method.runs) for method in found.methods] == [1]
    assert [run.name for run in found.repeats] == ["1"]


def test_the_best_is_chosen_on_validation(real_run: Path, tmp_path: Path) -> None:
    studies.grown(real_run, tmp_path / "0", "lora", 1, range(10), 0.6, config={"lora_r": 4})
    studies.grown(real_run, tmp_path / "1", "lora", 1, range(60), 0.8, config={"lora_r": 8})
    studies.grown(real_run, tmp_path / "2", "adapter", 1, range(40), 0.5)
    found = board(tmp_path)
    assert found.best().label == "lora · lora_r=8"  # although the other one is better on the test split
    assert {method.label for method in found.methods if method.best} == {"lora · lora_r=8", "adapter"}
    found = board(tmp_path, only_best=True)
    assert [method.label for method in found.methods] == ["adapter", "lora · lora_r=8"]
    assert len(found.pairs) == 1


def test_less_may_be_better(real_run: Path, tmp_path: Path) -> None:
    for name, wrong in (("lora", 10), ("adapter", 60)):
        folder = studies.grown(real_run, tmp_path / name, name, 1, range(wrong), metric="mse", trainable=wrong)
        path = folder / "delta" / "results.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "greater_is_better": False}))
    found = board(tmp_path)
    assert [method.label for method in found.methods] == ["lora", "adapter"]
    assert found.best().label == "lora"
    assert found.methods[0].pscp is None
    assert "trainable parameters" in found.methods[0].fronts
    assert "trainable parameters" not in found.methods[1].fronts
    assert found.pairs[0].separable


def test_tasks_and_backbones_have_boards_of_their_own(real_run: Path, tmp_path: Path) -> None:
    studies.grown(real_run, tmp_path / "0", "lora", 1, range(9))
    studies.grown(real_run, tmp_path / "1", "lora", 1, range(9), config={"task.name": "other"})
    studies.grown(real_run, tmp_path / "2", "lora", 1, range(9), config={"backbone.name": "large"}, metric="f1")
    found = boards.boards(runs.collect([tmp_path]).runs)
    assert [(one.title, one.metric) for one in found] == [
        ("other with small", "accuracy"), ("t with large", "f1"), ("t with small", "accuracy"),
    ]  # fmt: skip


def test_fronts(study: Path) -> None:
    found = board(study)
    on = {method.label for method in found.methods if "trainable parameters" in method.fronts}
    assert on == {"full", "lora", "bitfit", "none"}  # the adapter is no better than LoRA, and has more parameters
    costs = {"a": (1.0, 0.5), "b": (2.0, 0.5), "c": (3.0, 0.9), "d": (4.0, float("nan")), "e": (3.0, 0.9)}
    assert boards.front(costs, lambda name: costs[name][0], lambda name: costs[name][1]) == ["a", "c", "e"]  # type: ignore
    assert boards.front(costs, lambda name: None, lambda name: 1.0) == []  # type: ignore


def test_without_answers_seeds_alone_decide(real_run: Path, tmp_path: Path) -> None:
    for seed in (1, 2, 3):
        studies.grown(real_run, tmp_path / f"lora-{seed}", "lora", seed, range(10 + seed), answers=seed != 2)
        studies.grown(real_run, tmp_path / f"bitfit-{seed}", "bitfit", seed, range(80 + seed))
    studies.grown(real_run, tmp_path / "none", "none", 1, range(100))
    found = board(tmp_path)
    without = "lora-2 kept no answers (task.save_predictions=true)"
    assert pair(found, "lora", "bitfit").basis == f"3 seeds and 3 seeds, no rows: {without}"
    assert pair(found, "lora", "bitfit").separable
    alone = pair(found, "lora", "none")
    assert alone.difference is None
    assert not alone.separable
    assert alone.basis == f"cannot be compared: {without}"
    assert pair(found, "bitfit", "none").basis.startswith("200 rows")  # others are no worse for it


def test_answers_must_be_those_that_were_scored(real_run: Path, tmp_path: Path) -> None:
    for name in ("lora", "bitfit"):
        studies.grown(real_run, tmp_path / name, name, 1, range(9))
    path = tmp_path / "lora" / "predictions.jsonl"
    whole = path.read_text()
    path.write_text("".join(line + "\n" for line in whole.splitlines()[9:]))
    assert "the answers of lora give accuracy 1 and not the run's 0.955" in board(tmp_path).pairs[0].basis
    path.write_text(whole.replace('"reference": "good"', '"reference": "great"'))
    assert board(tmp_path).pairs[0].difference is not None  # the number of the class is what counts
    path.write_text(whole[:-9])
    assert "lora/predictions.jsonl cannot be read" in board(tmp_path).pairs[0].basis


def test_other_rows_are_not_paired(real_run: Path, tmp_path: Path) -> None:
    for name, rows in (("lora", 200), ("adapter", 200), ("bitfit", 100), ("ia3", 100)):
        studies.grown(real_run, tmp_path / name, name, 1, range(rows // 10), rows=rows)
    found = board(tmp_path)
    assert "was asked other rows than" in pair(found, "lora", "bitfit").basis
    assert pair(found, "lora", "adapter").basis.startswith("200 rows")
    assert pair(found, "bitfit", "ia3").basis.startswith("100 rows")


def test_a_run_that_diverged_is_worst(real_run: Path, tmp_path: Path) -> None:
    for name, seed in (("lora", 1), ("lora", 2), ("bitfit", 1), ("bitfit", 2)):
        studies.grown(real_run, tmp_path / f"{name}-{seed}", name, seed, range(50))
    path = tmp_path / "lora-1" / "delta" / "results.json"
    results = json.loads(path.read_text())
    results["metrics"]["after"]["accuracy"] = results["metrics"]["validation"]["accuracy"] = math.nan
    path.write_text(json.dumps(results))
    found = board(tmp_path)
    assert [method.label for method in found.methods] == ["bitfit", "lora"]
    assert found.best().label == "bitfit"
    assert found.pairs[0].basis == "cannot be compared: accuracy of lora-1 is no finite number"
    assert found.methods[1].fronts == []
    page = report.write(tmp_path, Console(file=io.StringIO()))
    method = json.loads(page.with_suffix(".json").read_text())["boards"][0]["methods"][1]
    assert (method["mean"], method["low"]) == (None, None)


def test_of_many_methods_not_every_two_are_compared(real_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boards, "MANY", 5)
    for number in range(6):
        kind = "lora" if number % 2 else "adapter"
        studies.grown(real_run, tmp_path / str(number), kind, 1, range(number + 1), config={"rank": number})
    found = board(tmp_path)
    best = {method.label for method in found.methods if method.best}
    assert found.best().label in best
    compared = {frozenset((pair.first.label, pair.second.label)) for pair in found.pairs}
    assert len(compared) == 5
    assert all(found.best().label in labels for labels in compared)
    assert best in compared
