"""What OpenDelta 0.3.2 saved and computed, read and computed again.

``tests/golden`` was made by the released package itself (see ``scripts/opendelta_golden.py``): for every backbone its weights,
an input and the plain logits, and for every case the two files that OpenDelta saved, the config that was given, the trained
parameters, the logits with the delta and, where it is another one, the input.
"""

from __future__ import annotations

import copy
import json
import pickle
import re
import shutil
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hub_fixtures import HubClient
from models import logits, md5, parameters, snapshot
from safetensors.torch import load_file
from torch import nn

from deltaexp import AutoDeltaConfig, AutoDeltaModel, HashCheck, LoraModel
from deltaexp.errors import AddressingError, BackboneMismatchError, CheckpointError, DamagedFileError, MissingTensorError
from deltaexp.interop.opendelta import PICKLED

GOLDEN = Path(__file__).parents[1] / "golden"
NAMED = sorted(path.parent.relative_to(GOLDEN).as_posix() for path in GOLDEN.glob("*/*/golden.json"))
CASES = [case for case in NAMED if (GOLDEN / case / "golden.safetensors").exists()]
TOLERANCE = 1e-5
OTHER_NAMES = {
    "bart/prefix_reparam": "the MLP of prefixes hangs beside the prefixes there, and in them here",
    "bert/prefix_reparam": "the same",
    "gpt2/prefix_reparam": "the same",
    "roberta/prefix_reparam": "the same",
    "t5_square/prefix_reparam": "the same",
    "t5_square/prefix": "T5's prefixes hang on SelfAttention there, and on the module around it here",
    "t5/bitfit_upstream_fix": "new biases are parameters of the modules themselves there",
    "bert/lora_exclude_modules": "OpenDelta ignores exclude_modules for LoRA",
    "opt/bitfit": "ln_f's kin of OPT is no layer norm to OpenDelta",
    "deberta_v2/bitfit": "intermediate.dense of DeBERTa is no part of ff to OpenDelta",
    "opt/adapter_ff": "ff@ means both of OPT's linear maps there",
    "roberta/adapter_ff": "ff@ means two modules around linear maps there",
    "roberta/low_rank_adapter_no_width": "a bottleneck is at least 1 wide here",
}
"""Why a new delta made from the same config has other parameters."""


@cache
def loaded(name: str, backbone_class: str) -> nn.Module:
    options = {"attn_implementation": "eager"} if name.startswith("deberta") else {}  # DeBERTa has no other
    return getattr(transformers, backbone_class).from_pretrained(GOLDEN / "backbones" / name, **options).eval()


def backbone_for(case: str) -> nn.Module:
    return copy.deepcopy(loaded(case.split("/")[0], facts(case)["backbone_class"]))


@cache
def facts(case: str) -> dict[str, Any]:
    return json.loads((GOLDEN / case / "golden.json").read_text())


def recorded(case: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return the input of a case, and the logits."""
    shared = load_file(GOLDEN / "backbones" / case.split("/")[0] / "golden.safetensors")
    shared.pop("logits_backbone")
    own = load_file(GOLDEN / case / "golden.safetensors")
    expected = own.pop("logits")
    return own or shared, expected


def unchecked(case: str | Path, backbone: nn.Module) -> Any:
    """Load what OpenDelta saved, which cannot be checked by its hash."""
    with pytest.warns(UserWarning, match=r"saved by OpenDelta 0\.3\.0.* whether this is the right backbone is unknown"):
        return AutoDeltaModel.from_finetuned(GOLDEN / case, backbone)


def test_all_cases_are_here() -> None:
    types = Counter(facts(case)["config"]["delta_type"] for case in CASES)
    assert set(types) == {
        *("adapter", "bitfit", "compacter", "lora", "low_rank_adapter", "parallel_adapter", "prefix", "soft_prompt")
    }
    assert len(CASES) == 66
    assert set(NAMED) - set(CASES) == {"bert/compacter_fixed_rule"}
    assert set(OTHER_NAMES) <= set(CASES)


@pytest.mark.parametrize("name", sorted({case.split("/")[0] for case in CASES}))
def test_the_plain_backbones(name: str) -> None:
    backbone = backbone_for(next(case for case in CASES if case.startswith(f"{name}/")))
    inputs = load_file(GOLDEN / "backbones" / name / "golden.safetensors")
    expected = inputs.pop("logits_backbone")
    torch.testing.assert_close(logits(backbone, inputs), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_of_opendelta(case: str, tmp_path: Path) -> None:
    backbone = backbone_for(case)
    inputs, expected = recorded(case)
    plain, before = logits(backbone, inputs), md5(backbone)
    delta_model = unchecked(case, backbone)
    assert delta_model.hash_check is HashCheck.UNKNOWN
    found = logits(backbone, inputs)
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)
    # A soft prompt's own positions come first in the logits of a causal model.
    assert (found[:, -plain.shape[1] :] - plain).abs().max() > 0.04

    trained = {id(parameter) for parameter in parameters(delta_model).values()}
    assert {id(parameter) for parameter in backbone.parameters() if parameter.requires_grad} == trained
    shapes = Counter(tuple(shape) for shape in facts(case)["trainable_parameters"].values())
    if case not in ("t5/bitfit_upstream_fix", "roberta/low_rank_adapter_no_width"):
        assert Counter(tuple(parameter.shape) for parameter in parameters(delta_model).values()) == shapes

    delta_model.save_finetuned(tmp_path)
    again = backbone_for(case)
    assert AutoDeltaModel.from_finetuned(tmp_path, again).hash_check is HashCheck.MATCH
    assert torch.equal(logits(again, inputs), found)

    delta_model.detach()
    assert torch.equal(logits(backbone, inputs), plain)
    assert md5(backbone) == before


@pytest.mark.parametrize("case", sorted(set(NAMED) - set(OTHER_NAMES)))
def test_a_new_delta_has_the_parameters_that_opendelta_gives_it(case: str) -> None:
    delta_model = AutoDeltaModel.from_config(
        AutoDeltaConfig.from_dict(facts(case)["config"]), backbone_model=backbone_for(case)
    )
    delta_model.freeze_module()
    found = {name: list(parameter.shape) for name, parameter in delta_model.trainable_parameters().items()}
    assert list(found.items()) == list(facts(case)["trainable_parameters"].items())


@pytest.mark.parametrize("case", sorted(OTHER_NAMES))
def test_what_is_said_to_have_other_names_has(case: str) -> None:
    config = AutoDeltaConfig.from_dict(facts(case)["config"])
    try:
        delta_model = AutoDeltaModel.from_config(config, backbone_model=backbone_for(case))
    except AddressingError:
        return  # no module of these backbones is ff here
    delta_model.freeze_module()
    found = {name: list(parameter.shape) for name, parameter in delta_model.trainable_parameters().items()}
    assert found != facts(case)["trainable_parameters"]


def test_config() -> None:
    config = AutoDeltaConfig.from_finetuned(GOLDEN / "t5" / "lora")
    assert config.delta_type == "lora"
    assert config.modified_modules == ["attn@.q@", "attn@.v@"]
    assert config.common_structure is True
    assert config.saved_with.origin == "OpenDelta 0.3.0"
    assert config.saved_with.backbone_class == "T5ForConditionalGeneration"
    assert config.saved_with.backbone_hash is None  # it means nothing here
    delta_model = AutoDeltaModel.from_config(config, backbone_model=backbone_for("t5/lora"))
    assert set(parameters(delta_model)) == set(facts("t5/lora")["trainable_parameters"])


def test_without_the_check_and_by_a_direct_class() -> None:
    with pytest.warns(UserWarning, match="check_hash=False"):
        assert LoraModel.from_finetuned(GOLDEN / "bert/lora", backbone_for("bert/lora"), False).hash_check is HashCheck.SKIPPED
    backbone = backbone_for("bert/adapter")
    before = snapshot(backbone)
    with pytest.raises(CheckpointError, match="holds a delta of type 'adapter', and LoraModel loads 'lora'"):
        LoraModel.from_finetuned(GOLDEN / "bert/adapter", backbone)
    assert snapshot(backbone) == before


def test_from_a_repository(hub_client: HubClient) -> None:
    hub_client.api.create_repo("DeltaHub/older")
    hub_client.api.upload_folder(
        repo_id="DeltaHub/older", folder_path=GOLDEN / "bert/lora", allow_patterns=["config.json", PICKLED]
    )
    backbone = backbone_for("bert/lora")
    with pytest.warns(UserWarning, match="saved by OpenDelta"):
        delta_model = AutoDeltaModel.from_finetuned("DeltaHub/older", backbone)
    assert delta_model.hash_check is HashCheck.UNKNOWN
    inputs, expected = recorded("bert/lora")
    torch.testing.assert_close(logits(backbone, inputs), expected, atol=TOLERANCE, rtol=0)
    assert AutoDeltaConfig.from_finetuned("DeltaHub/older").delta_type == "lora"


def test_heads_in_another_delta_of_bitfit(tmp_path: Path) -> None:
    # unfrozen_modules may name what the type trains as well: OpenDelta then trains all of it.
    folder = copied("bert/bitfit", tmp_path)
    backbone = backbone_for("bert/bitfit")
    heads = {name: p.detach() + 1 for name, p in backbone.named_parameters() if name.startswith(("classifier", "bert.pooler"))}
    names = [name for name in tensors_of(folder) if "LayerNorm" in name]
    norms = {name.replace("bias", "weight"): backbone.get_parameter(name.replace("bias", "weight")).detach() for name in names}
    change(
        folder, lambda tensors: tensors.update(heads | norms), unfrozen_modules=["deltas", "classifier", "pooler", "LayerNorm"]
    )
    delta_model = unchecked(folder, backbone)
    assert set(delta_model.delta_tensors()) == set(tensors_of(folder))
    assert torch.equal(backbone.classifier.bias, heads["classifier.bias"])


# What does not fit


def copied(case: str, folder: Path) -> Path:
    for name in ("config.json", PICKLED):
        shutil.copy(GOLDEN / case / name, folder / name)
    return folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / PICKLED, weights_only=True)


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object] = lambda tensors: None, **config: object) -> None:
    tensors = tensors_of(folder)
    edit(tensors)
    torch.save(tensors, folder / PICKLED)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))


def refused(folder: Path, backbone: nn.Module, match: str, error: type[CheckpointError] = CheckpointError) -> None:
    """Load, which must fail with a sentence that names the folder, and leave the backbone as it was."""
    before = snapshot(backbone)
    with pytest.raises(error, match=match) as caught:
        AutoDeltaModel.from_finetuned(folder, backbone)
    assert str(folder) in str(caught.value)
    assert str(caught.value).endswith(".")
    assert snapshot(backbone) == before


DAMAGED = ["bert/lora", "bert/bitfit", "gpt2/compacter", "opt/parallel_adapter", "t5_square/prefix", "bart/prefix_reparam"]
DAMAGED += ["roberta/soft_prompt_no_mask", "t5/adapter", "bert/adapter_relu_unfrozen_classifier", "opt/bitfit"]


@pytest.mark.parametrize("damage", ["missing", "a layer missing", "renamed", "shape", "extra", "elsewhere"])
@pytest.mark.parametrize("case", DAMAGED)
def test_tensors_that_do_not_fit_are_refused_whole(case: str, damage: str, tmp_path: Path) -> None:
    folder = copied(case, tmp_path)
    first = next(name for name in tensors_of(folder) if name != "classifier.weight")
    module = first.rpartition(".")[0]

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        if damage == "a layer missing":
            number = re.search(r"\.\d\.", first)
            for name in [name for name in tensors if name.startswith(first[: number.end()] if number else module)]:
                del tensors[name]
        elif damage == "shape":
            tensors[first] = torch.zeros(3, 5)
        elif damage == "extra":
            tensors[f"{module}.more"] = torch.zeros(2)
        else:
            value = tensors.pop(first)
            if damage == "renamed":
                tensors[f"{first}s"] = value
            elif damage == "elsewhere":
                tensors[f"another.{first}"] = value

    change(folder, edit)
    refused(folder, backbone_for(case), "Nothing was loaded")


def test_more_layers_than_the_delta_was_trained_in(tmp_path: Path) -> None:
    config = copy.deepcopy(loaded("bert", facts("bert/lora")["backbone_class"]).config)
    config.num_hidden_layers += 1
    backbone = transformers.BertForSequenceClassification(config)
    for case in ("bert/lora", "bert/bitfit", "bert/prefix", "bert/compacter"):
        folder = tmp_path / case
        folder.mkdir(parents=True)
        refused(copied(case, folder), backbone, r"it has none for bert\.encoder\.layer\.2", MissingTensorError)


def test_two_deltas_in_one_file(tmp_path: Path) -> None:
    folder = copied("t5/adapter", tmp_path)
    change(folder, lambda tensors: tensors.update({n.replace(".adapter.", ".adapter_1."): t for n, t in tensors.items()}))
    refused(folder, backbone_for("t5/adapter"), r"more than one adapter on .*\(adapter, adapter_1\)")
    # A file with the second alone, whose name has a number, is like any other.
    change(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if ".adapter." in name])
    unchecked(folder, backbone := backbone_for("t5/adapter"))
    inputs, expected = recorded("t5/adapter")
    torch.testing.assert_close(logits(backbone, inputs), expected, atol=TOLERANCE, rtol=0)


def test_another_delta_of_another_type_in_the_file(tmp_path: Path) -> None:
    folder = copied("bert/lora", tmp_path)
    change(folder, lambda tensors: tensors.update(tensors_of(GOLDEN / "bert/adapter")))
    refused(folder, backbone_for("bert/lora"), "none of its layers'.* no unfrozen_modules")


def test_another_delta_on_other_modules_in_the_file(tmp_path: Path) -> None:
    folder = copied("distilbert/lora_regex", tmp_path)
    change(folder, lambda t: t.update({n.replace("q_lin", "v_lin"): v for n, v in t.items() if ".q_lin." in n}))
    refused(folder, backbone_for("distilbert/lora_regex"), r"it has some for .*\.v_lin")


def test_parameters_of_the_backbone_that_the_config_does_not_name(tmp_path: Path) -> None:
    case = "bert/adapter_relu_unfrozen_classifier"
    folder = copied(case, tmp_path)
    change(folder, unfrozen_modules=["deltas"])
    refused(folder, backbone_for(case), r"classifier\.weight, classifier\.bias.* no unfrozen_modules")


def test_a_delta_that_was_not_trained_is_not_in_the_file(tmp_path: Path) -> None:
    case = "bert/adapter_relu_unfrozen_classifier"
    folder = copied(case, tmp_path)
    change(
        folder,
        lambda tensors: [tensors.pop(name) for name in list(tensors) if ".adapter." in name],
        unfrozen_modules=["classifier"],
    )
    refused(folder, backbone_for(case), "it has none for bert", MissingTensorError)


def test_random_matrices_that_were_not_saved() -> None:
    refused(GOLDEN / "bert/compacter_fixed_rule", backbone_for("bert/compacter_fixed_rule"), "learn_phm false")


class Trap:
    """A pickle of it creates a file where it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_files_that_hold_more_than_tensors(tmp_path: Path) -> None:
    folder = copied("bert/lora", tmp_path)
    backbone = backbone_for("bert/lora")
    sprung = tmp_path / "sprung"
    torch.save({"a": Trap(sprung)}, folder / PICKLED)
    refused(folder, backbone, "nothing else in a pickle is ever loaded", DamagedFileError)
    (folder / PICKLED).write_bytes(pickle.dumps(Trap(sprung)))
    refused(folder, backbone, "nothing else in a pickle is ever loaded", DamagedFileError)
    assert not sprung.exists()
    for content in ([torch.zeros(2)], {"a": 1}, {1: torch.zeros(2)}, {"a": torch.zeros(2, dtype=torch.int64)}):
        torch.save(content, folder / PICKLED)
        refused(folder, backbone, "something else than named tensors", DamagedFileError)


def test_truncated_files(tmp_path: Path) -> None:
    folder = copied("bert/lora", tmp_path)
    backbone = backbone_for("bert/lora")
    whole, legacy = (folder / PICKLED).read_bytes(), tmp_path / "legacy.bin"
    torch.save(tensors_of(folder), legacy, _use_new_zipfile_serialization=False)
    for content in (whole, legacy.read_bytes()):
        for length in (0, 1, 10, 100, 1000, len(content) // 2, len(content) - 1):
            (folder / PICKLED).write_bytes(content[:length])
            refused(folder, backbone, PICKLED, DamagedFileError)


def test_another_backbone(tmp_path: Path) -> None:
    refused(GOLDEN / "bert/lora", backbone_for("t5/lora"), "no module 'bert.encoder")
    config = loaded("bert", facts("bert/lora")["backbone_class"]).config
    other = transformers.BertForMaskedLM(config)  # it has all the modules, and another head
    refused(GOLDEN / "bert/lora", other, "trained on a BertForSequenceClassification", BackboneMismatchError)
    wide = copy.deepcopy(config)
    wide.hidden_size *= 2
    refused(GOLDEN / "bert/lora", transformers.BertForSequenceClassification(wide), r"has shape \[8, 64\] where \[8, 128\]")


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"lora_rank": 8}, "no key 'lora_rank'"),
        ({"lora_r": "eight"}, "lora_r is 'eight'"),
        ({"delta_type": "lara"}, "Did you mean 'lora'"),
        ({"delta_type": "ia3"}, "which OpenDelta does not have|has no key"),
        ({"modified_modules": []}, "modified_modules is an empty list"),
        ({"modified_modules": ["[r]("], "common_structure": False}, "is not a regular expression"),
        ({"modified_modules": ["query", "key"], "common_structure": False}, r"it has none for .*self\.key"),
    ],
)
def test_configs_that_cannot_be_used(config: dict[str, object], match: str, tmp_path: Path) -> None:
    folder = copied("bert/lora", tmp_path)
    change(folder, **config)
    refused(folder, backbone_for("bert/lora"), match)


def test_a_type_that_opendelta_does_not_have(tmp_path: Path) -> None:
    folder = copied("bert/lora", tmp_path)
    (folder / "config.json").write_text('{"delta_type": "ia3"}')
    refused(folder, backbone_for("bert/lora"), "type 'ia3', which OpenDelta does not have")


@pytest.mark.parametrize("text", ["", "[]", "{", "3", "[" * 200_000], ids=["empty", "list", "open", "number", "nested"])
def test_a_damaged_config(text: str, tmp_path: Path) -> None:
    folder = copied("bert/lora", tmp_path)
    (folder / "config.json").write_text(text)
    said = "no config that OpenDelta wrote|not valid JSON|nested too deeply"
    refused(folder, backbone_for("bert/lora"), said, DamagedFileError)
    with pytest.raises(DamagedFileError, match=said):
        AutoDeltaConfig.from_finetuned(folder)
