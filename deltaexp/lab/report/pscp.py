"""PSCP: a score with soft penalties for parameters, inference and memory.

PSCP = P (1 + M_p / C_p)^-b_p (1 + M_f / C_f)^-b_f (1 + M_m / C_m)^-b_m

with the score P in per cent, the trainable parameters M_p, the FLOPs M_f that the delta adds to a forward pass, and the peak of
memory in training M_m. A cost as large as its constant C halves the score where b is 1.

Source: Belanec et al. (2025), PEFT-Bench, arXiv:2511.21285; the constants are those of the authors' script
``scripts/peftfactory/cal_psqp.py`` in github.com/kinit-sk/PEFT-Factory: C_p = 5e8 parameters, C_f = 10 TFLOP, C_m = 94 GB (the
memory of an H100 NVL), all exponents 1. They count FLOPs on one input of 512 tokens; here it is the mean of a few of the task.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deltaexp.lab.report.runs import Run

C_P, C_F, C_M = 5e8, 10e12, 94e9
"""Parameters, FLOPs and bytes that halve the score."""
B_P, B_F, B_M = 1.0, 1.0, 1.0
PERCENT = ("bleu", "chrf")
"""Metrics that run from 0 to 100 already."""


@dataclass(frozen=True)
class Penalised:
    """A score and its penalties, each a factor from 0 to 1."""

    score: float
    """In per cent."""
    parameters: float
    inference: float
    memory: float

    @property
    def value(self) -> float:
        """The score with all of its penalties."""
        return self.score * self.parameters * self.inference * self.memory


def penalty(amount: float, constant: float, exponent: float) -> float:
    """Return (1 + amount / constant)^-exponent."""
    return (1 + amount / constant) ** -exponent


def of(run: Run) -> Penalised | None:
    """Return a run's score with its penalties; None where an input was not measured, or less is the better score."""
    flops, memory = run.results.get("inference_flops"), run.memory
    if not flops or memory is None or not run.results.get("greater_is_better", True) or not math.isfinite(run.score):
        return None
    added = max(0.0, (flops["with_delta"] - flops["backbone"]) / flops["rows"])
    return Penalised(
        run.score * (1 if run.metric in PERCENT else 100),
        penalty(run.trainable, C_P, B_P),
        penalty(added, C_F, B_F),
        penalty(memory, C_M, B_M),
    )


def mean(runs: Sequence[Run]) -> Penalised | None:
    """Return the mean over runs of the score and of each penalty; None where one of them has none."""
    found = [one for one in map(of, runs) if one is not None]
    if len(found) < len(runs):
        return None
    table = zip(*((one.score, one.parameters, one.inference, one.memory) for one in found), strict=True)
    return Penalised(*(sum(values) / len(found) for values in table))
