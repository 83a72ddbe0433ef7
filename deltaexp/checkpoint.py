"""A delta on disk: a folder that is written atomically, and read only after its bytes have been checked.

==========================  ================================================================================================
``config.json``             the flat config, with backbone class, name, revision and ``backbone_hash``
``delta_model.safetensors`` the trained tensors under their full names in the backbone
``manifest.json``           sha256 of every other file, digest of every tensor of the base and the delta (`deltaexp.manifest`)
``README.md``               the model card
``results.json``            what a run measured (written by `deltaexp.lab`)
``probe.safetensors``       a small batch and some of the trained model's logits on it, where one was given
==========================  ================================================================================================
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from deltaexp.checksum import ALGORITHM, ALGORITHMS, TensorDigest, digests, file_sha256, model_md5, model_sha256
from deltaexp.errors import (
    CheckpointError,
    DamagedFileError,
    DeltaExpError,
    EmptyTensorError,
    ExtraTensorError,
    MissingFileError,
    MissingTensorError,
    listing,
)
from deltaexp.manifest import DAMAGED, MANIFEST, Manifest, check_files, dump, read_json, read_manifest
from deltaexp.registry import DeltaConfig

CONFIG, WEIGHTS, CARD, RESULTS, PROBE = (
    "config.json",
    "delta_model.safetensors",
    "README.md",
    "results.json",
    "probe.safetensors",
)


@dataclass
class SavedDelta:
    """What a folder holds, its bytes checked against its manifest."""

    folder: Path
    config: DeltaConfig
    tensors: dict[str, torch.Tensor]
    manifest: Manifest | None
    """None where the folder has none, so that file digests and differences cannot be told."""

    @property
    def algorithm(self) -> str:
        """Which of `deltaexp.checksum.ALGORITHMS` the recorded digests of tensors are of; where there are none, the fastest."""
        record = self.config.saved_with
        return record.tensor_digest if record.backbone_hash or self.manifest else ALGORITHM


def write(
    folder: str | Path,
    config: DeltaConfig,
    tensors: Mapping[str, torch.Tensor],
    base: Mapping[str, TensorDigest],
    card: str,
    probe: Mapping[str, torch.Tensor] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Manifest:
    """Write a delta so that ``folder`` afterwards holds all of it, or what it held before.

    Args:
        folder: Where to; made if it does not exist.
        config: The config with its `saved_with`, whose hashes are filled in here.
        tensors: The trained tensors under their full names.
        base: Digests of the rest of the model.
        card: Text of the model card.
        probe: What `deltaexp.probe.record` returned.
        settings: What `deltaexp.verification.settings` returned.

    Raises:
        CheckpointError: If the tensors are empty or the disk refuses; nothing that was there is lost.
    """
    if not tensors and not config.trains_nothing:
        raise CheckpointError("There is nothing to save: the delta has no parameters. Check modified_modules.")
    check_not_empty(tensors, "The delta that is to be saved")
    # One buffer per tensor, in the plainest form: safetensors refuses views and writes what it gets.
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    delta = digests(plain)
    hashes = {"backbone_hash": model_md5({**base, **delta}), "base_sha256": model_sha256(base)}
    config.saved_with = dataclasses.replace(config.saved_with, **hashes, tensor_digest=ALGORITHM)
    record = {k: v for k, v in dataclasses.asdict(config.saved_with).items() if v is not None}

    def fill(stage: Path) -> None:
        save_file(plain, stage / WEIGHTS, metadata={"format": "pt"})
        (stage / CONFIG).write_text(dump({**config.to_dict(), **record}), encoding="utf-8")
        (stage / CARD).write_text(card, encoding="utf-8")
        if probe is not None:
            save_file(dict(probe), stage / PROBE, metadata={"format": "pt"})

    return _write(Path(folder), fill, Manifest(dict(base), delta, {}, dict(settings or {})))


def add_files(folder: str | Path, texts: Mapping[str, str]) -> Manifest:
    """Write more files into the folder of a delta, and their digests into its manifest.

    Raises:
        CheckpointError: If it is no delta, or the disk refuses; nothing that was there is lost.
    """
    manifest = read_manifest(Path(folder))
    if manifest is None:
        raise CheckpointError(f"{str(folder)!r} holds no manifest.json, so it is no delta that files could be added to.")

    def fill(stage: Path) -> None:
        for name, text in texts.items():
            (stage / name).write_text(text, encoding="utf-8")

    return _write(Path(folder), fill, manifest)


def _write(folder: Path, fill: Callable[[Path], None], known: Manifest) -> Manifest:
    """Let ``fill`` write into a folder beside the target, add the manifest, read back, then move everything into place."""
    stage = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        fill(stage)
        files = {path.name: file_sha256(path) for path in sorted(stage.iterdir())}
        manifest = dataclasses.replace(known, files={**known.files, **files})
        (stage / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
        for path in stage.iterdir():
            path.chmod(0o644)  # safetensors' files are private, and a delta is read by whoever may read its folder
            with path.open("rb") as file:
                os.fsync(file.fileno())
        if WEIGHTS in files and digests(read_tensors(stage / WEIGHTS)) != known.delta:
            raise CheckpointError(f"The tensors written to {str(stage)!r} are not those that were to be saved. Save again.")
        stage.chmod(0o755)  # mkdtemp's folders are private
        if not folder.exists():
            stage.rename(folder)
        else:
            # The manifest goes last: until it is there, the old one does not fit and a reader refuses the folder.
            _replace(stage, folder, [*files, MANIFEST])
        return manifest
    except OSError as error:
        raise CheckpointError(
            f"The delta could not be written to {str(folder)!r}: {error.strerror or error}. "
            "What was there before is untouched; make room or name another folder, and save again."
        ) from error
    finally:
        if stage is not None:
            shutil.rmtree(stage, ignore_errors=True)


def _replace(stage: Path, folder: Path, names: list[str]) -> None:
    """Move files from ``stage`` over those in ``folder``; where the disk refuses one, put back those already replaced."""
    old = stage / "old"
    old.mkdir()
    for name in names:
        if (folder / name).exists():
            shutil.copy2(folder / name, old / name)
    done = []
    try:
        for name in names:
            os.replace(stage / name, folder / name)
            done.append(name)
    except OSError:
        for name in done:
            if (old / name).exists():
                os.replace(old / name, folder / name)
            else:
                (folder / name).unlink()
        raise


def read_config(folder: Path) -> DeltaConfig:
    """Read ``config.json``.

    Raises:
        CheckpointError: If there is none, or it is no delta's config.
    """
    path = folder / CONFIG
    if not folder.is_dir():
        raise CheckpointError(f"There is no folder {str(folder)!r} to load a delta from.")
    if not path.exists():
        raise MissingFileError(f"{str(folder)!r} holds no {CONFIG}, so it is no saved delta.{_what_is_there(folder)}")
    values = read_json(path)
    if not isinstance(values, dict):
        raise DamagedFileError(f"{str(path)!r} is not a JSON object, as the config of a delta is. {DAMAGED}")
    try:
        return DeltaConfig.from_dict(values)
    except DeltaExpError as error:
        raise CheckpointError(f"{str(path)!r} is no config of a delta that this version knows: {error}") from error


def read(folder: str | Path) -> SavedDelta:
    """Read a delta's folder after checking the bytes of its files. No pickle is ever loaded.

    Raises:
        CheckpointError: If it is no delta.
        MissingFileError: If a file is missing.
        DamagedFileError: If a file is not the one that was written.
        TensorError: If the tensors are not those that the manifest lists.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if manifest is not None:
        check_files(folder, manifest, (CONFIG, WEIGHTS))
    path = folder / WEIGHTS
    if (folder / CONFIG).exists() and not path.exists():
        raise MissingFileError(f"{str(folder)!r} holds no {WEIGHTS}.{_what_is_there(folder)}")
    config = read_config(folder)
    tensors = read_tensors(path)
    if manifest is not None:
        check_names(manifest.delta, tensors, f"{str(path)!r}", "its manifest lists")
    check_not_empty(tensors, f"{str(path)!r}")
    saved = SavedDelta(folder, config, tensors, manifest)
    if saved.algorithm not in ALGORITHMS:
        raise CheckpointError(
            f"The digests of the delta in {str(folder)!r} are of the algorithm {saved.algorithm!r}, and this version of "
            f"deltaexp knows {listing(ALGORITHMS)}. Load it with the version that saved it (config.json names it)."
        )
    return saved


def read_probe(saved: SavedDelta) -> dict[str, torch.Tensor] | None:
    """Return what `deltaexp.probe.record` returned when the delta was saved; None where nothing was recorded.

    Raises:
        DamagedFileError: If the file is not the one that was written.
    """
    if saved.manifest is None or PROBE not in saved.manifest.files:
        return None
    check_files(saved.folder, saved.manifest, (PROBE,))
    return read_tensors(saved.folder / PROBE)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a file of safetensors that somebody else may have written.

    Raises:
        DamagedFileError: If it is none.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError, RuntimeError) as error:  # a dtype torch lacks, ...
        raise DamagedFileError(f"{str(path)!r} cannot be read as safetensors: {error}. {DAMAGED}") from error


def check_names(expected: Mapping[str, Any], found: Mapping[str, Any], where: str, said_by: str) -> None:
    """Compare the names of tensors.

    Raises:
        MissingTensorError: If one is missing.
        ExtraTensorError: If none is missing and one is too many.
    """
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected]
    if missing or extra:
        parts = []
        if missing:
            parts.append(f"lacks {len(missing)} of the {len(expected)} tensors that {said_by}: {listing(missing, 4)}")
        if extra:
            parts.append(f"has {len(extra)} that none of them is: {listing(extra, 4)}")
        kind = MissingTensorError if missing else ExtraTensorError
        raise kind(f"{where} {' and '.join(parts)}. Nothing was loaded; fetch the delta again.")


def check_not_empty(tensors: Mapping[str, torch.Tensor], where: str) -> None:
    """Raise an `EmptyTensorError` if a tensor has no elements: it would stand for something that nobody trained."""
    empty = [name for name, tensor in tensors.items() if not tensor.numel()]
    if empty:
        raise EmptyTensorError(
            f"{where} has {len(empty)} tensors without elements: {listing(empty, 4)}. Copy the delta again, or save it anew."
        )


def _what_is_there(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    nested = [name for name in names if (folder / name / CONFIG).exists()]
    hint = f" Did you mean {str(folder / nested[0])!r}?" if nested else ""
    return f" It holds {listing(names)}.{hint}" if names else " It is empty."
