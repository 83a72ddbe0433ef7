"""Runs that are interrupted and continued: they end in the bytes of a run that was not."""

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict
from filelock import FileLock
from models import slow_but
from safetensors import safe_open
from transformers import T5ForConditionalGeneration, TrainerCallback

from deltaexp import registry
from deltaexp.__main__ import _with, main
from deltaexp.checksum import file_sha256
from deltaexp.errors import CheckpointError, ConfigError, DamagedFileError, RunError
from deltaexp.lab import backbones, checkpoints, recovery, schema, training
from deltaexp.lab.checkpoints import Checkpoints
from deltaexp.lab.recovery import StoppedByKeyboard
from deltaexp.lab.run import Outcome, run
from deltaexp.lab.tasks import cache

SMALL = [
    "task.train_rows=20", "task.validation_rows=4", "task.test_rows=4", "task.max_target_length=8", "trainer=smoke",
    "trainer.progress=false", "trainer.max_steps=7", "trainer.save_every=2", "trainer.log_every=3",
]  # fmt: skip
DROPOUT = {
    "lora": ["lora_dropout=0.2"], "adalora": ["adalora_dropout=0.2"], "vera": ["vera_dropout=0.2"],
    "loha": ["loha_dropout=0.2"], "lokr": ["lokr_dropout=0.2"], "reft": ["reft_dropout=0.2"],
    "peft": ["peft.lora_dropout=0.2"], "adapter": ["adapter_drop=1"],
}  # fmt: skip
QUICK = ("adalora",)
NEEDS_BITSANDBYTES = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")


class Interruption(Exception):
    pass


class Interrupt(TrainerCallback):
    """Raises after a step, where the next one would begin."""

    def __init__(self, step: int, error: BaseException) -> None:
        self.step, self.error = step, error

    def on_step_begin(self, args, state, control, **_) -> None:
        if state.global_step == self.step:
            raise self.error


def go(folder: Path, *overrides: str) -> Outcome:
    config, delta = schema.composed(overrides)
    return run(config, delta, folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """A run that nothing interrupts."""
    return go(tmp_path_factory.mktemp("whole"), *SMALL)


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch):
    """Begin or continue a run that breaks off after a step."""

    def breaks_off(step: int, folder: Path, *overrides: str, error: BaseException | None = None) -> BaseException:
        build = training.build

        def with_callback(*arguments) -> training.DeltaTrainer:
            trainer = build(*arguments)
            trainer.add_callback(Interrupt(step, error or Interruption()))
            return trainer

        with monkeypatch.context() as patch:
            patch.setattr(training, "build", with_callback)
            with pytest.raises((Interruption, KeyboardInterrupt, RunError)) as caught:
                go(folder, *overrides)
        assert not (folder / "delta").exists()
        return caught.value

    return breaks_off


def digests(folder: Path) -> dict[str, str]:
    delta = folder if folder.name == "delta" else folder / "delta"
    return {name: file_sha256(delta / name) for name in ("delta_model.safetensors", "config.json")}


def losses(outcome: Outcome) -> list[dict]:
    """Return the training log without what depends on the clock."""
    timings = ("runtime", "per_second", "preparation_time")
    return [
        {name: value for name, value in entry.items() if not name.endswith(timings)}
        for entry in outcome.results["training_log"]
        if "train_runtime" not in entry
    ]


@pytest.mark.parametrize("delta_type", slow_but([name for name in registry.known() if name != "none"], QUICK))
def test_a_continued_run_ends_in_the_same_bytes(delta_type: str, tmp_path: Path, interrupted) -> None:
    # Three steps make an epoch, the last of half a batch; the checkpoint after step 4 lies in the middle of the second.
    words = [*SMALL, f"delta_type={delta_type}", *DROPOUT.get(delta_type, []), "trainer.gradient_accumulation_steps=2"]
    whole = go(tmp_path / "whole", *words)
    folder = tmp_path / "resumed"
    interrupted(5, folder, *words)
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["checkpoint-4"]
    resumed = go(folder, *words, "resume=true")
    assert digests(folder) == digests(tmp_path / "whole")
    assert resumed.results["metrics"] == whole.results["metrics"]
    assert losses(resumed) == losses(whole)
    assert [entry["step"] for entry in losses(whole) if "loss" in entry] == [3, 6]
    assert (resumed.results["sessions"], resumed.results["steps"]) == (2, 7)
    assert not (folder / "checkpoints").exists()


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (5, ["trainer.group_by_length=true", "trainer.gradient_accumulation_steps=2"]),
        (5, ["trainer.optimizer=adafactor", "trainer.gradient_checkpointing=true", "trainer.label_smoothing=0.1"]),
        pytest.param(5, ["trainer.optimizer=adamw_8bit", "lora_r=64"], marks=[pytest.mark.slow, NEEDS_BITSANDBYTES]),
        pytest.param(5, ["trainer.optimizer=sgd", "trainer.warmup_steps=3"], marks=pytest.mark.slow),
        pytest.param(5, ["trainer.precision=bf16", "trainer.optimizer=adamw_fused"], marks=pytest.mark.slow),
        pytest.param(5, ["trainer.lr_scheduler=warmup_stable_decay", "trainer.restore_best=true"], marks=pytest.mark.slow),
        pytest.param(5, ["trainer.learning_rates={lora_B: 1e-2}", "trainer.weight_decay=0.1"], marks=pytest.mark.slow),
        pytest.param(1, [], marks=pytest.mark.slow),  # before the first checkpoint
        pytest.param(5, ["trainer.save_every=4", "trainer.batch_size=5"], marks=pytest.mark.slow),  # which ends an epoch
        pytest.param(5, ["trainer.eval_every=3", "trainer.lr_scheduler=cosine"], marks=pytest.mark.slow),
        pytest.param(5, ["trainer.weight_decay=0.1", "lora_plus_ratio=4"], marks=pytest.mark.slow),
        pytest.param(5, ["trainer.group_by_length=true", "seeds.data=3", "trainer.batch_size=7"], marks=pytest.mark.slow),
    ],
)
def test_however_it_is_trained(step: int, words: list[str], tmp_path: Path, interrupted) -> None:
    words = [*SMALL, "lora_dropout=0.1", *words]
    whole = go(tmp_path / "whole", *words)
    interrupted(step, tmp_path / "resumed", *words)
    resumed = go(tmp_path / "resumed", *words, "resume=true")
    assert digests(tmp_path / "resumed") == digests(tmp_path / "whole")
    assert losses(resumed) == losses(whole)


@pytest.mark.slow
def test_the_order_of_the_data_depends_on_its_own_seed_only(tmp_path: Path) -> None:
    words = [*SMALL, "trainer.group_by_length=true", "trainer.max_steps=3"]
    seeds = {"a": ["seed=1"], "b": ["seed=1", "seeds.data=2"]}
    first, other = (go(tmp_path / name, *words, *extra) for name, extra in seeds.items())
    assert digests(first.folder.parent) != digests(other.folder.parent)


def test_a_checkpoint_holds_no_backbone_and_no_pickle(tmp_path: Path, interrupted) -> None:
    interrupted(5, tmp_path, *SMALL, "delta_type=adalora")
    folder = tmp_path / "checkpoints/checkpoint-4"
    found = {path.name for path in folder.iterdir()}
    assert found == {
        "delta_model.safetensors", "training_state.safetensors", "training_state.json", "trainer_state.json", "digests.json",
    }  # fmt: skip
    with safe_open(folder / "delta_model.safetensors", "pt") as file:
        assert all(".adalora." in name for name in file.keys())  # noqa: SIM118 - it is no dict
        weights = sum(file.get_slice(name).get_shape()[0] > 0 for name in file.keys())  # noqa: SIM118
    with safe_open(folder / "training_state.safetensors", "pt") as file:
        names = set(file.keys())
    trained = weights * 3 // 4  # one in four is the mask, which has no moments
    assert len([name for name in names if name.startswith("optimizer.")]) == 3 * trained
    assert len([name for name in names if name.startswith("delta.")]) == 2 * trained  # the means of every parameter
    assert "random.0.cpu" in names
    assert json.loads((folder / "digests.json").read_text()).keys() == found - {"digests.json"}


@pytest.mark.slow
def test_early_stopping_remembers_the_best_checkpoint(
    tmp_path: Path, interrupted, small_bert: Path, small_reviews: Path
) -> None:
    words = [
        "task=sst2", f"task.data={small_reviews}", "backbone=local", "backbone.name=small", f"backbone.source={small_bert}",
        "trainer=smoke", "trainer.progress=false", "trainer.batch_size=16", "trainer.max_steps=60", "trainer.eval_every=5",
        "trainer.early_stopping_patience=3", "trainer.learning_rate=0.02", "trainer.save_every=4",
    ]  # fmt: skip
    whole = go(tmp_path / "whole", *words)
    evaluated = {entry["step"]: entry["eval_accuracy"] for entry in losses(whole) if "eval_accuracy" in entry}
    best = max(evaluated, key=lambda step: (evaluated[step], -step))
    assert whole.results["steps"] == best + 15 < 60
    folder, moved = tmp_path / "resumed", tmp_path / "moved"
    interrupted(best + 9, folder, *words)
    kept = {path.name for path in (folder / "checkpoints").iterdir()}
    assert f"checkpoint-{best}" in kept
    assert len(kept) == 2
    folder.rename(moved)  # no path in it is absolute
    resumed = go(moved, *words, "resume=true")
    assert digests(moved) == digests(tmp_path / "whole")
    assert losses(resumed) == losses(whole)
    assert resumed.score == whole.score

    interrupted(best + 9, folder, *words)
    (folder / f"checkpoints/checkpoint-{best}/delta_model.safetensors").write_bytes(b"")
    with pytest.raises(DamagedFileError, match=f"checkpoint-{best}.* early stopping goes back"):
        go(folder, *words, "resume=true")


def test_training_that_had_ended_is_not_repeated(whole: Outcome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, evaluate, calls = tmp_path / "resumed", training.evaluate, []

    def breaks_off(trainer: training.DeltaTrainer, rows: object) -> dict[str, float]:
        calls.append(trainer.state.global_step)
        if trainer.state.global_step == 7:
            raise Interruption
        return evaluate(trainer, rows)

    with monkeypatch.context() as patch:
        patch.setattr(training, "evaluate", breaks_off)
        with pytest.raises(Interruption):
            go(folder, *SMALL)
    assert calls == [0, 7]
    monkeypatch.setattr(training.DeltaTrainer, "training_step", None)
    resumed = go(folder, *SMALL, "resume=true")
    assert digests(folder) == digests(whole.folder)
    assert resumed.results["metrics"] == whole.results["metrics"]
    assert resumed.results["steps"] == 7


def test_a_damaged_checkpoint_is_told_and_not_used(
    whole: Outcome, tmp_path: Path, interrupted, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupted(5, tmp_path, *SMALL)
    good = tmp_path / "checkpoints/checkpoint-4"
    assert checkpoints.fault(good) is None
    for path in good.iterdir():
        content = path.read_bytes()
        flipped = content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]
        for bad in (b"", content[:-3], flipped):
            path.write_bytes(bad)
            assert checkpoints.fault(good) is not None, path.name
        path.unlink()
        assert checkpoints.fault(good) == f"{path.name} is missing"
        path.write_bytes(content)
    (good / "training_state.safetensors").write_bytes(b"")
    (tmp_path / "checkpoints/.checkpoint-x").mkdir()
    (tmp_path / ".delta.unverified").mkdir()
    capsys.readouterr()
    go(tmp_path, *SMALL, "resume=true", "trainer.keep_checkpoints=true")
    assert "checkpoint-4 cannot be used: training_state.safetensors is not the file" in capsys.readouterr().out
    assert digests(tmp_path) == digests(whole.folder)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["checkpoint-7"]
    assert {path.name for path in tmp_path.iterdir()} == {"delta", "checkpoints", "run.json", ".run.lock"}


def test_an_older_checkpoint_goes_only_when_the_newer_one_is_complete(tmp_path: Path) -> None:
    saved = Checkpoints(tmp_path, every=1)
    saved.write(1, lambda folder: (folder / "a").write_text("one"))

    def fails(folder: Path) -> None:
        (folder / "a").write_text("half of two")
        raise Interruption

    with pytest.raises(Interruption):
        saved.write(2, fails)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2/a").write_text("of a killed run, before there were digests")
    newest, faults = saved.newest()
    assert newest == tmp_path / "checkpoint-1"
    assert faults == ["checkpoint-2 cannot be used: digests.json is missing."]
    saved.write(2, lambda folder: (folder / "a").write_text("two"), best=1)
    saved.write(3, lambda folder: (folder / "a").write_text("three"), best=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-3"]
    assert (saved.newest()[0], checkpoints.fault(tmp_path / "checkpoint-1")) == (tmp_path / "checkpoint-3", None)


def test_when_a_checkpoint_is_due(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [step for step in range(1, 10) if Checkpoints(tmp_path, 4).due(step)] == [4, 8]
    assert not any(Checkpoints(tmp_path, 0).due(step) for step in range(1, 10))
    now = 1000.0
    monkeypatch.setattr(checkpoints.time, "monotonic", lambda: now)
    saved = Checkpoints(tmp_path)
    now += checkpoints.INTERVAL - 1
    assert not saved.due(1)
    now += 1
    assert saved.due(2)
    saved.seconds = 10.0  # a large one is written less often
    assert not saved.due(2)
    now += 10 / checkpoints.SHARE
    assert saved.due(3)


def test_who_may_use_a_folder(tmp_path: Path, interrupted) -> None:
    interrupted(5, tmp_path, *SMALL)
    with pytest.raises(RunError, match="has not finished. Add resume=true"):
        go(tmp_path, *SMALL)
    with pytest.raises(RunError, match=r"another config, which differs in lora_r \(8, now 4\)"):
        go(tmp_path, *SMALL, "lora_r=4", "resume=true")
    with FileLock(tmp_path / ".run.lock"), pytest.raises(RunError, match="still going on, in another process"):
        go(tmp_path, *SMALL, "resume=true")
    record = (tmp_path / "run.json").read_text()
    (tmp_path / "run.json").write_text(record[:100])
    with pytest.raises(RunError, match="no record of a run"):
        go(tmp_path, *SMALL, "resume=true")
    (tmp_path / "run.json").write_text(record)
    (tmp_path / "delta").mkdir()
    with pytest.raises(CheckpointError, match="exists already.*With resume=true its results are shown"):
        go(tmp_path, *SMALL)


def test_a_finished_run_shows_what_it_found(whole: Outcome, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(whole.folder.parent, tmp_path, dirs_exist_ok=True)
    again = go(tmp_path, *SMALL, "resume=true")
    assert "this run is done already" in capsys.readouterr().out
    assert (again.score, again.results) == (whole.score, json.loads((whole.folder / "results.json").read_text()))
    for path in whole.folder.iterdir():
        assert (again.folder / path.name).read_bytes() == path.read_bytes()
    (again.folder / "results.json").write_text("{}")
    with pytest.raises(DamagedFileError, match=r"results\.json"):
        go(tmp_path, *SMALL, "resume=true")


def test_what_changed_since_is_said_or_refused(
    tmp_path: Path, interrupted, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupted(5, tmp_path, *SMALL)
    record = json.loads((tmp_path / "run.json").read_text())
    record["versions"]["torch"] = "1.0"
    (tmp_path / "run.json").write_text(json.dumps(record))
    with monkeypatch.context() as patch:
        patch.setattr(training, "build", None)  # it does not come to that
        patch.setattr("deltaexp.lab.tasks.data._fingerprint", lambda splits: "other")
        with pytest.raises(RunError, match=r"the data changed since it began, from \w+ to other"):
            go(tmp_path, *SMALL, "resume=true")
    assert "versions have changed (torch 1.0 -> " in capsys.readouterr().out


def test_a_backbone_that_changed_since_is_refused(tmp_path: Path, interrupted) -> None:
    place = tmp_path / "backbone"
    model = T5ForConditionalGeneration.from_pretrained(backbones.location("embedded:tiny_t5"))
    model.save_pretrained(place)
    words = [*SMALL, "backbone=local", f"backbone.source={place}", "backbone.name=mine", "backbone.tokenizer=byt5"]
    interrupted(5, tmp_path / "run", *words)
    model.shared.weight.data[3, 3] += 1
    model.save_pretrained(place)
    with pytest.raises(RunError, match="the digest of the backbone changed since it began"):
        go(tmp_path / "run", *words, "resume=true")


def test_the_keyboard_is_told_how_to_go_on(tmp_path: Path, interrupted) -> None:
    error = interrupted(5, tmp_path, *SMALL, error=KeyboardInterrupt())
    assert isinstance(error, StoppedByKeyboard)
    assert "the checkpoint after step 4" in str(error)
    assert "Continue with: " in str(error)


def test_the_newest_unfinished_run_is_found(tmp_path: Path) -> None:
    config = recovery.describe(*schema.composed(SMALL))
    assert recovery.find(tmp_path, config) == (None, False)
    for name, finished in (("a", False), ("b", False), ("c", True)):
        with recovery.claim(tmp_path / name, config, resume=False):
            if finished:
                (tmp_path / name / "delta").mkdir()
    with recovery.claim(tmp_path / "d", {**config, "seed": 1}, resume=False):
        pass
    (tmp_path / "e").mkdir()
    (tmp_path / "e/run.json").write_text("{")
    assert recovery.find(tmp_path, config) == (tmp_path / "b", False)
    with recovery.claim(tmp_path / "b", config, resume=True):  # which is being continued elsewhere
        assert recovery.find(tmp_path, config) == (tmp_path / "a", False)
    shutil.rmtree(tmp_path / "a")
    shutil.rmtree(tmp_path / "b")
    assert recovery.find(tmp_path, config) == (tmp_path / "c", True)
    same = recovery.describe(*schema.composed([*SMALL, "resume=true", "tracker=wandb", "trainer.save_every=0"]))
    assert recovery.find(tmp_path, same) == (tmp_path / "c", True)


def test_the_command_line_continues_shows_and_begins(
    whole: Outcome, tmp_path: Path, interrupted, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    runs = tmp_path / "outputs/dates/tiny_t5/lora"
    shutil.copytree(whole.folder.parent, runs / "done")
    assert main([*SMALL, "resume=true"]) == 0
    assert f"The run in '{Path('outputs/dates/tiny_t5/lora/done')}' is done already." in capfd.readouterr().out
    folder = runs / "it's one, [two] $"
    interrupted(5, folder, *SMALL)
    assert main(["resume=true", *SMALL]) == 0
    said = capfd.readouterr().out
    assert "is continued." in said
    assert "after step 4" in said
    assert digests(folder) == digests(whole.folder)
    assert {path.name for path in runs.iterdir()} == {"done", folder.name}
    assert main([*SMALL, "hydra.run.dir=outputs/dates/tiny_t5/lora/done", "resume=true", "seed=1"]) == 1
    assert "differs in seed (42, now 1)" in capfd.readouterr().err


@pytest.mark.slow
def test_the_command_line_begins_where_there_is_nothing(
    whole: Outcome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*SMALL, "resume=true"]) == 0
    assert "There is no run of this config below 'outputs/dates/tiny_t5/lora'" in capfd.readouterr().out
    (folder,) = tmp_path.glob("outputs/dates/tiny_t5/lora/*")
    assert digests(folder) == digests(whole.folder)


def test_half_made_data_of_a_killed_run_are_cleared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELTAEXP_CACHE", str(tmp_path))
    stale, fresh = (tmp_path / "tokenised" / name for name in (".making-a", ".making-b"))
    for path in (stale, fresh):
        path.mkdir(parents=True)
    os.utime(stale, (1e9, 1e9))
    table = cache.cached({"key": 1}, lambda: DatasetDict(train=Dataset.from_list([{"x": 1}])))
    assert table["train"]["x"][:] == [1]
    assert not stale.exists()
    assert fresh.exists()  # which another process may be making


def test_overrides_stand_together() -> None:
    overrides = ["lora_r=4", "resume=true"]
    words = ["--config-dir", "x", "lora_r=4", "resume=true"]
    assert _with(words, overrides, ["resume=true"]) == ["--config-dir", "x", "resume=true", "lora_r=4"]
    assert _with(["-m"], [], ["a=1"]) == ["-m", "a=1"]


def test_resuming_is_decided_without_torch(tmp_path: Path) -> None:
    config = recovery.describe(*schema.composed(SMALL))
    parent = tmp_path / "outputs/dates/tiny_t5/lora"
    with recovery.claim(parent / "running", config, resume=False):
        code = (
            "import sys, deltaexp.__main__ as command\n"
            f"words = {[*SMALL, 'resume=true']!r}\n"
            "from deltaexp.lab import schema\n"
            "from omegaconf import OmegaConf\n"
            "OmegaConf.register_new_resolver('short_id', lambda: 'x')\n"
            "print(command._resumed(words, words, schema.composed(words), []) == words)\n"
            "assert not {'torch', 'transformers'} & set(sys.modules)\n"
        )
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("True\n")  # the one that is there is still going on


def test_mistakes() -> None:
    for words in (["trainer.save_every=-1"], ["resume=yes_please"], ["trainer.keep_checkpoints=some"]):
        with pytest.raises(ConfigError):
            schema.composed(words)
