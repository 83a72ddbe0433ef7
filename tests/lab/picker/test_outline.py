"""The rows of the page: blocks that are alike in one, and where in them each module is."""

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from deltaexp.lab.picker.outline import Outline
from deltaexp.structure import backbone_modules


def llama(layers: int = 32) -> nn.Module:
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(hidden_size=64, intermediate_size=96, vocab_size=99, num_hidden_layers=layers))


def path(outline: Outline, row: int) -> str:
    above = outline.rows[row].parent
    return "" if above is None else f"{path(outline, above)}.{outline.rows[row].numbers[0]}".lstrip(".")


def test_blocks_that_are_alike_are_one_row() -> None:
    backbone = llama()
    outline = Outline(backbone)
    rows = {path(outline, number): row for number, row in enumerate(outline.rows)}
    assert len(rows) == 18
    assert rows["model.layers.0"].numbers == [str(number) for number in range(32)]
    q = rows["model.layers.0.self_attn.q_proj"]
    assert (q.kind, q.shape, q.roles, q.parameters) == ("Linear", "64 → 64", ["attn.q"], 4096)
    assert rows["model.embed_tokens"].shape == "99 × 64"
    assert rows[""].parameters == sum(parameter.numel() for parameter in backbone.parameters())
    # Every module with parameters has a place, and no other.
    named = {name for name, module in backbone_modules(backbone) if any(True for _ in module.parameters())}
    assert {name for name, part in outline.places if part is None} == named


def test_what_a_row_stands_for() -> None:
    outline = Outline(llama(3))
    row = next(number for number in range(len(outline.rows)) if path(outline, number).endswith("q_proj"))
    assert outline.folds(row) == [1, 1, 1, 3, 1, 1]
    names = [f"model.layers.{number}.self_attn.q_proj" for number in range(3)]
    assert outline.chosen(row, [None] * 6) == [(name, None) for name in names]
    assert outline.chosen(row, [None, None, None, 2, None, 0]) == [(names[2], None)]
    assert outline.marks([(names[2], None), (names[0], None), ("model.rotary_emb", None)]) == {
        "rows": {row: [0, 2]},
        "unseen": 1,
    }
    for bad in ([None] * 5, [None, None, None, 3, None, None], [None, None, None, -1, None, None]):
        with pytest.raises(ValueError, match="folds"):
            outline.chosen(row, bad)
    with pytest.raises(ValueError, match="no row"):
        outline.chosen(99, [])


def test_folds_within_folds() -> None:
    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(
                nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(4, 8) for _ in range(3))}) for _ in range(2)
            )

    outline = Outline(Mixture())
    row = len(outline.rows) - 1
    assert outline.folds(row) == [1, 1, 2, 1, 3]
    assert [name for name, _ in outline.units[row]] == [f"layers.{a}.experts.{b}" for a in range(2) for b in range(3)]
    assert [name for name, _ in outline.chosen(row, [None, None, None, None, 1])] == [
        "layers.0.experts.1",
        "layers.1.experts.1",
    ]
    assert outline.rows[row].shape == "4 → 8 + bias"


def test_slices_of_a_fused_projection() -> None:
    with torch.device("meta"):
        backbone = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32))
    outline = Outline(backbone)
    slices = [row for row in outline.rows if row.slice]
    assert [(row.roles, row.kind) for row in slices] == [
        (["attn.q"], "elements 0 to 15"),
        (["attn.k"], "elements 16 to 31"),
        (["attn.v"], "elements 32 to 47"),
    ]
    assert ("transformer.h.1.attn.c_attn", "attn.k") in outline.places


def test_a_mixture_of_experts_stays_small() -> None:
    with torch.device("meta"):
        config = MixtralConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=32, num_local_experts=8, vocab_size=99)
        backbone = MixtralForCausalLM(config)
    outline = Outline(backbone)
    assert len(outline.rows) < 30
    experts = next(row for row in outline.rows if row.numbers == ["experts"])
    assert experts.shape == "gate_up_proj 8 × 192 × 64, down_proj 8 × 64 × 96"
