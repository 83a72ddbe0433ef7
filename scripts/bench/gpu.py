"""What is measured on a GPU alone: steps as CUDA graphs, and the memory of a step at its peak."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import masking_utils

from deltaexp import speed
from deltaexp.lab.recorders import CudaRecorder


class Graphs:
    """Captures steps as CUDA graphs. They share their memory, as they are replayed one after the other and nothing is kept."""

    def __init__(self) -> None:
        self._recorder = self._new()

    def captured(self, step: Callable[[], Any]) -> Callable[[], Any]:
        """Return what replays a step.

        Raises:
            RuntimeError: If it cannot be captured, such as where it asks the GPU for a value.
        """
        with speed.configured(recorded=True):  # deltaexp takes other ways where calls cost nothing
            return self._captured(step)

    def _captured(self, step: Callable[[], Any]) -> Callable[[], Any]:
        with self._recorder.aside():
            step()
            torch.cuda.synchronize()
            # Better to find out beforehand: a capture that fails can leave the memory in a state that later ones suffer from.
            torch.cuda.set_sync_debug_mode("error")
            try:
                step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        try:
            replay = self._recorder.record(step)
        except Exception:
            self._recorder = self._new()
            raise
        replay()
        torch.cuda.synchronize()
        return replay

    def _new(self) -> CudaRecorder:
        return CudaRecorder(torch.device("cuda", torch.cuda.current_device()))


@contextlib.contextmanager
def without_packing() -> Iterator[None]:
    """Within this context transformers takes every row for one text.

    Without a mask it looks for texts that follow each other in a row. While a step is captured it cannot look: it takes there
    to be some, and computes attention with a mask, by another kernel than in an ordinary step.
    """
    before = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = before


def peak_memory(step: Callable[[], Any]) -> int:
    """Return the bytes that a step takes at its peak, above what was there before."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
