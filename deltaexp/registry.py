"""The one table of delta types, and the config that all of them share.

A delta type is a dataclass derived from `DeltaConfig` and decorated with `register`. Its fields are the keys a user
may set, flat, from the command line, a dict or a saved ``config.json``; all three go through `DeltaConfig.from_dict`.
Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pkgutil
import sys
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, ClassVar, Optional, TypeVar

from deltaexp import addressing
from deltaexp.errors import ConfigError, did_you_mean, listing, unknown

if TYPE_CHECKING:
    import torch
    from torch import nn

    from deltaexp.lazy import Layer
    from deltaexp.targets import Site

ENTRY_POINTS = "deltaexp.deltas"
"""The entry-point group under which another package names the modules that register its delta types."""

_types: dict[str, type[DeltaConfig]] = {}
_discovered = False


@dataclass
class SavedWith:
    """What ``config.json`` records about the backbone and the versions that a delta was trained with."""

    backbone_class: Optional[str] = None
    backbone_checkpoint_name: Optional[str] = None
    backbone_revision: Optional[str] = None
    backbone_hash: Optional[str] = None
    """md5 of the trained model, delta included (see `deltaexp.checksum.model_md5`); None where none was recorded."""
    base_sha256: Optional[str] = None
    """sha256 of what the delta was put on (see `deltaexp.checksum.model_sha256`), the same whatever the delta is."""
    tensor_digest: str = "sha256"
    """The algorithm of the tensors' digests that these two hashes are over (see `deltaexp.checksum.ALGORITHMS`). A config that
    does not name it was saved while there was one only."""
    deltaexp_version: Optional[str] = None
    transformers_version: Optional[str] = None
    origin: Optional[str] = None
    """The library that saved it, if not deltaexp."""


@dataclass
class DeltaConfig:
    """What every delta type is configured with; a type adds its own keys."""

    delta_type: str = ""
    """Name of the type in the registry."""
    modified_modules: Optional[list[str]] = None
    """Patterns of the modules to modify (see `deltaexp.addressing`); None means the type's `default_modules`."""
    exclude_modules: list[str] = field(default_factory=lambda: ["lm_head"])
    """Patterns of modules that are never modified, together with everything below them."""
    unfrozen_modules: list[str] = field(default_factory=lambda: ["deltas"])
    """Patterns of what is trained and saved; "deltas" stands for the delta's own parameters."""
    common_structure: Optional[bool] = None
    """True: patterns are names of the common structure (`attn.q`); False: names of the backbone; None: both."""
    layers: Any = None
    """The blocks to modify, counted from 0 in every stack of them: ``[20, 21]``, ``"0-5"``, ``"first:4"``, ``"last:4"``; null
    means all."""

    default_modules: ClassVar[tuple[str, ...]] = ()
    """Names of the common structure that are modified where `modified_modules` is None; none means the backbone itself."""
    attribute: ClassVar[str] = ""
    """Name under which a layer hangs on the module it modifies; it is part of the parameters' names."""
    paired: ClassVar[bool] = False
    """Whether the patterns come in pairs: where a layer takes its input, and where it adds its output."""
    trains_nothing: ClassVar[bool] = False
    """Whether it is right that a delta of this type may have no parameters at all."""
    learning_rate: ClassVar[float] = 1e-3
    """The recommended learning rate for AdamW, from the literature: what a run takes where `trainer.learning_rate` is null."""
    builds_on_meta: ClassVar[bool] = True
    """Whether `build` works on the meta device, where what a config asks for is compared with saved tensors for no memory."""

    def __post_init__(self) -> None:
        """Check the values; a type with keys of its own extends this.

        Raises:
            ConfigError: If a value is out of its range.
        """
        if not self.delta_type:
            raise ConfigError("A delta config needs a delta_type." + f" Known: {listing(known())}.")
        if self.modified_modules is not None and not self.modified_modules:
            raise ConfigError(
                "modified_modules is an empty list, so nothing would be modified. "
                "Name at least one module, or leave the key out to take the delta type's default modules."
            )
        if self.paired and len(self.modified_modules or ()) % 2:
            raise ConfigError(
                f"The delta type {self.delta_type!r} takes modified_modules in pairs, where its input comes from and where its "
                f"output goes, and {self.modified_modules!r} has {len(self.modified_modules or ())}."
            )
        if self.layers is not None:
            addressing.layer_numbers(self.layers)

    def defaults(self) -> tuple[str, ...]:
        """Return the default modules, where they depend on other keys."""
        return self.default_modules

    def expand(self, name: str, module: nn.Module) -> list[str]:
        """Return the names of the modules that are modified where the module called ``name`` is chosen: itself."""
        return [name]

    def build(self, site: Site) -> Layer | None:
        """Make the torch module for one place in the backbone; None where there is nothing to put.

        Raises:
            AddressingError: If the delta cannot be put on that module.
        """
        return None

    def owned(self, site: Site) -> list[str]:
        """Return the names of the module's own parameters, relative to it, that the delta trains in place."""
        return []

    def recommended_learning_rate(self) -> float:
        """Return the recommended learning rate for AdamW, where it depends on other keys."""
        return self.learning_rate

    def positions(self) -> int:
        """Return how many of the backbone's positions the delta takes for itself, so that inputs have to be shorter."""
        return 0

    def learning_rate_factor(self, parameter: str) -> float:
        """Return what the learning rate is multiplied by for the delta's parameter of that name."""
        return 1.0

    def decays(self, parameter: str, dim: int) -> bool:
        """Say whether weight decay acts on the delta's parameter of that name, which has ``dim`` dimensions: on matrices."""
        return dim > 1

    def penalty(self, layers: Sequence[Layer]) -> torch.Tensor | None:
        """Return what is added to the loss while training; None where the type has no such term."""
        return None

    def after_step(self, layers: Sequence[Layer], step: int, total_steps: int) -> None:
        """Do what the type wants done after optimizer step number ``step`` (from 1), while the gradients are there."""

    def training_state(self, layers: Sequence[Layer]) -> dict[str, torch.Tensor]:
        """Return what the type keeps between steps beside the delta's own tensors; a checkpoint of the training holds it."""
        return {}

    def load_training_state(self, layers: Sequence[Layer], state: Mapping[str, torch.Tensor]) -> None:
        """Take back what `training_state` returned, so that training goes on as if it had not been interrupted."""

    @property
    def saved_with(self) -> SavedWith:
        """What the file this config was read from records about backbone and versions; empty if it was not read."""
        return self.__dict__.get("_saved_with") or SavedWith()

    @saved_with.setter
    def saved_with(self, record: SavedWith) -> None:
        self.__dict__["_saved_with"] = record

    def to_dict(self) -> dict[str, Any]:
        """Return the flat dict that `from_dict` accepts."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DeltaConfig:
        """Build the config of ``values["delta_type"]``, strictly.

        The keys of `SavedWith` are accepted too, so that a saved ``config.json`` is itself such a dict.

        Raises:
            ConfigError: If the delta type or a key is unknown, a value has the wrong type or is out of range.
        """
        flat = dict(values)
        name = flat.get("delta_type", cls.delta_type)
        if not name:
            raise ConfigError(f"The config names no delta_type. Known delta types: {listing(known())}.")
        config_class = get(str(name))
        record = {f.name: flat.pop(f.name) for f in dataclasses.fields(SavedWith) if f.name in flat}
        config = config_class(**checked(config_class, flat, f"delta_type {name!r}"))
        config.saved_with = SavedWith(**checked(SavedWith, record, "a saved config"))
        return config

    def require(
        self, key: str, *, at_least: float | None = None, below: float | None = None, above: float | None = None
    ) -> None:
        """Raise a `ConfigError` unless the number under ``key`` lies in the range given."""
        value = getattr(self, key)
        if at_least is not None and value < at_least:
            raise ConfigError(f"{key} is {value!r}; it must be at least {at_least}.")
        if above is not None and value <= above:
            raise ConfigError(f"{key} is {value!r}; it must be greater than {above}.")
        if below is not None and value >= below:
            raise ConfigError(f"{key} is {value!r}; it must be less than {below}.")

    def require_one_of(self, key: str, allowed: Iterable[str]) -> None:
        """Raise a `ConfigError` unless the value under ``key`` is one of ``allowed``."""
        value, names = getattr(self, key), list(allowed)
        if value not in names:
            raise ConfigError(unknown(key, str(value), names))


Config = TypeVar("Config", bound=type[DeltaConfig])


def register(config_class: Config) -> Config:
    """Add a config dataclass to the table of delta types; used as a class decorator.

    Raises:
        ConfigError: If the class names no delta type, or another class already has that name.
    """
    name = config_class.delta_type
    if not name or not dataclasses.is_dataclass(config_class):
        raise ConfigError(f"{config_class.__name__} must be a dataclass with a default for delta_type to be registered.")
    taken = _types.get(name)
    # A module that is executed again (a notebook cell, importlib.reload) replaces its own class.
    if taken is not None and (taken.__module__, taken.__qualname__) != (
        config_class.__module__,
        config_class.__qualname__,
    ):
        raise ConfigError(
            f"The delta type {name!r} is registered already, by {taken.__module__}.{taken.__qualname__}. "
            f"Give {config_class.__module__}.{config_class.__qualname__} another delta_type."
        )
    _types[name] = config_class
    return config_class


def known() -> list[str]:
    """Return the names of all delta types, those of installed packages included."""
    global _discovered
    if not _discovered:
        _discovered = True
        import deltaexp.deltas as package

        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package.__name__}.{module.name}")
        for entry_point in entry_points(group=ENTRY_POINTS):
            entry_point.load()
    return sorted(_types)


def get(name: str) -> type[DeltaConfig]:
    """Return the config class of a delta type.

    Raises:
        ConfigError: If there is no such type; the message names the nearest one.
    """
    if name not in known():
        raise ConfigError(unknown("delta_type", name, known()))
    return _types[name]


def checked(schema: type, values: Mapping[str, Any], owner: str) -> dict[str, Any]:
    """Return ``values`` after checking every key and type against the dataclass ``schema``.

    Raises:
        ConfigError: If a key is none of the schema's fields or a value does not have the field's type.
    """
    hints = _hints(schema)
    fields = [f.name for f in dataclasses.fields(schema)]
    result = {}
    for key, value in values.items():
        if key not in fields:
            raise ConfigError(unknown_key(key, fields, owner))
        result[key] = _converted(value, hints[key], key)
    return result


_hints = functools.cache(typing.get_type_hints)


def unknown_key(key: str, fields: Iterable[str], owner: str) -> str:
    """Return the sentence for a ``key`` that ``owner`` does not have; it says who has it, where anyone does."""
    fields = list(fields)
    owners = [name for name in known() if key in {f.name for f in dataclasses.fields(_types[name])}]
    if owners:
        return f"{owner} has no key {key!r}; it belongs to delta_type {listing(owners)}."
    return f"{owner} has no key {key!r}.{did_you_mean(key, fields)} Its keys: {listing(sorted(fields), 40)}."


def _converted(value: Any, expected: Any, key: str) -> Any:
    """Return ``value`` as the type ``expected``: int to float, tuple to list; anything else must fit as it is."""
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if expected is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        for option in arguments:
            if option is not type(None):
                try:
                    return _converted(value, option, key)
                except ConfigError:
                    continue
    elif origin is list and isinstance(value, (list, tuple)):
        return [_converted(item, arguments[0], key) for item in value]
    elif origin is dict and isinstance(value, Mapping):
        return {_converted(k, arguments[0], key): _converted(v, arguments[1], key) for k, v in value.items()}
    elif expected is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        if abs(value) <= sys.float_info.max:  # neither infinite, nor nan, nor an int that no float holds
            return float(value)
        raise ConfigError(f"{key} is {value!r}, which is not a finite number.")
    elif isinstance(expected, type) and isinstance(value, expected) and not (expected is int and isinstance(value, bool)):
        if isinstance(value, int) and abs(value) >= 1 << 63:
            raise ConfigError(f"{key} is a number of {value.bit_length()} bits; it must have fewer than 64.")
        return value
    raise ConfigError(f"{key} is {value!r}, which is not {_spelled(expected)}.")


def _spelled(expected: Any) -> str:
    """Return an expected type in words."""
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    if expected in words:
        return words[expected]
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if origin is list:
        return "a list of " + {str: "texts", int: "whole numbers", float: "numbers"}.get(arguments[0], "values")
    if origin is dict:
        return "a mapping"
    if arguments:
        return " or ".join("null" if option is type(None) else _spelled(option) for option in arguments)
    return str(expected)
