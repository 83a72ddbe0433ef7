"""The orders of rows."""

import pytest
import torch
from torch.utils.data import RandomSampler

from deltaexp.lab import samplers


def test_an_epochs_order_is_that_of_torchs_sampler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samplers, "PART", 7)
    plain = RandomSampler(range(50), generator=torch.Generator().manual_seed(3 + 2))
    assert list(samplers.EpochSampler(RandomSampler(range(50)), 3, lambda: 2)) == list(plain)


def test_another_default_device_changes_nothing() -> None:
    order = list(samplers.EpochSampler(RandomSampler(range(50)), 3, lambda: 2))
    with torch.device("meta"):
        assert list(samplers.EpochSampler(RandomSampler(range(50)), 3, lambda: 2)) == order
