"""The config of a run: nested dicts in, a checked dataclass out."""

import pytest

from deltaexp.errors import ConfigError
from deltaexp.lab import config as lab_config

GOOD = {
    "seed": 3,
    "backbone": {"name": "b", "source": "s"},
    "task": {"kind": "seq2seq", "data": "d", "inputs": ["x"], "target": "y"},
}


def test_defaults_fill_what_is_not_given() -> None:
    run = lab_config.from_dict(GOOD)
    assert run.trainer == lab_config.TrainerConfig()
    assert run.resolved_seeds() == {"init": 3, "data": 3, "dropout": 3}


@pytest.mark.parametrize(
    ("section", "values", "says"),
    [
        ("trainer", {"epoch": 1}, "Did you mean 'epochs'"),
        ("trainer", {"epochs": "1"}, "not a number"),
        ("trainer", {"cpu": 1}, "not true or false"),
        ("trainer", {"max_steps": 0}, "at least 1, or -1"),
        ("backbone", {"source": ""}, "backbone.source is empty"),
        ("task", {"kind": "seq2seq", "data": "", "inputs": ["x"], "target": "y"}, "task.data is empty"),
        ("task", {"kind": "seq2seq", "data": "d", "inputs": ["a", "b", "c"], "target": "y"}, "names 3 columns"),
    ],
)
def test_mistakes(section: str, values: dict, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        lab_config.from_dict({**GOOD, section: values})
    assert says in str(caught.value)
