"""Is this the backbone the delta was trained on, and is this the delta? The answer, and what differs where it is no."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from enum import Enum

import torch

from deltaexp.addressing import covers
from deltaexp.checkpoint import SavedDelta
from deltaexp.checksum import Difference, TensorDigest, compare, model_md5
from deltaexp.errors import BackboneMismatchError, DeltaMismatchError, HashMismatchError, listing


class HashCheck(str, Enum):
    """What the hash check of a loaded delta found."""

    MATCH = "match"
    """The model after loading has the md5 of the trained model."""
    MISMATCH = "mismatch"
    """It does not; `from_finetuned` raises."""
    UNKNOWN = "unknown"
    """No hash was recorded, so nothing can be said."""
    SKIPPED = "skipped"
    """The caller asked not to check."""


IGNORE = "Load with check_hash=False only if you mean to use it all the same."


def check_class(saved: SavedDelta, backbone_class: str) -> None:
    """Compare the backbone's class with the one recorded.

    Raises:
        BackboneMismatchError: If it is another.
    """
    record = saved.config.saved_with
    if record.backbone_class and record.backbone_class != backbone_class:
        raise BackboneMismatchError(
            f"The delta in {str(saved.folder)!r} was trained on a {record.backbone_class}{_named(saved)}, and the backbone "
            f"given is a {backbone_class}. Load it onto the backbone it was trained on."
        )


def check_shapes(saved: SavedDelta, backbone: Mapping[str, torch.Tensor]) -> None:
    """Compare names and shapes of the backbone's tensors with those recorded, before anything is attached.

    Raises:
        BackboneMismatchError: If a tensor is missing, too many or of another shape.
    """
    if saved.manifest is None:
        return
    recorded = {name: TensorDigest("", digest.shape, "") for name, digest in saved.manifest.base.items()}
    # Whether the delta brings what it should, its heads included, is not the backbone's fault: `load_tensors` compares.
    heads = [pattern for pattern in saved.config.unfrozen_modules if pattern != "deltas"]
    found = {
        name: TensorDigest("", tuple(tensor.shape), "")
        for name, tensor in backbone.items()
        if name in recorded or not (name in saved.tensors or any(covers(pattern, name) for pattern in heads))
    }
    difference = compare(recorded, found)
    if difference:
        raise BackboneMismatchError(_backbone_sentence(saved, difference, len(recorded)))


def check_model(saved: SavedDelta, base: Mapping[str, TensorDigest], delta: Mapping[str, TensorDigest]) -> HashCheck:
    """Compare the md5 of the model after loading with the one recorded.

    Returns:
        MATCH, or UNKNOWN with a warning where no md5 was recorded.

    Raises:
        BackboneMismatchError: If the backbone's tensors differ.
        DeltaMismatchError: If the delta's tensors differ.
        HashMismatchError: If the md5 differs and no manifest tells which side does.
    """
    recorded = saved.config.saved_with.backbone_hash
    if saved.config.saved_with.origin:
        warnings.warn(
            f"The delta in {str(saved.folder)!r} was saved by {saved.config.saved_with.origin}, whose hash covers the text "
            "that its versions of torch and transformers print for a model. It cannot be compared with anything here: whether "
            "this is the right backbone is unknown. Its tensors fit by name and shape.",
            stacklevel=4,
        )
        return HashCheck.UNKNOWN
    if recorded is None:
        warnings.warn(
            f"The delta in {str(saved.folder)!r} records no hash of the model it was trained in, so whether this is the "
            "right backbone is unknown.",
            stacklevel=4,
        )
        return HashCheck.UNKNOWN
    if saved.manifest is not None:
        difference = compare(saved.manifest.base, base)
        if difference:
            raise BackboneMismatchError(_backbone_sentence(saved, difference, len(base)))
        difference = compare(saved.manifest.delta, delta)
        if difference:
            raise DeltaMismatchError(
                f"The backbone is the right one, but the tensors of the delta in {str(saved.folder)!r} are not those that "
                f"were trained: {_differing(difference, len(delta))}. Fetch the delta again. {IGNORE}"
            )
    found = model_md5({**base, **delta})
    if found != recorded:
        raise HashMismatchError(
            f"The model's md5 after loading the delta in {str(saved.folder)!r} is {found}, and {recorded} was recorded when "
            f"it was saved. Backbone or delta is not the one that was trained{_named(saved)}. {IGNORE}"
        )
    return HashCheck.MATCH


def skipped(saved: SavedDelta) -> HashCheck:
    """Warn that the caller switched the check off."""
    warnings.warn(
        f"check_hash=False: whether the delta in {str(saved.folder)!r} was trained on this backbone{_named(saved)} was not "
        "checked.",
        stacklevel=4,
    )
    return HashCheck.SKIPPED


def _named(saved: SavedDelta) -> str:
    name = saved.config.saved_with.backbone_checkpoint_name
    return f" ({name})" if name else ""


def _backbone_sentence(saved: SavedDelta, difference: Difference, total: int) -> str:
    start = f"The backbone is not the one that the delta in {str(saved.folder)!r} was trained on{_named(saved)}: "
    if difference.dtype_only and saved.manifest is not None:
        recorded = sorted({saved.manifest.base[name].dtype for name in difference.dtype})
        return (
            f"{start}{len(difference.dtype)} of {total} tensors have another dtype than then ({listing(recorded)}), and "
            f"nothing else differs that can be compared. Load the backbone with dtype=torch.{recorded[0]}. {IGNORE}"
        )
    return f"{start}{_differing(difference, total)}. Load it onto the backbone it was trained on. {IGNORE}"


def _differing(difference: Difference, total: int) -> str:
    """Say how many tensors differ, and which come first."""
    kinds = {
        "other values": difference.value,
        "another shape": difference.shape,
        "another dtype": difference.dtype,
        "none here": difference.missing,
        "not recorded": difference.extra,
    }
    parts = [f"{listing(names, 3)} ({kind})" for kind, names in kinds.items() if names]
    return f"{len(difference.names)} of {total} tensors differ: {'; '.join(parts)}"
