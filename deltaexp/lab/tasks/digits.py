"""Handwritten digits, which scikit-learn ships: 1,797 pictures of 8 by 8 pixels (Alpaydin and Kaynak, 1998, UCI)."""

from __future__ import annotations

import functools
import random
from typing import Any

SEED = 42
"""Of the split, which is the same for all runs, whatever their seeds."""
TEST_ROWS, VALIDATION_ROWS = 360, 180


def generate(split: str) -> list[dict[str, Any]]:
    """Return all rows of ``train``, ``validation`` or ``test``, in scikit-learn's order.

    Returns:
        Rows with ``pixels``, 64 numbers from 0 to 16, row by row, and ``label``, from 0 to 9.
    """
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return [{"pixels": images[n].astype(int).tolist(), "label": int(labels[n])} for n in _places(len(labels))[split]]


@functools.cache
def _places(total: int) -> dict[str, list[int]]:
    test = set(random.Random(SEED).sample(range(total), TEST_ROWS))
    rest = [n for n in range(total) if n not in test]
    validation = set(random.Random(SEED).sample(rest, VALIDATION_ROWS))
    return {
        "train": [n for n in rest if n not in validation],
        "validation": sorted(validation),
        "test": sorted(test),
    }
