"""The score with penalties, against the numbers of its authors."""

import json
from pathlib import Path

import pytest
import studies

from deltaexp.lab.report import boards, pscp, runs


@pytest.mark.parametrize(
    ("parameters", "teraflops", "gigabytes", "score"),
    [(196_608, 8.69 - 8.38, 28.41, 74.7), (14_680_064, 0.0, 27.75, 80.1), (53_130_752, 10.06 - 8.38, 34.53, 51.7)],
)  # IA3, LoRA and P-tuning on an 8B Llama, as in the authors' scripts/peftfactory/cal_psqp.py
def test_its_terms(parameters: int, teraflops: float, gigabytes: float, score: float) -> None:
    found = pscp.Penalised(
        score,
        pscp.penalty(parameters, pscp.C_P, pscp.B_P),
        pscp.penalty(teraflops * 1e12, pscp.C_F, pscp.B_F),
        pscp.penalty(gigabytes * 1e9, pscp.C_M, pscp.B_M),
    )
    expected = score / (1 + parameters / 5e8) / (1 + teraflops / 10) / (1 + gigabytes / 94)
    assert found.value == pytest.approx(expected)
    assert pscp.penalty(5e8, pscp.C_P, 2.0) == 0.25


def test_its_inputs_are_measured(real_run: Path, tmp_path: Path) -> None:
    folder = studies.grown(real_run, tmp_path / "0", "lora", 1, range(20), trainable=5 * 10**8)
    path = folder / "delta" / "results.json"
    results = json.loads(path.read_text())
    results["inference_flops"] = {"rows": 2, "backbone": 10**12, "with_delta": 21 * 10**12}
    results["peak_memory_bytes"] = {"cuda": 94 * 10**9, "process": 1}
    path.write_text(json.dumps(results))
    (run,) = runs.collect([tmp_path]).runs
    assert pscp.of(run) == pscp.Penalised(90.0, 0.5, 0.5, 0.5)
    assert boards.boards([run])[0].methods[0].pscp.value == pytest.approx(11.25)  # type: ignore
    del results["inference_flops"]
    path.write_text(json.dumps(results))
    assert pscp.of(runs.collect([tmp_path]).runs[0]) is None
