"""What is clicked is named by short patterns, and the engine reads them as exactly that."""

import random
from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from deltaexp import targets
from deltaexp.errors import AddressingError
from deltaexp.lab.picker.outline import Outline, Unit
from deltaexp.lab.picker.proposing import Proposal, Proposer
from deltaexp.registry import DeltaConfig
from deltaexp.structure import backbone_modules, common_structure


def t5() -> nn.Module:
    return T5ForConditionalGeneration(T5Config(d_model=32, d_kv=16, d_ff=64, num_layers=6, num_heads=2, vocab_size=99))


def bert() -> nn.Module:
    config = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)  # MiniLM's
    return BertForSequenceClassification(config)


def llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(hidden_size=64, intermediate_size=96, vocab_size=99, num_hidden_layers=32))


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=3, n_head=2, vocab_size=32))


class Engine:
    """A backbone, and what patterns mean on it."""

    def __init__(self, build: Callable[[], nn.Module], **keys: object) -> None:
        with torch.device("meta"):
            self.backbone = build()
        self.structure = common_structure(self.backbone)
        self.keys = keys
        self.names = [name for name, _ in backbone_modules(self.backbone) if name]
        self.proposer = Proposer(self.names, {name: [role.name for role in roles] for name, roles in self.structure.items()})

    def means(self, *patterns: str) -> frozenset[Unit]:
        try:
            config = DeltaConfig("any", list(patterns), **self.keys)
            _, sites = targets.find(config, self.backbone, self.structure)
        except AddressingError:
            return frozenset()
        return frozenset((site.name, site.role if site.rows else None) for site in sites)

    def find(self, wanted: frozenset[Unit]) -> list[Proposal]:
        found = self.proposer.find(wanted, self.means, self.keys.get("common_structure"))
        for proposal in found:
            assert self.means(*proposal.patterns) == wanted, proposal
        return found

    def first(self, wanted: frozenset[Unit]) -> list[str]:
        return self.find(wanted)[0].patterns


def some(engine: Engine, end: str, *numbers: int) -> frozenset[Unit]:
    return frozenset(
        (n, None) for n in engine.names if n.endswith(end) and int(next(filter(str.isdigit, n.split(".")))) in numbers
    )


@pytest.mark.parametrize(
    ("build", "chosen"),
    [
        (t5, ["attn.q"]),
        (t5, ["attn.q", "attn.v"]),
        (t5, ["q"]),
        (t5, ["attn.q", "ff.w1"]),
        (t5, ["all-linear"]),
        (t5, ["lm_head"]),
        (bert, ["attn.q", "attn.v"]),
        (bert, ["ff.w2"]),
        (bert, ["classifier"]),
        (llama, ["attn.q", "attn.v"]),
        (llama, ["ff.gate"]),
        (llama, ["block"]),
        (llama, ["attn", "ff"]),
        (gpt2, ["attn.q", "attn.v"]),
        (gpt2, ["c_attn"]),
    ],
    ids=lambda value: value.__name__ if callable(value) else ",".join(value),
)
def test_what_has_a_name_gets_it(build: Callable[[], nn.Module], chosen: list[str]) -> None:
    engine = Engine(build, exclude_modules=[])
    found = engine.first(engine.means(*chosen))
    expected = {"lm_head": ["lm_head"], "classifier": ["head"], "q": ["q"]}
    assert found == expected.get(chosen[0], chosen)


def test_names_of_the_backbone_and_expressions_are_offered_too() -> None:
    engine = Engine(llama)
    found = {proposal.kind: proposal.patterns for proposal in engine.find(engine.means("attn.q", "attn.v"))}
    assert found == {
        "common names": ["attn.q", "attn.v"],
        "names": ["q_proj", "v_proj"],
        "regular expression": [r"[r]self_attn\.(q_proj|v_proj)"],
    }


def test_some_blocks_are_an_expression() -> None:
    engine = Engine(llama)
    assert engine.first(some(engine, "q_proj", 0, 1, 2, 3)) == [r"[r]layers\.[0-3]\.self_attn\.q_proj"]
    assert engine.first(some(engine, "q_proj", *range(8, 24))) == [r"[r]layers\.(1\d|2[0-3]|[89])\.self_attn\.q_proj"]
    assert engine.first(some(engine, "q_proj", 5)) == ["layers.5.self_attn.q_proj"]
    assert engine.first(some(engine, "_proj", 1, 10, 11)) == [
        r"[r]layers\.(1[01]|1)\.(self_attn\.(q_proj|k_proj|v_proj|o_proj)|mlp\.(gate_proj|down_proj|up_proj))"
    ]
    blocks = frozenset((f"model.layers.{number}", None) for number in (1, 10, 11, 12))
    assert engine.first(blocks) == [r"[r]layers\.(1[0-2]|1)"]


def test_a_name_that_is_the_end_of_another() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(2, 2)
            self.inner = nn.ModuleDict({"proj": nn.Linear(2, 2)})

    engine = Engine(Twice)
    assert engine.first(frozenset({("proj", None)})) == ["[r]^proj"]
    assert engine.first(frozenset({("inner.proj", None)})) == ["inner.proj"]


@pytest.mark.slow
@pytest.mark.parametrize("build", [t5, bert, llama, gpt2])
def test_whatever_is_clicked_is_named_exactly(build: Callable[[], nn.Module]) -> None:
    engine, chance = Engine(build, exclude_modules=[]), random.Random(7)
    outline = Outline(engine.backbone)
    for size in (1, 3, 8, 30):
        modules = [unit for unit in outline.places if unit[0] and unit[1] is None]
        engine.find(frozenset(chance.sample(modules, min(size, len(modules)))))
    for count in (1, 2, 4):  # whole rows
        rows = chance.sample(range(1, len(outline.rows)), count)
        units = {unit for row in rows for unit in outline.units[row]}
        engine.find(frozenset((name, part) for name, part in units if part is None or (name, None) not in units))


def test_the_other_keys_count() -> None:
    engine = Engine(llama, layers="0-1")
    assert engine.first(some(engine, "q_proj", 0, 1)) == ["attn.q"]
    with pytest.raises(
        AddressingError, match=r"model\.layers\.5\.self_attn\.q_proj cannot be chosen: exclude_modules or layers"
    ):
        engine.find(some(engine, "q_proj", 5))
    with pytest.raises(AddressingError, match="lm_head cannot be chosen"):
        engine.find(frozenset({("lm_head", None)}))
    common = Engine(llama, common_structure=True)
    assert common.first(common.means("attn.q", "ff.w1")) == ["attn.q", "ff.w1"]
    with pytest.raises(AddressingError, match="No patterns mean exactly these modules"):
        common.find(some(common, "q_proj", 3))
    own = Engine(llama, common_structure=False)
    assert own.first(some(own, "q_proj", *range(32))) == ["q_proj"]


def test_slices_are_chosen_in_all_blocks() -> None:
    engine = Engine(gpt2)
    with pytest.raises(AddressingError, match=r"slice of a fused projection \(attn.q\) is chosen in all blocks; layers="):
        engine.find(frozenset({("transformer.h.0.attn.c_attn", "attn.q")}))
    assert Engine(gpt2, layers="0").first(frozenset({("transformer.h.0.attn.c_attn", "attn.q")})) == ["attn.q"]
