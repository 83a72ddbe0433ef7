"""One tracked run, for the tests of all trackers."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from tracked import TRACKED

from deltaexp.lab import schema
from deltaexp.lab.run import Outcome, run


@pytest.fixture(scope="session")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """A run that was logged to every tracker, with a token in its environment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("WANDB_API_KEY", "k" * 40)
        words = [*TRACKED, "tracker.predictions=true", "tracker.group=first", "tracker.tags=[quick]"]
        return run(*schema.composed(words), tmp_path_factory.mktemp("tracked"))
