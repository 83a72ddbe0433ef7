"""Is this the backbone the delta was trained on, and is this the delta? The answer, and what differs where it is no."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import nn

from deltaexp import quantised
from deltaexp.addressing import covers
from deltaexp.checkpoint import CONFIG, WEIGHTS, SavedDelta
from deltaexp.checksum import Difference, TensorDigest, compare, digests, model_md5, model_sha256
from deltaexp.errors import (
    BackboneDtypeError,
    BackboneMismatchError,
    BackboneRevisionError,
    BackboneSettingsError,
    CheckpointError,
    DeltaMismatchError,
    ExtraTensorError,
    HashMismatchError,
    MissingTensorError,
    TensorDtypeError,
    TensorShapeError,
    listing,
)
from deltaexp.manifest import check_files


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


COMPUTES = re.compile(
    "head|key_value|act|eps|rope|theta|window|scal|softcap|norm|causal|is_decoder|position|bucket|distance|per_tok|alibi|proj"
)
"""What the names of settings hold that decide what a model computes."""
IRRELEVANT = re.compile(r"(^|\.)(_|max_)|drop|init|attn_implementation|label")
"""What the names of those hold that matter for training only, or not at all."""
IGNORE = "Load with check_hash=False only if you mean to use it all the same."


@dataclass(frozen=True)
class Check:
    """One thing that was looked at and found right, or of which nothing can be said; what is wrong is raised."""

    what: str
    known: bool
    """False where nothing was recorded that could be compared."""
    detail: str


def check_saved(saved: SavedDelta, everything: bool = True) -> list[Check]:
    """Check what can be checked without the backbone: files, tensors, and that the recorded hash is that of what is recorded.

    Args:
        saved: The delta as `deltaexp.checkpoint.read` returned it, which has compared the files that loading needs.
        everything: Compare the other files that were saved, too.

    Raises:
        MissingFileError: If a file is missing.
        DamagedFileError: If a file has other bytes than were written.
        TensorError: If the tensors are not those of the manifest: by name, shape or dtype.
        DeltaMismatchError: If a tensor has other values.
        HashMismatchError: If the recorded hash is another than that of the recorded digests.
    """
    manifest, where = saved.manifest, repr(str(saved.folder))
    recorded = saved.config.saved_with.backbone_hash
    if manifest is None:
        origin = saved.config.saved_with.origin
        detail = f"{origin} records no digests" if origin else "there is no manifest.json to compare with"
        return [Check("files", False, detail), Check("tensors", False, detail)]
    if everything:
        check_files(saved.folder, manifest, sorted(manifest.files.keys() - {CONFIG, WEIGHTS}))
    count = len(manifest.files) if everything else 2
    checks = [Check("files", True, f"{count} files have the sha256 that was recorded")]
    difference = compare(manifest.delta, digests(saved.tensors, saved.algorithm))
    if difference:
        raise _kind(difference)(
            f"The tensors of the delta in {where} are not those that were trained: "
            f"{_differing(difference, len(manifest.delta))}. Fetch the delta again."
        )
    elements = sum(tensor.numel() for tensor in saved.tensors.values())
    checks.append(Check("tensors", True, f"{len(saved.tensors)} tensors, {elements:,} elements, as they were saved"))
    if recorded is None:
        checks.append(Check("recorded hash", False, "no hash of the trained model was recorded"))
        return checks
    found = model_md5({**manifest.base, **manifest.delta})
    base, of_base = saved.config.saved_with.base_sha256, model_sha256(manifest.base)
    if found == recorded and base not in (None, of_base):
        raise HashMismatchError(
            f"The digests of the base in the manifest of the delta in {where} have the sha256 {of_base}, and config.json "
            f"records {base}. One of the two was changed after it was saved; fetch the delta again."
        )
    if found != recorded:
        raise HashMismatchError(
            f"The digests in the manifest of the delta in {where} have the md5 {found}, and config.json records {recorded} for "
            "the trained model. One of the two was changed after it was saved; fetch the delta again."
        )
    checks.append(Check("recorded hash", True, f"md5 {recorded} is that of the recorded base and delta"))
    return checks


def _kind(difference: Difference) -> type[CheckpointError]:
    """Return the class of the error for the first kind of difference that there is."""
    kinds: list[tuple[list[str], type[CheckpointError]]] = [
        (difference.missing, MissingTensorError),
        (difference.extra, ExtraTensorError),
        (difference.shape, TensorShapeError),
        (difference.dtype, TensorDtypeError),
    ]
    return next((kind for names, kind in kinds if names), DeltaMismatchError)


def check_backbone(
    saved: SavedDelta, backbone: nn.Module, tensors: Mapping[str, torch.Tensor], revision: str | None = None
) -> None:
    """Check what can be checked of a backbone before anything is attached, and without the values of its ``tensors``.

    Raises:
        BackboneMismatchError: If it is of another class, quantised otherwise, or has tensors of other names or shapes.
    """
    check_class(saved, type(backbone).__name__)
    check_quantised(saved, backbone)
    check_shapes(saved, tensors, revision)


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


def settings(backbone: nn.Module) -> dict[str, Any]:
    """Return the settings of a backbone's config that decide what it computes, as far as their names say so."""
    config = getattr(backbone, "config", None)
    found = config.to_dict() if config is not None and hasattr(config, "to_dict") else {}
    plain = {key: value for key, value in _flat(found) if isinstance(value, (bool, int, float, str))}
    how = quantised.settings(plain)
    plain = {key: value for key, value in plain.items() if not key.startswith(quantised.SETTINGS)}
    relevant = {key: value for key, value in plain.items() if COMPUTES.search(key) and not IRRELEVANT.search(key)}
    return dict(sorted({**relevant, **how}.items()))


def _flat(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        name = f"{above}{key}"
        if isinstance(value, Mapping):
            yield from _flat(value, f"{name}.")
        else:
            yield name, value


def check_quantised(saved: SavedDelta, backbone: nn.Module) -> None:
    """Check that a backbone is quantised as the one was that a delta was trained on, or not at all where that was not.

    Raises:
        BackboneMismatchError: If it is not.
    """
    recorded = quantised.settings(saved.manifest.settings) if saved.manifest is not None else {}
    if saved.manifest is None or not saved.manifest.settings or bool(recorded) == bool(quantised.names(backbone)):
        return  # nothing was recorded, or it is what it was: how it is quantised shows in its tensors and settings
    start = f"The delta in {str(saved.folder)!r} was trained on"
    if not recorded:
        raise BackboneMismatchError(
            f"{start} a backbone that was not quantised{_named(saved)}, and this one is. Load it without quantisation. {IGNORE}"
        )
    how = listing([f"{key.removeprefix(quantised.SETTINGS)}={value}" for key, value in recorded.items()], 6)
    raise BackboneMismatchError(
        f"{start} a quantised backbone{_named(saved)}, and this one is not quantised. Load it as it was then: {how}. {IGNORE}"
    )


def check_settings(saved: SavedDelta, found: Mapping[str, Any]) -> None:
    """Compare the backbone's settings with those recorded, where both versions of transformers have them.

    Raises:
        BackboneSettingsError: If one differs: the tensors may be the same, and the model computes something else.
    """
    recorded = saved.manifest.settings if saved.manifest is not None else {}
    wrong = [f"{key} is {found[key]!r} and was {value!r}" for key, value in recorded.items() if found.get(key, value) != value]
    if wrong:
        raise BackboneSettingsError(
            f"The backbone is not set as when the delta in {str(saved.folder)!r} was trained{_named(saved)}: "
            f"{listing(wrong, 4)}. Load it with the settings it had then. {IGNORE}"
        )


def check_shapes(saved: SavedDelta, backbone: Mapping[str, torch.Tensor], revision: str | None = None) -> None:
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
        raise _backbone_error(saved, difference, len(recorded), revision)


def check_model(
    saved: SavedDelta, base: Mapping[str, TensorDigest], delta: Mapping[str, TensorDigest], revision: str | None = None
) -> HashCheck:
    """Compare the md5 of the model after loading with the one recorded.

    Args:
        saved: The delta, checked by `check_saved`.
        base: Digests of the backbone's tensors.
        delta: Digests of the delta's.
        revision: The commit from which the backbone was loaded, if it is known.

    Returns:
        MATCH, or UNKNOWN with a warning where no md5 was recorded.

    Raises:
        BackboneRevisionError: If the backbone's tensors differ, and it is another revision.
        BackboneDtypeError: If they differ in nothing but the dtype.
        BackboneMismatchError: If they differ otherwise.
        HashMismatchError: If the md5 differs and no manifest tells which side does.
    """
    record = saved.config.saved_with
    if saved.manifest is not None:
        difference = compare(saved.manifest.base, base)
        if difference:
            raise _backbone_error(saved, difference, len(base), revision)
    if record.backbone_hash is None:
        why = "records no hash of the model it was trained in, so"
        if record.origin and record.origin.startswith("OpenDelta"):
            why = (
                f"was saved by {record.origin}, whose hash covers the text that its versions of torch and transformers print "
                "for a model and cannot be compared with anything here:"
            )
        elif record.origin:
            why = f"was saved by {record.origin}, which records no hash of the backbone:"
        warnings.warn(
            f"The delta in {str(saved.folder)!r} {why} whether this is the right backbone is unknown. Its tensors fit by name "
            "and shape.",
            stacklevel=4,
        )
        return HashCheck.UNKNOWN
    found = model_md5({**base, **delta})
    if found != record.backbone_hash:
        raise HashMismatchError(
            f"The model's md5 after loading the delta in {str(saved.folder)!r} is {found}, and {record.backbone_hash} was "
            f"recorded when it was saved. Backbone or delta is not the one that was trained{_named(saved)}. {IGNORE}"
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


def _backbone_error(
    saved: SavedDelta, difference: Difference, total: int, revision: str | None = None
) -> BackboneMismatchError:
    """Return the error for a backbone that differs, which says in what and where the right one is."""
    assert saved.manifest is not None
    record = saved.config.saved_with
    start = f"The backbone is not the one that the delta in {str(saved.folder)!r} was trained on{_named(saved)}: "
    if revision and record.backbone_revision and revision != record.backbone_revision:
        return BackboneRevisionError(
            f"{start}it is revision {revision}, and then it was {record.backbone_revision}. {_differing(difference, total)}. "
            f"Load the backbone with revision={record.backbone_revision!r}. {IGNORE}"
        )
    if difference.dtype_only:
        recorded = sorted({saved.manifest.base[name].dtype for name in difference.dtype})
        return BackboneDtypeError(
            f"{start}{len(difference.dtype)} of {total} tensors have another dtype than then ({listing(recorded)}), and "
            f"nothing else differs that can be compared. Load the backbone with dtype=torch.{recorded[0]}. {IGNORE}"
        )
    return BackboneMismatchError(
        f"{start}{_differing(difference, total)}. Load it onto the backbone it was trained on. {IGNORE}"
    )


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
