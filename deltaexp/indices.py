"""Numbers of rows as tensors, made once: a GPU would have the host wait for each copy, and none can be part of a CUDA graph."""

from __future__ import annotations

import functools

import torch


def index(numbers: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Return numbers as a tensor of shape ``(len(numbers),)``, the same one every time, which nobody may write to."""
    if torch.compiler.is_compiling():
        return torch.tensor(numbers, dtype=torch.long, device=device)
    return _made(numbers, device)


@functools.lru_cache(maxsize=256)
def _made(numbers: tuple[int, ...], device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.tensor(numbers, dtype=torch.long, device=device)
