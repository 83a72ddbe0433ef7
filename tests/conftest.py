"""What all tests share."""

import os

import pytest
from hub_fixtures import hub, hub_client

__all__ = ["hub", "hub_client"]

# Read by tokenizers and OpenMP at import: the suite runs on small machines, beside other work.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(autouse=True)
def _own_caches(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what deltaexp caches out of the user's home."""
    monkeypatch.setenv("DELTAEXP_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
