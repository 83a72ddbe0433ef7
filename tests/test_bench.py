"""The benchmark in `scripts/bench`, on a model so small that it only shows that everything runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "bench" / "run.py"
pytest.importorskip("peft")


@pytest.mark.slow
def test_every_contender_is_measured(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--shapes", "tiny", "--seconds", "1", "--rounds", "3", "--out", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    results = json.loads((tmp_path / "results.json").read_text())
    groups = results["shapes"]["tiny"]
    assert not any(group["failed"] for group in groups.values())
    for group in groups.values():
        assert group["flops"] > 0
        for one in group["contenders"].values():
            assert len(one["times"]) == 3
            assert one["ratio"]["q1"] <= one["ratio"]["median"] <= one["ratio"]["q3"]
    trained = groups["training, fp32"]["contenders"]
    # The same modules and ranks, so the same parameters; and what is trained in full keeps more for the backward pass.
    for kind in ("q,v", "all"):
        assert trained[f"PEFT LoRA {kind}"]["trained_parameters"] == trained[f"LoRA {kind}"]["trained_parameters"] > 0
    assert trained["full fine-tuning"]["saved_bytes"] > trained["frozen limit"]["saved_bytes"] > 0
    assert (tmp_path / "results.txt").read_text().count("frozen limit") >= 2
    assert any("against the frozen limit" in line["text"] for line in results["targets"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "answer"),
    [
        ("--shapes tinyy", "There is no shape 'tinyy'. Did you mean 'tiny'?"),
        ("--groups inferense", "Did you mean 'inference, fp32'?"),
    ],
)
def test_what_there_is_not_is_said_in_a_sentence(tmp_path: Path, words: str, answer: str) -> None:
    command = [sys.executable, str(SCRIPT), *words.split(), "--out", str(tmp_path / "out")]
    found = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert found.returncode == 1
    assert answer in found.stderr
    assert "Traceback" not in found.stderr
    assert not (tmp_path / "out").exists()
