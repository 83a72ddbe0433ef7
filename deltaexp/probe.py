"""A probe: a small batch and some of the numbers that the trained model makes of it, kept with the delta.

Digests tell whether two models are the same to the last bit. A probe tells whether they compute the same, where versions,
device or those settings of a backbone differ that no tensor shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from deltaexp.errors import ProbeMismatchError

TOLERANCE = 1e-4
"""Largest difference from the recorded numbers, as a part of the largest of them: another machine rounds otherwise."""
INPUT, OUTPUT = "input.", "output"
POSITIONS, CLASSES = 16, 512
"""Of how many positions and classes the numbers are kept, evenly spaced."""


def record(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return the batch and a sample of what the model computes, as tensors for a file.

    Args:
        model: The model with its delta.
        inputs: A batch for it, by keywords; what is no tensor is left out.
    """
    kept = {name: value.detach().cpu() for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    return {**{INPUT + name: value.contiguous().clone() for name, value in kept.items()}, OUTPUT: _sample(model, kept)}


def compare(model: nn.Module, recorded: Mapping[str, torch.Tensor], tolerance: float = TOLERANCE) -> float:
    """Return by how much the model's numbers differ from the recorded ones, as a part of the largest of these.

    Raises:
        ProbeMismatchError: If it is more than the tolerance.
    """
    inputs = {name.removeprefix(INPUT): value for name, value in recorded.items() if name.startswith(INPUT)}
    expected = recorded.get(OUTPUT)
    advice = "Load the backbone with the settings and the versions that results.json names, or train the delta anew."
    if expected is None or not inputs:
        raise ProbeMismatchError(f"The probe that was saved with the delta holds no batch or no numbers. {advice}")
    try:
        found = _sample(model, inputs)
    except (TypeError, RuntimeError, ValueError, IndexError) as error:
        raise ProbeMismatchError(
            f"The model cannot compute the probe that was saved with the delta: {error}. {advice}"
        ) from error
    if found.shape != expected.shape:
        raise ProbeMismatchError(
            f"On the probe that was saved with the delta the model's output is of another size: {list(found.shape)}, and "
            f"{list(expected.shape)} was recorded. {advice}"
        )
    difference = float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-12))
    if not difference <= tolerance:
        raise ProbeMismatchError(
            f"On the probe that was saved with the delta the model's logits differ by {difference:.3g} of the largest, and "
            f"{tolerance:.3g} is allowed: it does not compute what was trained, though its tensors may be the same. {advice}"
        )
    return difference


def _sample(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return evenly spaced numbers of the model's logits, or of its first output where it has none, shape ``(P, C)``."""
    device = next(model.parameters()).device
    was_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.inference_mode():
            result = model(**{name: value.to(device) for name, value in inputs.items()})
    finally:
        for module in was_training:
            module.training = True
    tensor = logits(result)
    flat = tensor.detach().float().cpu().reshape(-1, tensor.shape[-1] if tensor.dim() else 1)
    rows, columns = (_spaced(size, most) for size, most in zip(flat.shape, (POSITIONS, CLASSES), strict=True))
    return flat[rows][:, columns].clone()


def logits(result: Any) -> torch.Tensor:
    """Return the logits of what a model returned, several side by side; its first output where it has none."""
    if isinstance(result, torch.Tensor):
        return result
    named = result.items() if isinstance(result, Mapping) else ()
    found = [value for name, value in named if name.endswith("logits") and isinstance(value, torch.Tensor)]
    own = getattr(result, "logits", None)
    if isinstance(own, torch.Tensor):
        return own
    return torch.cat(found, dim=-1) if found else result[0]


def _spaced(size: int, most: int) -> torch.Tensor:
    """Return at most ``most`` evenly spaced numbers below ``size``."""
    return torch.arange(0, size, max(1, -(-size // most)))
