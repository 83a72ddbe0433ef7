"""Runs side by side."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from deltaexp.__main__ import main
from deltaexp.errors import CheckpointError
from deltaexp.lab import comparison


def finished(folder: Path, delta_type: str, validation: float, test: float, rate: float, **keys: object) -> None:
    """Write what a run leaves, as far as a comparison reads it."""
    (folder / "delta").mkdir(parents=True)
    (folder / "delta" / "delta_model.safetensors").write_bytes(b"0" * 2048)
    results = {
        "config": {"delta_type": delta_type, "seed": 1, "trainer": {"learning_rate": rate}, **keys},
        "task_metric": "exact_match",
        "metrics": {"before": {"exact_match": 0.0}, "after": {"exact_match": test}, "validation": {"exact_match": validation}},
        "parameters": {"trainable": 1234},
        "seconds": {"train": 2.5},
        "peak_memory_bytes": {"training": 3 * 2**20, "process": 2**30},
    }
    (folder / "delta" / "results.json").write_text(json.dumps(results))


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    finished(tmp_path / "0", "lora", validation=0.6, test=0.9, rate=0.001)
    finished(tmp_path / "1", "lora", validation=0.8, test=0.7, rate=0.01)
    finished(tmp_path / "2" / "deeper", "adapter", validation=0.5, test=0.8, rate=0.001)
    finished(tmp_path / "3", "peft", validation=0.4, test=0.1, rate=0.001, peft={"peft_type": "BOFT"})
    (tmp_path / "4").mkdir()  # a run that did not get to its end
    return tmp_path


def test_the_best_are_chosen_on_validation(runs: Path) -> None:
    rows = comparison.best(comparison.collect(runs))
    assert [(row["delta_type"], row["test"], row["learning rate"]) for row in rows] == [
        ("adapter", 0.8, 0.001),
        ("lora", 0.7, 0.01),  # although the other one is better on the test split
        ("peft:BOFT", 0.1, 0.001),
    ]


def test_the_table(runs: Path) -> None:
    console = Console(file=io.StringIO())
    path = comparison.show(runs, console=console)
    assert path == runs / "comparison.md"
    assert "exact_match of 4 runs, best first" in console.file.getvalue()
    lines = path.read_text().splitlines()
    assert lines[0] == f"| {' | '.join(comparison.COLUMNS)} |"
    assert lines[2] == "| lora | 0.600 | 0.900 | 1,234 | 2.0 | 2.5 | 3 | 0.001 | 1 |"
    assert len(lines) == 6


def test_the_command(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(runs), "best=true"]) == 0
    printed = capsys.readouterr().out
    assert "the best on validation of each type" in printed
    assert str(runs / "best.md") in printed.replace("\n", "")
    for words in (["compare"], ["compare", str(runs), "worst=true"], ["compare", str(runs), "best=maybe"]):
        assert main(words) == 2
    assert main(["compare", str(runs / "4")]) == 1
    assert "no finished run" in capsys.readouterr().err


def test_a_folder_without_runs(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no finished run"):
        comparison.collect(tmp_path)
