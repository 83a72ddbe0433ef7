"""Delta models: what is trained beside the layers, the classes that make them, and delta types from elsewhere."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from models import FAMILIES, attach, logits, md5, perturb, same, snapshot, train_step, values
from safetensors.torch import load_file
from torch import nn

import deltaexp.model
from deltaexp import AutoDeltaConfig, AutoDeltaModel, DeltaConfig, DeltaModel, HashCheck, Layer, Site, registry
from deltaexp.errors import AddressingError, CheckpointError, ConfigError, DeltaExpError
from deltaexp.lab.memory import PeakMemory

BERT, T5 = FAMILIES["bert"], FAMILIES["t5"]
HEAD = ["classifier.weight", "classifier.bias"]


# --- the backbone's memory --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delta_type", ["lora", "adapter", "prefix"])
def test_loading_copies_nothing_of_the_backbone(delta_type: str, tmp_path: Path) -> None:
    attach(BERT.build(), delta_type).save_finetuned(tmp_path)
    backbone = BERT.build()
    places = {name: tensor.data_ptr() for name, tensor in [*backbone.named_parameters(), *backbone.named_buffers()]}
    loaded = AutoDeltaModel.from_finetuned(tmp_path, backbone)
    assert loaded.hash_check is HashCheck.MATCH
    now = {name: tensor.data_ptr() for name, tensor in [*backbone.named_parameters(), *backbone.named_buffers()]}
    assert places.items() <= now.items()


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of memory is read from /proc")
def test_loading_takes_no_memory_for_the_backbone(tmp_path: Path) -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(1 << 18, 64)  # 64 MiB
            self.layer = nn.Linear(64, 64)

    torch.manual_seed(0)
    backbone = Wide()
    config = AutoDeltaConfig.from_dict({"delta_type": "lora", "modified_modules": ["layer"]})
    delta_model = AutoDeltaModel.from_config(config, backbone)
    delta_model.freeze_module()
    delta_model.save_finetuned(tmp_path)
    delta_model.detach()
    memory = PeakMemory()
    AutoDeltaModel.from_finetuned(tmp_path, backbone)
    assert memory.read()["training"] < backbone.embedding.weight.nbytes / 2


# --- unfrozen modules -------------------------------------------------------------------------------------------------


@pytest.fixture
def trained() -> DeltaModel:
    """A LoRA whose classifier was trained with it."""
    backbone = BERT.build()
    delta_model = attach(backbone, seed=None)
    delta_model.freeze_module(exclude=["deltas", "classifier"])
    for _ in range(3):
        train_step(delta_model, BERT.inputs())
    return delta_model


def test_a_head_is_trained_with_the_delta(trained: DeltaModel) -> None:
    fresh = BERT.build()
    layers = {f"{a.prefix}.{name}" for a in trained.attachments for name, _ in a.layer.named_parameters()}
    assert set(trained.trainable_parameters()) == layers | set(HEAD) == set(trained.delta_tensors())
    assert trained.config.unfrozen_modules == ["deltas", "classifier"]
    changed = {
        name
        for name, parameter in trained.backbone_model.named_parameters()
        if name in fresh.state_dict() and not torch.equal(parameter, fresh.state_dict()[name])
    }
    assert changed == set(HEAD)
    assert trained.counts()["trainable"] == trained.counts()["delta"]
    assert trained.counts()["backbone"] == sum(p.numel() for p in fresh.parameters())


def test_a_head_is_saved_and_restored(trained: DeltaModel, tmp_path: Path) -> None:
    inputs = BERT.inputs()
    expected = logits(trained.backbone_model, inputs)
    trained.save_finetuned(tmp_path)
    assert set(HEAD) < set(load_file(tmp_path / "delta_model.safetensors"))
    fresh = BERT.build()
    loaded = AutoDeltaModel.from_finetuned(tmp_path, fresh)
    assert loaded.hash_check is HashCheck.MATCH
    assert torch.equal(logits(fresh, inputs), expected)
    assert set(loaded.trainable_parameters()) == set(trained.trainable_parameters())
    loaded.detach()
    assert md5(fresh) == md5(BERT.build())
    loaded.attach()
    assert torch.equal(logits(fresh, inputs), expected)


def test_detaching_restores_the_original_head(trained: DeltaModel, tmp_path: Path) -> None:
    backbone, inputs, fresh = trained.backbone_model, BERT.inputs(), BERT.build()
    expected, tensors = logits(backbone, inputs), values(trained.delta_tensors())
    plain = logits(fresh, inputs)
    assert not torch.equal(expected, plain)
    trained.save_finetuned(tmp_path / "attached")
    for _ in range(2):
        trained.detach()
        assert md5(backbone) == md5(fresh)
        assert torch.equal(logits(backbone, inputs), plain)
        assert same(trained.delta_tensors(), tensors)
        trained.attach()
        assert torch.equal(logits(backbone, inputs), expected)
        assert same(trained.delta_tensors(), tensors)
    trained.detach()
    trained.save_finetuned(tmp_path / "detached")
    for name in ("config.json", "delta_model.safetensors", "manifest.json"):
        assert (tmp_path / "attached" / name).read_bytes() == (tmp_path / "detached" / name).read_bytes()


def test_freezing_again_after_an_evaluation_without_the_delta_loses_no_training(trained: DeltaModel) -> None:
    with trained.detached():
        pass
    train_step(trained, BERT.inputs())
    tensors, expected = values(trained.delta_tensors()), logits(trained.backbone_model, BERT.inputs())
    trained.freeze_module()
    assert same(trained.delta_tensors(), tensors)
    assert torch.equal(logits(trained.backbone_model, BERT.inputs()), expected)
    trained.detach()
    assert md5(trained.backbone_model) == md5(BERT.build())


def test_freezing_while_detached_counts_when_attached() -> None:
    delta_model = attach(BERT.build(), seed=None)
    delta_model.detach()
    delta_model.freeze_module(exclude=["classifier"])
    delta_model.attach()
    assert list(delta_model.trainable_parameters()) == HEAD
    train_step(delta_model, BERT.inputs())
    delta_model.detach()
    assert md5(delta_model.backbone_model) == md5(BERT.build())


def test_a_head_without_the_layers() -> None:
    delta_model = attach(BERT.build(), unfrozen_modules=["classifier"])
    assert list(delta_model.trainable_parameters()) == HEAD
    # The layers stay part of what is saved.
    assert len(delta_model.delta_tensors()) == len(HEAD) + 2 * len(delta_model.attachments)


@pytest.mark.parametrize("pattern", ["lm_head", "shared"])
def test_a_tied_parameter_has_one_name(pattern: str, tmp_path: Path) -> None:
    backbone, inputs = T5.build(), T5.inputs()
    assert backbone.lm_head.weight is backbone.shared.weight
    delta_model = attach(backbone, unfrozen_modules=["deltas", pattern])
    owned = set(delta_model.delta_tensors()) & set(T5.build().state_dict())
    assert owned == {"shared.weight"}
    expected = logits(backbone, inputs)
    delta_model.save_finetuned(tmp_path)
    fresh = T5.build()
    loaded = AutoDeltaModel.from_finetuned(tmp_path, fresh)
    assert loaded.hash_check is HashCheck.MATCH
    assert fresh.lm_head.weight is fresh.shared.weight
    assert torch.equal(logits(fresh, inputs), expected)
    loaded.detach()
    assert md5(fresh) == md5(T5.build())


@pytest.mark.parametrize("delta_type", ["lora", "adapter"])
def test_layer_norms(delta_type: str) -> None:
    backbone = BERT.build()
    delta_model = attach(backbone, delta_type, seed=None, unfrozen_modules=["LayerNorm"])
    names = set(delta_model.trainable_parameters())
    assert names == {name for name, _ in backbone.named_parameters() if ".LayerNorm." in name}
    assert len(names) == 10


def test_an_unfrozen_module_that_does_not_exist_leaves_everything_as_it_was() -> None:
    backbone = BERT.build()
    before = snapshot(backbone)
    with pytest.raises(AddressingError, match="'clasifier' matches no module"):
        attach(backbone, unfrozen_modules=["deltas", "clasifier"])
    assert snapshot(backbone) == before
    delta_model = attach(backbone)
    before = snapshot(backbone)
    with pytest.raises(AddressingError, match="clasifier"):
        delta_model.freeze_module(exclude=["deltas", "clasifier"])
    assert snapshot(backbone) == before
    assert delta_model.config.unfrozen_modules == ["deltas"]


def test_training_what_is_not_saved_warns(tmp_path: Path) -> None:
    backbone = BERT.build()
    delta_model = AutoDeltaModel.from_config(AutoDeltaConfig.from_dict({"delta_type": "lora"}), backbone_model=backbone)
    with pytest.warns(UserWarning, match=r"bert\.embeddings.*not saved"):
        delta_model.save_finetuned(tmp_path)


def test_freezing_leaves_other_deltas_as_they_are() -> None:
    backbone = BERT.build()
    first, second = attach(backbone), attach(backbone, "adapter")
    first.freeze_module(exclude=["classifier"])
    assert set(first.trainable_parameters()) == {*HEAD, *second.delta_tensors()}


def test_a_delta_in_half_precision_keeps_its_dtype(tmp_path: Path) -> None:
    delta_model = attach(BERT.build())
    for attachment in delta_model.attachments:
        attachment.layer.to(torch.bfloat16)
    expected = logits(delta_model.backbone_model, BERT.inputs())
    delta_model.save_finetuned(tmp_path)
    fresh = BERT.build()
    loaded = AutoDeltaModel.from_finetuned(tmp_path, fresh)
    assert loaded.hash_check is HashCheck.MATCH
    assert {tensor.dtype for tensor in loaded.delta_tensors().values()} == {torch.bfloat16}
    assert torch.equal(logits(fresh, BERT.inputs()), expected)
    train_step(loaded, BERT.inputs())  # the parameters are still ones that a gradient fits
    assert not torch.equal(logits(fresh, BERT.inputs()), expected)


# --- making one -------------------------------------------------------------------------------------------------------


def test_direct_classes() -> None:
    backbone = BERT.build()
    delta_model = deltaexp.LoraModel(backbone_model=backbone, lora_r=2, modified_modules=["query"])
    assert type(delta_model).__name__ == "LoraModel"
    assert isinstance(delta_model, DeltaModel)
    assert delta_model.config.lora_r == 2
    made = AutoDeltaModel.from_config(AutoDeltaConfig.from_dict({"delta_type": "lora"}), backbone_model=BERT.build())
    assert type(made) is deltaexp.LoraModel
    assert pickle.loads(pickle.dumps(deltaexp.LoraModel)) is deltaexp.LoraModel
    assert "LoRA adds" in deltaexp.LoraModel.__doc__
    with pytest.raises(AttributeError, match="NoSuchModel"):
        _ = deltaexp.NoSuchModel
    with pytest.raises(AttributeError, match="nothing"):
        _ = deltaexp.nothing


def test_a_direct_class_loads_its_own_type_only(trained: DeltaModel, tmp_path: Path) -> None:
    trained.save_finetuned(tmp_path)
    assert deltaexp.LoraModel.from_finetuned(tmp_path, BERT.build()).hash_check is HashCheck.MATCH
    backbone = BERT.build()
    before = snapshot(backbone)
    with pytest.raises(CheckpointError, match="of type 'lora', and AdapterModel loads 'adapter'"):
        deltaexp.AdapterModel.from_finetuned(tmp_path, backbone)
    assert snapshot(backbone) == before


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"lora_rank": 3}, "lora_r"),
        ({"lora_r": 0}, "lora_r is 0; it must be at least 1"),
        ({"lora_r": "4"}, "lora_r is '4', which is not a whole number"),
        ({"modified_modules": []}, "empty list"),
        ({"bottleneck_dim": 3}, "no key 'bottleneck_dim'"),
    ],
)
def test_refused_keys_leave_the_backbone_alone(keys: dict, said: str) -> None:
    backbone = BERT.build()
    before = snapshot(backbone)
    with pytest.raises(ConfigError) as caught:
        deltaexp.LoraModel(backbone, **keys)
    assert said in str(caught.value)
    assert snapshot(backbone) == before


def test_a_config_is_not_shared_with_its_caller() -> None:
    config = AutoDeltaConfig.from_dict({"delta_type": "lora"}, lora_r=2)
    first = AutoDeltaModel.from_config(config, backbone_model=BERT.build())
    first.freeze_module(exclude=["deltas", "classifier"])
    assert config.unfrozen_modules == ["deltas"]
    assert config.modified_modules is None
    assert first.config.modified_modules == ["attn.q", "attn.v"]
    with pytest.raises(ConfigError, match="either a config"):
        DeltaModel(BERT.build())


def test_the_defaults_are_not_found_in_an_unknown_backbone() -> None:
    with pytest.raises(AddressingError, match="default modules of 'lora' .* are not found in this backbone"):
        deltaexp.LoraModel(nn.Sequential(nn.Linear(2, 2)))


def test_any_module_is_a_backbone(tmp_path: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()

    backbone, x = build(), torch.ones(2, 3)
    delta_model = deltaexp.LoraModel(backbone, modified_modules=["0", "2"])
    delta_model.freeze_module()
    perturb(delta_model)
    delta_model.save_finetuned(tmp_path)
    fresh = build()
    assert AutoDeltaModel.from_finetuned(tmp_path, fresh).hash_check is HashCheck.MATCH
    assert torch.equal(fresh(x), backbone(x))
    # A buffer is a part of the backbone, too.
    other = build()
    other[1].running_mean += 1
    with pytest.raises(DeltaExpError, match=r"1\.running_mean"):
        AutoDeltaModel.from_finetuned(tmp_path, other)


def test_the_root_may_be_modified() -> None:
    backbone = nn.Linear(3, 3)
    x = torch.ones(1, 3)
    plain = backbone(x)
    delta_model = deltaexp.AdapterModel(backbone, modified_modules=["[r]^$"])
    perturb(delta_model)
    assert sorted(delta_model.delta_tensors())[0] == "adapter.modulelist.down_proj.bias"
    assert not torch.equal(backbone(x), plain)
    delta_model.detach()
    assert torch.equal(backbone(x), plain)


def test_log(capsys: pytest.CaptureFixture[str]) -> None:
    attach(BERT.build()).log()
    printed = capsys.readouterr().out
    assert "lora_A:[8,16]" in printed
    assert "trainable 1,024" in printed


# --- a delta type from elsewhere --------------------------------------------------------------------------------------


class ScaleLayer(Layer):
    """Multiplies the output by a learnt vector, and is pickled like any class at the top of a module."""

    insertion = "sequential"

    def __init__(self, dim: int, start: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((dim,), start))

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return h * self.scale


@dataclass
class ScaleConfig(DeltaConfig):
    """IA3-like scaling."""

    delta_type: str = "scale"
    start: float = 1.0

    default_modules: ClassVar[tuple[str, ...]] = ("attn.k", "ff.w2")
    attribute: ClassVar[str] = "scale"

    def build(self, site: Site) -> ScaleLayer:
        return ScaleLayer(site.out_dim(self.delta_type), self.start)


@pytest.fixture
def scale() -> Iterator[str]:
    """The type in the registry, for one test."""
    known = registry.known()
    registry.register(ScaleConfig)
    yield "scale"
    registry._types.pop("scale", None)
    vars(deltaexp.model).pop("ScaleModel", None)
    assert registry.known() == known


@pytest.mark.parametrize("name", FAMILIES)
def test_a_type_of_another_package(name: str, scale: str, tmp_path: Path) -> None:
    family, inputs = FAMILIES[name], FAMILIES[name].inputs()
    backbone = family.build()
    plain, digest = logits(backbone, inputs), md5(backbone)
    delta_model = attach(backbone, scale, seed=None)
    assert torch.equal(logits(backbone, inputs), plain)
    perturb(delta_model)
    assert set(train_step(delta_model, inputs)) == set(delta_model.delta_tensors())
    expected = logits(backbone, inputs)
    assert not torch.equal(expected, plain)
    assert torch.equal(logits(pickle.loads(pickle.dumps(backbone)), inputs), expected)
    delta_model.save_finetuned(tmp_path)
    fresh = family.build()
    loaded = AutoDeltaModel.from_finetuned(tmp_path, fresh)
    assert type(loaded.config) is ScaleConfig
    assert loaded.hash_check is HashCheck.MATCH
    assert torch.equal(logits(fresh, inputs), expected)
    loaded.detach()
    assert md5(fresh) == digest
    assert deltaexp.ScaleModel is type(loaded)


def test_an_unknown_type_is_named_on_loading(scale: str, tmp_path: Path) -> None:
    attach(BERT.build(), scale).save_finetuned(tmp_path)
    del registry._types[scale]
    with pytest.raises(CheckpointError, match=r"no delta_type 'scale'\..*Known: adalora, adapter, bitfit"):
        AutoDeltaModel.from_finetuned(tmp_path, BERT.build())


def test_a_head_belongs_to_one_delta_at_a_time() -> None:
    backbone = FAMILIES["bert"].build()
    plain = backbone.classifier.weight.detach().clone()
    first = attach(backbone, "lora", unfrozen_modules=["deltas", "classifier"])
    with pytest.raises(AddressingError, match="belongs to another delta"):
        attach(backbone, "adapter", unfrozen_modules=["deltas", "classifier"])
    second = attach(backbone, "adapter")
    with pytest.raises(AddressingError, match="belongs to another delta"):
        second.freeze_module(exclude=["deltas", "classifier"])
    assert second.config.unfrozen_modules == ["deltas"]
    first.detach()
    second.freeze_module(exclude=["deltas", "classifier"])
    with torch.no_grad():
        backbone.classifier.weight.add_(1)
    second.detach()
    assert torch.equal(backbone.classifier.weight, plain)


def test_a_head_that_is_let_go_is_what_it_was() -> None:
    backbone = FAMILIES["bert"].build()
    plain = backbone.classifier.weight.detach().clone()
    delta = attach(backbone, "lora", unfrozen_modules=["deltas", "classifier"])
    with torch.no_grad():
        backbone.classifier.weight.add_(1)
    delta.freeze_module(exclude=["deltas"])
    assert torch.equal(backbone.classifier.weight, plain)
    delta.freeze_module(exclude=["deltas", "classifier"])
    delta.detach()
    delta.freeze_module(exclude=["deltas"])
    assert not any(name.startswith("classifier") for name in delta.delta_tensors())
    delta.attach()
    assert not any(name.startswith("classifier") for name in delta.delta_tensors())
