"""Which of PyTorch's kernels computes attention."""

from __future__ import annotations

import contextlib

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

AT_ONCE = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Those that take every length as it comes."""


def of_any_length(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Make a context for inputs of ever new lengths, such as of a text that is generated, which grows by each token.

    On a GPU PyTorch prefers the kernels of cuDNN, which are prepared for each shape when it comes first: on an H200 that took
    18 ms, where the attention of a small model takes some microseconds.
    """
    return sdpa_kernel(AT_ONCE) if device.type == "cuda" else contextlib.nullcontext()
