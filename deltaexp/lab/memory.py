"""How much memory a part of a run takes, in bytes."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from pathlib import Path

import torch

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


def _status(key: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024
