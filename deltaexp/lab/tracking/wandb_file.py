"""What an offline run of Weights & Biases has on disk: its ``.wandb`` file, and the name of its folder."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

from wandb.proto.wandb_internal_pb2 import Record

BLOCK, HEAD, HEADER = 32768, 7, struct.Struct("<IHB")
"""The bytes of a block, those that the file begins with, and a record's checksum, length and kind."""
FULL, LAST = 1, 4


def records(path: Path) -> Iterator[Record]:
    """Yield the records of a ``.wandb`` file, up to the first that is not complete.

    The layout is that of LevelDB's log: a record lies in one piece or in several, none of which crosses a block.
    """
    raw, place, pieces = path.read_bytes(), HEAD, b""
    while place + HEADER.size <= len(raw):
        if BLOCK - place % BLOCK < HEADER.size:
            place += BLOCK - place % BLOCK
            continue
        _, length, kind = HEADER.unpack_from(raw, place)
        place += HEADER.size + length
        if not kind or place > len(raw):
            return
        pieces += raw[place - length : place]
        if kind in (FULL, LAST):
            yield Record.FromString(pieces)
            pieces = b""


def earlier(folder: Path) -> list[Path]:
    """Return the folders that W&B made for earlier sessions of a run, the newest last."""
    return sorted(folder.glob("wandb/*run-*-*"), key=lambda path: path.name.removeprefix("offline-"))


def last_steps(sessions: list[Path]) -> dict[str, int]:
    """Return the last step that offline sessions have on disk of each part, ``train`` or ``eval``."""
    found: dict[str, int] = {}
    for path in (path for session in sessions if session.name.startswith("offline-") for path in session.glob("*.wandb")):
        for record in records(path):
            row = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
            for part in {name.split("/")[0] for name in row if "/" in name}:
                found[part] = max(found.get(part, -1), json.loads(row["_step"]))
    return found
