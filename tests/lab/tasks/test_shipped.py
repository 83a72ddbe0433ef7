"""The shipped tasks: each composes, and its rows, as the Hub has them, become the columns, labels and prompts of its kind."""

import pytest
from models import slow_but
from omegaconf import OmegaConf

from deltaexp.lab import schema, taskconfig
from deltaexp.lab.taskconfig import TaskConfig

GLUE = ["cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli"]
SUPERGLUE = ["boolq", "cb", "copa", "multirc", "record", "rte", "wic", "wsc"]
OTHERS = [
    "trec", "imdb", "ag_news", "e2e_nlg", "xsum", "samsum", "wmt16_en_ro", "squad", "wikitext", "alpaca", "gsm8k", "conll2003",
    "wnut_17", "beans", "cifar10", "digits", "dates",
]  # fmt: skip
CHOICES = sorted(schema.choices("task"))


def described(choice: str) -> TaskConfig:
    """Return a task as its file says, without all of the other groups."""
    values = OmegaConf.load(schema.config_dir() / "task" / f"{choice}.yaml")["task"]
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(TaskConfig), values))
    assert isinstance(config, TaskConfig)
    return config


def test_all_are_there() -> None:
    assert set(CHOICES) >= {*GLUE, *SUPERGLUE, *OTHERS}


@pytest.mark.parametrize("choice", CHOICES)
def test_a_choice_is_right_in_itself(choice: str) -> None:
    task = described(choice)
    taskconfig.check(task)
    assert task.name == choice
    assert task.data.startswith("generated:") or (task.data.count("/") == 1 and task.dataset == task.data)
    assert task.language or task.kind == "image_classification"
    assert schema.choices("task")[choice].endswith("."), "it has no line for --help"


@pytest.mark.parametrize("choice", slow_but(CHOICES, ["dates", "sst2", "multirc", "wmt16_en_ro"]))
def test_a_choice_composes(choice: str) -> None:
    assert schema.composed([f"task={choice}"])[0].task == described(choice)
