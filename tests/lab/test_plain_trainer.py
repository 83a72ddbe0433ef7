"""A run's training against PEFT's LoRA under a plain Trainer: from the same values, by the same rows, to the same values."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from datasets import load_dataset
from lab import small
from peft_adapters import quiet
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, TrainingArguments

from deltaexp import AutoDeltaModel
from deltaexp.lab import backbones, schema, training
from deltaexp.lab.checkpoints import Checkpoints
from deltaexp.lab.samplers import EpochSampler
from deltaexp.lab.tasks import data as task_data
from deltaexp.lab.tasks.kinds import choose

STEPS, RATE, SEED = 10, 1e-2, 3


class OrderedTrainer(transformers.Trainer):
    """A plain Trainer with our order of rows."""

    def _get_train_sampler(self, *arguments: object) -> EpochSampler:
        return EpochSampler(super()._get_train_sampler(*arguments), self.args.data_seed, lambda: int(self.state.epoch or 0))


@quiet
def test_trains_as_a_plain_trainer_trains_pefts_lora(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    place, rows = small.bert(tmp_path / "backbone"), small.reviews(tmp_path / "data")
    settings = json.loads((place / "config.json").read_text())
    settings |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # its random stream is each library's own
    (place / "config.json").write_text(json.dumps(settings))

    words = ["delta_type=lora", "backbone=local", f"backbone.source={place}", "task=sst2", f"task.data={rows}", f"seed={SEED}"]
    words += [f"trainer.learning_rate={RATE}", f"trainer.max_steps={STEPS}", "trainer.batch_size=8", "trainer.log_every=1"]
    words += ["trainer.cpu=true", "trainer.progress=false", "trainer.weight_decay=0.1", "trainer.save_every=0"]
    config, delta_config = schema.composed(words)
    data = task_data.load(config.task, choose(config.task, backbones.settings_of(config.backbone), "small"), progress=False)
    backbone = backbones.load(config.backbone, config.task)
    delta_model = AutoDeltaModel.from_config(delta_config, backbone_model=backbone.model)
    delta_model.freeze_module(exclude=["deltas", *backbone.new])
    kind = backbone.kind(config.task, backbone.processor, backbone.model.config, 0)
    seeds = config.resolved_seeds()
    ours = training.build(config.trainer, delta_model, kind, kind.splits(data), Checkpoints(tmp_path / "a", 0), seeds, [])
    begin = {name: value.detach().clone() for name, value in backbone.model.named_parameters() if value.requires_grad}
    ours.train_from(None)
    end = {name: value.detach() for name, value in backbone.model.named_parameters() if value.requires_grad}

    model = AutoModelForSequenceClassification.from_pretrained(place, num_labels=2)
    lora = peft.LoraConfig(
        task_type="SEQ_CLS", r=delta_config.lora_r, lora_alpha=delta_config.lora_alpha, target_modules=["query", "value"]
    )
    model = peft.get_peft_model(model, lora)
    theirs = {
        name.removeprefix("base_model.model.")
        .replace("modules_to_save.default.", "")
        .replace(".default.weight", "")
        .replace("lora_", "lora.lora_"): value
        for name, value in model.named_parameters()
        if value.requires_grad
    }
    assert theirs.keys() == begin.keys()
    with torch.no_grad():
        for name, value in begin.items():
            theirs[name].copy_(value)
    tokenizer = AutoTokenizer.from_pretrained(place)
    table = load_dataset(str(rows), split="train")
    table = table.map(lambda row: {**tokenizer(row["sentence"]), "labels": row["label"]}, remove_columns=table.column_names)
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "b"), max_steps=STEPS, per_device_train_batch_size=8, learning_rate=RATE, weight_decay=0.1,
        lr_scheduler_type="linear", warmup_steps=max(1, round(0.06 * STEPS)), use_cpu=True, seed=SEED, data_seed=SEED,
        save_strategy="no", report_to="none", disable_tqdm=True, dataloader_pin_memory=False, logging_steps=1,
    )  # fmt: skip
    plain = OrderedTrainer(model, arguments, DataCollatorWithPadding(tokenizer), table)
    plain.train()

    logs = [[entry for entry in trainer.state.log_history if "grad_norm" in entry] for trainer in (ours, plain)]
    assert len(logs[0]) == len(logs[1]) == STEPS
    for mine, other in zip(*logs, strict=True):
        assert mine["learning_rate"] == pytest.approx(other["learning_rate"])
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
    assert logs[0][-1]["loss"] < 0.9 * logs[0][0]["loss"]
    for name, value in end.items():
        torch.testing.assert_close(value, theirs[name].detach(), rtol=1e-3, atol=1e-4)
        assert not torch.equal(value, begin[name])
