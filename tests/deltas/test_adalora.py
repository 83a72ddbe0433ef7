"""AdaLoRA's allotment of ranks, against PEFT's and by itself."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from models import FAMILIES, attach, logits
from safetensors.torch import load_file

from deltaexp import AutoDeltaModel, DeltaModel, HashCheck

STEPS = 20


def trained(delta_model: DeltaModel, steps: int) -> None:
    """Train as `deltaexp.lab` does."""
    backbone, inputs = delta_model.backbone_model, FAMILIES["bert"].inputs()
    optimizer = torch.optim.SGD(delta_model.trainable_parameters().values(), lr=0.3)
    for step in range(1, steps + 1):
        (backbone(**inputs).loss + delta_model.penalty()).backward()
        optimizer.step()
        delta_model.after_step(step, steps)
        optimizer.zero_grad()


@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_training_equals_pefts(name: str, interval: int) -> None:
    family, inputs = FAMILIES[name], FAMILIES[name].inputs()
    targets = ["query", "value", "output.dense"] if name == "bert" else ["q_proj", "down_proj"]
    ours = family.build().double()
    keys = {"adalora_init_r": 4, "adalora_target_r": 2, "adalora_alpha": 9, "adalora_orth_reg_weight": 0.3}
    schedule = {"adalora_tinit": 0.1, "adalora_tfinal": 0.3, "adalora_delta_t": interval, "adalora_beta1": 0.7}
    delta_model = attach(ours, "adalora", modified_modules=targets, **keys, **schedule, seed=None)
    theirs = family.build().double()
    tuner = peft.AdaLoraModel(
        theirs,
        {
            "default": peft.AdaLoraConfig(
                target_modules=targets,
                init_r=4,
                target_r=2,
                lora_alpha=9,
                orth_reg_weight=0.3,
                tinit=2,
                tfinal=6,
                deltaT=interval,
                beta1=0.7,
                beta2=0.85,
                total_step=STEPS,
            )
        },
        "default",
    ).double()
    pairs = []
    for attachment in delta_model.attachments:
        module = theirs.get_submodule(attachment.site)
        for part in ("lora_A", "lora_E", "lora_B"):
            own, other = getattr(attachment.layer, part), getattr(module, part)["default"]
            with torch.no_grad():
                other.copy_(own)
            pairs.append((own, other))
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.5) for model in (ours, theirs)]
    ranks = []
    for step in range(1, STEPS + 1):
        losses = [ours(**inputs).loss + delta_model.penalty(), tuner(**inputs).loss]
        torch.testing.assert_close(losses[0], losses[1], check_dtype=False, rtol=1e-6, atol=0)
        for loss, optimizer in zip(losses, optimizers, strict=True):
            loss.backward()
            optimizer.step()
        delta_model.after_step(step, STEPS)
        tuner.update_and_allocate(step)
        for optimizer in optimizers:
            optimizer.zero_grad()
        for attachment, (own, other) in zip(delta_model.attachments, pairs[1::3], strict=True):
            torch.testing.assert_close(own * attachment.layer.lora_mask, other)
        for own, other in pairs[::3] + pairs[2::3]:
            torch.testing.assert_close(own, other)
        ranks.append(
            sum(int((e * a.layer.lora_mask != 0).sum()) for a, (e, _) in zip(delta_model.attachments, pairs[1::3], strict=True))
        )
    layers = len(delta_model.attachments)
    assert ranks[0] == 4 * layers
    assert ranks[-1] == 2 * layers
    assert 2 * layers < ranks[5] < 4 * layers
    assert {int(attachment.layer.lora_mask.sum()) for attachment in delta_model.attachments} != {2}  # not all alike


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 20])
def test_every_run_ends_at_the_target(steps: int, tmp_path: Path) -> None:
    family = FAMILIES["bert"]
    delta_model = attach(family.build(), "adalora", seed=None, adalora_init_r=4, adalora_target_r=2)
    before = {name: tensor.shape for name, tensor in delta_model.delta_tensors().items()}
    trained(delta_model, steps)
    masks = [attachment.layer.lora_mask for attachment in delta_model.attachments]
    assert set(torch.cat(masks).flatten().tolist()) == {0.0, 1.0}
    assert sum(int(mask.sum()) for mask in masks) == 2 * len(masks)
    assert {name: tensor.shape for name, tensor in delta_model.delta_tensors().items()} == before

    # It is saved with the rest, and holds in what is loaded.
    delta_model.save_finetuned(tmp_path)
    saved = load_file(tmp_path / "delta_model.safetensors")
    fresh = family.build()
    loaded = AutoDeltaModel.from_finetuned(tmp_path, fresh)
    assert loaded.hash_check is HashCheck.MATCH
    assert torch.equal(logits(fresh, family.inputs()), logits(delta_model.backbone_model, family.inputs()))
    for attachment, mask in zip(loaded.attachments, masks, strict=True):
        assert torch.equal(attachment.layer.lora_mask, mask)
        assert torch.equal(saved[f"{attachment.saved_prefix}.lora_mask"], mask)
    expected = logits(fresh, family.inputs())
    with torch.no_grad():
        for attachment in loaded.attachments:  # the ranks that were given up stay so
            attachment.layer.lora_E.add_(1 - attachment.layer.lora_mask)
    assert torch.equal(logits(fresh, family.inputs()), expected)


def test_the_least_important_go() -> None:
    """One allotment, with the importance of every rank set by hand."""
    delta_model = attach(FAMILIES["bert"].build(), "adalora", adalora_init_r=3, adalora_target_r=1, adalora_tfinal=0.0)
    layers = [attachment.layer for attachment in delta_model.attachments]
    scores = torch.arange(3.0 * len(layers))[torch.randperm(3 * len(layers), generator=torch.Generator().manual_seed(0))]
    for layer, score in zip(layers, scores.split(3), strict=True):
        zero = torch.zeros(1)
        layer.importance = {
            "lora_E": (score[:, None], torch.ones(3, 1)),
            "lora_A": (zero.expand(3, 16), zero),
            "lora_B": (zero.expand(16, 3), zero),
        }
    delta_model.after_step(10, 10)
    kept = torch.cat([layer.lora_mask[:, 0] for layer in layers])
    assert torch.equal(kept.bool(), scores >= 2 * len(layers))
    assert all(layer.importance == {} for layer in layers)
    delta_model.after_step(11, 10)


def test_the_budget_falls_with_the_cube() -> None:
    config = attach(FAMILIES["bert"].build(), "adalora", adalora_init_r=12, adalora_target_r=8).config
    assert [config.budget(10, step, 10, 70) for step in (10, 40, 70)] == [120, 85, 80]


def test_the_penalty() -> None:
    delta_model = attach(
        FAMILIES["bert"].build(), "adalora", adalora_init_r=3, adalora_target_r=3, adalora_orth_reg_weight=0.25
    )
    expected = []
    for attachment in delta_model.attachments:
        a, b = attachment.layer.lora_A, attachment.layer.lora_B
        expected += [(a @ a.T - torch.eye(3)).pow(2).sum().sqrt(), (b.T @ b - torch.eye(3)).pow(2).sum().sqrt()]
    torch.testing.assert_close(delta_model.penalty(), 0.25 * sum(expected) / len(expected))
    delta_model.penalty().backward()
    assert all(attachment.layer.lora_B.grad.abs().max() > 0 for attachment in delta_model.attachments)
    with torch.no_grad():
        for attachment in delta_model.attachments:
            torch.nn.init.orthogonal_(attachment.layer.lora_A)
            torch.nn.init.orthogonal_(attachment.layer.lora_B)
    assert delta_model.penalty().item() == pytest.approx(0, abs=1e-6)
    assert attach(FAMILIES["bert"].build(), "adalora", adalora_orth_reg_weight=0.0).penalty() is None
