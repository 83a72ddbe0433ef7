"""What records operations of a GPU, to be replayed by `deltaexp.lab.graphs`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Protocol

import torch


class Recorder(Protocol):
    """What records operations."""

    def record(self, compute: Callable[[], None]) -> Callable[[], None]:
        """Return what does again what a function does, on the same memory."""

    def aside(self) -> contextlib.AbstractContextManager[None]:
        """Make a context in which is computed where operations are recorded."""

    def random_state(self) -> torch.Tensor:
        """Return the state of the device's random generator."""

    def set_random_state(self, state: torch.Tensor) -> None:
        """Set it."""


class CudaRecorder:
    """Records CUDA graphs, which share their memory, as one is replayed at a time.

    Args:
        device: The GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self._pool = device, torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def record(self, compute: Callable[[], None]) -> Callable[[], None]:
        """Return the replay of what a function has the GPU do."""
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        try:
            # What other threads do meanwhile, such as that which pins the memory of batches, is no concern of the graph.
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                compute()
        except Exception:
            # What fails leaves its stream as the current one, and the random generator as if it were recorded still.
            torch.cuda.set_stream(before)
            with torch.cuda.graph(
                torch.cuda.CUDAGraph(), stream=torch.cuda.Stream(self.device), capture_error_mode="thread_local"
            ):
                torch.zeros(1, device=self.device)
            raise
        return graph.replay

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Within this context is computed on the stream on which is recorded.

        Autograd remembers on which stream a parameter was used, and nothing that is recorded may wait for another one.
        """
        own = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(own)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            own.wait_stream(self._stream)

    def random_state(self) -> torch.Tensor:
        """Return the state of the GPU's random generator."""
        return torch.cuda.get_rng_state(self.device)

    def set_random_state(self, state: torch.Tensor) -> None:
        """Set it."""
        torch.cuda.set_rng_state(state, self.device)
