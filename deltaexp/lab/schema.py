"""From the command line to checked configs, by Hydra: the config groups, the schema, and errors in whole sentences."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import sys
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import make_dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from deltaexp import registry
from deltaexp.errors import ConfigError, did_you_mean, listing, unknown
from deltaexp.lab import config as lab_config
from deltaexp.lab.config import RunConfig
from deltaexp.registry import DeltaConfig

# Hydra takes plugins only from packages of the name hydra_plugins, which it looks for in all of these folders.
PLUGINS = str(Path(__file__).resolve().parents[1] / "plugins")
if PLUGINS not in sys.path:
    sys.path.append(PLUGINS)

GROUPS = ("delta_type", "backbone", "task", "trainer", "hub", "tracker", "experiment")
"""The config groups, in the order of ``conf/config.yaml``'s defaults list."""
HYDRA_GROUPS = ("hydra/sweeper", "hydra/launcher")
"""Groups of Hydra's that deltaexp has choices for."""
FREE_OF_HYDRA = tuple(
    f"hydra.{section}"
    for section in (
        "sweeper.sampler_options", "sweeper.pruner_options",
        "launcher.additional_parameters", "launcher.init", "launcher.remote",
    )
)  # fmt: skip
"""Mappings of ``conf/hydra/`` whose keys are another library's."""
DEFAULT_DELTA_TYPE = "lora"
"""The choice in ``conf/config.yaml``'s defaults list."""


OmegaConf.register_new_resolver("per", lambda choice, values: values.get(choice, values.get("others")), replace=True)
"""``${per:${delta_type},{full:1e-3,others:1e-2}}`` in a YAML file is a value that depends on another key's."""

_stored: dict[str, type[DeltaConfig]] = {}
"""The delta types whose schemas Hydra knows."""


def config_dir() -> Path:
    """Return the folder ``conf/``: inside the installed package, or at the top of a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def choices(group: str, search_path: Sequence[str] = ()) -> dict[str, str]:
    """Return the choices of a config group, those in folders of the user's included, each with the line describing it."""
    result = {}
    for path in sorted(path for root in (str(config_dir()), *search_path) for path in (Path(root) / group).glob("*.yaml")):
        comments = [line.lstrip("# ").rstrip() for line in path.read_text("utf-8").splitlines() if line.startswith("#")]
        result[path.stem] = next((line for line in comments if line and not line.startswith("@package")), "")
    if group == "delta_type":
        for name in registry.known():
            result.setdefault(name, (registry.get(name).__doc__ or "").split("\n", 1)[0])
    return result


def register_schemas(search_path: Sequence[str] = ()) -> None:
    """Tell Hydra the type of the root config for every delta type: its own keys and those of a run, flat."""
    store = ConfigStore.instance()
    Plugins.instance()  # has stored what the plugins of other packages bring along
    for group in HYDRA_GROUPS:
        # Hydra would take one of the same name for the schema of deltaexp's own.
        for path in (config_dir() / group).glob("*.yaml"):
            store.repo.get("hydra", {}).get(group.partition("/")[2], {}).pop(path.name, None)
    for name in registry.known():
        config_class = registry.get(name)
        if _stored.get(name) is not config_class:  # storing takes time, and a sweep composes many configs
            # Two dataclasses merge at the root only if one is a subclass of the other, hence one type for each delta.
            root = make_dataclass(f"{config_class.__name__}Run", [], bases=(config_class, RunConfig))
            store.store(group="schema", name=name, node=root, package="_global_")
            _stored[name] = config_class
        described = any((Path(root) / "delta_type" / f"{name}.yaml").exists() for root in [str(config_dir()), *search_path])
        if described:
            store.repo.get("delta_type", {}).pop(f"{name}.yaml", None)  # of an earlier call that did not know the folder
        else:
            # A type from another package is a choice as soon as it is registered, without a YAML file.
            store.store(group="delta_type", name=name, node={"defaults": [f"/schema/{name}", "_self_"]}, package="_global_")


def split(cfg: DictConfig) -> tuple[RunConfig, DeltaConfig]:
    """Part a composed root config into the run's and the delta's, both checked.

    Raises:
        ConfigError: If a key or a value is not allowed, or a mandatory value is missing.
    """
    try:
        values = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(_omegaconf_sentence(error)) from error
    assert isinstance(values, dict)
    run_keys = {f.name for f in dataclasses.fields(RunConfig)}
    run = {str(key): value for key, value in values.items() if key in run_keys}
    delta = {str(key): value for key, value in values.items() if key not in run_keys and key != "hydra"}
    lab_config.check_secrets(delta)
    run_config, delta_config = lab_config.from_dict(run), DeltaConfig.from_dict(delta)
    lab_config.check_hub(run_config, delta_config.delta_type)
    return lab_config.completed(run_config, delta_config), delta_config


def composed(overrides: Sequence[str], search_path: Sequence[str] = ()) -> tuple[RunConfig, DeltaConfig]:
    """Compose one run's config and check all of it, without importing torch.

    Raises:
        ConfigError: If anything in it is not allowed.
    """
    register_schemas(search_path)
    check_keys(parse(overrides), search_path)
    return split(compose_root(overrides, search_path))


def check_single(overrides: Sequence[str], run: RunConfig, search_path: Sequence[str] = ()) -> None:
    """Check that nothing is asked for that a single run would leave out.

    Raises:
        ConfigError: If the experiment is a sweep, or a key is for sweeps.
    """
    for word, given in (
        ("retry=true", run.retry),
        ("fail_fast=true", run.fail_fast),
        ("sweep.joint=auto", run.sweep.joint != "off"),
    ):
        if given:
            raise ConfigError(f"{word} is for sweeps: add -m, or leave it out.")
    experiment = next((o.value() for o in parse(overrides) if o.key_or_group == "experiment"), None)
    if experiment is not None:
        params = compose_root(overrides, search_path, return_hydra_config=True).hydra.sweeper.get("params")
        if params:
            values = listing(f"{key}={value}" for key, value in params.items())
            raise ConfigError(f"experiment={experiment} is a sweep, over {values}: add -m to run it.")


def run_folder(overrides: Sequence[str], search_path: Sequence[str] = ()) -> Path:
    """Return the folder that a new run with these overrides would be given."""
    cfg = compose_root(overrides, search_path, return_hydra_config=True)
    return Path(OmegaConf.to_container(cfg.hydra.run, resolve=True)["dir"])  # type: ignore[index,call-overload]


def with_values(cfg: DictConfig, overrides: Sequence[Override]) -> DictConfig:
    """Return a copy of a composed root config with the values of some overrides, which choose nothing from groups.

    Raises:
        ConfigError: If a value is none that its key may have.
    """
    cfg = copy.deepcopy(cfg)
    for override in overrides:
        key = override.key_or_group
        free = any(key == name or key.startswith(f"{name}.") for name in free_sections())
        try:
            OmegaConf.update(cfg, key, override.value(), merge=True, force_add=free)
        except OmegaConfBaseException as error:
            raise ConfigError(f"Error merging override {override.input_line}: {_omegaconf_sentence(error)}") from error
    return cfg


def compose_root(overrides: Sequence[str], search_path: Sequence[str] = (), **options: bool) -> DictConfig:
    """Have Hydra compose a root config.

    Raises:
        ConfigError: If it cannot.
    """
    extra = [f"hydra.searchpath=[{','.join(f'file://{Path(p).resolve()}' for p in search_path)}]"] if search_path else []
    try:
        with _no_other_hydra(), initialize_config_dir(str(config_dir()), version_base="1.3"):
            return compose("config", overrides=[*spelled_out(overrides), *extra], **options)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_hydra_sentence(error)) from error
    except YAMLError as error:  # YAML may name Python objects; they are never made
        raise ConfigError(f"A file of the configuration is no plain YAML: {' '.join(str(error).split())}") from error


@contextlib.contextmanager
def _no_other_hydra() -> Iterator[None]:
    """Put the Hydra aside that runs this program, such as a sweep, while another config is composed."""
    state = GlobalHydra.instance()
    running, state.hydra = state.hydra, None
    try:
        yield
    finally:
        state.hydra = running


def parse(overrides: Sequence[str]) -> list[Override]:
    """Parse overrides by Hydra's grammar.

    Raises:
        ConfigError: If one is malformed.
    """
    parsed = []
    for text in map(quoted, overrides):
        try:
            parsed += OverridesParser.create().parse_overrides([text])
        except HydraException as error:
            raise ConfigError(
                f"{text!r} is no override, which looks like key=value. {_first_line(error)} "
                "Put a value that holds spaces, commas or brackets in quotes, e.g. 'key=\"a, b\"'."
            ) from error
    return parsed


def check_keys(overrides: Sequence[Override], search_path: Sequence[str] = ()) -> None:
    """Check every key and every choice of a group that the user typed, also those typed with ``+`` or ``~``.

    Raises:
        ConfigError: If one does not exist; the message names the nearest.
    """
    chosen: dict[str, str] = {}
    for override in overrides:
        key = override.key_or_group
        if key in GROUPS and override.value() is not None and not override.is_sweep_override():
            chosen[key], known = str(override.value()), choices(key, search_path)
            if chosen[key] not in known:
                raise ConfigError(unknown(key, chosen[key], known or ["null"]))
    delta_type: str | None = chosen.get("delta_type", DEFAULT_DELTA_TYPE)
    if "delta_type" not in chosen and "experiment" in chosen:
        delta_type = None  # the experiment may choose it, which composition will tell
    for override in overrides:
        key = override.key_or_group
        if key in GROUPS or key.split(".")[0] == "hydra":
            continue
        check_path(key, [delta_type] if delta_type in registry.known() else registry.known())
        if override.is_add() or override.is_force_add() or override.is_delete():
            raise ConfigError(f"{override.input_line!r}: the config has fixed keys; write {key}=VALUE to set one.")


def check_plugins(overrides: Sequence[Override]) -> None:
    """Check that Hydra knows the sweeper and the launcher that are asked for.

    Raises:
        ConfigError: If it does not; the message names the nearest.
    """
    for override in overrides:
        key = override.key_or_group
        if key in HYDRA_GROUPS and not override.is_sweep_override():
            others = ConfigStore.instance().repo.get("hydra", {}).get(key.partition("/")[2], {})  # of other packages
            known = {*choices(key), *(name.removesuffix(".yaml") for name in others)}
            if str(override.value()) not in known:
                raise ConfigError(unknown(key, str(override.value()), known))


def check_path(key: str, delta_types: Sequence[str]) -> None:
    """Check that a dotted key exists for a run with one of these delta types.

    Raises:
        ConfigError: If it does not; the message names the nearest.
    """
    section, _, rest = key.partition(".")
    fields = _fields(RunConfig)
    for name in delta_types:
        fields |= _fields(registry.get(name))
    if section not in fields:
        owners = [name for name in registry.known() if section in _fields(registry.get(name))]
        if owners:
            who = f"delta_type={delta_types[0]} has" if len(delta_types) == 1 else f"None of {listing(delta_types)} has"
            no = "no" if len(delta_types) == 1 else "a"
            raise ConfigError(f"{who} {no} key {section!r}; it belongs to delta_type={listing(owners)}.")
        hint = did_you_mean(section, fields) or _elsewhere(section)
        raise ConfigError(f"There is no key {section!r}.{hint} See all keys with: deltaexp --help delta_type={delta_types[0]}")
    if section in free_sections():
        return  # its keys are another library's, or patterns
    if rest.split(".")[0] in _mappings(section):
        return
    if rest and rest not in (_section(section) if section in lab_config.PARTS else {}):
        raise ConfigError(
            unknown(f"key of {section}", rest.split(".")[0], _section(section) if section in lab_config.PARTS else [])
        )


def owns(delta_type: str, key: str) -> bool:
    """Say whether a dotted key exists for a run with this delta type, as far as its first part tells."""
    section = key.partition(".")[0]
    return section in _fields(RunConfig) or section in _fields(registry.get(delta_type))


def free_sections() -> frozenset[str]:
    """Return the keys that are mappings, below which the user may write keys of any name."""
    return _free_of(tuple(map(registry.get, registry.known())))


@functools.lru_cache(maxsize=1)  # a sweep asks for every job
def _free_of(types: tuple[type[DeltaConfig], ...]) -> frozenset[str]:
    found = {f"{section}.{key}" for section in lab_config.PARTS for key in _mappings(section)}
    for config_class in types:
        hints = typing.get_type_hints(config_class)
        found |= {key for key in _fields(config_class) if typing.get_origin(hints[key]) is dict}
    return frozenset(found)


def spelled_out(words: Sequence[str]) -> list[str]:
    """Return command-line words in which overrides below a free section may add their key, as Hydra wants it said."""
    free = tuple(f"{section}{mark}" for section in {*free_sections(), *FREE_OF_HYDRA} for mark in ".=")
    return [f"++{word}" if word.startswith(free) and "=" in word else quoted(word) for word in words]


def quoted(word: str) -> str:
    """Return an override with quotes around a template of a repository's name, whose braces Hydra would take for a mapping."""
    key, _, value = word.partition("=")
    return f"{key}='{value}'" if key == "hub.repo_id" and "{" in value and value[:1] not in "'\"" else word


def _elsewhere(name: str) -> str:
    """Say in which section a key lies that was typed without it."""
    for section in lab_config.PARTS:
        if name in _section(section):
            return f" Did you mean '{section}.{name}'?"
    return ""


def _mappings(section: str) -> set[str]:
    """Return the keys of a section that are mappings."""
    hints = typing.get_type_hints(type(lab_config.PARTS[section]())) if section in lab_config.PARTS else {}
    return {key for key, hint in hints.items() if typing.get_origin(hint) is dict}


def _section(name: str) -> dict[str, Any]:
    return _fields(type(lab_config.PARTS[name]()))


def _fields(schema: type) -> dict[str, Any]:
    return {f.name: f for f in dataclasses.fields(schema)}


def _hydra_sentence(error: Exception) -> str:
    """Return what Hydra has to say in one sentence, with the cause where the cause says more."""
    cause = error.__cause__
    if isinstance(cause, OmegaConfBaseException):
        return f"{_first_line(error)}: {_omegaconf_sentence(cause)}"
    if isinstance(error, OmegaConfBaseException):
        return _omegaconf_sentence(error)
    return _first_line(error)


def _omegaconf_sentence(error: OmegaConfBaseException) -> str:
    key = getattr(error, "full_key", None)
    text = _first_line(error)
    if "Missing mandatory value" in text:
        return f"{key} must be given, e.g. {key}=..."
    return f"{key}: {text}" if key and key not in text else text


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".") + ("" if not lines else ".")


def defaults_of(delta_type: str) -> Mapping[str, Any]:
    """Return the keys of a delta type with their defaults."""
    result = {}
    for field in dataclasses.fields(registry.get(delta_type)):
        default = field.default_factory() if callable(field.default_factory) else field.default
        result[field.name] = default
    return result
