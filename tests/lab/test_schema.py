"""Composition: every choice and experiment composes, every mistake is one sentence that helps."""

from pathlib import Path

import pytest

from deltaexp import registry
from deltaexp.errors import ConfigError
from deltaexp.lab import schema


@pytest.mark.slow
# Backbones and tasks are many, and are composed in test_backbones.py and tasks/test_shipped.py.
@pytest.mark.parametrize("group", sorted(set(schema.GROUPS) - {"backbone", "task"}))
def test_every_choice_composes_and_is_described(group: str) -> None:
    for choice, line in schema.choices(group).items():
        _, delta = schema.composed([f"{group}={choice}"])
        assert line.endswith((".", ")")), f"{group}={choice} has no line for --help"
        assert delta.delta_type in registry.known()


def test_every_delta_type_has_a_choice() -> None:
    assert sorted(schema.choices("delta_type")) == registry.known()


def test_keys_of_delta_and_run_are_parted() -> None:
    run, delta = schema.composed(["delta_type=lora", "lora_r=4", "seed=7", "seeds.data=1", "modified_modules=[q,v]"])
    assert (delta.lora_r, delta.modified_modules) == (4, ["q", "v"])
    assert run.resolved_seeds() == {"init": 7, "data": 1, "dropout": 7}


def test_a_choice_of_trainer_wins_over_what_the_task_sets() -> None:
    assert schema.composed(["trainer=smoke"])[0].trainer.max_steps == 3
    assert schema.composed(["trainer=smoke", "trainer.max_steps=5"])[0].trainer.max_steps == 5


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["lora_rank=4"], "Did you mean 'lora_r'"),
        (["+lora_rank=4"], "Did you mean 'lora_r'"),
        (["++lora_rank=4"], "Did you mean 'lora_r'"),
        (["+lora_r=4"], "write lora_r=VALUE"),
        (["~lora_r"], "fixed keys"),
        (["delta_type=lroa"], "Did you mean 'lora'"),
        (["backbone=tiny-t5"], "Did you mean 'tiny_t5'"),
        (["task=date"], "Did you mean 'dates'"),
        (["experiment=nothing"], "There is no experiment 'nothing'"),
        (["delta_type=adapter", "lora_r=4"], "belongs to delta_type=lora"),
        (["lora_r=four"], "lora_r"),
        (["lora_r=0"], "must be at least 1"),
        (["lora_r=2.5"], "lora_r"),
        (["lora_dropout=1"], "must be less than 1"),
        (["delta_type=adapter", "non_linearity=rleu"], "Did you mean 'relu'"),
        (["modified_modules=[]"], "empty list"),
        (["trainer.learning_rat=1"], "Did you mean 'learning_rate'"),
        (["learning_rate=1"], "Did you mean 'trainer.learning_rate'"),
        (["trainer.learning_rate=-1"], "greater than 0"),
        (["trainer.batch_size=0"], "at least 1"),
        (["trainer.warmup_ratio=1"], "less than 1"),
        (["trainer.lr_scheduler=cosin"], "Did you mean 'cosine'"),
        (["backbone.dtype=float23"], "Did you mean 'float32'"),
        (["backbone=local"], "backbone.source is empty"),
        (["hub.push=true"], "needs hub.repo_id"),
        (["tracker.mode=offlin"], "Did you mean 'offline'"),
        (["seed=-1"], "negative"),
        (["a b=1"], "is no override"),
        (["task.labels=[one]", "task.kind=classification"], "at least two, in the order"),
    ],
)
def test_mistakes(overrides: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match="(?s).") as caught:
        schema.composed(overrides)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_experiment_may_choose_the_delta_type_and_lie_in_a_folder_of_the_user(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\n# Mine.\ndefaults:\n  - override /delta_type: adapter\n  - _self_\n"
    )
    _, delta = schema.composed(["experiment=mine", "bottleneck_dim=3"], [str(tmp_path)])
    assert (delta.delta_type, delta.bottleneck_dim) == ("adapter", 3)
    with pytest.raises(ConfigError, match="lora_r"):
        schema.composed(["experiment=mine", "lora_r=3"], [str(tmp_path)])
    with pytest.raises(ConfigError, match="There is no experiment 'mine'"):
        schema.composed(["experiment=mine"])


def test_the_default_delta_type_is_the_one_of_the_root_config() -> None:
    assert schema.composed([])[1].delta_type == schema.DEFAULT_DELTA_TYPE
