"""A run that was really trained, and what grows from it."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import small
import studies

from deltaexp.__main__ import main


@pytest.fixture(scope="session")
def real_run(tmp_path_factory: pytest.TempPathFactory, small_bert: Path, small_reviews: Path) -> Path:
    """The folder of a run of three steps, with its answers."""
    folder = tmp_path_factory.mktemp("real") / "run"
    words = [
        "task=sst2",
        "backbone=local",
        "backbone.name=small",
        f"backbone.source={small_bert}",
        f"task.data={small_reviews}",
    ]
    words += [
        "task.test_split=test",
        "trainer.eval_every=2",
        "trainer.log_every=1",
        "task.save_predictions=true",
        f"hydra.run.dir={folder}",
    ]
    assert main([*words, *small.QUICK]) == 0
    return folder


@pytest.fixture(scope="session")
def study(tmp_path_factory: pytest.TempPathFactory, real_run: Path) -> Path:
    """Three delta types and both baselines, with seeds; nothing is to be written there."""
    return studies.comparison(real_run, tmp_path_factory.mktemp("study") / "study")
