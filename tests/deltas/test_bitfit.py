"""BitFit: which biases there are, which are added, and which are left alone."""

from __future__ import annotations

import pytest
import torch
from models import FAMILIES, attach, logits, md5, train_step

from deltaexp.errors import AddressingError


def test_own_biases_of_blocks_only() -> None:
    for name in ("bert", "gpt2"):
        backbone = FAMILIES[name].build()
        delta_model = attach(backbone, "bitfit")
        assert not delta_model.attachments
        biases = [n for n, _ in backbone.named_parameters() if n.endswith(".bias")]
        outside = [n for n in biases if n.startswith(("bert.embeddings", "bert.pooler", "classifier"))]
        assert list(delta_model.trainable_parameters()) == [n for n in biases if n not in outside]
        assert (name == "bert") == bool(outside)


@pytest.mark.parametrize("name", ["t5", "llama"])
def test_new_biases(name: str) -> None:
    family = FAMILIES[name]
    backbone, inputs = family.build(), family.inputs()
    digest, plain = md5(backbone), logits(backbone, inputs)
    delta_model = attach(backbone, "bitfit", seed=None)
    assert torch.equal(logits(backbone, inputs), plain)
    added = {attachment.site for attachment in delta_model.attachments}
    cross = {n for n, m in backbone.named_modules() if "EncDecAttention" in n and isinstance(m, torch.nn.Linear)}
    expected = {
        n
        for n, m in backbone.named_modules()
        if (isinstance(m, torch.nn.Linear) or "Norm" in type(m).__name__) and n not in {"lm_head", *cross}
    }
    assert added == expected
    assert list(delta_model.trainable_parameters()) == list(delta_model.delta_tensors())
    first = delta_model.attachments[0]
    x = torch.randn(2, first.module.weight.shape[-1])
    with delta_model.detached():
        before = first.module(x)
    with torch.no_grad():
        first.layer.bias.fill_(0.25)
    torch.testing.assert_close(first.module(x), before + 0.25)
    assert train_step(delta_model, inputs).keys() == delta_model.delta_tensors().keys()
    delta_model.detach()
    assert md5(backbone) == digest


def test_existing_biases_only() -> None:
    with pytest.raises(AddressingError, match="nothing to modify"):
        attach(FAMILIES["t5"].build(), "bitfit", bitfit_add=False)
    assert attach(FAMILIES["bert"].build(), "bitfit", bitfit_add=False).delta_tensors()


def test_modules_inside_the_chosen_ones() -> None:
    backbone = FAMILIES["bert"].build()
    prefix = "bert.encoder.layer.1.attention"
    delta_model = attach(backbone, "bitfit", modified_modules=["1.attention"], exclude_modules=["output"])
    assert set(delta_model.delta_tensors()) == {f"{prefix}.self.{part}.bias" for part in ("query", "key", "value")}
    # A name reaches what the default leaves out.
    by_name = attach(FAMILIES["bert"].build(), "bitfit", modified_modules=["embeddings.LayerNorm", "classifier"])
    assert set(by_name.delta_tensors()) == {"bert.embeddings.LayerNorm.bias", "classifier.bias"}
    with pytest.raises(AddressingError, match="nothing to modify in word_embeddings"):
        attach(backbone, "bitfit", modified_modules=["word_embeddings"])


def test_a_slice_of_a_fused_projection_gets_a_bias_of_its_own() -> None:
    backbone = FAMILIES["gpt2"].build()
    c_attn = backbone.transformer.h[0].attn.c_attn
    x = torch.randn(2, 16)
    before = c_attn(x)
    delta_model = attach(backbone, "bitfit", modified_modules=["attn.v"])
    names = [f"transformer.h.{block}.attn.c_attn.bitfit_v.bias" for block in (0, 1)]
    assert list(delta_model.delta_tensors()) == names
    change = c_attn(x) - before
    torch.testing.assert_close(change[:, 32:], c_attn.bitfit_v.bias.expand(2, -1))
    assert torch.equal(change[:, :32], torch.zeros(2, 32))


def test_biases_that_are_tensors_of_a_container() -> None:
    class Experts(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down_proj = torch.nn.Parameter(torch.zeros(2, 3, 3))
            self.down_proj_bias = torch.nn.Parameter(torch.zeros(2, 3))
            self.position_bias = torch.nn.Parameter(torch.zeros(3))

    backbone = torch.nn.ModuleDict({"experts": Experts(), "attention": torch.nn.MultiheadAttention(4, 2)})
    delta_model = attach(backbone, "bitfit", modified_modules=["experts", "attention"])
    assert set(delta_model.delta_tensors()) == {
        "experts.down_proj_bias",
        "attention.in_proj_bias",
        "attention.out_proj.bias",
    }
