"""Freed memory that the process keeps."""

import resource

import pytest
import torch

from deltaexp.lab import memory


@pytest.mark.skipif(not memory.reusable(), reason="needs glibc, with settings of its own")
def test_freed_memory_is_used_again() -> None:
    """Touching what was freed before costs no page faults, and afterwards it is the system's again."""

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(4):
            torch.ones(2**24)  # 64 MiB, 16384 pages
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    given_back = faults()
    with memory.reused():
        faults()
        held = memory._status("VmRSS")
        assert faults() < given_back / 10
    assert memory._status("VmRSS") < held - 2**25
