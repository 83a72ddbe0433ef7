"""Images: in all the forms that data have them, and as pixels for the backbone."""

from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value

from deltaexp.errors import ConfigError, TaskError
from deltaexp.lab.taskconfig import TaskConfig
from deltaexp.lab.tasks import data as task_data
from deltaexp.lab.tasks.data import TaskData
from deltaexp.lab.tasks.kinds import choose

pillow = pytest.importorskip("PIL.Image", reason="images need the package pillow")

import small  # noqa: E402
from transformers import BertConfig, ViTConfig  # noqa: E402

from deltaexp.lab.tasks.kinds.images import ImageClassification, picture  # noqa: E402

SETTINGS = ViTConfig(image_size=16)


def task(**changes: object) -> TaskConfig:
    values = {"name": "t", "kind": "image_classification", "inputs": ["pixels"], "target": "label", "data": "d"}
    return TaskConfig(**{**values, "labels": ["dark", "light"], **changes})  # type: ignore[arg-type]


def kind() -> ImageClassification:
    processor = small.ViTImageProcessorPil(size={"height": 16, "width": 16})
    return ImageClassification(task(), processor, SETTINGS)


def test_numbers_are_images_in_several_shapes() -> None:
    grey = np.arange(16).reshape(4, 4)
    expected = np.rint(grey * 255 / 16).astype(np.uint8)
    for value in (grey.tolist(), grey.ravel().tolist(), grey[None].tolist(), grey[..., None]):
        assert np.array_equal(np.asarray(picture(value, 16, task())), expected)
    colour = np.arange(48).reshape(4, 4, 3)
    assert np.array_equal(np.asarray(picture(colour.tolist(), 255, task())), colour)
    assert np.array_equal(np.asarray(picture(colour.transpose(2, 0, 1).tolist(), 255, task())), colour)
    with pytest.raises(TaskError, match=r"numbers of shape \(15,\), which are no image"):
        picture(list(range(15)), 255, task())


def test_what_is_white_goes_by_all_rows() -> None:
    rows = {
        "train": Dataset.from_dict({"image": [[0, 3, 7, 9], [1, 1, 1, 1]], "target": [0, 1]}),
        "test": Dataset.from_dict({"image": [[0, 16, 0, 0]], "target": [1]}),
    }
    splits, labels, notes = ImageClassification.labelled(rows, task())
    assert set(splits["train"]["white"]) == set(splits["test"]["white"]) == {16}
    assert labels == ["dark", "light"]
    assert notes[-1] == "pixels are numbers from 0, which is black, to 16, which is white"
    for wrong, fault in (([-1, 0, 0, 0], "below zero"), ([70000, 0, 0, 0], "a pixel of 70000")):
        with pytest.raises(TaskError, match=fault):
            ImageClassification.labelled({"test": Dataset.from_dict({"image": [wrong], "target": [1]})}, task())


def test_files_and_numbers_give_the_same_pixels(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3)).astype(np.uint8)
    pillow.fromarray(pixels).save(tmp_path / "a.png")
    found = [
        kind().features({"image": [value]}, training=False)["pixel_values"][0]
        for value in (
            str(tmp_path / "a.png"), {"bytes": (tmp_path / "a.png").read_bytes(), "path": None}, pillow.fromarray(pixels),
            pixels.tolist(),
        )
    ]  # fmt: skip
    for other in found:
        np.testing.assert_allclose(other, pixels.transpose(2, 0, 1) / 255 * 2 - 1, atol=1e-6)
    (tmp_path / "b.png").write_bytes(b"no image")
    with pytest.raises(TaskError, match="An image of task 't' cannot be read: cannot identify image file"):
        kind().features({"image": [str(tmp_path / "b.png")]}, training=False)


def test_features_are_made_when_they_are_read(tmp_path: Path) -> None:
    files = []
    for shade in (0, 255):
        files.append(str(tmp_path / f"{shade}.png"))
        pillow.new("L", (5, 7), shade).save(files[-1])
    features = Features({"image": Image(), "target": Value("int64")})
    rows = Dataset.from_dict({"image": files, "target": [0, 1]}, features=features)
    splits = kind().splits(TaskData({"train": rows, "test": rows}, "0" * 64))
    assert splits["test"].lengths is None
    assert set(splits["train"].features[0]) == {"pixel_values", "labels"}
    batch = kind().collator(torch.nn.Module())([splits["test"].features[n] for n in (1, 0)])
    assert batch["pixel_values"].shape == (2, 3, 16, 16)
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [1.0, -1.0]
    assert (batch["row"].tolist(), batch["labels"].tolist()) == ([1, 0], [1, 0])
    # What an image holds is in the fingerprint, and where it lies is not.
    before = task_data._fingerprint({"test": rows})
    (tmp_path / "other").mkdir()
    moved = [str(Path(name).rename(tmp_path / "other" / Path(name).name)) for name in files]
    again = Dataset.from_dict({"image": moved, "target": [0, 1]}, features=features)
    assert task_data._fingerprint({"test": again}) == before
    pillow.new("L", (5, 7), 100).save(moved[0])
    assert task_data._fingerprint({"test": again}) != before


def test_only_what_sees_takes_images() -> None:
    assert choose(task(), SETTINGS) is ImageClassification
    with pytest.raises(ConfigError, match="which needs an image model"):
        choose(task(), BertConfig())


def test_a_run(tmp_path: Path) -> None:
    rows = [{"pixels": [(n % 2) * 16] * 64, "label": n % 2} for n in range(16)]
    words = ["task.kind=image_classification", "task.inputs=[pixels]", "task.target=label", "task.labels=[dark,light,odd]"]
    results = small.trained(tmp_path / "run", small.vit(tmp_path / "vit"), small.table(tmp_path / "data", rows), *words)
    assert results["task_metric"] == "accuracy"
    assert results["new_parameters"] == ["classifier"]
    assert results["labels"] == ["dark", "light", "odd"]


@pytest.mark.parametrize("delta", ["lora", "full"])
def test_the_statistics_of_a_batch_normalisation_stay_the_backbones(tmp_path: Path, delta: str) -> None:
    rows = [{"pixels": [(n % 2) * 16] * 64, "label": n % 2} for n in range(16)]
    words = ["task.kind=image_classification", "task.inputs=[pixels]", "task.target=label", "task.labels=[dark,light]"]
    words += [f"delta_type={delta}", *(["modified_modules=[convolution]"] if delta == "lora" else [])]
    results = small.trained(tmp_path / "run", small.resnet(tmp_path / "resnet"), small.table(tmp_path / "data", rows), *words)
    assert results["verification"]["hash"] == "match"
