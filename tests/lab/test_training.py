"""What a delta's type may ask of the training: learning rates of its own, a term in the loss, and a word after each step."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import FAMILIES, attach
from transformers import Trainer, TrainerCallback

from deltaexp import AutoDeltaConfig, AutoDeltaModel, registry
from deltaexp.errors import ConfigError, RunError
from deltaexp.lab import arguments, backbones, schema, training
from deltaexp.lab.checkpoints import Checkpoints
from deltaexp.lab.config import BackboneConfig, TrainerConfig
from deltaexp.lab.hyperparameters import SCHEDULES
from deltaexp.lab.recovery import Record, describe
from deltaexp.lab.taskconfig import TaskConfig
from deltaexp.lab.tasks import data as task_data
from deltaexp.model import DeltaModel

Make = Callable[..., tuple[training.DeltaTrainer, DeltaModel]]


@pytest.fixture
def trainer_for(tmp_path: Path, small_bert: Path, small_reviews: Path) -> Make:
    """Make a trainer for a small classifier, with a delta."""

    def make(delta: dict, **trainer: object) -> tuple[training.DeltaTrainer, DeltaModel]:
        task = TaskConfig(
            name="reviews", kind="classification", data=str(small_reviews), inputs=["sentence"], target="label",
            labels=["bad", "good"],
        )  # fmt: skip
        torch.manual_seed(0)
        backbone = backbones.load(BackboneConfig(name="small", source=str(small_bert)), task)
        delta_model = AutoDeltaModel.from_config(AutoDeltaConfig.from_dict(delta), backbone_model=backbone.model)
        delta_model.freeze_module(exclude=["deltas", *backbone.new])
        kind = backbone.kind(task, backbone.processor, backbone.model.config)
        splits = kind.splits(task_data.load(task, backbone.kind, progress=False))
        settings = {"max_steps": 4, "batch_size": 8, "progress": False, "cpu": True, "learning_rate": 1e-3}
        config = TrainerConfig(**{**settings, "lr_scheduler": "constant", **trainer})
        seeds = {"init": 1, "data": 1, "dropout": 1}
        return training.build(config, delta_model, kind, splits, Checkpoints(tmp_path / "checkpoints"), seeds, []), delta_model

    return make


def test_learning_rates_of_lora_plus(trainer_for: Make) -> None:
    keys = {"delta_type": "lora", "lora_plus_ratio": 16.0}
    trainer, delta_model = trainer_for(keys, learning_rate=1e-3, weight_decay=0.1)
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
    trainer_for: Make, monkeypatch: pytest.MonkeyPatch, accumulation: int
) -> None:
    trainer, delta_model = trainer_for({"delta_type": "adalora"}, gradient_accumulation_steps=accumulation)
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


def test_parameters_without_a_gradient_are_named(trainer_for: Make) -> None:
    trainer, delta_model = trainer_for({"delta_type": "lora"})
    layer = torch.nn.Linear(2, 2)  # which nothing calls
    delta_model.backbone_model.bert.add_module("idle", layer)
    with pytest.warns(UserWarning, match=r"2 trainable parameters have no gradient \(bert\.idle\.weight, bert\.idle\.bias\)"):
        trainer.train()


@pytest.mark.slow
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


def test_half_precision(trainer_for: Make) -> None:
    settings = TrainerConfig(cpu=True)
    assert arguments.precision(settings) == "fp32"
    with pytest.raises(ConfigError, match=r"trainer\.precision=fp16 needs a GPU"):
        arguments.precision(TrainerConfig(cpu=True, precision="fp16"))
    with pytest.raises(ConfigError, match="needs a GPU"):
        schema.composed(["trainer.precision=fp16", "trainer.cpu=true"])
    with pytest.raises(ConfigError, match=r"Did you mean 'bf16'"):
        schema.composed(["trainer.precision=bf61"])

    trainer, delta_model = trainer_for({"delta_type": "lora"}, precision="bf16")
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


RATES = {
    # After how many of 20 steps, the first two of which are the warm-up, which part of the largest rate.
    "linear": ({}, {2: 1.0, 11: 0.5, 20: 0.0}),
    "cosine": ({}, {2: 1.0, 11: 0.5, 20: 0.0}),
    "cosine_with_restarts": ({"num_cycles": 2}, {2: 1.0, 6: 0.587, 11: 1.0, 20: 0.0}),
    "cosine_with_min_lr": ({"min_lr_rate": 0.1}, {2: 1.0, 11: 0.55, 20: 0.1}),
    "cosine_warmup_with_min_lr": ({"min_lr": 1e-4}, {2: 1.0, 20: 0.1}),
    "polynomial": ({"power": 2.0, "lr_end": 1e-5}, {2: 1.0, 11: 0.2575, 20: 0.01}),
    "inverse_sqrt": ({"timescale": 4}, {2: 1.0, 14: 0.5}),
    "warmup_stable_decay": ({}, {2: 1.0, 16: 1.0, 18: 0.5, 20: 0.0}),
    "constant": ({}, {0: 1.0, 20: 1.0}),
    "constant_with_warmup": ({}, {0: 0.0, 1: 0.5, 2: 1.0, 20: 1.0}),
}


def test_schedules(trainer_for: Make) -> None:
    assert set(RATES) == set(SCHEDULES)
    for name, (options, parts) in RATES.items():
        keys = {"lr_scheduler": name, "scheduler_options": options, "warmup_steps": None if name == "constant" else 2}
        trainer, _ = trainer_for({"delta_type": "lora"}, max_steps=20, learning_rates={"classifier": 2e-3}, **keys)
        trainer.create_optimizer_and_scheduler(20)
        rates = []
        for _ in range(21):
            rates.append(trainer.lr_scheduler.get_last_lr())
            trainer.optimizer.step()
            trainer.lr_scheduler.step()
        assert {step: rates[step][0] / 1e-3 for step in parts} == pytest.approx(parts, abs=1e-2), name
        assert rates[2][-1] == pytest.approx(2e-3, rel=1e-2), name  # each group has a largest rate of its own


def test_warm_up_by_steps(trainer_for: Make) -> None:
    trainer, _ = trainer_for({"delta_type": "lora"}, max_steps=10, warmup_steps=7, lr_scheduler="linear")
    assert trainer.args.warmup_steps == 7
    with pytest.raises(ConfigError, match="the training has 8 steps"):
        trainer_for({"delta_type": "lora"}, max_steps=-1, epochs=1, warmup_steps=8, lr_scheduler="linear")


@pytest.mark.parametrize(
    ("optimizer", "kind"),
    [("adamw", "AdamW"), ("adamw_fused", "AdamW"), ("adafactor", "Adafactor"), ("sgd", "SGD"), ("adamw_8bit", "AdamW")],
)
def test_optimizers(trainer_for: Make, optimizer: str, kind: str) -> None:
    if "8bit" in optimizer:
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    keys = {"adam_beta1": 0.8, "adam_beta2": 0.98, "adam_epsilon": 1e-6, "momentum": 0.7, "weight_decay": 0.1}
    trainer, delta_model = trainer_for({"delta_type": "lora"}, optimizer=optimizer, max_steps=2, **keys)
    before = {name: p.detach().clone() for name, p in delta_model.trainable_parameters().items()}
    trainer.train_from(None)
    inner = trainer.optimizer.optimizer
    assert type(inner).__name__ == kind
    assert [group["weight_decay"] for group in inner.param_groups] == [0.1, 0.0]
    if kind == "AdamW":
        assert {tuple(group["betas"]) for group in inner.param_groups} == {(0.8, 0.98)}
        assert {group["eps"] for group in inner.param_groups} == {1e-6}
    elif kind == "SGD":
        assert {group["momentum"] for group in inner.param_groups} == {0.7}
    after = delta_model.trainable_parameters()
    assert all(not torch.equal(before[name], after[name]) for name in before)


def test_label_smoothing_counts_while_training_only(trainer_for: Make) -> None:
    trainer, delta_model = trainer_for({"delta_type": "lora"}, label_smoothing=0.3)
    model = delta_model.backbone_model
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(4)])
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    logits, labels = model(**batch).logits, batch["labels"]
    smooth = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.3)
    torch.testing.assert_close(trainer.compute_loss(model.train(), dict(batch)), smooth)
    torch.testing.assert_close(
        trainer.compute_loss(model.eval(), dict(batch)), torch.nn.functional.cross_entropy(logits, labels)
    )


SOFT = {"soft_prompt": {"soft_token_num": 3}}


@pytest.mark.parametrize("family", ["bert", "t5", "gpt2", "llama"])
@pytest.mark.parametrize("delta_type", [name for name in registry.known() if name != "none"])
def test_gradients_are_the_same_with_checkpoints_of_activations(delta_type: str, family: str) -> None:
    delta_model = attach(FAMILIES[family].build(), delta_type, **SOFT.get(delta_type, {}))
    model, inputs = delta_model.backbone_model.train(), FAMILIES[family].inputs()
    block = next(module for name, module in model.named_modules() if name.endswith(("layer.0", "block.0", "h.0", "layers.0")))
    calls: list[int] = []
    inside = next(module for module in block.modules() if getattr(module, "weight", torch.ones(1)).dim() == 2)
    inside.register_forward_pre_hook(lambda *_: calls.append(1))

    def gradients() -> dict[str, torch.Tensor | None]:
        calls.clear()
        torch.manual_seed(3)  # dropout is on
        model.zero_grad(set_to_none=True)
        loss, term = model(**inputs).loss, delta_model.penalty()
        (loss if term is None else loss + term).backward()
        return {name: p.grad for name, p in delta_model.trainable_parameters().items()}

    plain, once = gradients(), len(calls)
    options = arguments.checkpointing(TrainerConfig(gradient_checkpointing=True), model)
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable(next(value for key, value in options.items() if key.endswith("kwargs")))
    again = gradients()
    assert len(calls) == 2 * once
    assert plain.keys() == again.keys()
    for name, gradient in plain.items():
        assert gradient is not None, name
        assert torch.equal(gradient, again[name]), name


def test_checkpoints_of_activations_while_training(trainer_for: Make) -> None:
    trained = []
    for on in (False, True):
        trainer, delta_model = trainer_for({"delta_type": "lora"}, gradient_checkpointing=on)
        trainer.train_from(None)
        trained.append({name: p.detach().clone() for name, p in delta_model.trainable_parameters().items()})
        flags = {getattr(module, "gradient_checkpointing", False) for module in delta_model.backbone_model.modules()}
        assert (True in flags) == on
        trainer.unwrap()
        assert not any(getattr(module, "gradient_checkpointing", False) for module in delta_model.backbone_model.modules())
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])
    delta_model.backbone_model.supports_gradient_checkpointing = False
    with pytest.raises(ConfigError, match="BertForSequenceClassification has no checkpointing"):
        arguments.checkpointing(TrainerConfig(gradient_checkpointing=True), delta_model.backbone_model)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's compiler uses what PyTorch deprecates
def test_compiled(trainer_for: Make) -> None:
    if not any(map(shutil.which, arguments.COMPILERS)):
        pytest.skip("there is no C++ compiler")
    trained = []
    for on in (False, True):
        torch._dynamo.utils.counters.clear()
        trainer, delta_model = trainer_for({"delta_type": "lora"}, compile=on)
        for module in delta_model.backbone_model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        trainer.train_from(None)
        assert bool(torch._dynamo.utils.counters["stats"]["unique_graphs"]) == on
        trained.append({name: p.detach().clone() for name, p in delta_model.trainable_parameters().items()})
    for name, value in trained[0].items():
        torch.testing.assert_close(trained[1][name], value, rtol=1e-3, atol=1e-4)


def test_a_compiler_is_asked_for(trainer_for: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ConfigError, match=r"needs a C\+\+ compiler"):
        trainer_for({"delta_type": "lora"}, compile=True)


def test_training_that_diverges_is_stopped(trainer_for: Make) -> None:
    keys = {"max_steps": 8, "log_every": 1, "save_every": 1, "learning_rate": 1e-3}
    trainer, delta_model = trainer_for({"delta_type": "lora"}, **keys)
    layer = delta_model.attachments[0].layer

    class Break(TrainerCallback):
        def on_step_begin(self, args: object, state: object, control: object, **_: object) -> None:
            if state.global_step == 3:
                with torch.no_grad():
                    layer.lora_B.fill_(math.inf)

    trainer.checkpoints.every = 1
    trainer.add_callback(Break())
    with pytest.raises(RunError, match=r"diverged: after step 4 the loss is (nan|inf); after step 3 it was .*checkpoint-3'"):
        trainer.train_from(None)
    assert [path.name for path in trainer.checkpoints.folder.iterdir()] == ["checkpoint-3"]


def test_what_is_no_number_is_never_kept(trainer_for: Make) -> None:
    trainer, delta_model = trainer_for({"delta_type": "lora"}, max_steps=2, log_every=100)
    trainer.train_from(None)
    with torch.no_grad():
        next(iter(delta_model.trainable_parameters().values()))[0] = math.nan
    with pytest.raises(RunError, match=r"not all numbers in .*lora_A are finite"):
        trainer._save_checkpoint(trainer.model, None)


def test_the_best_by_another_metric(trainer_for: Make) -> None:
    keys = {"restore_best": True, "eval_every": 1, "max_steps": 5, "learning_rate": 0.05, "log_every": 1}
    trainer, _ = trainer_for({"delta_type": "lora"}, **keys, metric="loss")
    assert (trainer.args.metric_for_best_model, trainer.args.greater_is_better) == ("loss", False)
    trainer.train_from(None)
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    assert len(losses) == 5  # all steps are trained
    best = min(losses, key=lambda step: losses[step])
    assert trainer.state.best_global_step == best
    measured = training.evaluate(trainer, trainer.splits["validation"])
    assert measured["loss"] == pytest.approx(losses[best], abs=1e-6)

    trainer, _ = trainer_for({"delta_type": "lora"}, restore_best=True)
    assert (trainer.args.metric_for_best_model, trainer.args.greater_is_better) == ("accuracy", True)
    trainer, _ = trainer_for({"delta_type": "lora"}, restore_best=True, metric="acuracy")
    with pytest.raises(ConfigError, match=r"no trainer\.metric 'acuracy'\. Did you mean 'accuracy'"):
        training.evaluate(trainer, trainer.splits["validation"])  # before training


def test_early_stopping_waits_for_a_real_improvement(trainer_for: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(transformers.trainer_callback.logger, "warning", said.append)
    keys = {"eval_every": 1, "max_steps": 9, "metric": "loss", "early_stopping_patience": 2}
    trainer, _ = trainer_for({"delta_type": "lora"}, **keys, early_stopping_min_delta=1e6)
    trainer.train_from(None)
    assert trainer.state.global_step == 3
    training.evaluate(trainer, trainer.splits["validation"])
    assert not said  # such as that it were disabled


@pytest.mark.parametrize("delta_type", ["lora", "none"])
def test_operations_are_those_that_transformers_counts(delta_type: str, trainer_for: Make) -> None:
    trainer, _ = trainer_for({"delta_type": delta_type})
    for columns in (3, 7):
        inputs = {"input_ids": torch.ones(2, columns)}
        assert trainer.floating_point_ops(inputs) == Trainer.floating_point_ops(trainer, inputs) > 0
    assert trainer.floating_point_ops({}) == 0


def test_no_part_of_a_backbone_keeps_keys_and_values_unless_asked() -> None:
    model = FAMILIES["t5"].build()
    arguments.without_cache(model)
    batch = FAMILIES["t5"].inputs()
    assert model(**batch).past_key_values is None
    settings: Any = {"max_new_tokens": 3, "return_dict_in_generate": True, "eos_token_id": None}
    generated = model.generate(batch["input_ids"], **settings)
    assert generated.past_key_values is not None
    assert torch.equal(generated.sequences, FAMILIES["t5"].build().generate(batch["input_ids"], **settings).sequences)
