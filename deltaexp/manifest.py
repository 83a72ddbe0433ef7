"""What ``manifest.json`` records of a delta, and the comparison of files with it.

It holds the sha256 of every other file, the digest of every tensor of the base and the delta (`deltaexp.checksum`), and in its
last line the sha256 of its own text without that line. So no byte of the folder can change without being noticed. It is no
signature: who changes the delta and the manifest alike makes another delta, which is what the commit of a repository tells
apart. A tensor's digest stands under the name of its algorithm, which was SHA-256 in format 2 and is BLAKE3 since format 3.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deltaexp.checksum import TensorDigest, file_sha256
from deltaexp.errors import CheckpointError, DamagedFileError, MissingFileError, UnsafeFileError, listing

MANIFEST = "manifest.json"
FORMAT = 3
"""Version of the layout of ``manifest.json``."""
READABLE = (2, FORMAT)
LARGEST_JSON = 1 << 26
"""Bytes that a file of JSON may have; those of the largest models have some millions."""
END, SEAL = "\n}\n", ',\n  "sha256": "'
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
    settings: dict[str, Any] = field(default_factory=dict)
    """The backbone's settings that decide what it computes and that no tensor shows (`deltaexp.verification.settings`)."""

    def to_json(self) -> str:
        """Return the text of ``manifest.json``."""
        tensors = {
            part: {name: digest.to_dict() for name, digest in sorted(getattr(self, part).items())} for part in ("base", "delta")
        }
        return sealed({"format": FORMAT, "files": self.files, "backbone_settings": self.settings, **tensors})

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Read what `to_json` wrote.

        Raises:
            CheckpointError: If it is of another version.
            UnsafeFileError: If it names a file outside of its folder.
            ValueError: If it is not what `to_json` writes, to the byte.
        """
        data = json.loads(text)
        if data["format"] not in READABLE:
            raise CheckpointError(
                f"{MANIFEST} has format {data['format']!r}; this version of deltaexp reads {listing(READABLE)}. Load the delta "
                "with the version that saved it (config.json names it) and save it anew."
            )
        if text != _sealed(text[: text.rfind(SEAL)] + END):
            raise ValueError("its own sha256 is not that of its text")
        for name in data["files"]:
            if not is_plain_name(name):
                raise UnsafeFileError(
                    f"{MANIFEST} lists a file {name!r}, and a delta has only files with plain names in its own folder. "
                    "Do not use it: somebody made it by hand."
                )
        parts = {part: {name: TensorDigest.from_dict(d) for name, d in data[part].items()} for part in ("base", "delta")}
        files = {str(name): str(value) for name, value in data["files"].items()}
        return cls(files=files, settings=dict(data["backbone_settings"]), **parts)


def sealed(data: dict[str, Any]) -> str:
    """Return the text of a manifest with its own digest, which is over the text without it."""
    assert max(data) < "sha256"  # so it comes last, as dump would have it
    return _sealed(dump(data))


def _sealed(text: str) -> str:
    return f'{text.removesuffix(END)}{SEAL}{hashlib.sha256(text.encode()).hexdigest()}"{END}'


def dump(data: Any) -> str:
    """Return ``data`` as JSON as it stands in files: sorted, indented, the same text for the same data."""
    return json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def is_plain_name(name: Any) -> bool:
    """Say whether a name is that of a file in the folder itself, on every system."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\:\0")


def read_json(path: Path) -> Any:
    """Read a file of JSON that somebody else may have written.

    Raises:
        DamagedFileError: If it is not valid JSON, or far too large to be a delta's.
    """
    return _parsed(path, json.loads, "valid JSON")


def read_manifest(folder: Path) -> Manifest | None:
    """Read ``manifest.json``; None where there is none.

    Raises:
        DamagedFileError: If it is not as it was written.
    """
    path = folder / MANIFEST
    return _parsed(path, Manifest.from_json, "a manifest that deltaexp wrote") if path.exists() else None


def _parsed(path: Path, parse: Callable[[str], Any], what: str) -> Any:
    """Return what ``parse`` makes of a file's text.

    Raises:
        DamagedFileError: If the file is too large, or ``parse`` finds that it is not ``what`` it should be.
    """
    try:
        size = path.stat().st_size
        if size > LARGEST_JSON:
            raise ValueError(f"it has {size:,} bytes, and none of a delta has more than {LARGEST_JSON:,}")
        return parse(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise DamagedFileError(f"{str(path)!r} is nested too deeply to be a delta's. {DAMAGED}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedFileError(f"{str(path)!r} is not {what}: {error}. {DAMAGED}") from error


def check_files(folder: Path, manifest: Manifest, names: Iterable[str]) -> None:
    """Compare the digests of the files called ``names`` with the manifest.

    Raises:
        MissingFileError: If a file is missing or not listed.
        DamagedFileError: If it has other bytes.
    """
    for name in names:
        recorded = manifest.files.get(name)
        if recorded is None or not (folder / name).exists():
            where = f"{MANIFEST} does not list it" if recorded is None else "it is missing from the folder"
            raise MissingFileError(f"The delta in {str(folder)!r} is not complete: it needs {name}, and {where}. {DAMAGED}")
        found = file_sha256(folder / name)
        if found != recorded:
            raise DamagedFileError(
                f"{str(folder / name)!r} is not the file that was saved: its sha256 is {found[:16]}..., and {MANIFEST} "
                f"recorded {recorded[:16]}.... {DAMAGED}"
            )
