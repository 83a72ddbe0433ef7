"""``plan KEY=VALUE ...``: what a run would train and take, before a weight is loaded.

  deltaexp plan delta_type=lora backbone=llama task=e2e_nlg     targets, parameters, memory and FLOPs of that run
  deltaexp plan ... length=40 target_length=12                  for rows of that many tokens, not the longest allowed
  deltaexp plan ... rows=67349                                  rows of the training split, for the number of steps
  deltaexp plan ... json=true                                   the same for programs

It takes every key of a run, and --config-dir FOLDER. Of the backbone only its config is read. Memory is that of PyTorch's
tensors at their peak, found by computing one step, forward, backward and optimizer, on tensors without values.
"""

from __future__ import annotations

from deltaexp.commands import searched, switch
from deltaexp.errors import ConfigError
from deltaexp.lazy import imports

USAGE = "plan KEY=VALUE ...    what a run would train, the memory and FLOPs it would take, before weights are loaded"
NUMBERS = ("length", "target_length", "rows")
OWN = ("json", *NUMBERS)


def main(words: list[str]) -> int:
    """Print the plan; every key of a run may be given."""
    from deltaexp.lab import schema

    options = dict(word.split("=", 1) for word in words if "=" in word and word.split("=", 1)[0] in OWN)
    as_json = bool(switch(options, "json"))
    numbers = {key: _number(key, options[key]) for key in NUMBERS if key in options}
    others, folders = searched([word for word in words if word.split("=", 1)[0] not in OWN])
    config, delta_config = schema.composed(others, folders)
    with imports():
        from deltaexp.lab import plan
        from deltaexp.lab.costs import Sizes

    found = plan.make(config, delta_config, Sizes(**numbers))
    if as_json:
        print(found.dump())
    else:
        plan.show(found)
    return 0


def _number(key: str, text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise ConfigError(f"{key} is {text!r}; it must be a whole number from 1.")
    return int(text)
