"""Making one delta of several: what is added to the weights, against formulas written out here, and against PEFT's."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from models import FAMILIES, attach, logits, md5, same, slow_but, snapshot, values
from peft.utils import merge_utils

from deltaexp import AutoDeltaModel, DeltaModel, HashCheck, registry
from deltaexp.combining import METHODS, Combination, Mixer, agreeing, combine, dropped, trimmed
from deltaexp.errors import ConfigError, DeltaExpError

BERT = FAMILIES["bert"]


def updates(delta_model: DeltaModel) -> dict[str, torch.Tensor]:
    """Return what a LoRA adds to each weight, in float64."""
    result = {}
    for attachment in delta_model.attachments:
        layer = attachment.layer
        update = layer.scale * layer.lora_B.detach().double() @ layer.lora_A.detach().double()
        if layer.lora_A0 is not None:
            update = update - layer.scale * layer.lora_B0.double() @ layer.lora_A0.double()
        result[attachment.site] = update
    return result


# --- the methods ------------------------------------------------------------------------------------------------------


@pytest.fixture
def tasks() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(7, 9, generator=generator) for _ in range(3)]


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_the_methods_are_peft_s(tasks: list[torch.Tensor], density: float) -> None:
    weights = (0.7, -0.4, 1.3)
    tensor = torch.tensor(weights)

    def ours(method: str) -> torch.Tensor:
        return Mixer(method, weights, density, torch.Generator().manual_seed(11))(tasks)

    torch.testing.assert_close(ours("linear"), merge_utils.task_arithmetic(tasks, tensor))
    torch.testing.assert_close(ours("ties"), merge_utils.ties(tasks, tensor, density))
    with torch.random.fork_rng(devices=[]):
        for method in ("dare_linear", "dare_ties"):
            torch.manual_seed(11)
            torch.testing.assert_close(ours(method), getattr(merge_utils, method)(tasks, tensor, density))
        torch.manual_seed(12)
        ours_dropped = dropped(tasks[0], density, torch.Generator().manual_seed(12))
        assert torch.equal(ours_dropped, merge_utils.random_pruning(tasks[0], density, rescale=True))
    assert torch.equal(trimmed(tasks[0], density), merge_utils.magnitude_based_pruning(tasks[0], density))
    assert torch.equal(agreeing(torch.stack(tasks)), merge_utils.calculate_majority_sign_mask(torch.stack(tasks)))


def test_ties_by_hand() -> None:
    first, second = torch.tensor([4.0, -3.0, 0.5, 1.0]), torch.tensor([-1.0, -2.0, 0.1, 3.0])
    mixed = Mixer("ties", (1.0, 1.0), 0.5, torch.Generator())([first, second])
    # Kept are [4, -3, 0, 0] and [0, -2, 0, 3]; no signs differ; the mean is over those that are not zero.
    assert mixed.tolist() == [4.0, -2.5, 0.0, 3.0]
    mixed = Mixer("ties", (1.0, 1.0), 1.0, torch.Generator())([first, second])
    assert mixed.tolist() == [4.0, -2.5, pytest.approx(0.3), 2.0]


def test_dare_keeps_the_expectation() -> None:
    task = torch.ones(200, 200)
    mixed = Mixer("dare_linear", (1.0,), 0.2, torch.Generator().manual_seed(0))([task])
    assert set(mixed.unique().tolist()) == {0.0, 5.0}
    assert mixed.mean() == pytest.approx(1, abs=0.05)


# --- LoRA -------------------------------------------------------------------------------------------------------------

LORAS = [
    {"lora_r": 2},
    {"lora_r": 3, "lora_alpha": 5},
    {"lora_r": 4, "lora_scaling": "rslora"},
    {"lora_r": 3, "lora_init": "pissa"},
    {"lora_r": 2, "lora_r_pattern": {"layer.1.attention.self.query": 5}, "lora_alpha_pattern": {"attn.v": 3}},
]


def loras(backbone: torch.nn.Module, keys: list[dict] = LORAS) -> list[DeltaModel]:
    made = []
    for seed, key in enumerate(keys):
        made.append(attach(backbone, seed=seed + 1, **key))
        made[-1].detach()
    return made


def test_a_weighted_sum_of_loras_is_exact(tmp_path: Path) -> None:
    backbone, inputs = BERT.build(), BERT.inputs()
    digest, plain = md5(backbone), logits(backbone, inputs)
    deltas, weights = loras(backbone), [0.5, -1.0, 2.0, 0.25, 1.5]
    combined = combine(deltas, weights)
    assert not combined.attached
    assert md5(backbone) == digest
    assert combined.config.lora_r == 2 + 3 + 4 + 6 + 5  # the starting values of PiSSA are an update as well
    expected = [updates(delta) for delta in deltas]
    for site, update in updates(combined).items():
        wanted = sum(weight * own[site] for weight, own in zip(weights, expected, strict=True))
        torch.testing.assert_close(update, wanted, rtol=1e-6, atol=1e-6)
    assert combined.combination == Combination("linear", tuple(weights), 0.5, 0)

    # It is a delta like any other: it computes what the sum computes, and can be merged and saved.
    with torch.no_grad():
        for name, module in backbone.named_modules():
            if name in expected[0]:
                change = sum(weight * own[name] for weight, own in zip(weights, expected, strict=True))
                module.weight.add_(change.float())
    wanted = logits(backbone, inputs)
    backbone.load_state_dict(BERT.build().state_dict())
    combined.attach()
    assert not torch.allclose(wanted, plain, atol=1e-2)
    torch.testing.assert_close(logits(backbone, inputs), wanted, rtol=1e-4, atol=1e-5)
    combined.save_finetuned(tmp_path)
    fresh = BERT.build()
    assert AutoDeltaModel.from_finetuned(tmp_path, fresh).hash_check is HashCheck.MATCH
    assert torch.equal(logits(fresh, inputs), logits(backbone, inputs))
    combined.merge()
    combined.detach()
    assert md5(backbone) == digest


def test_one_lora_is_itself() -> None:
    backbone, inputs = BERT.build(), BERT.inputs()
    delta_model = attach(backbone, lora_alpha=3)
    expected = logits(backbone, inputs)
    delta_model.detach()
    combined = combine([delta_model], [1])
    combined.attach()
    torch.testing.assert_close(logits(backbone, inputs), expected)


@pytest.mark.parametrize("method", ["ties", "dare_linear", "dare_ties"])
def test_pruned_loras_are_cut_to_a_rank(method: str) -> None:
    backbone = BERT.build()
    deltas, weights = loras(backbone, LORAS[:3]), [0.5, -1.0, 2.0]
    whole = combine(deltas, weights, method, density=0.4, seed=3, rank=16)
    assert whole.config.lora_r == 16
    assert max(whole.combination.truncation.values()) < 1e-12
    cut = combine(deltas, weights, method, density=0.4, seed=3)
    assert cut.config.lora_r == 4
    mixer = Mixer(method, tuple(weights), 0.4, torch.Generator().manual_seed(3))
    before, exact, best = [updates(delta) for delta in deltas], updates(whole), updates(cut)
    for site in exact:
        wanted = mixer([own[site] for own in before])
        torch.testing.assert_close(exact[site], wanted, rtol=1e-5, atol=1e-6)
        # No matrix of that rank is nearer (Eckart and Young), and the record says how far it is.
        lost = torch.linalg.svdvals(wanted)[4:].norm() / wanted.norm()
        assert 0.1 < lost < 1
        assert (best[site] - wanted).norm() / wanted.norm() == pytest.approx(float(lost), rel=1e-5)
        assert cut.combination.truncation[f"{site}.lora"] == pytest.approx(float(lost), rel=1e-5)
    again = combine(deltas, weights, method, density=0.4, seed=3)
    assert same(again.delta_tensors(), cut.delta_tensors())
    if method.startswith("dare"):
        other = combine(deltas, weights, method, density=0.4, seed=4)
        assert not same(other.delta_tensors(), cut.delta_tensors())


def test_a_sum_may_be_cut_as_well() -> None:
    backbone = BERT.build()
    deltas = loras(backbone, LORAS[:2])
    combined = combine(deltas, [1, 1], rank=5)
    assert combined.config.lora_r == 5
    assert max(combined.combination.truncation.values()) < 1e-12
    assert max(combine(deltas, [1, 1], rank=2).combination.truncation.values()) > 0.1


def test_rows_of_a_fused_projection_and_convolutions() -> None:
    for backbone, keys in (
        (FAMILIES["gpt2"].build(), {}),
        (torch.nn.Sequential(torch.nn.Conv2d(4, 6, 3, groups=2)), {"modified_modules": ["0"]}),
    ):
        deltas = [attach(backbone, seed=seed, lora_r=2, **keys) for seed in (1, 2)]
        for delta in deltas:
            delta.detach()
        combined = combine(deltas, [1, 2])
        first, second = (updates(delta) for delta in deltas)
        for site, update in updates(combined).items():
            torch.testing.assert_close(update, first[site] + 2 * second[site])


# --- the other types --------------------------------------------------------------------------------------------------


def test_adapters_are_combined_parameter_by_parameter() -> None:
    backbone = BERT.build()
    deltas = [attach(backbone, "adapter", seed=seed) for seed in (1, 2)]
    combined = combine(deltas, [0.25, 0.75])
    first, second = (delta.delta_tensors() for delta in deltas)
    for name, tensor in combined.delta_tensors().items():
        torch.testing.assert_close(tensor, 0.25 * first[name] + 0.75 * second[name])


@pytest.mark.skipif("ia3" not in registry.known(), reason="needs the type ia3")
def test_what_starts_at_one_counts_from_one() -> None:
    backbone = BERT.build()
    deltas = [attach(backbone, "ia3", seed=seed) for seed in (1, 2)]
    first, second = (delta.delta_tensors() for delta in deltas)
    for name, tensor in combine(deltas, [2, -0.5]).delta_tensors().items():
        torch.testing.assert_close(tensor, 1 + 2 * (first[name] - 1) - 0.5 * (second[name] - 1))
    # What is trimmed does nothing, where a zero would switch the module off.
    trimmed_away = combine(deltas, [1, 1], "ties", density=0.01)
    assert set(torch.cat([t.flatten() for t in trimmed_away.delta_tensors().values()]).tolist()) == {1.0}


def test_parameters_of_the_backbone_are_combined_by_their_change() -> None:
    backbone = BERT.build()
    plain, digest = values(backbone.state_dict()), md5(backbone)
    deltas = []
    for seed in (1, 2):
        deltas.append(attach(backbone, seed=seed, unfrozen_modules=["deltas", "classifier"]))
        deltas[-1].detach()
    deltas[0].attach()
    combined = combine(deltas, [2, 3])
    assert deltas[0].attached
    first, second = (delta.delta_tensors() for delta in deltas)
    for name in ("classifier.weight", "classifier.bias"):
        wanted = plain[name] + 2 * (first[name] - plain[name]) + 3 * (second[name] - plain[name])
        torch.testing.assert_close(combined.delta_tensors()[name], wanted)
    deltas[0].detach()
    assert md5(backbone) == digest
    combined.attach()
    assert torch.equal(backbone.classifier.weight, combined.delta_tensors()["classifier.weight"])
    combined.detach()
    assert md5(backbone) == digest


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("delta_type", slow_but(registry.known(), ("lora", "adapter", "ia3", "bitfit")))
def test_every_type(delta_type: str, method: str) -> None:
    backbone, inputs = BERT.build(), BERT.inputs()
    digest = md5(backbone)
    if registry.get(delta_type).trains_nothing:
        pytest.skip("has nothing to combine")
    keys = {"soft_token_num": 3} if delta_type == "soft_prompt" else {}
    first = attach(backbone, delta_type, seed=1, **keys)
    first.detach()
    second = attach(backbone, delta_type, seed=2, **keys)
    before = snapshot(backbone)
    expected, state = logits(backbone, inputs), torch.get_rng_state()
    combined = combine([first, second], [0.5, 0.5], method)
    assert type(combined) is type(first) or delta_type == "adalora"
    assert not combined.attached
    assert snapshot(backbone) == before
    assert torch.equal(logits(backbone, inputs), expected)
    assert torch.equal(torch.get_rng_state(), state)
    second.detach()
    combined.attach()
    assert not torch.equal(logits(backbone, inputs), expected)
    combined.detach()
    assert md5(backbone) == digest


# --- as they are ------------------------------------------------------------------------------------------------------


def test_the_deltas_given_stay_as_they_are() -> None:
    backbone, inputs = BERT.build(), BERT.inputs()
    digest = md5(backbone)
    attached, detached, merged = attach(backbone, seed=1), attach(backbone, seed=2), attach(backbone, seed=3)
    detached.detach()
    merged.merge()
    expected, tensors = logits(backbone, inputs), [values(d.delta_tensors()) for d in (attached, detached, merged)]
    combine([attached, detached, merged, attached], [1, 2, 3, 4])
    assert (attached.attached, detached.attached, merged.merged) == (True, False, True)
    assert torch.equal(logits(backbone, inputs), expected)
    for before, delta in zip(tensors, (attached, detached, merged), strict=True):
        assert same(before, delta.delta_tensors())
        delta.detach()
    assert md5(backbone) == digest


def test_equal_backbones_are_as_good_as_one() -> None:
    deltas = [attach(BERT.build(), seed=1), attach(BERT.build(), seed=2)]
    combined = combine(deltas, [1, 1])
    assert combined.backbone_model is deltas[0].backbone_model
    other = attach(BERT.build(seed=1), seed=3)
    with pytest.raises(DeltaExpError, match=r"their backbones differ in bert\.embeddings"):
        combine([deltas[0], other], [1, 1])


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"weights": [1]}, "2 deltas were given with 1 weights"),
        ({"weights": [1, float("nan")]}, "each must be a finite number"),
        ({"method": "tie"}, "no method of combining 'tie'. Did you mean 'ties'"),
        ({"density": 0}, "density is 0; it must be greater than 0"),
        ({"density": 1.5}, "density is 1.5"),
        ({"rank": 0}, "rank is 0"),
        ({"deltas": [], "weights": []}, "0 deltas"),
    ],
)
def test_refused_numbers(keys: dict, said: str) -> None:
    backbone = BERT.build()
    deltas = [attach(backbone, seed=seed) for seed in (1, 2)]
    before = snapshot(backbone)
    with pytest.raises(ConfigError) as caught:
        combine(**{"deltas": deltas, "weights": [1, 1], **keys})
    assert said in str(caught.value)
    assert snapshot(backbone) == before


def test_what_does_not_belong_together() -> None:
    backbone = BERT.build()
    lora, adapter, dora = attach(backbone), attach(backbone, "adapter"), attach(backbone, lora_dora=True)
    before = snapshot(backbone)
    others = {
        r"one type can be combined, and these are lora LoraLayer, adapter": adapter,
        r"these are lora LoraLayer, lora DoraLayer": dora,
        r"only one of them has bert.*key\.lora": attach(backbone, modified_modules=["query", "key"]),
        r"only one of them has classifier\.bias": attach(backbone, unfrozen_modules=["deltas", "classifier"]),
    }
    for said, other in others.items():
        with pytest.raises(DeltaExpError, match=said):
            combine([lora, other], [1, 1])
        other.detach()
    adapter.attach()
    wider = attach(backbone, "adapter", bottleneck_dim=5)
    with pytest.raises(DeltaExpError, match="they differ in bottleneck_dim"):
        combine([adapter, wider], [1, 1])
    wider.detach()
    with pytest.raises(ConfigError, match="only LoRA without DoRA"):
        combine([adapter], [1], rank=3)
    dora.attach()
    assert len(before) == len(snapshot(backbone))


def test_deltas_that_differ_in_what_is_fixed() -> None:
    backbone = BERT.build()
    first, second = attach(backbone, "vera", seed=1, vera_r=4), attach(backbone, "vera", seed=2, vera_r=4)
    second.attachments[0].layer.projection.vera_A[0, 0] += 1
    with pytest.raises(DeltaExpError, match=r"'.*vera_A', which is not trained, differs"):
        combine([first, second], [1, 1])


def test_adalora_becomes_a_lora() -> None:
    """Each has given up other ranks, so that only their updates can be combined."""
    backbone = BERT.build()
    deltas = [attach(backbone, "adalora", seed=seed, adalora_init_r=4, adalora_target_r=2) for seed in (1, 2)]
    expected: dict[str, torch.Tensor] = {}
    for number, delta in enumerate(deltas):
        for attachment in delta.attachments:
            layer = attachment.layer
            layer.lora_mask.copy_(torch.tensor([[number], [1.0], [0.0], [1.0 - number]]))
            product = layer.lora_B.double() @ (layer.lora_A * layer.lora_E * layer.lora_mask).double()
            expected[attachment.site] = expected.get(attachment.site, 0) + (number + 1) * layer.scale * product.detach()
    combined = combine(deltas, [1, 2])
    assert combined.config.delta_type == "lora"
    assert combined.config.lora_r == 8
    for site, update in updates(combined).items():
        torch.testing.assert_close(update, expected[site], rtol=1e-6, atol=1e-6)


def test_combinations_of_combinations() -> None:
    backbone = BERT.build()
    first, second, third = loras(backbone, LORAS[:3])
    nested = combine([combine([first, second], [1, 2]), third], [3, 4])
    flat = combine([first, second, third], [3, 6, 4])
    for (site, one), (_, other) in itertools.zip_longest(updates(nested).items(), updates(flat).items()):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6, msg=site)
