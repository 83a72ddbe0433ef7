"""What is searched, from Hydra's syntax to Optuna's distributions."""

from typing import Any

import pytest

pytest.importorskip("optuna", reason="needs the extra search")

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from deltaexp.errors import ConfigError
from deltaexp.lab import schema
from deltaexp.lab.sweeping import space


def one(text: str, value: Any = None) -> BaseDistribution:
    (override,) = schema.parse([text])
    return space.distribution(override, value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("trainer.learning_rate=interval(0.1,1)", FloatDistribution(0.1, 1.0)),
        ("trainer.learning_rate=tag(log,interval(1e-4,1e-2))", FloatDistribution(1e-4, 1e-2, log=True)),
        ("lora_r=interval(1,8)", IntDistribution(1, 8)),
        ("lora_r=tag(log,interval(1,64))", IntDistribution(1, 64, log=True)),
        ("lora_r=int(interval(1,8))", IntDistribution(1, 8)),
        ("lora_r=range(1,8)", IntDistribution(1, 7)),
        ("lora_r=range(1,8,3)", IntDistribution(1, 7, step=3)),
        ("lora_r=range(8,1,-3)", IntDistribution(2, 8, step=3)),
        ("trainer.warmup_ratio=range(0,0.3,0.1)", FloatDistribution(0.0, 0.2, step=0.1)),
        ("lora_r=2,4,8", CategoricalDistribution(["2", "4", "8"])),
        ("lora_r=choice(2,4,4)", CategoricalDistribution(["2", "4"])),
        ("modified_modules=[attn.q],[attn.q,attn.v]", CategoricalDistribution(["[attn.q]", "[attn.q,attn.v]"])),
        ("trainer=default,smoke", CategoricalDistribution(["default", "smoke"])),
    ],
)
def test_hydras_syntax(text: str, expected: BaseDistribution) -> None:
    assert one(text, {"lora_r": 8}.get(text.split("=")[0])) == expected


def test_a_relative_range_is_around_what_the_config_says() -> None:
    assert one("trainer.learning_rate=tag(log,relative,interval(0.1,10))", 2e-3) == FloatDistribution(2e-4, 2e-2, log=True)
    assert one("trainer.max_steps=tag(relative,interval(1,3))", 100) == IntDistribution(100, 300)


@pytest.mark.parametrize(
    ("text", "value", "message"),
    [
        ("trainer.learning_rate=tag(logarithm,interval(1e-4,1e-2))", None, "There is no tag of trainer.learning_rate"),
        ("trainer.learning_rate=interval(1,0.1)", None, "the first end has to be below the second"),
        ("trainer.learning_rate=tag(log,interval(0.0,0.1))", None, "cannot be searched"),
        ("lora_r=range(8,1)", None, "there is nothing in it"),
        ("lora_r=tag(log,range(1,8))", None, "a range has steps"),
        ("trainer.metric=tag(relative,interval(0.1,10))", "loss", "which is no size"),
    ],
)
def test_what_cannot_be_searched_is_told(text: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        one(text, value)


def test_values_become_overrides_that_hydra_reads_as_the_same_values() -> None:
    params = {"trainer.learning_rate": 1.2345678901234567e-05, "lora_r": 4, "modified_modules": "[attn.q,attn.v]"}
    read = {override.key_or_group: override.value() for override in schema.parse(space.words(params))}
    assert read == {"trainer.learning_rate": 1.2345678901234567e-05, "lora_r": 4, "modified_modules": ["attn.q", "attn.v"]}


def test_what_the_config_says_is_found_among_what_is_searched() -> None:
    searched = {
        "trainer.learning_rate": FloatDistribution(1e-4, 1e-2, log=True),
        "lora_r": CategoricalDistribution(["4", "8"]),
        "modified_modules": CategoricalDistribution(["[attn.q, 'attn.v']", "null"]),
        "trainer.label_smoothing": CategoricalDistribution(["0", "0.1"]),
    }
    says = {
        "trainer.learning_rate": 1e-3,
        "lora_r": 8,
        "modified_modules": ["attn.q", "attn.v"],
        "trainer.label_smoothing": 0.0,
    }
    assert space.default(searched, says) == {
        "trainer.learning_rate": 1e-3, "lora_r": "8", "modified_modules": "[attn.q, 'attn.v']", "trainer.label_smoothing": "0",
    }  # fmt: skip
    assert space.default(searched, {**says, "trainer.learning_rate": 1.0}) is None
    assert space.default(searched, {**says, "lora_r": 5}) is None
