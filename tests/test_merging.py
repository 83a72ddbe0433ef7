"""Merging deltas into their backbone: the same outputs, honest errors, and the way back bit for bit."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from models import FAMILIES, attach, logits, md5, perturb, same, snapshot, train_step, values
from torch import nn

import deltaexp.model
from deltaexp import AutoDeltaModel, DeltaConfig, DeltaModel, HashCheck, Layer, LoraModel, Site, registry
from deltaexp.errors import AddressingError, CheckpointError, DeltaExpError
from deltaexp.folding import mergeable_types
from deltaexp.structure import Rows
from deltaexp.surgery import Attachment


class VectorLayer(Layer):
    """Multiplies the output or the input of a linear map by a vector."""

    def __init__(self, dim: int, insertion: str) -> None:
        super().__init__()
        self.insertion = insertion
        self.vector = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.vector

    def merged(self, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self.insertion == "input":
            return weight * self.vector, bias
        return weight * self.vector[:, None], None if bias is None else bias * self.vector


@dataclass
class VectorConfig(DeltaConfig):
    """What IA3 does."""

    delta_type: str = "vector"
    where: str = "sequential"

    default_modules: ClassVar[tuple[str, ...]] = ("attn.k", "attn.v")
    attribute: ClassVar[str] = "vector"

    def build(self, site: Site) -> VectorLayer:
        return VectorLayer(site.linear_dims("vector")[self.where != "input"], self.where)


class AddedBias(Layer):
    """A bias for modules that have none."""

    insertion = "sequential"

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.ones(dim))

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return h + self.bias

    def merged(self, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        return weight, self.bias if bias is None else bias + self.bias


@dataclass
class AddedBiasConfig(DeltaConfig):
    """What BitFit does where there is no bias."""

    delta_type: str = "added_bias"
    default_modules: ClassVar[tuple[str, ...]] = ("attn.q",)
    attribute: ClassVar[str] = "added_bias"

    def build(self, site: Site) -> AddedBias:
        return AddedBias(site.out_dim("added_bias"))


@pytest.fixture(autouse=True)
def _types() -> Iterator[None]:
    registry.known()
    own = (VectorConfig, AddedBiasConfig)
    for config in own:
        registry.register(config)
    yield
    for config in own:
        registry._types.pop(config.delta_type, None)
        vars(deltaexp.model).pop(config.__name__.removesuffix("Config") + "Model", None)


def merges(delta_model: DeltaModel) -> bool:
    """Say whether a delta can be merged, by trying; one that is refused must leave everything as it was."""
    before = snapshot(delta_model.backbone_model)
    try:
        delta_model.merge()
    except DeltaExpError:
        assert snapshot(delta_model.backbone_model) == before
        return False
    return True


CASES = {
    "lora": {"lora_dropout": 0.5},
    "lora-rslora": {"lora_scaling": "rslora"},
    "lora-dora": {"lora_dora": True},
    "lora-pissa": {"lora_init": "pissa", "lora_r": 4},
    "vector": {},
    "vector-input": {"where": "input"},
    **{name: {} for name in registry.known() if name in mergeable_types() and name not in ("lora", "vector")},
}


@pytest.mark.parametrize(
    ("name", "case"),
    [(name, case) for name in FAMILIES for case in CASES if name == "gpt2" or case in ("lora", "lora-dora", "vector")],
)
def test_the_merged_backbone_computes_the_same(name: str, case: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    backbone, inputs = family.build(), family.inputs()
    plain, digest, modules = logits(backbone, inputs), md5(backbone), list(backbone.named_modules())
    parameters = {name: id(parameter) for name, parameter in backbone.named_parameters()}
    delta_model = attach(backbone, case.partition("-")[0], **CASES[case])
    expected, state = logits(backbone, inputs), values(backbone.state_dict())
    assert not torch.equal(expected, plain)
    delta_model.save_finetuned(tmp_path / "before")

    report = delta_model.merge(inputs)
    assert delta_model.merged
    assert delta_model.attached
    assert list(backbone.named_modules()) == modules
    assert {name: id(parameter) for name, parameter in backbone.named_parameters()} == parameters
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in backbone.modules())
    assert md5(backbone) != digest
    merged = logits(backbone, inputs)
    torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    assert report.layers == len(delta_model.attachments)
    assert {d.where for d in report.modules} == {a.site for a in delta_model.attachments}
    assert max(d.relative for d in report.modules) < 1e-5
    assert report.logits.absolute == pytest.approx(float((merged - expected).abs().max()))
    assert delta_model.merge() is report

    # What is saved is the same, and so is what it was put on.
    delta_model.save_finetuned(tmp_path / "merged")
    for file in ("config.json", "delta_model.safetensors", "manifest.json"):
        assert (tmp_path / "merged" / file).read_bytes() == (tmp_path / "before" / file).read_bytes()

    # A delta that comes beside it is put on the backbone without it.
    other = attach(backbone, "adapter")
    other.save_finetuned(tmp_path / "other")
    assert AutoDeltaModel.from_finetuned(tmp_path / "other", family.build()).hash_check is HashCheck.MATCH
    other.detach()

    delta_model.unmerge()
    assert not delta_model.merged
    assert same(backbone.state_dict(), state)
    assert torch.equal(logits(backbone, inputs), expected)
    delta_model.unmerge()
    for step in ("detach", "attach"):
        delta_model.merge()
        with delta_model.detached():
            assert md5(backbone) == digest
            assert not delta_model.merged
        assert delta_model.merged
        assert torch.equal(logits(backbone, inputs), merged)
        delta_model.attach()
        assert delta_model.merged
        if step == "detach":
            delta_model.detach()
            assert not delta_model.attached
            assert not delta_model.merged
            assert md5(backbone) == digest
            assert list(backbone.named_modules()) == modules
            assert set(vars(backbone)) == set(vars(family.build()))
            assert torch.equal(logits(backbone, inputs), plain)
    delta_model.unmerge()
    assert torch.equal(logits(backbone, inputs), expected)
    train_step(delta_model, inputs)
    assert not torch.equal(logits(backbone, inputs), expected)


@pytest.mark.parametrize("case", CASES)
def test_the_new_weight_is_the_exact_one_rounded_once(case: str) -> None:
    """In float64 the layers and the fold agree to the last digits, and the float32 weight is that one rounded."""
    backbone = FAMILIES["bert"].build()
    exact_backbone = copy.deepcopy(backbone).double()
    kind = case.partition("-")[0]
    delta_model, exact = attach(backbone, kind, **CASES[case]), attach(exact_backbone, kind, **CASES[case])
    tensors = {name: tensor.double() for name, tensor in delta_model.delta_tensors().items()}
    exact.load_tensors(tensors, "the delta in float32")
    report = exact.merge(FAMILIES["bert"].inputs())
    assert report.worst.relative < 1e-13
    assert report.logits.relative < 1e-13
    delta_model.merge()
    for attachment, other in zip(delta_model.attachments, exact.attachments, strict=True):
        wide = other.module.weight.float()
        assert torch.equal(attachment.module.weight, wide) or (attachment.module.weight - wide).abs().max() < 1e-7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_half_precision(dtype: torch.dtype) -> None:
    family = FAMILIES["llama"]
    backbone, inputs = family.build().to(dtype), family.inputs()
    digest = md5(backbone)
    delta_model = attach(backbone)
    expected, tensors = logits(backbone, inputs), values(delta_model.delta_tensors())
    report = delta_model.merge(inputs)
    assert report.dtypes == (str(dtype).removeprefix("torch."),)
    # Rounding the weight is seen in the outputs, and the report says how much.
    bound = {torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float64: 1e-6}[dtype]
    assert 0 < report.worst.relative < bound
    assert report.logits.absolute == float((logits(backbone, inputs).float() - expected.float()).abs().max())
    text = str(report)
    assert text.startswith(f"Merged 4 layers into the weights of 4 modules of dtype {report.dtypes[0]}.\n")
    assert f"module outputs: off by at most {report.worst.absolute:.2g}" in text
    assert report.worst.where in text
    assert "logits: off by at most" in text
    delta_model.unmerge()
    assert torch.equal(logits(backbone, inputs), expected)
    assert same(delta_model.delta_tensors(), tensors)
    delta_model.merge()
    delta_model.detach()
    assert md5(backbone) == digest


def test_the_report_measures_what_it_says() -> None:
    """A layer whose ``merged`` is wrong is found out."""
    backbone = FAMILIES["bert"].build()
    delta_model = attach(backbone)
    wrong = delta_model.attachments[1].layer
    wrong.merged = lambda weight, bias: (weight, bias)
    report = delta_model.merge(FAMILIES["bert"].inputs())
    assert report.worst.where == delta_model.attachments[1].site
    assert report.worst.relative > 1e-2
    assert report.logits.relative > 1e-3


def test_training_mode_and_random_numbers_are_left_alone() -> None:
    backbone = FAMILIES["bert"].build().train()
    backbone.bert.pooler.eval()
    modes = [module.training for module in backbone.modules()]
    delta_model = attach(backbone, lora_dropout=0.5)
    state = torch.get_rng_state()
    report = delta_model.merge(FAMILIES["bert"].inputs())
    assert report.logits.relative < 1e-5  # no dropout was in the way
    delta_model.detach()
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in backbone.modules()] == modes


def test_rows_of_a_fused_projection() -> None:
    """Layers on slices of GPT-2's c_attn change their rows of the weight and of the bias only."""
    backbone = FAMILIES["gpt2"].build()
    module = backbone.transformer.h[0].attn.c_attn
    before, bias = module.weight.detach().clone(), module.bias.detach().clone()
    delta_model = attach(backbone, "vector", modified_modules=["h.0.attn.c_attn"])
    rows = {"k": Rows(1, 48, 16, 16), "v": Rows(2, 24, 20, 2)}
    delta_model.detach()
    delta_model.attachments = [
        Attachment("transformer.h.0.attn.c_attn", module, f"vector_{n}", f"vector_{n}", VectorLayer(size, "sequential"), r)
        for (n, r), size in zip(rows.items(), (16, 4), strict=True)
    ]
    for order, attachment in enumerate(delta_model.attachments):
        attachment.layer.order = order
    delta_model.attach()
    perturb(delta_model)
    assert delta_model.merge().worst.relative < 1e-6
    factor = torch.ones(48)
    for part, attachment in zip(rows.values(), delta_model.attachments, strict=True):
        factor[part.indices()] *= attachment.layer.vector.detach()
    assert (factor != 1).sum() == 18  # two of the second's lie among the first's
    torch.testing.assert_close(module.weight.detach(), before * factor, rtol=1e-6, atol=0)
    torch.testing.assert_close(module.bias.detach(), bias * factor, rtol=1e-6, atol=0)
    delta_model.detach()
    assert torch.equal(module.weight, before)
    assert torch.equal(module.bias, bias)


def test_a_convolution() -> None:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), nn.Conv1d(3, 5, 2, dilation=2))
    delta_model = LoraModel(backbone, modified_modules=["0", "1"], lora_r=2)
    perturb(delta_model)
    digest, x = md5(backbone), torch.randn(2, 4, 8, 8)
    expected = backbone[0](x)
    assert delta_model.merge().worst.relative < 1e-5
    torch.testing.assert_close(backbone[0](x), expected)
    delta_model.detach()
    assert md5(backbone) == digest


# --- beside other deltas ----------------------------------------------------------------------------------------------

LORA, DORA = ("lora", {}), ("lora", {"lora_dora": True})
SCALE, INPUT, ADAPTER = ("vector", {}), ("vector", {"where": "input"}), ("adapter", {})


@pytest.mark.parametrize(
    ("first", "second", "which"),
    [  # which of the two may be merged while the other stays
        (LORA, LORA, {0, 1}),
        (LORA, ADAPTER, {0}),
        (ADAPTER, LORA, set()),
        (LORA, SCALE, {0}),
        (SCALE, LORA, {0}),
        (SCALE, SCALE, {0}),
        (LORA, DORA, set()),
        (DORA, LORA, {0}),
        (LORA, INPUT, {0}),
        (INPUT, LORA, {1}),
        (INPUT, INPUT, {1}),
        (INPUT, SCALE, {0, 1}),
        (ADAPTER, INPUT, {1}),
        (INPUT, DORA, {1}),
    ],
    ids=lambda value: "-".join([value[0], *map(str, value[1].values())]) if isinstance(value, tuple) else str(value),
)
def test_the_order_of_layers_on_one_module(first: tuple, second: tuple, which: set[int]) -> None:
    family = FAMILIES["llama"]
    backbone, inputs = family.build(), family.inputs()
    digest = md5(backbone)
    pair = [
        attach(backbone, kind, modified_modules=["q_proj"], seed=seed, **keys)
        for seed, (kind, keys) in enumerate([first, second], 1)
    ]
    expected = logits(backbone, inputs)
    for index, delta_model in enumerate(pair):
        allowed = merges(delta_model)
        assert allowed == (index in which)
        if allowed:
            torch.testing.assert_close(logits(backbone, inputs), expected, rtol=1e-4, atol=1e-5)
            delta_model.unmerge()
        assert torch.equal(logits(backbone, inputs), expected)
    for delta_model in pair:
        delta_model.detach()
    assert md5(backbone) == digest


def test_the_message_names_what_is_in_the_way() -> None:
    backbone = FAMILIES["llama"].build()
    attach(backbone, "adapter", modified_modules=["q_proj"])
    delta_model = attach(backbone, modified_modules=["q_proj"])
    with pytest.raises(DeltaExpError, match=r"q_proj\.lora' cannot be merged while 'adapter' hangs on the same module"):
        delta_model.merge()


def test_a_later_layer_may_stay_out() -> None:
    """A layer that is detached is not in the way, and merging while it is out is merging what there is."""
    family = FAMILIES["llama"]
    backbone, inputs = family.build(), family.inputs()
    digest = md5(backbone)
    adapter = attach(backbone, "adapter", modified_modules=["q_proj"])
    lora = attach(backbone, modified_modules=["q_proj"])
    both = logits(backbone, inputs)
    adapter.detach()
    lora.merge()
    adapter.attach()
    lora.unmerge()
    assert torch.equal(logits(backbone, inputs), both)
    lora.detach()
    adapter.detach()
    assert md5(backbone) == digest


def test_two_merged_deltas() -> None:
    family = FAMILIES["bert"]
    backbone, inputs = family.build(), family.inputs()
    digest = md5(backbone)
    first, second = attach(backbone, modified_modules=["query"]), attach(backbone, modified_modules=["value"], seed=3)
    third = attach(backbone, modified_modules=["query"], seed=4)
    expected = logits(backbone, inputs)
    first.merge()
    second.merge()
    assert not merges(third)  # the weight has another delta in it, which could not be taken out any more
    torch.testing.assert_close(logits(backbone, inputs), expected)
    first.detach()
    assert second.merged
    second.detach()
    third.detach()
    assert md5(backbone) == digest


# --- what is refused --------------------------------------------------------------------------------------------------


def test_a_type_that_is_no_linear_map_is_refused() -> None:
    backbone = FAMILIES["bert"].build()
    delta_model = attach(backbone, "adapter")
    before = snapshot(backbone)
    with pytest.raises(DeltaExpError, match=r"a AdapterLayer is no change of a weight.*can be merged are .*lora"):
        delta_model.merge()
    assert snapshot(backbone) == before
    assert not delta_model.merged
    delta_model.detach()
    assert not merges(delta_model)
    assert not delta_model.attached
    assert "lora" in mergeable_types()
    assert "adapter" not in mergeable_types()


@pytest.mark.parametrize("name", ["t5", "gpt2"])
def test_a_tied_weight_is_refused(name: str) -> None:
    backbone = FAMILIES[name].build()
    delta_model = attach(backbone, modified_modules=["lm_head", FAMILIES[name].linear[0]], exclude_modules=[])
    before, expected = snapshot(backbone), logits(backbone, FAMILIES[name].inputs())
    with pytest.raises(DeltaExpError, match=r"which is a parameter of .*(shared|wte)"):
        delta_model.merge()
    assert snapshot(backbone) == before
    assert torch.equal(logits(backbone, FAMILIES[name].inputs()), expected)


def test_a_missing_bias_is_not_invented() -> None:
    bert, llama = FAMILIES["bert"].build(), FAMILIES["llama"].build()
    with_bias = attach(bert, "added_bias")
    expected = logits(bert, FAMILIES["bert"].inputs())
    assert with_bias.merge(FAMILIES["bert"].inputs()).logits.relative < 1e-6
    torch.testing.assert_close(logits(bert, FAMILIES["bert"].inputs()), expected)
    without = attach(llama, "added_bias")
    before = snapshot(llama)
    with pytest.raises(DeltaExpError, match=r"q_proj.* to have a bias, and that has none"):
        without.merge()
    assert snapshot(llama) == before


def test_overflow_is_refused() -> None:
    backbone = FAMILIES["bert"].build().half()
    delta_model = attach(backbone)
    with torch.no_grad():
        delta_model.attachments[-1].layer.lora_B.mul_(1e6)
    before = snapshot(backbone)
    with pytest.raises(DeltaExpError, match="its new weight is not finite in torch.float16"):
        delta_model.merge()
    assert snapshot(backbone) == before


def test_other_modules_are_refused() -> None:
    with torch.device("meta"):
        meta = FAMILIES["llama"].make()
    with pytest.raises(DeltaExpError, match="has no values"):
        LoraModel(meta).merge()
    backbone = FAMILIES["bert"].build()
    delta_model = attach(backbone)
    delta_model.attachments[0].module = backbone.bert.embeddings.LayerNorm
    with pytest.raises(DeltaExpError, match="which is a LayerNorm with a weight of dtype torch.float32"):
        deltaexp.merging.merge(delta_model)


# --- what the backbone owns -------------------------------------------------------------------------------------------


def test_owned_parameters_stay_as_they_are(tmp_path: Path) -> None:
    family = FAMILIES["bert"]
    backbone, inputs = family.build(), family.inputs()
    digest = md5(backbone)
    delta_model = attach(backbone, unfrozen_modules=["deltas", "classifier", "query.bias"])
    head, expected = backbone.classifier.weight.detach().clone(), logits(backbone, inputs)
    delta_model.save_finetuned(tmp_path / "before")
    report = delta_model.merge(inputs)
    assert report.logits.relative < 1e-6
    assert torch.equal(backbone.classifier.weight, head)
    delta_model.save_finetuned(tmp_path / "merged")
    for file in ("config.json", "delta_model.safetensors", "manifest.json"):
        assert (tmp_path / "merged" / file).read_bytes() == (tmp_path / "before" / file).read_bytes()
    delta_model.detach()
    assert md5(backbone) == digest
    delta_model.attach()
    assert torch.equal(logits(backbone, inputs), expected)


def test_a_weight_that_is_trained_itself_is_refused() -> None:
    backbone = FAMILIES["bert"].build()
    both = attach(backbone, modified_modules=["query"], unfrozen_modules=["deltas", "layer.1.attention.self.query"])
    before = snapshot(backbone)
    with pytest.raises(DeltaExpError, match=r"layer\.1\.attention\.self\.query\.weight', which is trained itself"):
        both.merge()
    assert snapshot(backbone) == before


def test_a_merged_weight_cannot_be_trained_by_another_delta() -> None:
    backbone = FAMILIES["bert"].build()
    digest = md5(backbone)
    delta_model = attach(backbone, modified_modules=["query"])
    delta_model.merge()
    with pytest.raises(AddressingError, match=r"query\.weight.*belongs to another delta"):
        attach(backbone, "adapter", unfrozen_modules=["deltas", "query"])
    delta_model.detach()
    assert md5(backbone) == digest
    other = attach(backbone, "adapter", unfrozen_modules=["deltas", "query"])
    other.detach()
    assert md5(backbone) == digest


def test_a_place_that_was_taken_meanwhile() -> None:
    family = FAMILIES["bert"]
    backbone, inputs = family.build(), family.inputs()
    digest = md5(backbone)
    first = attach(backbone)
    first.merge()
    second = attach(backbone, seed=2)
    before, expected = snapshot(backbone), logits(backbone, inputs)
    with pytest.raises(DeltaExpError, match="exists already"):
        first.unmerge()
    assert first.merged
    assert snapshot(backbone) == before
    assert torch.equal(logits(backbone, inputs), expected)
    first.detach()  # always possible
    second.detach()
    assert md5(backbone) == digest


def test_a_merged_delta_takes_no_other_tensors(tmp_path: Path) -> None:
    delta_model = attach(FAMILIES["bert"].build())
    tensors = values(delta_model.delta_tensors())
    delta_model.merge()
    with pytest.raises(CheckpointError, match="call unmerge"):
        delta_model.load_tensors(tensors, "a file")


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_while_merged(how: str) -> None:
    family = FAMILIES["t5"]
    backbone, inputs = family.build(), family.inputs()
    digest = md5(backbone)
    delta_model = attach(backbone)
    expected = logits(backbone, inputs)
    delta_model.merge()
    merged = logits(backbone, inputs)
    twin = copy.deepcopy(delta_model) if how == "deepcopy" else pickle.loads(pickle.dumps(delta_model))
    delta_model.detach()
    assert md5(backbone) == digest
    assert torch.equal(logits(twin.backbone_model, inputs), merged)
    twin.unmerge()
    assert torch.equal(logits(twin.backbone_model, inputs), expected)
    twin.detach()
    assert md5(twin.backbone_model) == digest


def test_a_merged_backbone_is_an_ordinary_checkpoint(tmp_path: Path) -> None:
    family = FAMILIES["llama"]
    backbone, inputs = family.build(), family.inputs()
    delta_model = attach(backbone)
    delta_model.merge()
    backbone.save_pretrained(tmp_path)
    assert torch.equal(logits(type(backbone).from_pretrained(tmp_path).eval(), inputs), logits(backbone, inputs))
    generated = backbone.generate(inputs["input_ids"], max_new_tokens=4, do_sample=False)
    delta_model.unmerge()
    assert torch.equal(backbone.generate(inputs["input_ids"], max_new_tokens=4, do_sample=False), generated)


def test_another_default_device_changes_nothing() -> None:
    backbone = FAMILIES["llama"].build()
    delta_model = attach(backbone, "lora")
    before = logits(backbone, FAMILIES["llama"].inputs())
    with torch.device("meta"):
        delta_model.merge()
    torch.testing.assert_close(logits(backbone, FAMILIES["llama"].inputs()), before, rtol=0, atol=1e-4)
