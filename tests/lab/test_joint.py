"""Runs that are trained in one end in the deltas of separate runs, to rounding; those that cannot be, in their bytes."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import small
import torch
from safetensors.torch import load_file
from test_recovery import SMALL, digests, losses

from deltaexp.checkpoint import WEIGHTS
from deltaexp.lab import joint_step, schema
from deltaexp.lab.checkpoints import Checkpoints
from deltaexp.lab.joint import Team
from deltaexp.lab.run import Outcome, run
from deltaexp.lab.sharing import Shared

QUIET = ["trainer.batch_size=4", "trainer.log_every=1", "trainer.save_every=0", "trainer.progress=false"]
TINY = [*SMALL, *QUIET, "trainer.max_steps=5"]
TOGETHER, ONE_BY_ONE = 1e9, 0.0


def go(
    folder: Path, words: Sequence[str], shared: Shared | None = None, resume: bool = False, usual: Sequence[str] = TINY
) -> Outcome:
    config, delta = schema.composed([*usual, *words, f"resume={resume}"])
    return run(config, delta, folder, shared=shared)


def team(
    folder: Path,
    jobs: Sequence[Sequence[str]],
    faster: float,
    monkeypatch: pytest.MonkeyPatch,
    usual: Sequence[str] = TINY,
) -> tuple[list, list[str]]:
    """Do runs as a team, whatever is faster; return their outcomes, and what was said."""
    monkeypatch.setattr(joint_step, "FASTER", faster)
    said: list[str] = []
    works: list[Any] = [partial(go, folder / f"joint{number}", words, usual=usual) for number, words in enumerate(jobs)]
    shared = Shared()
    found = dict(Team(works, shared, said.append).go())
    assert shared.loads == 1
    return [found[number] for number in range(len(jobs))], said


def close(one: Outcome, other: Outcome, tolerance: float) -> None:
    first, second = ([entry["loss"] for entry in losses(run) if "loss" in entry] for run in (one, other))
    assert first == pytest.approx(second, rel=tolerance)
    found, expected = load_file(one.folder / WEIGHTS), load_file(other.folder / WEIGHTS)
    assert found.keys() == expected.keys()
    # Of single numbers rounding is the whole where their gradient is next to nothing, which Adam divides by its size.
    found, expected = (torch.cat([each[name].flatten() for name in sorted(each)]) for each in (found, expected))
    assert float((found - expected).norm() / expected.norm()) < tolerance
    for when, metrics in other.results["metrics"].items():
        assert one.results["metrics"][when] == pytest.approx(metrics, rel=tolerance)


def test_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [["delta_type=lora", "seed=1"], ["delta_type=adapter", "trainer.max_steps=3"]]
    found, said = team(tmp_path, jobs, TOGETHER, monkeypatch)
    for number, words in enumerate(jobs):
        close(found[number], go(tmp_path / f"alone{number}", words), 1e-3)
        assert found[number].results["trained_together"]["runs"] == 2
    assert len(said) == 1
    assert said[0].startswith("2 runs are trained together: a step of all takes ")


@pytest.fixture(scope="session")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a BERT encoder without dropout."""
    folder = tmp_path_factory.mktemp("calm") / "bert"
    return small.bert(folder, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def with_head(kind: str, folder: Path) -> list[str]:
    """Write rows of different lengths for a task that a head answers, and return the words that name it."""
    texts = [" ".join(small.WORDS[(n + i) % 11] for i in range((2, 5, 10, 4)[n % 4])) for n in range(32)]
    made: dict[str, tuple[list[str], Any]] = {
        "classification": (["task=sst2"], lambda n, text: {"sentence": text, "label": n % 2}),
        "regression": (["task=stsb"], lambda n, text: {"sentence1": text, "sentence2": "a film", "label": n / 4}),
        "tokens": (
            ["task=wnut_17", "task.labels=[O,B-PER]"],
            lambda n, text: {"tokens": text.split(), "ner_tags": [word in small.WORDS[:4] for word in text.split()]},
        ),
        "choices": (
            ["task=copa"],
            lambda n, text: {"premise": text, "question": "cause", "choice1": "a plot", "choice2": text, "label": n % 2},
        ),
    }
    words, row = made[kind]
    data = small.table(folder / kind, [row(n, text) for n, text in enumerate(texts)])
    return [*words, f"task.data={data}", "task.test_split=null"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["classification", "regression", "tokens", "choices"])
def test_heads(kind: str, calm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run has a head of its own, from its own seed, and leaves out what it would leave out alone."""
    common = ["backbone=local", f"backbone.source={calm}", *with_head(kind, tmp_path), "layers=last:1"]
    jobs = [[*common, "delta_type=lora", "seed=1"], [*common, "delta_type=adapter", "seed=2", "trainer.max_steps=10"]]
    usual = ["trainer=smoke", *QUIET, "trainer.max_steps=8"]
    found, said = team(tmp_path, jobs, TOGETHER, monkeypatch, usual)
    assert "together" in said[0], said
    for number, words in enumerate(jobs):
        one = found[number]
        assert one.results["trained_together"]["runs"] == 2
        if number and kind != "classification":
            continue
        other = go(tmp_path / f"alone{number}", words, usual=usual)
        close(one, other, 1e-3)
        assert one.results["shortcuts"] == other.results["shortcuts"]
        assert (one.results["shortcuts"]["last_block"] == "first token") == (kind != "tokens")
    if kind == "classification":
        assert all(one.results["shortcuts"]["while_training"] for one in found)


@pytest.mark.slow
def test_heads_one_by_one_and_with_everything_else(calm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    common = ["backbone=local", f"backbone.source={calm}", *with_head("classification", tmp_path)]
    common += ["trainer.gradient_accumulation_steps=2", "trainer.eval_every=2", "trainer.restore_best=true"]
    common += ["trainer.label_smoothing=0.1", "trainer.max_grad_norm=0.5", "trainer.save_every=1"]
    usual = ["trainer=smoke", *QUIET, "trainer.max_steps=4"]
    jobs = [[*common, "delta_type=lora", "seed=1"], [*common, "delta_type=none", "seed=2"]]
    jobs[0].append("unfrozen_modules=[deltas,LayerNorm]")
    alone = [go(tmp_path / f"alone{number}", words, usual=usual) for number, words in enumerate(jobs)]
    for faster in (TOGETHER, ONE_BY_ONE):
        found, said = team(tmp_path / str(faster), jobs, faster, monkeypatch, usual)
        assert [line.split(":")[0] for line in said] == [f"2 runs are trained {'together' if faster else 'one by one'}"]
        for number, one in enumerate(found):
            if faster:
                close(one, alone[number], 2e-3)
            else:
                assert digests(one.folder) == digests(alone[number].folder)
            assert (one.results["trained_together"] is not None) == (faster > 0)


@pytest.mark.slow
def test_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [["delta_type=lora", "seed=1"], ["delta_type=ia3"], ["delta_type=lora", "lora_r=2"]]
    found, said = team(tmp_path, jobs, ONE_BY_ONE, monkeypatch)
    for number, words in enumerate(jobs):
        alone = go(tmp_path / f"alone{number}", words)
        assert digests(found[number].folder) == digests(alone.folder)
        assert found[number].results["metrics"] == alone.results["metrics"]
        assert found[number].results["trained_together"] is None
    assert said[0].startswith("3 runs are trained one by one: a step of all takes ")


@pytest.mark.slow
def test_everything_else_that_a_training_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more = ["trainer.gradient_accumulation_steps=2", "trainer.eval_every=2", "trainer.restore_best=true"]
    more += ["trainer.label_smoothing=0.1", "trainer.max_grad_norm=0.5", "trainer.max_steps=6", "trainer.save_every=1"]
    jobs = [[*more, "delta_type=adalora"], [*more, "delta_type=vera", "seed=3"], [*more, "delta_type=ia3"]]
    found, _ = team(tmp_path, jobs, TOGETHER, monkeypatch)
    for number, words in enumerate(jobs):
        assert found[number].results["trained_together"]["runs"] == 3
        close(found[number], go(tmp_path / f"alone{number}", words), 2e-3)


@pytest.mark.slow
def test_half_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [["delta_type=adapter", "trainer.precision=bf16", f"seed={seed}"] for seed in (1, 2)]
    found, _ = team(tmp_path, jobs, TOGETHER, monkeypatch)
    for number, words in enumerate(jobs):
        assert found[number].results["trained_together"]["runs"] == 2
        close(found[number], go(tmp_path / f"alone{number}", words), 0.05)


@pytest.mark.slow
@pytest.mark.parametrize("words", [["task=wikitext", "task.max_source_length=16"], ["task=sst2", "task.answer=text"]])
def test_decoders(
    words: list[str],
    backbone_folders: dict[str, Path],
    small_reviews: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = small_reviews
    if words[0] == "task=wikitext":
        data = small.table(tmp_path / "texts", [{"text": "a good film " * (3 + row % 4)} for row in range(40)])
    common = ["backbone=local", f"backbone.source={backbone_folders['llama']}", f"task.data={data}", "task.test_split=null"]
    jobs = [[*common, *words, "delta_type=lora", f"seed={seed}"] for seed in (1, 2)]
    found, said = team(tmp_path, jobs, TOGETHER, monkeypatch, ["trainer=smoke", "trainer.max_steps=4", *QUIET])
    assert "together" in said[0]
    for number, one in enumerate(jobs):
        assert found[number].results["trained_together"]["runs"] == 2
        close(found[number], go(tmp_path / f"alone{number}", one, usual=["trainer=smoke", "trainer.max_steps=4", *QUIET]), 1e-3)


@pytest.mark.slow
def test_who_cannot_be_trained_with_others_trains_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = [
        ["delta_type=soft_prompt"],
        ["delta_type=lora"],
        ["delta_type=full"],
        ["delta_type=lora", "seed=1"],
        ["delta_type=none"],
    ]
    found, said = team(tmp_path, jobs, TOGETHER, monkeypatch)
    assert [one.results["trained_together"] is not None for one in found] == [False, True, False, True, False]
    printed = capsys.readouterr().out
    assert "it is trained by itself: it trains parameters of the backbone itself" in printed
    assert "cannot be limited to some rows of a batch" in printed
    for number in (0, 2, 4):
        assert digests(found[number].folder) == digests(go(tmp_path / f"alone{number}", jobs[number]).folder)
    # One that is left alone, and dropout, which no step of several draws as each would.
    jobs = [["delta_type=lora", "lora_dropout=0.2"], ["delta_type=lora"]]
    found, said = team(tmp_path / "dropout", jobs, TOGETHER, monkeypatch)
    assert said == ["2 runs are trained one by one: there is dropout, or something else random, in it"]
    jobs += [["delta_type=full"]]
    alone = [go(tmp_path / f"dropout/alone{number}", words) for number, words in enumerate(jobs)]
    assert [digests(one.folder) for one in found] == [digests(one.folder) for one in alone[:2]]
    found, said = team(tmp_path / "single", jobs[1:], TOGETHER, monkeypatch)
    assert said == []
    assert [digests(one.folder) for one in found] == [digests(one.folder) for one in alone[1:]]


@pytest.mark.slow
def test_one_that_fails_and_one_that_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run raises is its own affair, and Ctrl-C stops all of them, at their last checkpoints."""
    jobs = [["delta_type=lora", "trainer.learning_rate=1e38"], ["delta_type=lora", "seed=1"], ["delta_type=adapter"]]
    jobs = [[*words, "trainer.save_every=2"] for words in jobs]
    monkeypatch.setattr(joint_step, "FASTER", TOGETHER)

    def kept(number: int, shared: Shared, resume: bool = False) -> Any:
        try:
            return go(tmp_path / f"joint{number}", jobs[number], shared, resume)
        except RuntimeError as error:
            return error

    class Stopping(Team):
        def _steps(self, backbone: Any, live: list) -> None:
            steps = iter(range(7))
            real = self._go_on

            def count(seat: Any, *rest: Any) -> Any:
                if seat is live[1] and next(steps, None) is None:
                    raise KeyboardInterrupt
                return real(seat, *rest)

            self._go_on = count  # type: ignore[method-assign]
            super()._steps(backbone, live)

    shared = Shared()
    with pytest.raises(KeyboardInterrupt):
        list(Stopping([partial(kept, number) for number in range(3)], shared, print).go())
    newest = [Checkpoints(tmp_path / f"joint{number}/checkpoints", 2).newest()[0] for number in (1, 2)]
    assert all(path is not None for path in newest)
    found = dict(Team([partial(kept, number, resume=True) for number in range(3)], Shared(), print).go())
    assert "without overflow" in str(found[0])
    for number in (1, 2):
        assert found[number].results["sessions"] == 2
        close(found[number], go(tmp_path / f"alone{number}", jobs[number]), 1e-3)
