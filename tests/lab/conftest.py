"""Small data and backbones that several tests of the lab share."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import small


@pytest.fixture(scope="session")
def small_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random BERT encoder."""
    return small.bert(tmp_path_factory.mktemp("backbone") / "small_bert")


@pytest.fixture(scope="session")
def small_reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a classification data set."""
    return small.reviews(tmp_path_factory.mktemp("data") / "reviews")


@pytest.fixture(scope="session")
def backbone_folders(tmp_path_factory: pytest.TempPathFactory, small_bert: Path) -> dict[str, Path]:
    """The folders of random backbones of every architecture, by model type."""
    root = tmp_path_factory.mktemp("backbones")
    return {
        "bert": small_bert,
        "gpt2": small.gpt2(root / "gpt2"),
        "llama": small.llama(root / "llama"),
        "t5": small.t5(root / "t5"),
    }
