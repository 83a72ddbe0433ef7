"""How much memory a part of a run takes, in bytes, and whether the C library keeps what is freed."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's mallopt(3): from how much free memory at the heap's end it is given back to the system, and from which
size a block is mapped apart and given back when it is freed."""
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """Measures a stretch of a run from its making to `read`; what is measured is the peak above what was held before."""

    def __init__(self) -> None:
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
            ctypes.CDLL(None).malloc_trim(0)  # what earlier jobs have freed is not there to be used unseen
        self.before: int | None = None
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        with contextlib.suppress(OSError):  # only Linux has it
            CLEAR.write_text("5")  # the high-water mark starts anew, so that jobs of one process do not add up
            self.before = _status("VmRSS")

    def read(self) -> dict[str, int]:
        """Return the peaks: of the stretch (``training``, on Linux), of the process so far, and of CUDA memory."""
        peak = {}
        if self.before is not None:
            peak["training"] = max(0, _status("VmHWM") - self.before)
        if sys.platform != "win32":
            import resource

            unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss counts bytes on macOS, kibibytes elsewhere
            peak["process"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        if torch.cuda.is_available():
            peak["cuda"] = torch.cuda.max_memory_allocated()
        return peak


def reusable() -> bool:
    """Say whether `reused` can do anything: with glibc, and where the environment does not set what it sets."""
    found = (name for name in os.environ if name.startswith("MALLOC_") or name == "GLIBC_TUNABLES")
    return platform.libc_ver()[0] == "glibc" and not any(found)


@contextlib.contextmanager
def reused() -> Iterator[None]:
    """Within this context freed memory stays with the process; afterwards it is given back to the system.

    A step frees at its end what the next one needs again. By itself glibc gives part of it back each time, and every page of
    4 KiB of which the system has to clear anew when it is touched: this took up to a sixth of a training step in bfloat16.
    """
    library = ctypes.CDLL(None)
    library.mallopt(MMAP_THRESHOLD, 2**30)
    library.mallopt(TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        # The most to which glibc raises them by itself; it no longer does once they are set.
        library.mallopt(MMAP_THRESHOLD, 2**25)
        library.mallopt(TRIM_THRESHOLD, 2**26)
        library.malloc_trim(0)


def _status(key: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024
