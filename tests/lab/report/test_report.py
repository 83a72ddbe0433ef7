"""The report as a whole: its files, its command, and that nothing is dropped in silence."""

import csv
import io
import json
import shutil
from pathlib import Path

import pytest
import small
import studies
from rich.console import Console

from deltaexp.__main__ import main
from deltaexp.lab import report


@pytest.fixture
def written(study: Path, tmp_path: Path) -> Path:
    """The folder of the report on the study, with one more run that broke off."""
    folder = tmp_path / "study"
    shutil.copytree(study, folder)
    shutil.copytree(folder / "lora-1", folder / "lora-4", ignore=lambda *_: ["delta"])
    shutil.copytree(folder / "lora-1", folder / "lora-5")
    console = Console(file=io.StringIO())
    assert report.write(folder, console) == folder / "report.html"
    (tmp_path / "printed").write_text(console.file.getvalue())  # type: ignore[attr-defined]
    return folder


def test_the_terminal_has_the_answer(written: Path) -> None:
    printed = (written.parent / "printed").read_text()
    assert "t with small: accuracy on test (more is better)" in printed
    flowing = " ".join(printed.split())
    assert "Best on validation: lora, with accuracy 0.950 on test (3 seeds), for 2,000 trainable parameters." in flowing
    assert "Not separable from it: full, adapter." in flowing
    assert "Worse: bitfit, none." in flowing
    assert "lora-4 is unfinished: begun " in flowing
    assert "lora-5 repeats a run of the same config and seed" in flowing
    assert "report.html, with .json, .csv, .md and .tex beside it" in flowing


def test_the_files_beside_the_page(written: Path) -> None:
    values = json.loads((written / "report.json").read_text())
    (board,) = values["boards"]
    assert [method["label"] for method in board["methods"]] == ["full", "lora", "adapter", "bitfit", "none"]
    assert board["answer"] == {
        "chosen": "lora", "better": [], "worse": ["bitfit", "none"], "same": ["full", "adapter"], "unknown": [], "reason": None,
    }  # fmt: skip
    assert [other["status"] for other in values["others"]] == ["unfinished"]
    assert len(values["runs"]) == 12
    rows = list(csv.DictReader(io.StringIO((written / "report.csv").read_text())))
    assert len(rows) == 12
    assert {row["method"] for row in rows} == {"full", "lora", "adapter", "bitfit", "none", ""}  # the last is the repeat
    assert [float(row["score"]) for row in rows if row["name"] == "bitfit-2"] == [0.69]
    text = (written / "report.md").read_text()
    assert "| full | 1 | 0.960 | – | – |" in text
    assert "| lora | adapter | 0.005 | " in text
    assert "not separable" in text
    assert "- lora-4 is unfinished" in text
    table = (written / "report.tex").read_text()
    assert table.count(r"\toprule") == table.count(r"\midrule") == table.count(r"\bottomrule") == 1
    assert r"95 \% interval" in table


def test_latex_and_markdown_hold_any_name(real_run: Path, tmp_path: Path) -> None:
    for name in (r"a_b & c\d{e}", "x|y#z^~"):
        studies.grown(real_run, tmp_path / "runs" / str(hash(name)), "lora", 1, range(9), config={"task.name": name, "a": name})
        studies.grown(real_run, tmp_path / "runs" / str(hash(name) + 1), "lora", 1, range(9), config={"task.name": name})
    report.write(tmp_path / "runs", Console(file=io.StringIO()))
    table = (tmp_path / "runs" / "report.tex").read_text()
    assert r"a\_b \& c\textbackslash{}d\{e\}" in table
    assert r"x|y\#z\textasciicircum{}\textasciitilde{}" in table
    assert r"a=x\|y#z" in (tmp_path / "runs" / "report.md").read_text()


def test_a_sweep_of_failures_is_told(tmp_path: Path) -> None:
    job = {"folder": "0", "identity": "a", "overrides": {}, "status": "failed", "error": "RunError: no", "seconds": 1.0}
    (tmp_path / "sweep.json").write_text(json.dumps({"format": 1, "command": "x", "overrides": [], "jobs": [job]}))
    console = Console(file=io.StringIO())
    page = report.write(tmp_path, console).read_text()
    assert "0 is failed: RunError: no" in console.file.getvalue()  # type: ignore[attr-defined]
    assert "RunError: no" in page


def test_the_command(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["report", str(study), str(study / "lora-1"), "best=true", f"out={out}"]) == 0
    assert str(out / "report.html") in capsys.readouterr().out.replace("\n", "")
    assert {path.name for path in out.iterdir()} == {f"report.{ending}" for ending in ("html", "json", "csv", "md", "tex")}
    for words, said in (
        (["report"], "takes the folders"),
        (["report", "a", "b"], "add out=FOLDER"),
        (["report", "a", "worst=true"], "best"),
        (["report", "a", "best=maybe"], "must be true or false"),
    ):
        assert main(words) == 2
        assert said in capsys.readouterr().err
    assert main(["report", str(tmp_path / "nowhere")]) == 1
    assert "There is no folder" in capsys.readouterr().err


@pytest.mark.slow
def test_a_sweep_ends_in_a_report(small_bert: Path, small_reviews: Path, tmp_path: Path) -> None:
    """Runs that were really trained, by a sweep, compared on rows and seeds."""
    words = [
        "task=sst2",
        "backbone=local",
        "backbone.name=small",
        f"backbone.source={small_bert}",
        f"task.data={small_reviews}",
    ]
    words += ["task.test_split=test", "delta_type=lora,none", "lora_r=2,4", "seed=1,2", "trainer.learning_rate=0.05"]
    folder = tmp_path / "sweep"
    assert main(["-m", *words, *small.QUICK, "trainer.max_steps=30", f"hydra.sweep.dir={folder}"]) == 0
    values = json.loads((folder / "report.json").read_text())
    (board,) = values["boards"]
    assert {method["label"] for method in board["methods"]} == {"lora · lora_r=2", "lora · lora_r=4", "none"}
    assert {method["seeds"] for method in board["methods"]} == {2}
    assert all(pair["basis"] == "16 rows, 2 seeds and 2 seeds" for pair in board["pairs"])
    assert all(method["pscp"] is not None for method in board["methods"])
    assert len(values["commands"]) == 1
    assert all(run["command"] is not None and "delta_type=" in run["command"] for run in values["runs"])


def test_what_was_left_out_is_told(study: Path, tmp_path: Path) -> None:
    """Seconds and memory of runs that did not compute everything are not those of runs that did."""
    folder = tmp_path / "study"
    shutil.copytree(study, folder)
    told = {
        "lora-1": {"trained_together": {"runs": 2, "time": 0.7}},
        "bitfit-1": {"shortcuts": {"while_training": True, "frozen_blocks": 4, "last_block": "first token"}},
    }
    for path in folder.glob("*/delta/results.json"):
        results = json.loads(path.read_text())
        for old in ("shortcuts", "trained_together"):  # of an older version
            results.pop(old, None)
        results["speed"] = {"asked": "auto"}
        path.write_text(json.dumps(results | told.get(path.parent.parent.name, {})))
    console = Console(file=io.StringIO(), width=200)
    report.write(folder, console)
    printed = " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]
    assert "Seconds and memory of all: with trainer.speed=auto." in printed
    assert "Seconds and memory of lora: with other runs trained in the same steps." in printed
    assert "Seconds and memory of bitfit: with kept activations of frozen blocks." in printed
    assert "Seconds and memory of bitfit: with the first token only in the last block." in printed
    assert "Seconds and memory of bitfit: with kept activations" in (folder / "report.html").read_text()
    values = json.loads((folder / "report.json").read_text())
    assert {run["name"]: run["computed"] for run in values["runs"]}["none-1"] == ["trainer.speed=auto"]
