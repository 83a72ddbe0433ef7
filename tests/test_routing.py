"""Batches whose rows use different deltas: every row as if its delta were alone."""

from __future__ import annotations

import pytest
import torch
from models import FAMILIES, Family, attach, logits, slow_but, values
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from deltaexp import AdapterModel, DeltaModel, LoraModel, registry
from deltaexp.errors import DeltaExpError
from deltaexp.routing import EXPERT, BatchRows, route
from deltaexp.structure import Rows
from deltaexp.surgery import Attachment

KINDS = {
    "lora": ("lora", {}),
    "dora": ("lora", {"lora_dora": True}),
    "pissa": ("lora", {"lora_init": "pissa", "lora_r": 3}),
    "adapter": ("adapter", {}),
    **({"ia3": ("ia3", {})} if "ia3" in registry.known() else {}),
    "prefix": ("prefix", {"reparameterize": False}),
}


def batch(family: Family, rows: int = 5) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, 32, (rows, 6), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if family.name == "t5":
        inputs["decoder_input_ids"] = torch.randint(1, 32, (rows, 4), generator=generator)
    return inputs


def alone(delta_model: DeltaModel | None, everyone: list[DeltaModel], inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the logits with one delta and no other."""
    for other in everyone:
        other.detach()
    if delta_model is not None:
        delta_model.attach()
    result = logits(everyone[0].backbone_model, inputs)
    for other in everyone:
        other.attach()
    return result


@pytest.mark.parametrize("name", FAMILIES)
def test_every_row_is_as_with_its_delta_alone(name: str) -> None:
    family = FAMILIES[name]
    backbone, inputs = family.build(), batch(family, 9)
    deltas = [attach(backbone, kind, seed=seed, **keys) for seed, (kind, keys) in enumerate(KINDS.values(), 1)]
    both = [deltas[0], deltas[-1]]
    choices = [deltas[1], None, deltas[0], deltas[3], both, deltas[2], deltas[0], deltas[4], deltas[-1]]
    expected = [
        alone(choice if isinstance(choice, DeltaModel) else None, deltas, inputs)[row] for row, choice in enumerate(choices)
    ]
    for delta in deltas:
        delta.detach()
    for delta in both:
        delta.attach()
    expected[4] = logits(backbone, inputs)[4]
    for delta in deltas:
        delta.attach()
    together = logits(backbone, inputs)
    with route(choices):
        routed = logits(backbone, inputs)
    for row in range(len(choices)):
        torch.testing.assert_close(routed[row], expected[row], rtol=1e-5, atol=1e-6)
        assert not torch.allclose(routed[row], together[row], atol=1e-4)
    assert not torch.allclose(expected[0], expected[2], atol=1e-4)
    # Afterwards everything is as it was.
    assert torch.equal(logits(backbone, inputs), together)
    assert all(attachment.layer.batch_rows is None for delta in deltas for attachment in delta.attachments)


@pytest.mark.parametrize("name", ["t5", "gpt2"])
def test_gradients_reach_the_deltas_used_and_are_theirs(name: str) -> None:
    family = FAMILIES[name]
    backbone, inputs = family.build(), batch(family, 4)
    deltas = [attach(backbone, kind, seed=seed) for seed, kind in enumerate(["lora", "adapter", "lora"], 1)]
    first, second, unused = deltas

    def gradients(rows: list[int]) -> dict[str, torch.Tensor]:
        backbone.zero_grad(set_to_none=True)
        backbone(**{name: tensor[rows] for name, tensor in inputs.items()}).logits.pow(2).sum().backward()
        return values({name: p.grad for name, p in backbone.named_parameters() if p.grad is not None})

    with route([first, second, None, first]):
        routed = gradients([0, 1, 2, 3])
    assert {a.prefix for d in (first, second) for a in d.attachments} == {
        a.prefix for d in deltas for a in d.attachments if any(name.startswith(f"{a.prefix}.") for name in routed)
    }
    expected = {}
    for delta, rows in ((first, [0, 3]), (second, [1])):
        for other in deltas:
            other.detach()
        delta.attach()
        expected |= gradients(rows)
    assert routed.keys() == expected.keys()
    for parameter, gradient in expected.items():
        torch.testing.assert_close(routed[parameter], gradient, rtol=1e-4, atol=5e-5, msg=parameter)
    unused.detach()


@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "num_return_sequences": 2}, {"use_cache": False}], ids=str)
@pytest.mark.parametrize("name", slow_but(["t5", "gpt2", "llama"], ["gpt2"]))
def test_generate(name: str, options: dict) -> None:
    family = FAMILIES[name]
    backbone = family.build()
    inputs = {key: value for key, value in batch(family).items() if key != "decoder_input_ids"}
    first, second = attach(backbone, seed=1), attach(backbone, "adapter", seed=2)
    choices = [first, None, second, second, first]

    def generate(rows: list[int]) -> torch.Tensor:
        chosen = {name: tensor[rows] for name, tensor in inputs.items()}
        fixed = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
        return backbone.generate(**chosen, **fixed, **options)

    with route(choices):
        routed = generate([0, 1, 2, 3, 4])
    expected = []
    for row, choice in enumerate(choices):
        first.detach()
        second.detach()
        if choice is not None:
            choice.attach()
        expected.append(generate([row]))
    assert torch.equal(routed, torch.cat(expected))
    first.attach()
    second.attach()
    assert not torch.equal(generate([0, 1, 2, 3, 4]), routed)


def test_what_tells_rows_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU would have the host wait for it in every layer."""
    family = FAMILIES["bert"]
    backbone, inputs = family.build(), batch(family)
    deltas = [attach(backbone, kind, seed=seed, **keys) for seed, (kind, keys) in enumerate(KINDS.values(), 1)]
    choices = [deltas[-1], deltas[0], None, deltas[3], deltas[-1]]
    with route(choices):
        expected = logits(backbone, inputs)
    monkeypatch.setattr(torch, "tensor", None)
    with route(choices):
        assert torch.equal(logits(backbone, inputs), expected)


def test_only_none() -> None:
    family = FAMILIES["bert"]
    backbone, inputs = family.build(), batch(family, 2)
    plain = logits(backbone, inputs)
    delta_model = attach(backbone)
    with route([None, None], backbone):
        assert torch.equal(logits(backbone, inputs), plain)
    assert not torch.equal(logits(backbone, inputs), plain)
    with route([delta_model, None]), route([None, None], backbone_model=backbone):
        assert torch.equal(logits(backbone, inputs), plain)
    with pytest.raises(KeyError), route([delta_model, None]):
        raise KeyError
    assert {a.layer.batch_rows for a in delta_model.attachments} == {None}


def test_rows_stand_for_what_follows_one_another() -> None:
    rows = BatchRows([0, 2], 3)
    assert rows.of(torch.zeros(3, 4, 8)).tolist() == [0, 2]
    assert rows.of(torch.zeros(6, 1, 8)).tolist() == [0, 1, 4, 5]
    assert rows.of(torch.zeros(12, 8)).tolist() == [0, 1, 2, 3, 8, 9, 10, 11]
    assert BatchRows([], 3).of(torch.zeros(5, 8)).tolist() == []
    assert BatchRows([0], 1).of(torch.zeros(2, 1, 8)).tolist() == [0, 1]
    for shape in ((4, 4, 8), (1, 8), (9, 3, 8)):  # the last has positions before rows
        with pytest.raises(DeltaExpError, match=r"deltas for 3 rows.*hidden states of shape"):
            rows.of(torch.zeros(shape))


class Flat(nn.Module):
    """A backbone that gives a module all positions in one dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x.flatten(0, 1)).view_as(x)


@pytest.mark.parametrize("model", [LoraModel, AdapterModel])
def test_positions_in_one_dimension(model: type) -> None:
    torch.manual_seed(0)
    backbone, x = Flat(), torch.randn(3, 4, 3)
    plain = backbone(x)
    delta_model = model(backbone, modified_modules=["inner"])
    for parameter in delta_model.attachments[0].layer.parameters():
        nn.init.normal_(parameter)
    whole = backbone(x)
    with route([None, delta_model, None]):
        torch.testing.assert_close(backbone(x), torch.stack([plain[0], whole[1], plain[2]]))


def test_rows_of_a_fused_projection() -> None:
    torch.manual_seed(0)
    backbone, x = nn.ModuleDict({"qkv": nn.Linear(4, 12)}), torch.randn(3, 5, 4)
    plain = backbone["qkv"](x)
    delta_model = LoraModel(backbone, modified_modules=["qkv"])
    delta_model.detach()
    layer = type(delta_model.attachments[0].layer)(*_lora_arguments(4, 4))
    nn.init.normal_(layer.lora_B)
    delta_model.attachments = [Attachment("qkv", backbone["qkv"], "lora_k", "lora_k", layer, Rows(1, 12, 4, 4))]
    delta_model.attach()
    with route([None, None, delta_model]):
        routed = backbone["qkv"](x)
    difference = (routed - plain).abs() > 1e-6
    assert difference[2, :, 4:8].all()
    assert difference.sum() == 5 * 4


def _lora_arguments(in_dim: int, out_dim: int) -> tuple:
    from deltaexp.deltas._linear import LinearMap

    return LinearMap(in_dim, out_dim), 2, 1.0, 0.0


# --- what is refused --------------------------------------------------------------------------------------------------


def test_refusals() -> None:
    family = FAMILIES["bert"]
    backbone = family.build()
    delta_model, elsewhere = attach(backbone), attach(family.build())
    with pytest.raises(DeltaExpError, match="belong to several"), route([delta_model, elsewhere]):
        pass
    with pytest.raises(DeltaExpError, match="belong to several"), route([elsewhere], backbone):
        pass
    with pytest.raises(DeltaExpError, match="given a str"), route(["lora"]):  # type: ignore[list-item]
        pass
    for empty in ([], [None, None]):
        with pytest.raises(DeltaExpError, match="where no row has a delta"), route(empty):
            pass
    with pytest.raises(DeltaExpError, match="deltas for 2 rows"), route([delta_model, None]):
        logits(backbone, batch(family, 3))
    delta_model.merge()
    with pytest.raises(DeltaExpError, match="merged: call its unmerge"), route([delta_model]):
        pass
    delta_model.detach()
    with pytest.raises(DeltaExpError, match="not attached: call its attach"), route([delta_model]):
        pass
    delta_model.attach()
    owner = attach(backbone, "adapter", unfrozen_modules=["deltas", "classifier"])
    for choice in (owner, delta_model):
        with pytest.raises(DeltaExpError, match=r"classifier\.bias, classifier\.weight .* to every row"), route([choice]):
            pass
    owner.detach()
    delta_model.attachments[0].layer.connect = lambda *_: []
    with pytest.raises(DeltaExpError, match=r"query\.lora cannot be limited to some rows"), route([None], backbone):
        pass
    assert {a.layer.batch_rows for a in delta_model.attachments} == {None}


def test_what_is_merged_is_part_of_the_backbone() -> None:
    family = FAMILIES["bert"]
    backbone, inputs = family.build(), batch(family, 2)
    base, other = attach(backbone), attach(backbone, "adapter")
    expected = logits(backbone, inputs)
    base.merge()
    with route([other, None]):
        routed = logits(backbone, inputs)
    torch.testing.assert_close(routed[0], expected[0])
    other.detach()
    torch.testing.assert_close(routed[1], logits(backbone, inputs)[1])


def test_experts_are_refused_and_the_rest_of_such_a_backbone_is_not() -> None:
    torch.manual_seed(0)
    backbone = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=32,
        )
    ).eval()  # fmt: skip
    inputs = {"input_ids": torch.randint(1, 32, (3, 5))}
    plain = logits(backbone, inputs)
    delta_model = attach(backbone, modified_modules=["q_proj"])
    whole = logits(backbone, inputs)
    with route([delta_model, None, None]):
        torch.testing.assert_close(logits(backbone, inputs), torch.cat([whole[:1], plain[1:]]))
    names = {
        "layers.0.mlp.experts.3.w1.lora": True,
        "layers.0.mlp.experts": True,
        "layers.0.moe.local_experts.1.up": True,
        "layers.0.mlp.shared_expert.up_proj.lora": False,
        "layers.0.mlp.shared_experts.up_proj.lora": False,
        "layers.0.mlp.up_proj.lora": False,
    }
    assert {name: bool(EXPERT.search(name)) for name in names} == names
    tree = nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])})
    inside = LoraModel(tree, modified_modules=[r"[r]experts\.\d"])
    with pytest.raises(DeltaExpError, match=r"experts\.0\.lora.*mixture of experts"), route([inside]):
        pass
    with route([None], tree):
        pass
