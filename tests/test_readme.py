"""What the README tells users to write works."""

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from models import FAMILIES, logits

from deltaexp import AutoDeltaConfig, AutoDeltaModel, HashCheck, registry
from deltaexp.__main__ import main
from deltaexp.lab import schema
from deltaexp.lab.sweeping import grid

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def block(section: str, language: str = "python", number: int = 0) -> str:
    """Return code of a section, the first of a language if not another."""
    return re.findall(rf"```{language}\n(.*?)```", README.split(f"## {section}\n")[1], re.DOTALL)[number]


def test_the_library_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(block("The library"), names)
    assert "HashCheck.MATCH" in capsys.readouterr().out
    with pytest.warns(UserWarning, match="saved by PEFT, which records no hash"):
        exec(block("The library", number=1), names)
    assert "Wrote an adapter of PEFT's method LORA" in capsys.readouterr().out
    exec(block("The library", number=2), names)
    assert "logits: off by at most" in capsys.readouterr().out


def test_the_delta_type_of_one_file_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_types", dict(registry._types))
    exec(block("Add your own"), {"__name__": "their_package"})
    _, config = schema.composed(["delta_type=scale"])
    assert config.delta_type == "scale"
    family = FAMILIES["t5"]
    backbone = family.build()
    plain = logits(backbone, family.inputs())
    delta = AutoDeltaModel.from_config(AutoDeltaConfig.from_dict({"delta_type": "scale"}), backbone_model=backbone)
    assert torch.equal(logits(backbone, family.inputs()), plain)
    with torch.no_grad():
        for tensor in delta.delta_tensors().values():
            tensor.mul_(2)
    changed = logits(backbone, family.inputs())
    assert not torch.allclose(changed, plain)
    delta.freeze_module()
    delta.save_finetuned(tmp_path / "scale")
    fresh = family.build()
    assert AutoDeltaModel.from_finetuned(tmp_path / "scale", backbone_model=fresh).hash_check is HashCheck.MATCH
    assert torch.equal(logits(fresh, family.inputs()), changed)


def test_the_delta_type_of_one_file_and_one_yaml_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_types", dict(registry._types))
    exec(block("Add your own"), {"__name__": "their_package"})
    (tmp_path / "conf" / "delta_type").mkdir(parents=True)
    (tmp_path / "conf" / "delta_type" / "scale.yaml").write_text(block("Add your own", "yaml"))
    rows = ["task.train_rows=32", "task.validation_rows=8", "task.test_rows=8", "trainer=smoke", "trainer.progress=false"]
    monkeypatch.chdir(tmp_path)
    assert main(["--config-dir", str(tmp_path / "conf"), "delta_type=scale", *rows, "hydra.run.dir=out"]) == 0
    results = json.loads((tmp_path / "out" / "delta" / "results.json").read_text())
    assert results["config"]["modified_modules"] == ["attn.v", "ff.w1"]
    assert results["verification"]["hash"] == "match"


OWN_TASK = dict(re.findall(r"<!-- own-task: (\S+) -->\n```\w+\n(.*?)```", README, re.DOTALL))


@pytest.mark.skipif(not OWN_TASK, reason="the README has no blocks marked as parts of a task of one's own")
def test_the_task_of_ones_own_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files are written where the README says, and its command is run there."""
    before, _, words = OWN_TASK["command"].partition("python -m deltaexp ")
    assert not before
    for name, text in OWN_TASK.items():
        if name == "command":
            continue
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert main([*shlex.split(words), "trainer.progress=false", "hydra.run.dir=out"]) == 0
    results = json.loads((tmp_path / "out" / "delta" / "results.json").read_text())
    assert results["verification"]["hash"] == "match"
    assert results["labels"] == ["bad", "good"]
    assert {"accuracy", "missed"} <= results["metrics"]["after"].keys()
    (tmp_path / "new.csv").write_text("title,text\nNice,It works\nOdd,It hums\n")
    assert main(["predict", "delta=out/delta", "input=new.csv", "out=answers.jsonl", "trainer.progress=false"]) == 0
    answers = [json.loads(line)["prediction"] for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 2
    assert set(answers) <= {"bad", "good"}


def test_every_delta_type_has_its_row() -> None:
    for name in registry.known():
        assert f"| `{name}` |" in README


def test_every_module_is_in_the_layout() -> None:
    layout = README.split("## How the code is laid out")[1]
    for path in (ROOT / "deltaexp").glob("*.py"):
        assert path.name in layout or path.name == "__init__.py"


def commands() -> Iterator[tuple[bool, list[str]]]:
    """Yield of each command that trains whether it is a sweep, and its overrides."""
    for line in re.findall(r"python -m deltaexp ([^`\n]*)", README):
        words = shlex.split(line.split("|")[0], comments=True)
        others = {"push", "report", "verify", "list", "export", "import", "eval", "predict", "--config-dir"}
        if "lora_rank=4" not in words and not others & set(words):
            yield "-m" in words, [word for word in words if "=" in word]


@pytest.mark.slow
def test_the_commands_compose() -> None:
    for sweep, words in commands():
        if not sweep:
            schema.composed(words)


@pytest.mark.slow
def test_the_sweeps_compose() -> None:
    for words in {tuple(words) for sweep, words in commands() if sweep}:
        # One of several rates will do.
        plan = grid.plan(
            tuple(grid.words_for_hydra([re.sub(r"^(trainer\.[a-z_]+=[\w.-]+),.*", r"\1", word) for word in words]))
        )
        if plan is None:  # Optuna decides what to run
            assert {"hydra/sweeper=optuna", "experiment=equal_budget"} & set(words)
        else:
            assert len(plan.jobs) > 1
