"""Every delta type on every kind of backbone: what holds for all of them.

A delta type that is added to the registry is tested here without a change.
"""

from __future__ import annotations

import copy
import itertools
import json
import pickle
from pathlib import Path

import pytest
import torch
from models import FAMILIES, Family, attach, logits, md5, perturb, same, train_step, values
from safetensors.torch import load_file

from deltaexp import AutoDeltaModel, HashCheck, registry

TYPES = registry.known()
# How far from the plain backbone a new delta may start, as a fraction of the size of the logits.
START = {"lora": 0.0, "adapter": 0.02}


@pytest.fixture(params=FAMILIES.values(), ids=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


every_type = pytest.mark.parametrize("delta_type", TYPES)


@every_type
def test_start_and_effect(family: Family, delta_type: str) -> None:
    backbone, inputs = family.build(), family.inputs()
    plain = logits(backbone, inputs)
    delta_model = attach(backbone, delta_type, seed=None)
    start = (logits(backbone, inputs) - plain).abs().max() / plain.abs().max()
    assert start <= START.get(delta_type, float("inf"))
    perturb(delta_model)
    assert (logits(backbone, inputs) - plain).abs().max() / plain.abs().max() > max(START.get(delta_type, 0), 1e-3)


@every_type
def test_every_layer_matters(family: Family, delta_type: str) -> None:
    backbone, inputs = family.build(), family.inputs()
    delta_model = attach(backbone, delta_type)
    with_all = logits(backbone, inputs)
    assert delta_model.attachments
    for attachment in delta_model.attachments:
        before = values(dict(attachment.layer.named_parameters()))
        with torch.no_grad():
            for parameter in attachment.layer.parameters():
                parameter.mul_(0.5)
        assert not torch.equal(logits(backbone, inputs), with_all), attachment.prefix
        attachment.layer.load_state_dict(before)
    assert torch.equal(logits(backbone, inputs), with_all)


@every_type
def test_a_train_step_moves_the_delta_and_nothing_else(family: Family, delta_type: str) -> None:
    backbone = family.build()
    delta_model = attach(backbone, delta_type)
    backbone.train()
    before = values(backbone.state_dict())
    delta = set(delta_model.delta_tensors())
    assert delta
    assert set(delta_model.trainable_parameters()) == delta
    gradients = train_step(delta_model, family.inputs())
    assert set(gradients) == delta
    assert [name for name, gradient in gradients.items() if not gradient.abs().max() > 0] == []
    after = backbone.state_dict()
    assert {name for name in before if not torch.equal(before[name], after[name])} == delta


@every_type
def test_freezing_twice_is_freezing_once(family: Family, delta_type: str) -> None:
    backbone = family.build()
    delta_model = attach(backbone, delta_type)
    once = [(name, p.requires_grad) for name, p in backbone.named_parameters()]
    delta_model.freeze_module()
    assert [(name, p.requires_grad) for name, p in backbone.named_parameters()] == once
    assert {name for name, trainable in once if trainable} == set(delta_model.delta_tensors())


@every_type
def test_save_and_load(family: Family, delta_type: str, tmp_path: Path) -> None:
    backbone, inputs = family.build(), family.inputs()
    delta_model = attach(backbone, delta_type)
    expected = logits(backbone, inputs)
    delta_model.save_finetuned(tmp_path / "delta")
    saved = load_file(tmp_path / "delta" / "delta_model.safetensors")
    assert same(saved, delta_model.delta_tensors())
    # Saving is no more than that: the model goes on as it was.
    assert torch.equal(logits(backbone, inputs), expected)
    assert set(delta_model.trainable_parameters()) == set(saved)

    fresh = family.build()
    loaded = AutoDeltaModel.from_finetuned(tmp_path / "delta", fresh)
    assert loaded.hash_check is HashCheck.MATCH
    assert loaded.config == delta_model.config
    assert torch.equal(logits(fresh, inputs), expected)
    assert set(loaded.trainable_parameters()) == set(saved)
    # What was loaded can be saved again, and is then the same delta.
    loaded.save_finetuned(tmp_path / "again")
    for name in ("config.json", "delta_model.safetensors", "manifest.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "delta" / name).read_bytes()
    loaded.detach()
    assert md5(fresh) == md5(family.build())


@every_type
def test_detached_and_attached_again(family: Family, delta_type: str) -> None:
    backbone, inputs = family.build(), family.inputs()
    plain, modules, digest = logits(backbone, inputs), list(backbone.named_modules()), md5(backbone)
    delta_model = attach(backbone, delta_type)
    tensors, expected = values(delta_model.delta_tensors()), logits(backbone, inputs)
    for _ in range(3):
        delta_model.detach()
        delta_model.detach()
        assert torch.equal(logits(backbone, inputs), plain)
        assert list(backbone.named_modules()) == modules
        assert md5(backbone) == digest
        assert same(delta_model.delta_tensors(), tensors)
        delta_model.attach()
        delta_model.attach()
        assert torch.equal(logits(backbone, inputs), expected)
        with delta_model.detached() as inner:
            assert inner is backbone
            assert torch.equal(logits(backbone, inputs), plain)
        assert torch.equal(logits(backbone, inputs), expected)
    with pytest.raises(KeyError, match="inside"), delta_model.detached():
        raise KeyError("inside")
    assert delta_model.attached
    delta_model.detach()
    with delta_model.detached():
        pass
    assert not delta_model.attached


@pytest.mark.parametrize("types", list(itertools.combinations_with_replacement(TYPES, 2)), ids="+".join)
def test_two_deltas_on_the_same_modules(family: Family, types: tuple[str, str], tmp_path: Path) -> None:
    backbone, inputs = family.build(), family.inputs()
    plain, digest, modules = logits(backbone, inputs), md5(backbone), list(backbone.named_modules())
    alone = []
    for index, delta_type in enumerate(types):
        single = attach(backbone, delta_type, modified_modules=list(family.linear), seed=index + 1)
        alone.append(logits(backbone, inputs))
        single.detach()
    pair = [
        attach(backbone, delta_type, modified_modules=list(family.linear), seed=index + 1)
        for index, delta_type in enumerate(types)
    ]
    both, trainable = logits(backbone, inputs), set().union(*[set(delta.trainable_parameters()) for delta in pair])
    assert len(trainable) == sum(len(delta.delta_tensors()) for delta in pair)
    assert not torch.equal(both, alone[0])
    assert not torch.equal(both, alone[1])

    # Each is saved without the other and can be loaded alone.
    for index, delta in enumerate(pair):
        delta.save_finetuned(tmp_path / str(index))
        fresh = family.build()
        loaded = AutoDeltaModel.from_finetuned(tmp_path / str(index), fresh)
        assert loaded.hash_check is HashCheck.MATCH
        assert torch.equal(logits(fresh, inputs), alone[index])
        names = json.loads((tmp_path / str(index) / "manifest.json").read_text())["delta"]
        assert len(names) == len(delta.delta_tensors())

    # Out and in again in every order.
    for order in itertools.permutations([(0, "out"), (1, "out"), (0, "in"), (1, "in")]):
        state = [True, True]
        for index, step in order:
            (pair[index].detach if step == "out" else pair[index].attach)()
            state[index] = step == "in"
            assert md5(backbone) == digest
            if sum(state) == 1:
                assert torch.equal(logits(backbone, inputs), alone[state.index(True)])
            elif not any(state):
                assert torch.equal(logits(backbone, inputs), plain)
                assert list(backbone.named_modules()) == modules
        for delta in pair:
            delta.detach()
        assert torch.equal(logits(backbone, inputs), plain)
        for delta in pair:
            delta.attach()
        assert torch.equal(logits(backbone, inputs), both)


@every_type
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_computes_with_its_own_layers(family: Family, delta_type: str, how: str) -> None:
    def copied(value):
        return copy.deepcopy(value) if how == "deepcopy" else pickle.loads(pickle.dumps(value))

    backbone, inputs = family.build(), family.inputs()
    plain, digest = logits(backbone, inputs), md5(backbone)
    delta_model = attach(backbone, delta_type)
    expected = logits(backbone, inputs)
    twin, twin_model = copied(backbone), copied(delta_model)
    for copy_of_backbone in (twin, twin_model.backbone_model):
        assert torch.equal(logits(copy_of_backbone, inputs), expected)
        storages = {parameter.data_ptr() for parameter in backbone.parameters()}
        assert not storages & {parameter.data_ptr() for parameter in copy_of_backbone.parameters()}
    perturb(delta_model, 8)
    changed = logits(backbone, inputs)
    assert not torch.equal(changed, expected)
    assert torch.equal(logits(twin, inputs), expected)
    assert torch.equal(logits(twin_model.backbone_model, inputs), expected)
    twin_model.detach()
    assert torch.equal(logits(twin_model.backbone_model, inputs), plain)
    assert md5(twin_model.backbone_model) == digest
    twin_model.attach()
    assert torch.equal(logits(twin_model.backbone_model, inputs), expected)
    assert torch.equal(logits(backbone, inputs), changed)
    delta_model.detach()
    assert torch.equal(logits(backbone, inputs), plain)
    assert torch.equal(logits(twin, inputs), expected)


@every_type
def test_the_backbone_is_saved_as_ever(family: Family, delta_type: str, tmp_path: Path) -> None:
    backbone = family.build()
    state = values(backbone.state_dict())
    backbone.save_pretrained(tmp_path / "before")
    delta_model = attach(backbone, delta_type)
    with_delta = backbone.state_dict()
    assert same({name: with_delta[name] for name in state}, state)
    assert set(with_delta) - set(state) == {
        f"{attachment.prefix}.{name}" for attachment in delta_model.attachments for name in attachment.layer.state_dict()
    }
    backbone.save_pretrained(tmp_path / "attached")
    plain = load_file(tmp_path / "before" / "model.safetensors")
    attached = load_file(tmp_path / "attached" / "model.safetensors")
    assert same({name: attached[name] for name in plain}, plain)
    with delta_model.detached():
        backbone.save_pretrained(tmp_path / "after")
    delta_model.detach()
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "after" / name).read_bytes() == (tmp_path / "before" / name).read_bytes()
    assert same(backbone.state_dict(), state)


@every_type
@pytest.mark.parametrize("name", ["t5", "gpt2", "llama"])
def test_generate(name: str, delta_type: str) -> None:
    family = FAMILIES[name]
    backbone = family.build()
    inputs = {key: value for key, value in family.inputs().items() if key != "labels"}

    def generate(cached: bool) -> torch.Tensor:
        return backbone.generate(**inputs, max_new_tokens=5, do_sample=False, use_cache=cached)

    plain = generate(True)
    delta_model = attach(backbone, delta_type)
    with_delta = generate(True)
    assert torch.equal(with_delta, generate(False))
    # One more forward pass over what was generated agrees with each choice.
    whole = {**inputs, "decoder_input_ids": with_delta[:, :-1]} if name == "t5" else {"input_ids": with_delta[:, :-1]}
    start = 0 if name == "t5" else inputs["input_ids"].shape[1] - 1
    chosen = logits(backbone, whole)[:, start:].argmax(-1)
    for row, expected in zip(chosen, with_delta[:, start + 1 :], strict=True):
        end = (expected == 1).nonzero()[0].item() + 1 if name == "t5" and (expected == 1).any() else len(expected)
        assert torch.equal(row[:end], expected[:end])
    assert not torch.equal(with_delta, plain)
    delta_model.detach()
    assert torch.equal(generate(True), plain)


@every_type
def test_gradient_checkpointing(family: Family, delta_type: str) -> None:
    backbone, inputs = family.build(), family.inputs()
    delta_model = attach(backbone, delta_type)
    backbone.train()
    layer, gradients, calls = delta_model.attachments[0].layer, [], []
    layer.register_forward_hook(lambda *_: calls.append(len(gradients)))
    # Transformers 5.23 renamed it, and its old name warns.
    enable = getattr(backbone, "activation_checkpointing_enable", None) or backbone.gradient_checkpointing_enable
    for checkpointed in (False, True):
        if checkpointed:
            enable()
        torch.manual_seed(3)
        backbone.zero_grad()
        backbone(**inputs).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in delta_model.trainable_parameters().items()})
    assert calls == [0, 1, 1]  # computed anew on the way back, so the checkpoints are there
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@every_type
def test_half_precision_backbone(family: Family, delta_type: str, tmp_path: Path) -> None:
    backbone, inputs = family.build().bfloat16(), family.inputs()
    delta_model = attach(backbone, delta_type)
    assert {tensor.dtype for tensor in delta_model.delta_tensors().values()} == {torch.float32}
    expected = logits(backbone, inputs)
    assert expected.dtype == torch.bfloat16
    gradients = train_step(delta_model, inputs)
    assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}
    assert not torch.equal(logits(backbone, inputs), expected)
    expected = logits(backbone, inputs)
    delta_model.save_finetuned(tmp_path)
    fresh = family.build().bfloat16()
    loaded = AutoDeltaModel.from_finetuned(tmp_path, fresh)
    assert loaded.hash_check is HashCheck.MATCH
    assert same(loaded.delta_tensors(), delta_model.delta_tensors())
    assert torch.equal(logits(fresh, inputs), expected)
