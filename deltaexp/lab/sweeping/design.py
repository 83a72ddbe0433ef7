"""What a search consists of: studies, the trials of each being runs of one config but for what is searched."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.types import Override

from deltaexp import registry
from deltaexp.errors import ConfigError, listing
from deltaexp.lab import recovery, schema
from deltaexp.lab.sweeping import grid, space
from deltaexp.lab.sweeping.job import Job
from deltaexp.lab.sweeping.study import needed

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

OF_TRIALS = ("task.test_split=null", "trainer.evaluate_before=false", "hub.push=false")
"""What a trial does without: the test split, the backbone as it is, and the Hub. The final runs have what was asked for."""


@dataclass(frozen=True)
class Planned:
    """A study before it is opened."""

    label: str
    """What tells it from the others."""
    words: tuple[str, ...]
    """The overrides that all of its runs share."""
    base: Job
    """The trial that the config describes without a search."""
    space: Mapping[str, BaseDistribution]
    first: Mapping[str, Any] | None
    """What the config says of the searched keys, None where that lies outside of what is searched."""


def plan(asked: grid.Asked, per: Sequence[str], search_path: Sequence[str] = ()) -> tuple[list[Planned], list[str]]:
    """Return the studies of a search, one for each combination of the values of ``per``, and what there is to say of them.

    Raises:
        ConfigError: If one of them cannot be searched.
    """
    needed()
    grid.root_of.cache_clear()
    given = asked.given.values()
    split = [o for o in given if o.key_or_group in per and o.is_discrete_sweep()]
    rest = [o for o in given if o not in split]
    seeds = [o.key_or_group for o in rest if o.is_sweep_override() and o.key_or_group.split(".")[0] in ("seed", "seeds")]
    if seeds:
        raise ConfigError(
            f"A search over {seeds[0]} would choose the luckiest seed. Search with one, and measure what was chosen with "
            "several: hydra.sweeper.final_seeds=[1,2,3]."
        )
    found, notes = [], []
    types: dict[str, str] = {}
    for values in itertools.product(*map(grid.each_value, split)):
        chosen = [word for word in values if word.split("=", 1)[0] in schema.GROUPS]
        fixed_groups = [grid.each_value(o)[0] for o in rest if o.key_or_group in schema.GROUPS and not o.is_sweep_override()]
        choices = (*chosen, *fixed_groups)
        schema.check_keys(schema.parse(choices), search_path)
        delta_type = str(grid.root_of(choices, tuple(search_path)).delta_type)
        own = [o for o in rest if o.key_or_group in schema.GROUPS or schema.owns(delta_type, o.key_or_group)]
        fixed = [grid.each_value(o)[0] for o in own if not o.is_sweep_override()]
        searched = [o for o in own if o.is_sweep_override()]
        words = (*values, *fixed)
        grid.job(words, search_path)  # what the final runs will be is checked, too
        base = grid.job([*words, *OF_TRIALS], search_path)
        says = {**_flat(recovery.describe(base.run, base.delta)), **_groups(base)}
        distributions = {o.key_or_group: space.distribution(o, says.get(o.key_or_group)) for o in searched}
        label = " ".join(word.split("=", 1)[1] for word in values) or delta_type
        types[label] = delta_type
        if not distributions:
            raise ConfigError(
                f"Nothing is searched for {label}: give values to search, such as 'trainer.learning_rate=tag(log,interval("
                "1e-4,1e-2))'."
            )
        found.append(Planned(label, words, base, distributions, space.default(distributions, says)))
    for override in rest:
        if override.key_or_group not in schema.GROUPS:
            optional = override.key_or_group in asked.optional
            schema.check_path(override.key_or_group, registry.known() if optional else list(dict.fromkeys(types.values())))
            having = [label for label, name in types.items() if schema.owns(name, override.key_or_group)]
            if len(having) < len(types):
                notes.append(
                    f"{override.key_or_group} goes to {listing(having) or 'none'}; the other delta types have no such key"
                )
    return found, notes


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in config.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return found


def _groups(job: Job) -> dict[str, str]:
    """Return the choices of groups that a job's own names tell."""
    return {"delta_type": job.delta.delta_type, "backbone": job.run.backbone.name, "task": job.run.task.name}


def name(planned: Sequence[Planned], given: Mapping[str, Override]) -> str:
    """Return a name for a search that depends on what it searches."""
    from optuna.distributions import distribution_to_json

    own, experiment = planned[0].base.run.sweep.name, given.get("experiment")
    begins = own or (str(experiment.value()) if experiment and not experiment.is_sweep_override() else "search")
    about = []
    for one in planned:
        spaces = {key: distribution_to_json(value) for key, value in one.space.items()}
        about.append([recovery.Record(recovery.describe(one.base.run, one.base.delta)).fingerprint, spaces])
    text = json.dumps(sorted(about, key=str), sort_keys=True)
    return f"{begins}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"
