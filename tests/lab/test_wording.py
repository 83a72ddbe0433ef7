"""Values as words of the command line, and runs as files of experiments, are read back as they were."""

from pathlib import Path
from typing import Any

import pytest

from deltaexp.lab import schema, wording


@pytest.mark.parametrize(
    "value",
    [
        *("q", "attn.q", "0.x", "null", "True", "a b", "x\\", '"q"', "", "1e5", "[r]q$", r"[r]a\.b'\d+", r"[r](a|b),c{2}\'"),
        *(None, True, 7, 0.5, [], ["q", r"[r]x\.(y|z)", "0"], {}, {"attn.q": 4, "[r](a|b)\\.c": 1, "a b": {"c": ["d:e"]}}),
    ],
    ids=repr,
)
def test_written_values_are_read_back(value: Any) -> None:
    assert schema.parse([f"key={wording.written(value)}"])[0].value() == value


def test_an_experiment_composes_to_the_run_it_was_made_of(tmp_path: Path) -> None:
    typed = ["experiment=minilm_sst2", "trainer=smoke", "seed=7", "task.train_rows=5", "tracker.tags=[a]"]
    run, _ = schema.composed(typed)
    _, delta = schema.composed(["delta_type=ia3", "layers=last:1"])
    text = wording.experiment(typed, delta, "What it is.")
    assert text.splitlines()[:2] == ["# @package _global_", "# What it is."]
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(text)
    found_run, found_delta = schema.composed(["experiment=mine"], [str(tmp_path)])
    assert (found_run, found_delta) == (run, delta)
