"""What deltaexp takes of transformers' Trainer, imported without the libraries that it never calls here.

transformers imports all of PEFT (and with it bitsandbytes and torch's compiler) to be able to say that a model is none of
PEFT's, and SciPy's optimizers for the loss of object detectors. While it is imported, names that look themselves up when they
are used stand in for both.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from types import ModuleType
from typing import Any

STAND_INS = {"peft": ("PeftModel", "PeftMixedModel"), "scipy.optimize": ("linear_sum_assignment",)}
"""The modules that are not to be imported, with what is taken from them at once."""


class _Later:
    """A function or a class of a module that is imported when it is called."""

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return getattr(importlib.import_module(self.module), self.name)(*arguments, **options)

    def __instancecheck__(self, instance: object) -> bool:
        # Nothing is an instance of a class that was never imported.
        return isinstance(instance, getattr(sys.modules.get(self.module), self.name, ()))


class _StandIn(ModuleType):
    """A module that gives way to the true one as soon as anything else is asked of it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), name)


@contextlib.contextmanager
def _standing_in() -> Iterator[None]:
    """Within this context, modules that are installed and have not been imported yet are stand-ins."""
    mine = []
    for module, names in STAND_INS.items():
        root = module.partition(".")[0]
        if root not in sys.modules and (spec := find_spec(root)) is not None:
            one = _StandIn(module)
            one.__spec__ = spec  # by which transformers finds that it is installed
            vars(one).update({name: _Later(module, name) for name in names})
            sys.modules[module] = one
            mine.append(one)
    try:
        yield
    finally:
        for one in mine:
            if sys.modules.get(one.__name__) is one:
                del sys.modules[one.__name__]


with _standing_in():
    from transformers import (
        EarlyStoppingCallback,
        EvalPrediction,
        Trainer,
        TrainerCallback,
        TrainerState,
        TrainingArguments,
        set_seed,
    )
    from transformers.trainer_callback import ExportableState, PrinterCallback
    from transformers.trainer_pt_utils import LabelSmoother, LengthGroupedSampler, find_batch_size

__all__ = [
    "EarlyStoppingCallback",
    "EvalPrediction",
    "ExportableState",
    "LabelSmoother",
    "LengthGroupedSampler",
    "PrinterCallback",
    "Trainer",
    "TrainerCallback",
    "TrainerState",
    "TrainingArguments",
    "find_batch_size",
    "set_seed",
]
