"""From what is typed, or written into an experiment, to the jobs of a sweep, all of them checked before the first begins.

Hydra's own sweeper puts every key into every job, and its composition refuses a key that the delta type of a job does not
have. Here a key goes only to the jobs whose type has it; only one that no swept type has is refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import shlex
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from deltaexp import registry
from deltaexp.errors import ConfigError, listing
from deltaexp.lab import recovery, schema
from deltaexp.lab.sweeping.job import Job

SWEEPER = "hydra_plugins.deltaexp_sweeping.DeltaSweeper"
PARAMS = "hydra.sweeper.params"
"""Where Hydra's sweepers look for keys with their values: an experiment's, and here what is typed, too."""
PLACEHOLDER = "{sweep}"
"""What stands for a sweep's name in ``hydra.sweep.dir``."""
WHOLE = ("retry", "fail_fast", "sweep", "resume")
"""Keys that are about the sweep as a whole."""
DEFAULTS = ("task.save_predictions=true",)
"""What is other in a sweep than in a run on its own: the report compares runs row by row."""


@dataclass(frozen=True)
class Plan:
    """The jobs of a sweep."""

    jobs: tuple[Job, ...]
    notes: tuple[str, ...]
    """Sentences on what a user might not expect."""
    name: str
    """The name of its folder: the same for the same jobs."""
    command: str
    """The command that makes and continues it."""
    words: tuple[str, ...]
    """The overrides of that command."""


def words_for_hydra(overrides: Sequence[str]) -> list[str]:
    """Return a sweep's overrides as Hydra's sweepers want them: what is no choice from a group is put under ``params``.

    So Hydra does not try to put a key into its config that the delta types of some jobs only have.

    Raises:
        ConfigError: If one is malformed.
    """
    of_hydra, groups, params = [], [], {}
    for override in schema.parse(overrides):
        line = override.input_line or ""
        if override.key_or_group == "hydra.sweep.subdir":
            raise ConfigError(
                "hydra.sweep.subdir cannot be chosen: a job's folder is named by what it trains, so that it is found again. "
                "hydra.sweep.dir is the folder of the sweep."
            )
        if override.is_hydra_override():
            of_hydra.append(line)
        elif override.key_or_group in schema.GROUPS and not override.is_sweep_override():
            groups.append(line)
        else:
            _check_plain(override)
            params[override.key_or_group] = line.split("=", 1)[1]
    if params:
        of_hydra.append(f"++{PARAMS}={{{','.join(f'{key}:{_in_quotes(value)}' for key, value in params.items())}}}")
    return [*of_hydra, *groups]


def _check_plain(override: Override) -> None:
    if override.is_delete() or override.is_add() or (override.is_force_add() and override.key_or_group in schema.GROUPS):
        key = override.key_or_group
        raise ConfigError(f"{override.input_line!r}: the config has fixed keys; write {key}=VALUE to set one.")


def _in_quotes(value: str) -> str:
    """Return a text as a value of Hydra's grammar, in quotes."""
    return "'" + value.replace("\\'", "\\\\'").replace("'", "\\'") + "'"


@functools.lru_cache(maxsize=1)  # the command line plans before Hydra's sweeper does, and composing takes time
def plan(words: tuple[str, ...], search_path: tuple[str, ...] = ()) -> Plan | None:
    """Return the jobs of a sweep, without importing torch.

    Args:
        words: What `words_for_hydra` returned.
        search_path: Folders of configs, beside ``conf/``.

    Returns:
        The plan; None where another sweeper than deltaexp's is chosen, which decides by itself what to run.

    Raises:
        ConfigError: If one of the jobs cannot be composed; the message says which.
    """
    root_of.cache_clear()  # files may have changed since
    schema.register_schemas(search_path)
    parsed = schema.parse(words)
    groups = [override for override in parsed if not override.is_hydra_override()]
    schema.check_keys(groups, search_path)
    schema.check_plugins(parsed)
    root = schema.compose_root(words, search_path, return_hydra_config=True)
    if root.hydra.sweeper.get("_target_") != SWEEPER:
        return None
    asked = asked_for(words, root)
    jobs, notes = _jobs(list(asked.given.values()), search_path, asked.optional)
    return Plan(tuple(jobs), tuple(notes), _name(jobs, asked.given), as_typed(asked.words, search_path), asked.words)


def listed(plan: Plan | None) -> str:
    """Return the jobs of a sweep as lines to read, each with the overrides that make it.

    Raises:
        ConfigError: If another sweeper is chosen, which decides on its jobs as it goes.
    """
    if plan is None:
        raise ConfigError("What a search tries depends on what it finds: there is no list of its jobs beforehand.")
    lines = [f"{job.folder}: {' '.join(job.words)}" for job in plan.jobs]
    return "\n".join([f"{len(lines)} jobs in {PLACEHOLDER} = {plan.name}, of: {plan.command}", *lines, *plan.notes])


class Asked(NamedTuple):
    """What is asked of a sweeper."""

    given: dict[str, Override]
    """All overrides by key, those of an experiment included."""
    optional: frozenset[str]
    """Keys that only the experiment sets; typed delta types need not have them."""
    words: tuple[str, ...]
    """The overrides of the command that makes the sweep, and continues it."""


def asked_for(words: Sequence[str], root: DictConfig) -> Asked:
    """Return what is asked of a sweeper.

    Args:
        words: What `words_for_hydra` returned.
        root: The root config that Hydra composes of them, with Hydra's own.
    """
    parsed = schema.parse(words)
    params: Any = OmegaConf.to_container(root.hydra.sweeper.get("params") or OmegaConf.create(), resolve=False)
    typed: Any = next((override.value() for override in parsed if override.key_or_group == PARAMS), {})
    # As with Hydra's sweeper, what is typed comes on top of what an experiment says.
    groups = [override for override in parsed if not override.is_hydra_override()]
    given = {**_by_key(schema.parse([f"{key}={value}" for key, value in params.items()])), **_by_key(groups)}
    own = [override.input_line or "" for override in parsed if override.key_or_group != PARAMS]
    return Asked(given, frozenset(params.keys() - typed.keys()), (*own, *(f"{key}={value}" for key, value in typed.items())))


def _by_key(overrides: Iterable[Override]) -> dict[str, Override]:
    return {override.key_or_group: override for override in overrides}


def as_typed(words: Sequence[str], search_path: Sequence[str]) -> str:
    """Return the command of a sweep, as it could be typed."""
    folders = [word for folder in search_path for word in ("--config-dir", folder)]
    return shlex.join(["python", "-m", "deltaexp", "-m", *folders, *words])


def _jobs(given: Sequence[Override], search_path: Sequence[str], optional: Collection[str] = ()) -> tuple[list[Job], list[str]]:
    """Return a job for every combination of values, and what there is to say about them.

    Args:
        given: The overrides.
        search_path: Folders of configs, beside ``conf/``.
        optional: Keys that no swept type needs to have, because an experiment set them for types that were not typed.
    """
    groups = [override for override in given if override.key_or_group in schema.GROUPS]
    settings = [override for override in given if override.key_or_group not in schema.GROUPS]
    for override in settings:
        key = override.key_or_group
        if override.is_sweep_override() and key.partition(".")[0] in WHOLE:
            raise ConfigError(f"{key} is about the sweep as a whole, and takes one value.")
    combinations = list(itertools.product(*map(each_value, groups)))
    several = len(combinations) > 1 or any(override.is_sweep_override() for override in settings)
    roots: list[tuple[tuple[str, ...], DictConfig]] = []
    for choices in combinations:
        with _said_of(choices, several):
            schema.check_keys(schema.parse(choices), search_path)
            roots.append((choices, root_of(tuple(choices), tuple(search_path))))
    types = list(dict.fromkeys(str(root.delta_type) for _, root in roots))
    notes = []
    for override in settings:
        schema.check_path(override.key_or_group, registry.known() if override.key_or_group in optional else types)
        having = [name for name in types if schema.owns(name, override.key_or_group)]
        if len(having) < len(types):
            notes.append(f"{override.key_or_group} goes to {listing(having) or 'none'}; the other delta types have no such key")
    jobs = []
    for choices, root in roots:
        own = [override for override in settings if schema.owns(str(root.delta_type), override.key_or_group)]
        for values in itertools.product(*map(each_value, own)):
            with _said_of((*choices, *values), several):
                jobs.append(_job(root, choices, values))
    return _distinct(jobs, notes)


@functools.lru_cache(maxsize=64)  # composing takes time, and a search does it again for every trial
def root_of(choices: tuple[str, ...], search_path: tuple[str, ...]) -> DictConfig:
    """Return the root config of some choices from groups; it is not to be changed."""
    return schema.compose_root(choices, search_path)


def each_value(override: Override) -> list[str]:
    """Return an override once for each of its values.

    Raises:
        ConfigError: If they are not to be counted.
    """
    key = override.key_or_group
    if override.is_discrete_sweep():
        return [f"{key}={value}" for value in override.sweep_string_iterator()]
    if override.is_sweep_override():
        raise ConfigError(
            f"{override.input_line!r} is a range without steps, which only a search sweeps: give values, such as {key}=1,2,3."
        )
    return [f"{key}={(override.input_line or '').split('=', 1)[1]}"]


def _job(root: DictConfig, choices: Sequence[str], values: Sequence[str]) -> Job:
    """Return the job that a root config becomes by some values; its place in a sweep is filled in later."""
    keys = {value.split("=", 1)[0] for value in values}
    defaults = [word for word in DEFAULTS if word.split("=", 1)[0] not in keys]
    run, delta = schema.split(schema.with_values(root, schema.parse([*defaults, *values])))
    config = recovery.describe(run, delta)
    identity = recovery.identity(config)
    typed = schema.parse([*choices, *values])
    overrides = {o.key_or_group: o.value() for o in typed if o.key_or_group.partition(".")[0] not in WHOLE}
    folder = f"{delta.delta_type}-seed{run.seed}-{identity[:12]}"
    return Job(run, delta, identity, folder, (*choices, *values), overrides)


def job(words: Sequence[str], search_path: Sequence[str] = ()) -> Job:
    """Return the job of some overrides with one value each, those aside that its delta type does not have.

    Raises:
        ConfigError: If it cannot be composed.
    """
    (found,), _ = _jobs(list(_by_key(schema.parse(words)).values()), search_path)
    return found


def _distinct(jobs: Sequence[Job], notes: list[str]) -> tuple[list[Job], list[str]]:
    """Return jobs without those that would make the same delta again, those of one backbone and task together."""
    distinct = {job.identity: job for job in reversed(jobs)}
    kept = [job for job in jobs if distinct[job.identity] is job]
    if len(kept) < len(jobs):
        notes = [*notes, f"{len(jobs) - len(kept)} jobs would make the same delta as another one, and are left out"]
    places: dict[str, int] = {}
    for job in kept:
        places.setdefault(_data(job), len(places))
    return sorted(kept, key=lambda job: places[_data(job)]), notes


def _data(job: Job) -> str:
    return json.dumps([dataclasses.asdict(job.run.backbone), dataclasses.asdict(job.run.task)], sort_keys=True)


def _name(jobs: Sequence[Job], given: Mapping[str, Override]) -> str:
    """Return a name for a sweep that depends on what its jobs train, in whatever order, and not on the version of the code."""
    own, experiment = jobs[0].run.sweep.name, given.get("experiment")
    begins = own or (str(experiment.value()) if experiment and not experiment.is_sweep_override() else "sweep")
    prints = sorted(recovery.Record(recovery.describe(job.run, job.delta)).fingerprint for job in jobs)
    return f"{begins}-{hashlib.sha256(''.join(prints).encode()).hexdigest()[:10]}"


@contextlib.contextmanager
def _said_of(words: Sequence[str], several: bool) -> Iterator[None]:
    """Have errors within this context name the job that they are about, where there are several."""
    try:
        yield
    except ConfigError as error:
        raise (ConfigError(f"The job {' '.join(words)} cannot run: {error}") if several else error) from error


def folder(config: DictConfig, name: str) -> Path:
    """Return the folder of a sweep with all of its path, and tell Hydra of it.

    Args:
        config: The root config of the sweep, whose ``hydra.sweep.dir`` may hold ``{sweep}``, as the default does.
        name: What that stands for.
    """
    wanted = str(config.hydra.sweep.dir)
    if PLACEHOLDER in wanted:
        config.hydra.sweep.dir = wanted.replace(PLACEHOLDER, name)
        config.hydra.overrides.hydra.append(f"hydra.sweep.dir={_in_quotes(config.hydra.sweep.dir)}")
    return Path(config.hydra.sweep.dir).resolve()
