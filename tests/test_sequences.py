"""Random sequences of all that can be done to deltas: the backbone always comes out bit for bit as it went in."""

from __future__ import annotations

import copy
import pickle
import tempfile
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from models import FAMILIES, Family, attach, logits, md5, train_step

from deltaexp import AutoDeltaModel, DeltaModel, registry
from deltaexp.errors import AddressingError, DeltaExpError

KEYS: dict[str, dict] = {
    "soft_prompt": {"soft_token_num": 2},
    "none": {"unfrozen_modules": ["{head}"]},
    "vera": {"vera_r": 4},
    "lora": {"lora_r": 2},
}
"""Keys other than the defaults, where those do not suit a tiny backbone."""
HEADS = {"t5": "final_layer_norm", "bert": "classifier", "gpt2": "ln_f", "llama": "model.norm"}


def expected(error: Exception, said: str) -> None:
    """Let no other refusal pass than the one that is right."""
    if said not in str(error):
        raise error


class World:
    """A backbone and the deltas that have been put into it; they stay the same deltas through copies."""

    def __init__(self, family: Family, types: list[str], heads: list[bool]) -> None:
        self.inputs = family.inputs()
        backbone = family.build()
        self.plain, self.digest = logits(backbone, self.inputs), md5(backbone)
        self.names = list(backbone.state_dict())
        self.deltas: list[DeltaModel] = []
        self.backbone = backbone
        for seed, (delta_type, head) in enumerate(zip(types, heads, strict=True), 1):
            keys = {key: value for key, value in KEYS.get(delta_type, {}).items() if key != "unfrozen_modules"}
            if head or "unfrozen_modules" in KEYS.get(delta_type, {}):
                keys["unfrozen_modules"] = ["deltas", HEADS[family.name]]
            try:
                self.deltas.append(attach(backbone, delta_type, seed=seed, **keys))
            except AddressingError as error:
                expected(error, "belongs to another delta")  # two cannot own one parameter

    def together(self, order: list[DeltaModel]) -> torch.Tensor | None:
        """Return the logits with all deltas, attached in some order; None where two own one parameter."""
        self.apart()
        try:
            for delta in order:
                delta.attach()
        except AddressingError as error:
            expected(error, "belongs to another delta")
            return None
        return logits(self.backbone, self.inputs)

    def apart(self) -> None:
        for delta in self.deltas:
            delta.detach()

    def check(self) -> None:
        """Compare the backbone without deltas, and with all of them put in forwards and backwards."""
        self.apart()
        assert md5(self.backbone) == self.digest
        assert torch.equal(logits(self.backbone, self.inputs), self.plain)
        assert list(self.backbone.state_dict()) == self.names
        assert not [name for name in vars(self.backbone) if name.startswith("_deltaexp")]
        forwards = self.together(self.deltas)
        backwards = self.together(self.deltas[::-1])
        assert (forwards is None) == (backwards is None)
        if forwards is not None:
            assert torch.equal(forwards, backwards)
        self.apart()
        assert md5(self.backbone) == self.digest


def _save_and_load(world: World, number: int) -> None:
    """Save one of several, and put the loaded one in its place: it must have the same tensors."""
    delta = world.deltas[number]
    attached = delta.attached
    with tempfile.TemporaryDirectory() as folder:
        delta.save_finetuned(folder)
        delta.detach()
        try:
            loaded = AutoDeltaModel.from_finetuned(folder, world.backbone)
        except AddressingError as error:
            expected(error, "belongs to another delta")
            return
    before, after = delta.delta_tensors(), loaded.delta_tensors()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    world.deltas.pop(number)
    world.deltas.append(loaded)  # it is the newest now
    if not attached:
        loaded.detach()


def _train(world: World, number: int) -> None:
    delta = world.deltas[number]
    if delta.attached and not delta.merged and any(p.requires_grad for p in delta.delta_tensors().values()):
        trainable = [p for p in world.backbone.parameters() if p.requires_grad]
        with torch.enable_grad():
            if trainable:
                delta.freeze_module()
                train_step(delta, world.inputs)


def _attach(world: World, number: int) -> None:
    try:
        world.deltas[number].attach()
    except AddressingError as error:
        expected(error, "belongs to another delta")
    except DeltaExpError as error:
        expected(error, "exists already")


def _merge(world: World, number: int) -> None:
    state, delta = md5(world.backbone), world.deltas[number]
    merged, attached = delta.merged, delta.attached
    try:
        delta.merge()
    except DeltaExpError:
        assert md5(world.backbone) == state
        assert (delta.merged, delta.attached) == (merged, attached)


def _unmerge(world: World, number: int) -> None:
    try:
        world.deltas[number].unmerge()
    except DeltaExpError as error:
        expected(error, "exists already")
        assert world.deltas[number].merged


def _inside(world: World, number: int) -> None:
    with world.deltas[number].detached():
        assert not world.deltas[number].attached
        logits(world.backbone, world.inputs)


def _copied(world: World, copier: Callable) -> None:
    before = logits(world.backbone, world.inputs)
    world.backbone, world.deltas = copier((world.backbone, world.deltas))
    assert torch.equal(logits(world.backbone, world.inputs), before)


STEPS: dict[str, Callable[[World, int], object]] = {
    "attach": _attach,
    "detach": lambda world, number: world.deltas[number].detach(),
    "freeze": lambda world, number: world.deltas[number].freeze_module(),
    "train": _train,
    "merge": _merge,
    "unmerge": _unmerge,
    "detached": _inside,
    "save and load": _save_and_load,
    "deepcopy": lambda world, number: _copied(world, copy.deepcopy),
    "pickle": lambda world, number: _copied(world, lambda value: pickle.loads(pickle.dumps(value))),
}


@pytest.mark.filterwarnings("ignore:.*not part of the delta:UserWarning")
@settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],  # shrinking would take minutes; the steps are few anyway
    suppress_health_check=list(HealthCheck),
)
@given(
    name=st.sampled_from(list(FAMILIES)),
    types=st.lists(st.sampled_from(registry.known()), min_size=1, max_size=3),
    heads=st.lists(st.booleans(), min_size=3, max_size=3),
    steps=st.lists(st.tuples(st.sampled_from(list(STEPS)), st.integers(0, 2)), min_size=2, max_size=10),
)
def test_any_sequence(name: str, types: list[str], heads: list[bool], steps: list[tuple[str, int]]) -> None:
    world = World(FAMILIES[name], types, heads[: len(types)])
    if not world.deltas:
        return
    for step, number in steps:
        STEPS[step](world, number % len(world.deltas))
    world.check()
