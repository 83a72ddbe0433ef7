"""What all tests share."""

import contextlib
import os
import signal
import sys
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:
    # Before torch is imported: the processes of pytest-xdist share the cores, and so would their threads.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# Read by tokenizers at import: the suite runs on small machines, beside other work.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
from browser import chromium, new_page
from hub_fixtures import hub, hub_client
from hypothesis import HealthCheck, settings

# What starts the tests in the background may ignore Ctrl-C, and so would the commands that they interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
# On a busy machine, drawing examples is slow.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

with contextlib.suppress(ImportError):  # it comes with rouge-score
    from absl import logging

    # When Hydra sets up logging, it would close the stream that it found at its import: what pytest captures.
    logging.get_absl_handler().python_handler.stream = sys.__stderr__

__all__ = ["chromium", "hub", "hub_client", "new_page"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes minutes, so that no process is left alone with it in the end."""
    items.sort(key=lambda item: "test_minilm" not in item.nodeid)


@pytest.fixture(autouse=True)
def _own_caches(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what deltaexp caches out of the user's home."""
    monkeypatch.setenv("DELTAEXP_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(autouse=True)
def _large(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the inputs of the engine's tests, which are small, be computed as large ones are; runs compute as they always do."""
    from deltaexp import low_rank

    if "lab" not in request.path.relative_to(Path(__file__).parent).parts:
        monkeypatch.setattr(low_rank, "SMALL", 0)
