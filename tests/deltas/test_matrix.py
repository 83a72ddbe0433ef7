"""Every delta type on every kind of backbone: what holds for all of them.

A delta type that is added to the registry is tested here without a change.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import pickle
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from models import FAMILIES, Family, attach, logits, md5, parameters, perturb, same, snapshot, train_step, values
from safetensors.torch import load_file
from torch import nn

from deltaexp import AutoDeltaModel, DeltaModel, HashCheck, registry
from deltaexp.errors import AddressingError


@dataclass(frozen=True)
class Traits:
    """In what a delta type differs from one that puts new layers on linear modules."""

    keys: dict[str, Any] = field(default_factory=dict)
    """Keys of its config on the tiny backbones."""
    start: float = math.inf
    """How far from the plain backbone a new delta may start, as a fraction of the size of the logits."""
    linear: bool = True
    """Whether it goes on any linear module."""
    owns: bool = False
    """Whether it trains parameters of the backbone itself, of which there cannot be two owners."""
    grows: int = 0
    """How many positions the logits of a causal model have more."""
    recomputed: bool = True
    """Whether its layers lie in the blocks, and so are computed anew under gradient checkpointing."""


TRAITS = {
    "lora": Traits(start=0.0),
    "adalora": Traits(start=0.0),
    "vera": Traits(start=0.0),
    "loha": Traits(start=0.0),
    "lokr": Traits(start=0.0),
    "ia3": Traits(start=0.0),
    "peft": Traits(start=0.0),
    "reft": Traits(start=1e-5, linear=False, recomputed=False),  # it acts on what a block hands on
    "adapter": Traits(start=0.02),
    "parallel_adapter": Traits(start=0.02, linear=False),
    "bitfit": Traits(start=0.0, owns=True),
    "ln_tuning": Traits(start=0.0, linear=False, owns=True),
    "full": Traits(start=0.0, owns=True),
    "prefix": Traits(keys={"embed_dim": 8, "mid_dim": 8}, linear=False),
    "soft_prompt": Traits(keys={"soft_token_num": 4}, linear=False, grows=4, recomputed=False),
}
TYPES = [name for name in registry.known() if not registry.get(name).trains_nothing]
THOROUGH = ("lora", "adapter")
"""The types that are tested on every backbone in every respect; of the others, some respects are tested on one, in turn."""


def traits(delta_type: str) -> Traits:
    return TRAITS.get(delta_type, Traits())


def new(family: Family, delta_type: str, **options: Any) -> tuple[nn.Module, DeltaModel]:
    backbone = family.build()
    return backbone, attach(backbone, delta_type, **{**traits(delta_type).keys, **options})


def shared(values: torch.Tensor, family: Family, delta_type: str) -> torch.Tensor:
    """Return the logits at the positions that the plain backbone has as well."""
    return values[:, traits(delta_type).grows :] if family.name in ("gpt2", "llama") else values


def distance(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first - second).abs().max() / second.abs().max())


def in_turn(names: Sequence[str] = tuple(FAMILIES)) -> Any:
    """Parametrise a test over every type, on all of these backbones or on one of them."""
    pairs = [
        (FAMILIES[name], delta_type)
        for number, delta_type in enumerate(TYPES)
        for name in (names if delta_type in THOROUGH else [names[number % len(names)]])
    ]
    return pytest.mark.parametrize(("family", "delta_type"), pairs, ids=[f"{family.name}-{name}" for family, name in pairs])


QUICK = ("t5", "gpt2")
"""The backbones, one without fused projections and one with, on which every type is tested every time."""
everywhere = pytest.mark.parametrize(
    ("family", "delta_type"),
    [
        pytest.param(
            family,
            delta_type,
            marks=[] if delta_type in THOROUGH or family.name in QUICK else [pytest.mark.slow],
            id=f"{family.name}-{delta_type}",
        )
        for family in FAMILIES.values()
        for delta_type in TYPES
    ],
)


def test_every_trait_is_of_a_type() -> None:
    assert set(TRAITS) <= set(TYPES)


@everywhere
def test_start_and_effect(family: Family, delta_type: str) -> None:
    inputs, plain = family.inputs(), logits(family.build(), family.inputs())
    backbone, delta_model = new(family, delta_type, seed=None)
    start = distance(shared(logits(backbone, inputs), family, delta_type), plain)
    assert start <= traits(delta_type).start
    perturb(delta_model)
    changed = distance(shared(logits(backbone, inputs), family, delta_type), plain)
    assert changed > max(start if math.isfinite(traits(delta_type).start) else 0, 1e-3)


@everywhere
def test_every_layer_matters(family: Family, delta_type: str) -> None:
    inputs = family.inputs()
    backbone, delta_model = new(family, delta_type)
    with_all = logits(backbone, inputs)
    assert delta_model.attachments or traits(delta_type).owns
    for attachment in delta_model.attachments:
        before = values(dict(attachment.layer.named_parameters()))
        if not before:
            continue  # it computes with the parameters of another layer
        with torch.no_grad():
            for parameter in attachment.layer.parameters():
                parameter.mul_(0.5)
        assert not torch.equal(logits(backbone, inputs), with_all), attachment.prefix
        attachment.layer.load_state_dict(before, strict=False)
    assert torch.equal(logits(backbone, inputs), with_all)


@everywhere
def test_a_train_step_moves_the_delta_and_nothing_else(family: Family, delta_type: str) -> None:
    backbone, delta_model = new(family, delta_type)
    backbone.train()
    tensors = {**dict(backbone.named_parameters()), **dict(backbone.named_buffers())}
    before, delta = values(tensors), set(parameters(delta_model))
    assert delta
    assert set(delta_model.trainable_parameters()) == delta
    gradients = train_step(delta_model, family.inputs())
    assert set(gradients) == delta
    assert [name for name, gradient in gradients.items() if not gradient.abs().max() > 0] == []
    moved = {name for name in before if not torch.equal(before[name], tensors[name])}
    # The softmax takes away a bias of all keys: its gradient is rounding, which need not reach the last bit.
    idle = {name for name in delta if ".k.bitfit" in name or "key.bias" in name or ".k_proj.bitfit" in name}
    assert delta - idle <= moved <= delta


@in_turn()
def test_freezing_twice_is_freezing_once(family: Family, delta_type: str) -> None:
    backbone, delta_model = new(family, delta_type)
    once = [(name, p.requires_grad) for name, p in backbone.named_parameters()]
    delta_model.freeze_module()
    assert [(name, p.requires_grad) for name, p in backbone.named_parameters()] == once
    assert {name for name, trainable in once if trainable} == set(parameters(delta_model))


@everywhere
def test_save_and_load(family: Family, delta_type: str, tmp_path: Path) -> None:
    inputs = family.inputs()
    backbone, delta_model = new(family, delta_type)
    expected = logits(backbone, inputs)
    delta_model.save_finetuned(tmp_path / "delta")
    saved = load_file(tmp_path / "delta" / "delta_model.safetensors")
    assert same(saved, delta_model.delta_tensors())
    # Saving is no more than that: the model goes on as it was.
    assert torch.equal(logits(backbone, inputs), expected)
    assert set(delta_model.trainable_parameters()) == set(parameters(delta_model))

    fresh = family.build()
    loaded = AutoDeltaModel.from_finetuned(tmp_path / "delta", fresh)
    assert loaded.hash_check is HashCheck.MATCH
    assert loaded.config == delta_model.config
    assert torch.equal(logits(fresh, inputs), expected)
    assert set(loaded.trainable_parameters()) == set(parameters(delta_model))
    # What was loaded can be saved again, and is then the same delta.
    loaded.save_finetuned(tmp_path / "again")
    for name in ("config.json", "delta_model.safetensors", "manifest.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "delta" / name).read_bytes()
    loaded.detach()
    assert md5(fresh) == md5(family.build())


@everywhere
def test_detached_and_attached_again(family: Family, delta_type: str) -> None:
    backbone, inputs = family.build(), family.inputs()
    plain, modules, digest = logits(backbone, inputs), list(backbone.named_modules()), md5(backbone)
    delta_model = attach(backbone, delta_type, **traits(delta_type).keys)
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


PAIRS = list(itertools.combinations_with_replacement(THOROUGH, 2))
PAIRS += [(first, second) for second in TYPES if second not in THOROUGH for first in ("lora", second)]


def pair(family: str, types: tuple[str, str]) -> Any:
    """Return parameters for a test; what is not between the two thorough types is run with the slow ones."""
    marks = [] if set(types) <= set(THOROUGH) else [pytest.mark.slow]
    return pytest.param(FAMILIES[family], types, marks=marks, id=f"{family}-{'+'.join(types)}")


@pytest.mark.parametrize(
    ("family", "types"),
    [
        pair(name, types)
        for number, types in enumerate(PAIRS)
        for name in (QUICK if set(types) <= set(THOROUGH) else [tuple(FAMILIES)[number % len(FAMILIES)]])
        if not (types[0] == types[1] and traits(types[0]).owns)
    ],
)
def test_two_deltas_on_the_same_modules(family: Family, types: tuple[str, str], tmp_path: Path) -> None:
    backbone, inputs = family.build(), family.inputs()
    plain, digest, modules = logits(backbone, inputs), md5(backbone), list(backbone.named_modules())
    owner = any(traits(name).owns for name in types)

    def add(number: int) -> DeltaModel:
        keys = dict(traits(types[number]).keys)
        if traits(types[number]).linear and types[number] != "full":
            keys["modified_modules"] = list(family.linear)
        return attach(backbone, types[number], seed=number + 1, **keys)

    alone = []
    for number in range(2):
        single = add(number)
        alone.append(logits(backbone, inputs))
        single.detach()
    both_deltas = [add(number) for number in range(2)]
    both, trainable = logits(backbone, inputs), set().union(*[set(delta.trainable_parameters()) for delta in both_deltas])
    assert len(trainable) == sum(len(parameters(delta)) for delta in both_deltas)
    assert not torch.equal(both, alone[0])
    assert not torch.equal(both, alone[1])

    # Each is saved without the other and can be loaded alone.
    for index, delta in enumerate(both_deltas):
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
            (both_deltas[index].detach if step == "out" else both_deltas[index].attach)()
            state[index] = step == "in"
            if not owner:
                assert md5(backbone) == digest
            if sum(state) == 1:
                assert torch.equal(logits(backbone, inputs), alone[state.index(True)])
            elif not any(state):
                assert md5(backbone) == digest
                assert torch.equal(logits(backbone, inputs), plain)
                assert list(backbone.named_modules()) == modules
        for delta in both_deltas:
            delta.detach()
        assert torch.equal(logits(backbone, inputs), plain)
        for delta in reversed(both_deltas):  # each takes its old place among the layers of a module
            delta.attach()
        assert torch.equal(logits(backbone, inputs), both)


@pytest.mark.parametrize("delta_type", [name for name in TYPES if traits(name).owns])
def test_two_owners_are_refused(delta_type: str) -> None:
    backbone, first = new(FAMILIES["bert"], delta_type)
    before = snapshot(backbone)
    with pytest.raises(AddressingError, match="belongs to another delta"):
        attach(backbone, delta_type)
    assert snapshot(backbone) == before
    first.detach()
    attach(backbone, delta_type)


@in_turn()
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_computes_with_its_own_layers(family: Family, delta_type: str, how: str) -> None:
    def copied(value):
        return copy.deepcopy(value) if how == "deepcopy" else pickle.loads(pickle.dumps(value))

    backbone, inputs = family.build(), family.inputs()
    plain, digest = logits(backbone, inputs), md5(backbone)
    delta_model = attach(backbone, delta_type, **traits(delta_type).keys)
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


@in_turn()
def test_the_backbone_is_saved_as_ever(family: Family, delta_type: str, tmp_path: Path) -> None:
    backbone = family.build()
    state = values(backbone.state_dict())
    backbone.save_pretrained(tmp_path / "before")
    delta_model = attach(backbone, delta_type, **traits(delta_type).keys)
    with_delta = backbone.state_dict()
    storages = {parameter.data_ptr() for parameter in parameters(delta_model).values()}
    owned = {name for name in state if with_delta[name].data_ptr() in storages}  # all names of tied ones
    if not traits(delta_type).owns:
        assert not owned
    assert same({n: with_delta[n] for n in state if n not in owned}, {n: state[n] for n in state if n not in owned})
    assert set(with_delta) - set(state) == {
        f"{attachment.prefix}.{name}" for attachment in delta_model.attachments for name in attachment.layer.state_dict()
    }
    backbone.save_pretrained(tmp_path / "attached")
    plain = load_file(tmp_path / "before" / "model.safetensors")
    attached = load_file(tmp_path / "attached" / "model.safetensors")
    assert same({n: attached[n] for n in plain if n not in owned}, {n: plain[n] for n in plain if n not in owned})
    with delta_model.detached():
        backbone.save_pretrained(tmp_path / "after")
    delta_model.detach()
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "after" / name).read_bytes() == (tmp_path / "before" / name).read_bytes()
    assert same(backbone.state_dict(), state)


@in_turn(("t5", "gpt2", "llama"))
def test_generate(family: Family, delta_type: str) -> None:
    name, backbone = family.name, family.build()
    inputs = {key: value for key, value in family.inputs().items() if key != "labels"}

    def generate(cached: bool) -> torch.Tensor:
        return backbone.generate(**inputs, max_new_tokens=5, do_sample=False, use_cache=cached)

    plain = generate(True)
    delta_model = attach(backbone, delta_type, **traits(delta_type).keys)
    with_delta = generate(True)
    assert torch.equal(with_delta, generate(False))
    # One more forward pass over what was generated agrees with each choice.
    whole = {**inputs, "decoder_input_ids": with_delta[:, :-1]} if name == "t5" else {"input_ids": with_delta[:, :-1]}
    start = 0 if name == "t5" else inputs["input_ids"].shape[1] - 1 + traits(delta_type).grows
    chosen = logits(backbone, whole)[:, start:].argmax(-1)
    for row, expected in zip(chosen, with_delta[:, start + 1 :], strict=True):
        end = (expected == 1).nonzero()[0].item() + 1 if name == "t5" and (expected == 1).any() else len(expected)
        assert torch.equal(row[:end], expected[:end])
    if delta_type in THOROUGH:  # others may be too weak to change what is most likely
        assert not torch.equal(with_delta, plain)
    delta_model.detach()
    assert torch.equal(generate(True), plain)


@in_turn()
def test_gradient_checkpointing(family: Family, delta_type: str) -> None:
    inputs = family.inputs()
    backbone, delta_model = new(family, delta_type)
    backbone.train()
    gradients, calls = [], []
    for attachment in delta_model.attachments[:1]:
        attachment.layer.register_forward_hook(lambda *_: calls.append(len(gradients)))
    # Transformers 5.23 renamed it, and its old name warns.
    enable = getattr(backbone, "activation_checkpointing_enable", None) or backbone.gradient_checkpointing_enable
    for checkpointed in (False, True):
        if checkpointed:
            enable()
        torch.manual_seed(3)
        backbone.zero_grad()
        backbone(**inputs).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in delta_model.trainable_parameters().items()})
    if delta_model.attachments and traits(delta_type).recomputed:
        assert calls[-2:] == [1, 1]  # computed anew on the way back, so the checkpoints are there
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@in_turn()
def test_half_precision_backbone(family: Family, delta_type: str, tmp_path: Path) -> None:
    backbone, inputs = family.build().bfloat16(), family.inputs()
    delta_model = attach(backbone, delta_type, **traits(delta_type).keys)
    # A layer is kept in full precision; what is trained in place keeps the backbone's.
    own = set(dict(family.build().named_parameters()))
    for name, parameter in parameters(delta_model).items():
        assert parameter.dtype == (torch.bfloat16 if name in own else torch.float32), name
    expected = logits(backbone, inputs)
    assert expected.dtype == torch.bfloat16
    gradients = train_step(delta_model, inputs)
    assert set(gradients) == set(parameters(delta_model))
    assert not torch.equal(logits(backbone, inputs), expected)
    expected = logits(backbone, inputs)
    delta_model.save_finetuned(tmp_path)
    fresh = family.build().bfloat16()
    loaded = AutoDeltaModel.from_finetuned(tmp_path, fresh)
    assert loaded.hash_check is HashCheck.MATCH
    assert same(loaded.delta_tensors(), delta_model.delta_tensors())
    assert torch.equal(logits(fresh, inputs), expected)
