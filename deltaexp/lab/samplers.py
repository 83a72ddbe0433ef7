"""The orders in which rows are trained on and measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import RandomSampler, Sampler

PART = 2**16
"""Rows of an epoch's order that are made Python's numbers at once."""


class ListedSampler(Sampler):
    """The places of a list, in its order."""

    def __init__(self, places: list[int]) -> None:
        self.places = places

    def __iter__(self) -> Iterator[int]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


class EpochSampler(Sampler):
    """Another sampler, whose order in an epoch depends on the seed and the epoch's number only, not on what was before.

    Args:
        sampler: The sampler, which draws from its attribute ``generator``.
        seed: The seed of the data.
        epoch: Returns the number of the epoch, from 0.
    """

    def __init__(self, sampler: Any, seed: int, epoch: Callable[[], int]) -> None:
        self.sampler, self.seed, self.epoch = sampler, seed, epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch())
        if type(self.sampler) is RandomSampler:  # which would make a list of Python's numbers of its permutation
            for part in torch.randperm(len(self.sampler), generator=generator, device="cpu").split(PART):
                yield from part.tolist()
            return
        self.sampler.generator = generator
        yield from self.sampler

    def __len__(self) -> int:
        return len(self.sampler)
