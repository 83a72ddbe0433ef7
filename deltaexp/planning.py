"""What a config would put into a backbone, found out without memory for it: the check before a foreign config is believed."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from deltaexp import checkpoint, ownership, surgery, targets
from deltaexp.errors import TensorShapeError, UnsafeFileError, listing
from deltaexp.registry import DeltaConfig
from deltaexp.structure import backbone_parameters
from deltaexp.targets import Structure


def check(
    config: DeltaConfig,
    backbone: nn.Module,
    tensors: Mapping[str, torch.Tensor],
    where: str,
    structure: Structure | None = None,
) -> None:
    """Compare tensors with those that a config describes on a backbone, before any of them is made.

    Args:
        config: The config.
        backbone: The backbone, which is not touched.
        tensors: The saved tensors.
        where: What to call their source in an error.
        structure: The backbone's common structure, where that is known already.

    Raises:
        UnsafeFileError: If the config asks for what no machine could hold.
        AddressingError: If it finds no place in this backbone.
        TensorError: If a tensor is missing, too many or of another shape.
    """
    if not config.builds_on_meta:
        _check_sizes(config, tensors, where)
        return
    check_shapes(expected_shapes(config, backbone, where, structure), tensors, where)


def check_shapes(expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, torch.Tensor], where: str) -> None:
    """Compare tensors with the shapes that a config describes.

    Raises:
        TensorError: If a tensor is missing, too many or of another shape.
    """
    checkpoint.check_names(expected, tensors, f"The delta in {where!r}", "its config describes on this backbone")
    wrong = [
        f"{name} has shape {list(tensors[name].shape)} where {list(shape)} is needed"
        for name, shape in expected.items()
        if tuple(tensors[name].shape) != shape
    ]
    if wrong:
        raise TensorShapeError(
            f"The delta in {where!r} does not fit this backbone: {listing(wrong, 3)}. Nothing was loaded; load it onto "
            "the backbone it was trained on."
        )


def expected_shapes(
    config: DeltaConfig, backbone: nn.Module, where: str, structure: Structure | None = None
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors that a delta with this config has on this backbone, under their names in a checkpoint.

    The layers are built on the meta device, where a tensor of any size takes no memory.
    """
    plan = copy.deepcopy(config)
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the real building says them again
            _, sites = targets.find(plan, backbone, structure)
            layers = surgery.saved_tensors(surgery.prepare(plan, sites, torch.device("meta")))
    except (RuntimeError, OverflowError, MemoryError, TypeError, ValueError, ZeroDivisionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UnsafeFileError(
            f"The config of the delta in {where!r} describes layers that cannot be built on this {type(backbone).__name__}: "
            f"{reason}. It was damaged or made by hand; fetch the delta again."
        ) from error
    own = backbone_parameters(backbone)
    owned = ownership.in_place(plan, sites, backbone) | ownership.unfrozen(plan, backbone)
    return {name: tuple(t.shape) for name, t in layers.items()} | {name: tuple(own[name].shape) for name in owned}


def _check_sizes(config: DeltaConfig, tensors: Mapping[str, torch.Tensor], where: str) -> None:
    """Refuse a config with a number that is larger than all of the saved tensors together, as no size in it can be."""
    most = max(sum(tensor.numel() for tensor in tensors.values()), 1 << 16)
    for key, value in _numbers(config.to_dict()):
        # The seed of a random generator is a number of any size.
        if abs(value) > most and not any(word in key.lower() for word in ("seed", "prng")):
            raise UnsafeFileError(
                f"The config of the delta in {where!r} says {key}={value}, and all its tensors have no more than {most:,} "
                "elements. It was damaged or made by hand; fetch the delta again."
            )


def _numbers(value: Any, key: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _numbers(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _numbers(inner, key)
    elif isinstance(value, (int, float)):
        yield key, value
