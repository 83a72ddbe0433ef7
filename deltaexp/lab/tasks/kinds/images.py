"""Images: one of several labels, by a head on a backbone that sees."""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import transformers
from datasets import Dataset
from torch import nn

from deltaexp.errors import TaskError
from deltaexp.lab.taskconfig import TaskConfig
from deltaexp.lab.tasks.columns import Spec
from deltaexp.lab.tasks.data import TaskData
from deltaexp.lab.tasks.kinds.base import ROW, Split, extras
from deltaexp.lab.tasks.kinds.heads import Classification

LARGEST = (1, 16, 255, 65535)
"""What the brightest pixel may be in data that hold numbers; the first that none exceeds is taken for white."""


class ImageClassification(Classification):
    """One of several labels for an image.

    An image is what `datasets` takes for one, the path of a file, or numbers: rows of pixels, rows of pixels of colours, or the
    pixels of a square grey image in one list. Features are made whenever they are needed, since pixels take far more room than
    the files.
    """

    caches = False
    processes = "image"

    @classmethod
    def auto_class(cls) -> Any:
        """Return the class with a head on an image."""
        return transformers.AutoModelForImageClassification

    @classmethod
    def columns(cls, task: TaskConfig) -> dict[str, Spec]:
        """Return the image and the label."""
        return {"image": task.inputs[0], "target": task.target, **extras(task)}

    @classmethod
    def labelled(cls, splits: dict[str, Dataset], task: TaskConfig) -> tuple[dict[str, Dataset], list[str], list[str]]:
        """Make numbers of labels, and find out what is white in images of numbers."""
        splits, labels, notes = super().labelled(splits, task)
        tops = [_largest(batch["image"], task) for rows in splits.values() for batch in _numbers(rows)]
        if tops:
            white = task.white or _white(max(tops), task)
            splits = {split: rows.add_column("white", [white] * len(rows)) for split, rows in splits.items()}
            notes = [*notes, f"pixels are numbers from 0, which is black, to {white}, which is white"]
        return splits, labels, notes

    def features(self, batch: dict[str, list], training: bool) -> dict[str, list]:
        """Turn images into pixels as the backbone wants them, each of shape ``(channels, height, width)``."""
        first = batch["image"][0]
        white = batch["white"][0] if "white" in batch else None
        if white is None and isinstance(first, (list, np.ndarray)):
            white = self.task.white or _white(_largest(batch["image"], self.task), self.task)
        mode = "L" if getattr(self.settings, "num_channels", 3) == 1 else "RGB"
        images = [picture(value, white, self.task).convert(mode) for value in batch["image"]]
        result = {"pixel_values": list(self.processor(images, return_tensors="np")["pixel_values"])}
        return {**result, "labels": list(batch["target"])} if "target" in batch else result

    def collator(self, model: nn.Module) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """Put images of one size into a batch."""

        def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
            batch = {"pixel_values": torch.from_numpy(np.stack([np.asarray(row["pixel_values"]) for row in rows])).float()}
            names = [name for name in ("labels", ROW) if name in rows[0]]
            return batch | {name: torch.tensor([row[name] for row in rows]) for name in names}

        return collate

    def splits(self, data: TaskData) -> dict[str, Split]:
        """Return every split with features that are made of the images whenever they are read."""
        found = {}
        for split, rows in data.splits.items():
            numbered = rows.add_column(ROW, list(range(len(rows))))
            make = functools.partial(self._made, training=split == "train")
            found[split] = Split(rows, numbered.with_transform(make), 0)
        return found

    def _made(self, batch: dict[str, list], training: bool) -> dict[str, list]:
        made = self.features(batch, training)
        return made if training else {**made, ROW: batch[ROW]}


def picture(value: Any, white: int | None, task: TaskConfig) -> Any:
    """Return an image as Pillow has it.

    Args:
        value: Pillow's image, the bytes or the path of a file, or numbers.
        white: The number that is white.
        task: For an error, its name.

    Raises:
        TaskError: If a file cannot be read, or numbers are no image.
    """
    from PIL import Image

    try:
        if isinstance(value, Image.Image):
            return value
        if isinstance(value, Mapping):
            value = value.get("bytes") or value["path"]
        if isinstance(value, (str, bytes)):
            image = Image.open(io.BytesIO(value) if isinstance(value, bytes) else value)
            image.load()
            return image
    except (OSError, KeyError, TypeError) as error:
        raise TaskError(f"An image of task {task.name!r} cannot be read: {error}.") from error
    pixels = np.asarray(value, dtype=np.float64)
    side = math.isqrt(pixels.size)
    if pixels.ndim == 1 and side * side == pixels.size:
        pixels = pixels.reshape(side, side)
    if pixels.ndim == 3 and pixels.shape[-1] not in (1, 3) and pixels.shape[0] in (1, 3):
        pixels = pixels.transpose(1, 2, 0)
    if pixels.ndim == 3 and pixels.shape[-1] == 1:
        pixels = pixels[..., 0]
    if not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[-1] == 3)):
        raise TaskError(
            f"An image of task {task.name!r} has numbers of shape {pixels.shape}, which are no image: it needs rows of pixels, "
            "rows of pixels of three colours, or the pixels of a square grey image in one list."
        )
    return Image.fromarray(np.rint(pixels * (255 / (white or 255))).clip(0, 255).astype(np.uint8))


def _numbers(rows: Dataset) -> Any:
    """Return batches of rows where images are numbers, else nothing."""
    feature = rows.features["image"]
    described = hasattr(feature, "decode") or getattr(feature, "dtype", None) == "string" or isinstance(feature, dict)
    return [] if described else rows.iter(batch_size=1000)


def _largest(images: list[Any], task: TaskConfig) -> float:
    values = [np.asarray(image) for image in images]
    if any(image.dtype == object or not image.size or image.min() < 0 for image in values):
        raise TaskError(f"An image of task {task.name!r} has no pixels, rows of different lengths, or pixels below zero.")
    return max(float(image.max()) for image in values)


def _white(largest: float, task: TaskConfig) -> int:
    white = next((number for number in LARGEST if largest <= number), None)
    if white is None:
        raise TaskError(f"An image of task {task.name!r} has a pixel of {largest:g}; pixels are at most {LARGEST[-1]}.")
    return white
