"""A delta on a backbone it was not trained on, or damaged on its way, is refused, and the backbone is as before."""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import FAMILIES, attach, logits, same, snapshot, values
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, BertModel

from deltaexp import AutoDeltaModel, DeltaExpError, HashCheck, checkpoint
from deltaexp.checksum import TensorDigest, model_md5, tensor_digest
from deltaexp.errors import (
    BackboneDtypeError,
    BackboneMismatchError,
    BackboneRevisionError,
    BackboneSettingsError,
    CheckpointError,
    DamagedFileError,
    DeltaMismatchError,
    EmptyTensorError,
    ExtraTensorError,
    HashMismatchError,
    MissingFileError,
    MissingTensorError,
    ProbeMismatchError,
    TensorDtypeError,
    TensorShapeError,
)
from deltaexp.manifest import sealed
from deltaexp.tree import linear_dims
from deltaexp.verification import check_saved

BERT = FAMILIES["bert"]
WEIGHTS = "delta_model.safetensors"
NAME = "bert.encoder.layer.1.attention.self.query"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA with a trained classifier."""
    folder = tmp_path_factory.mktemp("verification") / "delta"
    attach(BERT.build(), "lora", unfrozen_modules=["deltas", "classifier"]).save_finetuned(folder)
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy of it that may be spoilt."""
    return Path(shutil.copytree(original, tmp_path / "delta"))


def refusal(folder: Path, backbone: nn.Module, **options: object) -> DeltaExpError:
    """Load, which must fail and leave no trace in the backbone, and return the error."""
    for index, parameter in enumerate(backbone.parameters()):
        parameter.requires_grad_(index % 3 > 0)  # a pattern of its own, which must come back
    before, state, inputs = snapshot(backbone), values(backbone.state_dict()), BERT.inputs()
    outputs = logits(backbone, inputs) if isinstance(backbone, BertForSequenceClassification) else None
    with pytest.raises(CheckpointError) as caught:
        AutoDeltaModel.from_finetuned(folder, backbone, **options)
    assert snapshot(backbone) == before
    assert same(backbone.state_dict(), state)
    if outputs is not None:
        assert torch.equal(logits(backbone, inputs), outputs)
    return caught.value


def reseal(folder: Path, *, tensors: bool = False, recorded: bool = True) -> None:
    """Make the manifest fit the other files again, and with ``tensors`` the recorded digests and hash, as a forger might."""
    manifest = json.loads((folder / "manifest.json").read_text())
    if tensors:
        manifest["delta"] = {k: tensor_digest(v).to_dict() for k, v in load_file(folder / WEIGHTS).items()}
        every = {name: TensorDigest.from_dict(d) for part in ("base", "delta") for name, d in manifest[part].items()}
        if recorded:
            edit_config(folder, lambda values: values.update(backbone_hash=model_md5(every)))
    for name in manifest["files"]:
        manifest["files"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    del manifest["sha256"]
    (folder / "manifest.json").write_text(sealed(manifest))


def edit_config(folder: Path, change: Callable[[dict], object]) -> None:
    values = json.loads((folder / "config.json").read_text())
    change(values)
    (folder / "config.json").write_text(json.dumps(values))


def edit_tensors(folder: Path, change: Callable[[dict], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def test_the_right_backbone(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert AutoDeltaModel.from_finetuned(folder, BERT.build()).hash_check is HashCheck.MATCH


# --- another backbone -------------------------------------------------------------------------------------------------


def test_another_class(folder: Path) -> None:
    error = refusal(folder, FAMILIES["t5"].build())
    assert type(error) is BackboneMismatchError
    assert "BertForSequenceClassification" in str(error)
    assert "T5ForConditionalGeneration" in str(error)


def test_another_shape(folder: Path) -> None:
    config = BertConfig.from_dict({**BERT.build().config.to_dict(), "intermediate_size": 20})
    error = refusal(folder, BertForSequenceClassification(config).eval())
    assert type(error) is BackboneMismatchError
    assert "bert.encoder.layer.0.intermediate.dense.weight" in str(error)
    assert "another shape" in str(error)


@pytest.mark.parametrize(("layers", "said"), [(1, "none here"), (3, "not recorded")])
def test_another_depth(folder: Path, layers: int, said: str) -> None:
    config = BertConfig.from_dict({**BERT.build().config.to_dict(), "num_hidden_layers": layers})
    error = refusal(folder, BertForSequenceClassification(config).eval())
    assert type(error) is BackboneMismatchError
    assert f"bert.encoder.layer.{min(layers, 2)}." in str(error)
    assert said in str(error)


def test_the_same_backbone_with_other_weights(folder: Path) -> None:
    backbone = BERT.build(seed=1)
    error = refusal(folder, backbone)
    assert type(error) is BackboneMismatchError
    total = len(list(backbone.named_parameters())) - 2
    assert f"{total} of {total} tensors differ: bert.embeddings." in str(error)
    assert "other values" in str(error)


def test_one_weight_changed_in_its_last_bit(folder: Path) -> None:
    backbone = BERT.build()
    weight = backbone.bert.encoder.layer[1].output.dense.weight.data
    weight[3, 4] = torch.nextafter(weight[3, 4], torch.tensor(9.0))
    error = refusal(folder, backbone)
    assert type(error) is BackboneMismatchError
    total = len(list(backbone.named_parameters())) - 2  # the classifier belongs to the delta
    assert f"1 of {total} tensors differ: bert.encoder.layer.1.output.dense.weight (other values)" in str(error)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_another_dtype_and_nothing_else(original: Path, dtype: torch.dtype, tmp_path: Path) -> None:
    attach(BERT.build()).save_finetuned(tmp_path)
    error = refusal(tmp_path, BERT.build().to(dtype))
    assert type(error) is BackboneDtypeError
    assert "another dtype" in str(error)
    assert "dtype=torch.float32" in str(error)
    # With a head of another dtype in the delta as well, it is still refused.
    assert str(dtype) in str(refusal(original, BERT.build().to(dtype)))


def test_the_head_of_the_backbone_given_does_not_count(folder: Path) -> None:
    """The delta brings its own head, so the one it replaces may be any, as after ``from_pretrained``."""
    backbone, inputs = BERT.build(), BERT.inputs()
    expected = logits(AutoDeltaModel.from_finetuned(folder, BERT.build()).backbone_model, inputs)
    nn.init.ones_(backbone.classifier.weight)
    head = backbone.classifier.weight.detach().clone()
    loaded = AutoDeltaModel.from_finetuned(folder, backbone)
    assert loaded.hash_check is HashCheck.MATCH
    assert torch.equal(logits(backbone, inputs), expected)
    loaded.detach()
    assert torch.equal(backbone.classifier.weight, head)


# --- damaged files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", WEIGHTS, "manifest.json"])
def test_a_flipped_bit(folder: Path, name: str) -> None:
    path = folder / name
    data = path.read_bytes()
    for position in range(0, len(data), len(data) // 25):
        bit = 1 << position % 8
        path.write_bytes(data[:position] + bytes([data[position] ^ bit]) + data[position + 1 :])
        error = refusal(folder, BERT.build())
        if name == "manifest.json" and "has format" in str(error):
            continue
        assert type(error) is DamagedFileError
        assert str(path) in str(error)
    path.write_bytes(data)
    assert AutoDeltaModel.from_finetuned(folder, BERT.build()).hash_check is HashCheck.MATCH


def test_a_flipped_bit_in_the_card_is_found_when_it_matters(folder: Path) -> None:
    """Loading does not read the card; pushing does, see test_hub.py."""
    data = (folder / "README.md").read_bytes()
    (folder / "README.md").write_bytes(bytes([data[0] ^ 1]) + data[1:])
    assert AutoDeltaModel.from_finetuned(folder, BERT.build()).hash_check is HashCheck.MATCH


@pytest.mark.parametrize("name", ["config.json", WEIGHTS, "manifest.json"])
@pytest.mark.parametrize("length", [0, 0.5, -1])
def test_a_truncated_file(folder: Path, name: str, length: float) -> None:
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: int(length) if length <= 0 else len(data) // 2])
    error = refusal(folder, BERT.build())
    assert type(error) is DamagedFileError
    assert name in str(error)
    assert str(folder) in str(error)


@pytest.mark.parametrize("name", ["config.json", WEIGHTS])
def test_a_missing_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    error = refusal(folder, BERT.build())
    assert type(error) is MissingFileError
    assert f"it needs {name}" in str(error)


def test_truncated_weights_without_a_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-1])
    error = refusal(folder, BERT.build())
    assert type(error) is DamagedFileError
    assert WEIGHTS in str(error)


def test_a_manifest_of_another_version(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["sha256"]
    (folder / "manifest.json").write_text(sealed({**manifest, "format": 7}))
    assert "format 7" in str(refusal(folder, BERT.build()))


def test_digests_of_another_algorithm(folder: Path) -> None:
    edit_config(folder, lambda values: values.update(tensor_digest="blake9"))
    reseal(folder)
    error = str(refusal(folder, BERT.build()))
    assert "'blake9', and this version of deltaexp knows blake3, sha256" in error


# --- deltas that were saved with SHA-256 digests ------------------------------------------------------------------------


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A copy of a delta that was saved when manifests had format 2."""
    return Path(shutil.copytree(Path(__file__).parent / "saved" / "format_2", tmp_path / "old"))


def old_backbone() -> BertModel:
    """The backbone it was saved with, whose weights no version draws otherwise."""
    config = BertConfig(
        vocab_size=16,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=8,
    )
    model = BertModel(config)
    for parameter in model.parameters():
        parameter.data = (torch.arange(parameter.numel()) % 97 - 48).reshape(parameter.shape) / 256
    return model


def test_an_old_delta_is_verified(old: Path) -> None:
    loaded = AutoDeltaModel.from_finetuned(old, old_backbone())
    assert loaded.hash_check is HashCheck.MATCH
    assert all(check.known for check in check_saved(checkpoint.read(old)))
    checkpoint.add_files(old, {"results.json": "{}"})
    assert {digest.algorithm for digest in checkpoint.read_manifest(old).base.values()} == {"sha256"}
    assert AutoDeltaModel.from_finetuned(old, old_backbone()).hash_check is HashCheck.MATCH
    (old / "manifest.json").unlink()
    assert AutoDeltaModel.from_finetuned(old, old_backbone()).hash_check is HashCheck.MATCH


def test_an_old_delta_is_refused_as_any_other(old: Path) -> None:
    backbone = old_backbone()
    backbone.pooler.dense.bias.data[3] = torch.nextafter(backbone.pooler.dense.bias.data[3], torch.tensor(9.0))
    assert "1 of 23 tensors differ: pooler.dense.bias (other values)" in str(refusal(old, backbone))
    edit_tensors(old, lambda tensors: tensors["encoder.layer.0.attention.self.query.lora.lora_B"][0, 0].add_(1))
    assert type(refusal(old, old_backbone())) is DamagedFileError
    reseal(old)
    assert type(refusal(old, old_backbone())) is DeltaMismatchError
    reseal(old, tensors=True, recorded=False)
    assert type(refusal(old, old_backbone())) is DeltaMismatchError  # its digests are of the other algorithm now


def test_an_old_delta_saved_anew_has_new_digests(old: Path, tmp_path: Path) -> None:
    loaded = AutoDeltaModel.from_finetuned(old, old_backbone())
    before = checkpoint.read_config(old).saved_with
    manifest = loaded.save_finetuned(tmp_path / "new")
    assert {digest.algorithm for digest in (*manifest.base.values(), *manifest.delta.values())} == {"blake3"}
    after = checkpoint.read_config(tmp_path / "new").saved_with
    assert (before.tensor_digest, after.tensor_digest) == ("sha256", "blake3")
    assert before.backbone_hash != after.backbone_hash
    assert AutoDeltaModel.from_finetuned(tmp_path / "new", old_backbone()).hash_check is HashCheck.MATCH


# --- tensors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("consistent", [False, True], ids=["files resealed", "tensors resealed"])
@pytest.mark.parametrize("gone", [f"{NAME}.lora.lora_B", "classifier.weight"])
def test_a_missing_tensor(folder: Path, gone: str, consistent: bool) -> None:
    edit_tensors(folder, lambda tensors: tensors.pop(gone))
    assert type(refusal(folder, BERT.build())) is DamagedFileError
    reseal(folder, tensors=consistent)
    error = refusal(folder, BERT.build())
    assert type(error) is MissingTensorError
    assert f"lacks 1 of the 10 tensors that {'its config describes' if consistent else 'its manifest lists'}" in str(error)
    assert gone in str(error)


@pytest.mark.parametrize("consistent", [False, True], ids=["files resealed", "tensors resealed"])
@pytest.mark.parametrize("name", [f"{NAME}.lora.lora_C", f"{NAME}.weight", "nowhere"])
def test_an_extra_tensor(folder: Path, name: str, consistent: bool) -> None:
    """A delta's file must not be able to overwrite the backbone."""
    edit_tensors(folder, lambda tensors: tensors.update({name: torch.ones(16, 16)}))
    assert type(refusal(folder, BERT.build())) is DamagedFileError
    reseal(folder, tensors=consistent)
    error = refusal(folder, BERT.build())
    assert type(error) is ExtraTensorError
    assert name in str(error)
    if consistent:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that check_hash is off
            assert type(refusal(folder, BERT.build(), check_hash=False)) is ExtraTensorError


def test_a_tensor_of_another_shape(folder: Path) -> None:
    name = f"{NAME}.lora.lora_B"
    edit_tensors(folder, lambda tensors: tensors.update({name: tensors[name].T.contiguous()}))
    reseal(folder, tensors=True)
    error = refusal(folder, BERT.build())
    assert type(error) is TensorShapeError
    assert f"{name} has shape [8, 16] where [16, 8] is needed" in str(error)


def test_other_values_in_the_delta(folder: Path) -> None:
    name = f"{NAME}.lora.lora_B"
    edit_tensors(folder, lambda tensors: tensors[name][0, 0].add_(1))
    reseal(folder)
    error = refusal(folder, BERT.build())
    assert type(error) is DeltaMismatchError
    assert f"1 of 10 tensors differ: {name} (other values)" in str(error)
    # The manifest agrees with everything now, but the md5 in the config does not.
    reseal(folder, tensors=True, recorded=False)
    error = refusal(folder, BERT.build())
    assert type(error) is HashMismatchError
    assert json.loads((folder / "config.json").read_text())["backbone_hash"] in str(error)


def test_a_changed_digest_of_the_base(folder: Path) -> None:
    edit_config(folder, lambda values: values.update(base_sha256="0" * 64))
    reseal(folder)
    error = refusal(folder, BERT.build())
    assert type(error) is HashMismatchError
    assert "0" * 64 in str(error)


def test_a_changed_config(folder: Path) -> None:
    edit_config(folder, lambda values: values.update(lora_r=4))
    assert type(refusal(folder, BERT.build())) is DamagedFileError
    reseal(folder)
    assert "where [4, 16] is needed" in str(refusal(folder, BERT.build()))
    edit_config(folder, lambda values: values.update(lora_r=0))
    reseal(folder)
    assert "lora_r is 0" in str(refusal(folder, BERT.build()))
    edit_config(folder, lambda values: values.update(lora_r=8, lora_rank=8))
    reseal(folder)
    assert "lora_rank" in str(refusal(folder, BERT.build()))


def test_a_tensor_of_another_dtype(folder: Path) -> None:
    """Also where all digests agree with it: what trains in float32 is not silently held in whole numbers."""
    name = f"{NAME}.lora.lora_B"
    edit_tensors(folder, lambda tensors: tensors.update({name: tensors[name].half()}))
    reseal(folder)
    error = refusal(folder, BERT.build())
    assert type(error) is TensorDtypeError
    assert f"{name} (another dtype)" in str(error)
    edit_tensors(folder, lambda tensors: tensors.update({name: tensors[name].long()}))
    reseal(folder, tensors=True)
    error = refusal(folder, BERT.build())
    assert type(error) is TensorDtypeError
    assert f"{name} has dtype torch.int64" in str(error)


def test_a_renamed_tensor(folder: Path) -> None:
    name = f"{NAME}.lora.lora_B"
    edit_tensors(folder, lambda tensors: tensors.update({name.replace("query", "value2"): tensors.pop(name)}))
    reseal(folder, tensors=True)
    error = refusal(folder, BERT.build())
    assert type(error) is MissingTensorError
    assert name in str(error)
    assert "value2" in str(error)


def test_an_empty_tensor(folder: Path) -> None:
    name = f"{NAME}.lora.lora_B"
    edit_tensors(folder, lambda tensors: tensors.update({name: torch.empty(16, 0)}))
    reseal(folder, tensors=True)
    error = refusal(folder, BERT.build())
    assert type(error) is EmptyTensorError
    assert name in str(error)


def test_another_revision(tmp_path: Path) -> None:
    backbone, other = BERT.build(), BERT.build(seed=1)
    backbone.config._commit_hash, other.config._commit_hash = "a" * 40, "b" * 40
    attach(backbone).save_finetuned(tmp_path)
    error = refusal(tmp_path, other)
    assert type(error) is BackboneRevisionError
    assert f"it is revision {'b' * 40}, and then it was {'a' * 40}" in str(error)
    assert f"revision='{'a' * 40}'" in str(error)
    # A revision in which these weights did not change is the same backbone.
    same_weights = BERT.build()
    same_weights.config._commit_hash = "b" * 40
    assert AutoDeltaModel.from_finetuned(tmp_path, same_weights).hash_check is HashCheck.MATCH


# --- the probe --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_the_probe(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    backbone = family.build()
    delta_model = attach(backbone, "lora")
    backbone.train()
    delta_model.save_finetuned(tmp_path / "delta", probe=family.inputs())
    assert backbone.training
    assert all(module.training for module in backbone.modules())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AutoDeltaModel.from_finetuned(tmp_path / "delta", family.build(), check_probe=True)


def test_settings_that_no_tensor_shows(tmp_path: Path) -> None:
    attach(BERT.build()).save_finetuned(tmp_path / "delta")
    config = BertConfig.from_dict({**BERT.build().config.to_dict(), "num_attention_heads": 4, "layer_norm_eps": 1e-3})
    backbone = BertForSequenceClassification(config).eval()
    backbone.load_state_dict(BERT.build().state_dict())
    error = refusal(tmp_path / "delta", backbone)
    assert type(error) is BackboneSettingsError
    assert "layer_norm_eps is 0.001 and was 1e-12" in str(error)
    assert "num_attention_heads is 4 and was 2" in str(error)


def test_settings_that_change_nothing(tmp_path: Path) -> None:
    attach(BERT.build()).save_finetuned(tmp_path / "delta")
    backbone = BERT.build()
    backbone.config.update({"hidden_dropout_prob": 0.5, "use_cache": False, "pad_token_id": 3, "initializer_range": 1.0})
    assert AutoDeltaModel.from_finetuned(tmp_path / "delta", backbone).hash_check is HashCheck.MATCH


@pytest.mark.parametrize("name", FAMILIES)
def test_what_the_probe_finds_alone(name: str, tmp_path: Path) -> None:
    """A backbone whose code is another: no tensor and no setting shows it."""
    family = FAMILIES[name]
    attach(family.build()).save_finetuned(tmp_path / "delta", probe=family.inputs())
    backbone = family.build()
    first = next(module for module in backbone.modules() if linear_dims(module))
    first.register_forward_hook(lambda module, inputs, output: output + 0.5 * output.roll(1, -1))
    AutoDeltaModel.from_finetuned(tmp_path / "delta", backbone).detach()
    before = snapshot(backbone)
    with pytest.raises(ProbeMismatchError, match="does not compute what was trained"):
        AutoDeltaModel.from_finetuned(tmp_path / "delta", backbone, check_probe=True)
    assert snapshot(backbone) == before


def test_without_a_probe_its_check_is_refused(folder: Path) -> None:
    before = snapshot(backbone := BERT.build())
    with pytest.raises(ProbeMismatchError, match="holds no batch"):
        AutoDeltaModel.from_finetuned(folder, backbone, check_probe=True)
    assert snapshot(backbone) == before


def test_a_flipped_bit_in_the_probe(tmp_path: Path) -> None:
    attach(BERT.build()).save_finetuned(tmp_path / "delta", probe=BERT.inputs())
    path = tmp_path / "delta" / "probe.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(DamagedFileError, match="probe"):
        AutoDeltaModel.from_finetuned(tmp_path / "delta", BERT.build(), check_probe=True)


# --- what is recorded -------------------------------------------------------------------------------------------------


def test_no_recorded_hash_is_unknown_and_never_a_match(folder: Path) -> None:
    edit_config(folder, lambda values: values.pop("backbone_hash"))
    reseal(folder)
    with pytest.warns(UserWarning, match="unknown") as caught:
        loaded = AutoDeltaModel.from_finetuned(folder, BERT.build())
    assert loaded.hash_check is HashCheck.UNKNOWN
    assert [Path(warning.filename).name for warning in caught] == [Path(__file__).name]  # the caller's line
    assert str(folder) in str(caught[0].message)


def test_without_a_manifest_the_md5_decides(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    assert AutoDeltaModel.from_finetuned(folder, BERT.build()).hash_check is HashCheck.MATCH
    error = refusal(folder, BERT.build(seed=1))
    assert type(error) is HashMismatchError
    assert json.loads((folder / "config.json").read_text())["backbone_hash"] in str(error)


def test_the_check_can_be_switched_off(folder: Path) -> None:
    backbone = BERT.build(seed=1)
    with pytest.warns(UserWarning, match="check_hash=False") as caught:
        loaded = AutoDeltaModel.from_finetuned(folder, backbone, check_hash=False)
    assert loaded.hash_check is HashCheck.SKIPPED
    assert [Path(warning.filename).name for warning in caught] == [Path(__file__).name]
    assert same(loaded.delta_tensors(), load_file(folder / WEIGHTS))


def test_switching_the_check_off_loads_no_damaged_file(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert type(refusal(folder, BERT.build(), check_hash=False)) is DamagedFileError


def test_an_attached_delta_stays_when_another_is_refused(folder: Path) -> None:
    backbone, inputs = BERT.build(seed=1), BERT.inputs()
    first = attach(backbone, "adapter")
    expected, tensors = logits(backbone, inputs), values(first.delta_tensors())
    assert type(refusal(folder, backbone)) is BackboneMismatchError
    assert torch.equal(logits(backbone, inputs), expected)
    assert same(first.delta_tensors(), tensors)


def test_the_errors_tell_the_cases_apart() -> None:
    kinds = [DamagedFileError, MissingTensorError, BackboneMismatchError, DeltaMismatchError]
    for kind in kinds:
        assert issubclass(kind, CheckpointError)
        assert [other for other in kinds if issubclass(kind, other)] == [kind]
