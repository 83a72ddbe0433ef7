"""Whether memory is still what a file holds, told by the operating system and without reading either.

A checkpoint of safetensors is mapped into memory, privately: a page is the file's own until somebody writes to it, and then a
copy of it. Linux tells which: by ``/proc/self/maps`` (proc(5)) and by bits 61 to 63 of the entries of ``/proc/self/pagemap``
(admin-guide/mm/pagemap in the kernel's documentation). Elsewhere nothing is told, and the memory has to be read.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

FILE, SWAPPED, PRESENT = (np.uint64(1 << bit) for bit in (61, 62, 63))
"""Bits of a page's entry: it is a file's (or shared), it was swapped out, it is in memory."""
ENTRY = 8
"""Bytes of an entry."""


class Mapping(NamedTuple):
    """A part of a file in memory."""

    start: int
    end: int
    offset: int
    file: Path


class MappedFiles:
    """Where files are mapped into the memory of this process at present.

    Args:
        files: The files.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._mappings: list[Mapping] = []
        names = {os.fsencode(file.resolve()): file for file in files}
        with contextlib.suppress(OSError, ValueError):
            # A file that was removed or replaced since has " (deleted)" behind its name, and is none of these.
            for line in Path("/proc/self/maps").read_bytes().splitlines():
                place, mode, offset, _, _, *name = line.split(maxsplit=5)
                if mode.endswith(b"p") and name and name[0] in names:
                    start, end = (int(number, 16) for number in place.split(b"-"))
                    self._mappings.append(Mapping(start, end, int(offset, 16), names[name[0]]))

    def place(self, address: int, size: int) -> tuple[Path, int] | None:
        """Return of which file, and from which byte on, some memory is still the very content; None where that is not known.

        Args:
            address: Where the memory begins.
            size: Its number of bytes.
        """
        for mapping in self._mappings:
            if mapping.start <= address and address + size <= mapping.end and _untouched(address, size):
                return mapping.file, mapping.offset + address - mapping.start
        return None


def _untouched(address: int, size: int) -> bool:
    """Say whether no page of some mapped memory was written to: each is the file's, or not in memory at all."""
    page = os.sysconf("SC_PAGESIZE")
    first, last = address // page, (address + max(size, 1) - 1) // page
    with contextlib.suppress(OSError), open("/proc/self/pagemap", "rb", buffering=0) as file:
        file.seek(first * ENTRY)
        entries = np.frombuffer(file.read((last - first + 1) * ENTRY), np.uint64)
        copied = (entries & SWAPPED) | (entries & PRESENT & ~((entries & FILE) << np.uint64(2)))
        return len(entries) == last - first + 1 and not copied.any()
    return False
