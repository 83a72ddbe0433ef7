"""What a delta's type may ask of the training: learning rates of its own, a term in the loss, and a word after each step."""

from pathlib import Path

import pytest
import torch
from small import bert, reviews

from deltaexp import AutoDeltaConfig, AutoDeltaModel, registry
from deltaexp.errors import ConfigError
from deltaexp.lab import backbones, schema, training
from deltaexp.lab.checkpoints import Checkpoints
from deltaexp.lab.config import BackboneConfig, TrainerConfig
from deltaexp.lab.recovery import Record, describe
from deltaexp.lab.taskconfig import TaskConfig
from deltaexp.lab.tasks import data as task_data
from deltaexp.model import DeltaModel


def trainer_for(folder: Path, delta: dict, **trainer: object) -> tuple[training.DeltaTrainer, DeltaModel]:
    task = TaskConfig(
        name="reviews", kind="classification", data=str(reviews(folder / "data")), inputs=["sentence"], target="label",
        labels=["bad", "good"],
    )  # fmt: skip
    backbone = backbones.load(BackboneConfig(name="small", source=str(bert(folder / "bert"))), task)
    delta_model = AutoDeltaModel.from_config(AutoDeltaConfig.from_dict(delta), backbone_model=backbone.model)
    delta_model.freeze_module(exclude=["deltas", *backbone.new])
    kind = backbone.kind(task, backbone.tokenizer, backbone.model.config)
    splits = kind.splits(task_data.load(task, backbone.kind, progress=False))
    settings = TrainerConfig(
        **{
            "max_steps": 4,
            "batch_size": 8,
            "progress": False,
            "cpu": True,
            "lr_scheduler": "constant",
            "learning_rate": 1e-3,
            **trainer,
        }
    )
    seeds = {"init": 1, "data": 1, "dropout": 1}
    return training.build(settings, delta_model, kind, splits, Checkpoints(folder / "checkpoints"), seeds, []), delta_model


def test_learning_rates_of_lora_plus(tmp_path: Path) -> None:
    keys = {"delta_type": "lora", "lora_plus_ratio": 16.0}
    trainer, delta_model = trainer_for(tmp_path, keys, learning_rate=1e-3, weight_decay=0.1)
    optimizer = trainer.create_optimizer()
    names = {parameter: name for name, parameter in delta_model.backbone_model.named_parameters()}
    rates = {names[p]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    assert set(rates) == set(delta_model.trainable_parameters())
    for name, (rate, decay) in rates.items():
        assert rate == pytest.approx(1e-3 * (16 if name.endswith("lora_B") else 1)), name
        assert decay == (0.0 if name.endswith("bias") else 0.1), name
    trainer.train()
    assert {group["lr"] for group in trainer.optimizer.param_groups} == {1e-3, 16e-3}


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_term_in_the_loss_and_a_word_after_each_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulation: int
) -> None:
    trainer, delta_model = trainer_for(tmp_path, {"delta_type": "adalora"}, gradient_accumulation_steps=accumulation)
    steps: list[tuple[int, int, bool]] = []
    original = delta_model.after_step

    def after_step(step: int, total: int) -> None:
        steps.append((step, total, all(p.grad is not None for p in delta_model.trainable_parameters().values())))
        original(step, total)

    monkeypatch.setattr(delta_model, "after_step", after_step)
    trainer.train()
    assert steps == [(number, 4, True) for number in range(1, 5)]  # once for a step, however many batches it has

    # The term counts once for a step, not once for every batch of it.
    delta_model.backbone_model.train()
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(4)])
    trainer.current_gradient_accumulation_steps = accumulation
    trainer.model_accepts_loss_kwargs = False
    torch.manual_seed(0)  # the same dropout for both
    with_term = trainer.compute_loss(delta_model.backbone_model, dict(batch))
    monkeypatch.setattr(delta_model, "penalty", lambda: None)
    torch.manual_seed(0)
    without = trainer.compute_loss(delta_model.backbone_model, dict(batch))
    monkeypatch.undo()
    term = delta_model.penalty()
    assert term is not None
    assert term > 0
    torch.testing.assert_close(with_term - without, term.detach(), rtol=1e-3, atol=1e-5)
    delta_model.backbone_model.eval()
    loss = trainer.compute_loss(delta_model.backbone_model, dict(batch))
    assert loss < term  # it is no part of what is measured


def test_parameters_without_a_gradient_are_named(tmp_path: Path) -> None:
    trainer, delta_model = trainer_for(tmp_path, {"delta_type": "lora"})
    layer = torch.nn.Linear(2, 2)  # which nothing calls
    delta_model.backbone_model.bert.add_module("idle", layer)
    with pytest.warns(UserWarning, match=r"2 trainable parameters have no gradient \(bert\.idle\.weight, bert\.idle\.bias\)"):
        trainer.train()


def test_the_learning_rate_is_the_recommended_one_unless_another_is_named() -> None:
    for name in registry.known():
        config, delta = schema.composed([f"delta_type={name}", "task=sst2", "backbone=minilm"])
        assert config.trainer.learning_rate == registry.get(name).learning_rate
        named = [f"delta_type={name}", "task=sst2", "backbone=minilm", f"trainer.learning_rate={config.trainer.learning_rate}"]
        # Who names the same number continues the same run.
        assert Record(describe(config, delta)).fingerprint == Record(describe(*schema.composed(named))).fingerprint
    assert schema.composed([])[0].trainer.learning_rate == 5e-3  # the task's
    direct = schema.composed(["delta_type=prefix", "reparameterize=false", "task=sst2"])[0]
    assert direct.trainer.learning_rate == 5e-3
    other = schema.composed(["delta_type=peft", "peft.peft_type=IA3", "task=sst2"])[0]
    assert other.trainer.learning_rate == registry.get("ia3").learning_rate


def test_half_precision(tmp_path: Path) -> None:
    settings = TrainerConfig(cpu=True)
    assert training.precision(settings) == "fp32"
    with pytest.raises(ConfigError, match=r"trainer\.precision=fp16 needs a GPU"):
        training.precision(TrainerConfig(cpu=True, precision="fp16"))
    with pytest.raises(ConfigError, match="needs a GPU"):
        schema.composed(["trainer.precision=fp16", "trainer.cpu=true"])
    with pytest.raises(ConfigError, match=r"Did you mean 'bf16'"):
        schema.composed(["trainer.precision=bf61"])

    trainer, delta_model = trainer_for(tmp_path, {"delta_type": "lora"}, precision="bf16")
    layer = delta_model.attachments[0].layer
    seen: list[torch.dtype] = []
    handle = layer.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    trainer.train_from(None)
    handle.remove()
    assert set(seen) == {torch.bfloat16}
    assert {p.dtype for p in delta_model.trainable_parameters().values()} == {torch.float32}
    assert {p.grad.dtype for p in delta_model.trainable_parameters().values() if p.grad is not None} <= {torch.float32}
    trainer.unwrap()
    model = delta_model.backbone_model.eval()
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(4)])
    with torch.no_grad():
        logits = model(**batch).logits
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model(**batch).logits
    assert not torch.equal(logits, mixed)
    assert "forward" not in model.__dict__
