"""A delta on disk: a folder that is written atomically, and read only after its bytes have been checked.

==========================  ==========================================================================
``config.json``             the flat config, with backbone class, name, revision and ``backbone_hash``
``delta_model.safetensors`` the trained tensors under their full names in the backbone
``manifest.json``           sha256 of every other file, digest of every tensor of the base and the delta
``README.md``               the model card
``results.json``            what a run measured (written by `deltaexp.lab`)
==========================  ==========================================================================
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from deltaexp.checksum import TensorDigest, digests, file_sha256, model_md5
from deltaexp.errors import CheckpointError, DamagedFileError, DeltaExpError, MissingTensorError, listing
from deltaexp.registry import DeltaConfig

CONFIG, WEIGHTS, MANIFEST, CARD, RESULTS = (
    "config.json",
    "delta_model.safetensors",
    "manifest.json",
    "README.md",
    "results.json",
)
FORMAT = 1
"""Version of the layout of ``manifest.json``."""
DAMAGED = (
    "The file was changed or damaged after it was saved: copy the delta again, save it anew, or, if it came from the Hub, "
    "load it with force_download=True."
)


@dataclass
class Manifest:
    """What was true of the model when the delta was saved."""

    base: dict[str, TensorDigest]
    """The backbone's tensors that the delta does not contain."""
    delta: dict[str, TensorDigest]
    """The tensors in ``delta_model.safetensors``."""
    files: dict[str, str]
    """sha256 of each other file in the folder."""

    def to_json(self) -> str:
        """Return the text of ``manifest.json``."""
        tensors = {
            part: {name: digest.to_dict() for name, digest in sorted(getattr(self, part).items())} for part in ("base", "delta")
        }
        return dump({"format": FORMAT, "files": dict(sorted(self.files.items())), **tensors})

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Read what `to_json` wrote."""
        data = json.loads(text)
        if data["format"] != FORMAT:
            raise CheckpointError(f"manifest.json has format {data['format']!r}; this version of deltaexp reads {FORMAT}.")
        parts = {part: {name: TensorDigest.from_dict(d) for name, d in data[part].items()} for part in ("base", "delta")}
        return cls(files={str(name): str(value) for name, value in data["files"].items()}, **parts)


@dataclass
class SavedDelta:
    """What a folder holds, its bytes checked against its manifest."""

    folder: Path
    config: DeltaConfig
    tensors: dict[str, torch.Tensor]
    manifest: Manifest | None
    """None where the folder has none, so that file digests and differences cannot be told."""


def dump(data: Any) -> str:
    """Return ``data`` as JSON as it stands in files: sorted, indented, the same text for the same data."""
    return json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def write(
    folder: str | Path,
    config: DeltaConfig,
    tensors: Mapping[str, torch.Tensor],
    base: Mapping[str, TensorDigest],
    card: str,
) -> Manifest:
    """Write a delta so that ``folder`` afterwards holds all of it, or what it held before.

    Args:
        folder: Where to; made if it does not exist.
        config: The config with its `saved_with`, whose ``backbone_hash`` is filled in here.
        tensors: The trained tensors under their full names.
        base: Digests of the rest of the model.
        card: Text of the model card.

    Raises:
        CheckpointError: If the tensors are empty or the disk refuses; nothing that was there is lost.
    """
    if not tensors and not config.trains_nothing:
        raise CheckpointError("There is nothing to save: the delta has no parameters. Check modified_modules.")
    # One buffer per tensor, in the plainest form: safetensors refuses views and writes what it gets.
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    delta = digests(plain)
    config.saved_with = dataclasses.replace(config.saved_with, backbone_hash=model_md5({**base, **delta}))
    record = {k: v for k, v in dataclasses.asdict(config.saved_with).items() if v is not None}

    def fill(stage: Path) -> None:
        save_file(plain, stage / WEIGHTS, metadata={"format": "pt"})
        (stage / CONFIG).write_text(dump({**config.to_dict(), **record}), encoding="utf-8")
        (stage / CARD).write_text(card, encoding="utf-8")

    return _write(Path(folder), fill, dict(base), delta)


def add_files(folder: str | Path, texts: Mapping[str, str]) -> Manifest:
    """Write more files into the folder of a delta, and their digests into its manifest."""
    manifest = read_manifest(Path(folder))
    if manifest is None:
        raise CheckpointError(f"{str(folder)!r} holds no manifest.json, so it is no delta that files could be added to.")

    def fill(stage: Path) -> None:
        for name, text in texts.items():
            (stage / name).write_text(text, encoding="utf-8")

    return _write(Path(folder), fill, manifest.base, manifest.delta, manifest.files)


def _write(folder: Path, fill: Any, base: dict, delta: dict, known: Mapping[str, str] | None = None) -> Manifest:
    """Let ``fill`` write into a folder beside the target, add the manifest, then move everything into place."""
    stage = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        fill(stage)
        files = {path.name: file_sha256(path) for path in sorted(stage.iterdir())}
        manifest = Manifest(base, delta, {**(known or {}), **files})
        (stage / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
        for path in stage.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
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


def read_manifest(folder: Path) -> Manifest | None:
    """Read ``manifest.json``; None where there is none.

    Raises:
        DamagedFileError: If it cannot be understood.
    """
    path = folder / MANIFEST
    if not path.exists():
        return None
    try:
        return Manifest.from_json(path.read_text(encoding="utf-8"))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedFileError(f"{str(path)!r} is not a manifest that deltaexp wrote ({error!r}). {DAMAGED}") from error


def read_config(folder: Path) -> DeltaConfig:
    """Read ``config.json``.

    Raises:
        CheckpointError: If there is none, or it is no delta's config.
    """
    path = folder / CONFIG
    if not folder.is_dir():
        raise CheckpointError(f"There is no folder {str(folder)!r} to load a delta from.")
    if not path.exists():
        raise CheckpointError(f"{str(folder)!r} holds no {CONFIG}, so it is no saved delta.{_what_is_there(folder)}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("not a JSON object")
    except ValueError as error:
        raise DamagedFileError(f"{str(path)!r} is not valid JSON: {error}. {DAMAGED}") from error
    try:
        return DeltaConfig.from_dict(values)
    except DeltaExpError as error:
        raise CheckpointError(f"{str(path)!r} is no config of a delta that this version knows: {error}") from error


def read(folder: str | Path) -> SavedDelta:
    """Read a delta's folder after checking the bytes of its files. No pickle is ever loaded.

    Raises:
        CheckpointError: If it is no delta.
        DamagedFileError: If a file is not the one that was written.
        MissingTensorError: If the tensors are not those that the manifest lists.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if manifest is not None:
        check_files(folder, manifest, (CONFIG, WEIGHTS))
    path = folder / WEIGHTS
    if (folder / CONFIG).exists() and not path.exists():
        raise CheckpointError(f"{str(folder)!r} holds no {WEIGHTS}.{_what_is_there(folder)}")
    config = read_config(folder)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
    except (SafetensorError, OSError) as error:
        raise DamagedFileError(f"{str(path)!r} cannot be read as safetensors: {error}. {DAMAGED}") from error
    if manifest is not None:
        check_names(manifest.delta, tensors, f"{str(path)!r}", "its manifest lists")
    return SavedDelta(folder, config, tensors, manifest)


def check_files(folder: Path, manifest: Manifest, names: tuple[str, ...]) -> None:
    """Compare the digests of the files called ``names`` with the manifest.

    Raises:
        DamagedFileError: If a file is missing, not listed, or has other bytes.
    """
    for name in names:
        recorded = manifest.files.get(name)
        if recorded is None or not (folder / name).exists():
            where = "manifest.json does not list it" if recorded is None else "it is missing from the folder"
            raise DamagedFileError(f"The delta in {str(folder)!r} is not complete: it needs {name}, and {where}. {DAMAGED}")
        found = file_sha256(folder / name)
        if found != recorded:
            raise DamagedFileError(
                f"{str(folder / name)!r} is not the file that was saved: its sha256 is {found[:16]}..., and manifest.json "
                f"recorded {recorded[:16]}.... {DAMAGED}"
            )


def check_names(expected: Mapping[str, Any], found: Mapping[str, Any], where: str, said_by: str) -> None:
    """Compare the names of tensors.

    Raises:
        MissingTensorError: If one is missing or one too many.
    """
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected]
    if missing or extra:
        parts = []
        if missing:
            parts.append(f"lacks {len(missing)} of the {len(expected)} tensors that {said_by}: {listing(missing, 4)}")
        if extra:
            parts.append(f"has {len(extra)} that none of them is: {listing(extra, 4)}")
        raise MissingTensorError(f"{where} {' and '.join(parts)}. Nothing was loaded; fetch the delta again.")


def _what_is_there(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    nested = [name for name in names if (folder / name / CONFIG).exists()]
    hint = f" Did you mean {str(folder / nested[0])!r}?" if nested else ""
    return f" It holds {listing(names)}.{hint}" if names else " It is empty."
