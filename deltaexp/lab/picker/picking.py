"""What the page asks: which modules patterns mean, which patterns mean chosen modules, what a delta on them would train."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import re
import shlex
import threading
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deltaexp import addressing, registry, targets
from deltaexp.errors import AddressingError, ConfigError, DeltaExpError, listing, unknown
from deltaexp.lab import blueprint, plan, schema, wording
from deltaexp.lab.picker.documentation import documentation
from deltaexp.lab.picker.outline import Outline, Unit
from deltaexp.lab.picker.proposing import Proposal, Proposer
from deltaexp.lab.writing import write_whole
from deltaexp.registry import DeltaConfig
from deltaexp.structure import backbone_modules

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
"""What an experiment may be called."""
SHOWN = 4
"""How many ways to name the same modules are shown."""
EXAMINED = 24
"""How many rows are examined one by one where a delta cannot be put on all of them."""


@dataclass
class State:
    """What the page holds: it is sent with every question, so that the server has nothing to remember."""

    delta_type: str
    keys: dict[str, str] = field(default_factory=dict)
    """The delta's keys, each as it is typed after ``key=``."""
    patterns: list[list[str]] | None = None
    """The patterns of the modules; of a type that goes on pairs two lists, where it reads and where it writes. None are the
    type's defaults."""


@dataclass
class Choice:
    """What a state comes to in words for the shell."""

    override: str | None
    """``modified_modules=[...]``, quoted; None where the defaults are taken."""
    command: str
    """The whole command that trains it."""


class Picker:
    """A backbone on the meta device, and the answers to the page's questions about it.

    Args:
        overrides: What was typed: every key of a run may be given.
        folder: Where experiments are saved, as ``folder/experiment/NAME.yaml``.
        search_path: A folder with config groups of the user's, or none.

    Raises:
        ConfigError: If the config is not allowed.
        DeltaExpError: If the backbone's config cannot be read.
    """

    def __init__(self, overrides: Sequence[str], folder: Path, search_path: Sequence[str] = ()) -> None:
        self.config, start = schema.composed(overrides, search_path)
        self.folder, self.search_path = folder, search_path
        delta_keys = {key for name in registry.known() for key in schema.defaults_of(name)}
        parsed = zip(overrides, schema.parse(overrides), strict=True)
        self.overrides = [text for text, override in parsed if override.key_or_group.partition(".")[0] not in delta_keys]
        """What was typed of the run, without its delta."""
        self.drawn = blueprint.make(self.config.backbone, self.config.task)
        self.model = self.drawn.model
        self.outline = Outline(self.model)
        common = {name: [role.name for role in roles] for name, roles in self.outline.structure.items()}
        self.proposer = Proposer([name for name, _ in backbone_modules(self.model) if name], common)
        self.lock = threading.RLock()
        """One question at a time: counting puts the delta into the backbone and takes it out again."""
        self.bases: dict[str, DeltaConfig] = {}
        """By delta type its config as the command has it before anything is chosen."""
        self.meanings: dict[tuple, frozenset[Unit] | str] = {}
        """What patterns mean, or why they mean nothing."""
        base = self._base(start.delta_type)
        typed = {key: wording.written(value) for key, value in _changes(start, base).items()}
        patterns = None if start.modified_modules == base.modified_modules else _lists(start.modified_modules, start.paired)
        self.start = State(start.delta_type, typed, patterns)

    def about(self) -> dict[str, Any]:
        """Return what the page is built of: the rows of the backbone, the delta types, the state it starts in."""
        types = []
        lines = schema.choices("delta_type", self.search_path)
        for name in registry.known():
            config_class = registry.get(name)
            goes_on = "pairs" if config_class.paired else "modules" if config_class.default_modules else "all"
            types.append({"name": name, "about": lines.get(name, ""), "goes_on": goes_on})
        return {
            "backbone": self.config.backbone.name,
            "class": type(self.model).__name__,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "modules": len(self.proposer.order),
            "rows": self.outline.described(),
            "types": types,
            "state": dataclasses.asdict(self.start),
            "folder": str(self.folder / "experiment"),
            "remarks": self.drawn.assumed,
        }

    def keys(self, delta_type: str) -> list[dict[str, Any]]:
        """Return the keys of a delta type: name, value where nothing is typed, documentation, and whether all types have it.

        Raises:
            ConfigError: If the config cannot have this type.
        """
        base, told = self._base(delta_type), documentation(registry.get(delta_type))
        shared = {f.name for f in dataclasses.fields(DeltaConfig)}
        return [
            {"name": key, "value": wording.written(getattr(base, key)), "about": told.get(key, ""), "own": key not in shared}
            for key in _keys(base)
        ]

    def show(self, state: State, toggle: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return what a state means: modules, parameters, words for the shell; errors in words.

        Args:
            state: The state.
            toggle: A click that changes it: ``row`` and ``digits`` as for `Outline.chosen`, or ``pattern`` for all that it
                means, and ``side``, the number of the list of patterns. What is chosen already, all of it, is so no more.
        """
        answer: dict[str, Any] = {
            "error": None,
            "keys": [],
            "lists": [],
            "marks": [],
            "proposals": [],
            "counts": None,
            "faults": {},
        }
        with self.lock:
            try:
                answer["keys"] = self.keys(state.delta_type)
                bare = self._delta_config(dataclasses.replace(state, patterns=None))
                if toggle is not None:
                    proposals = self._toggled(state, bare, toggle)
                    answer["proposals"] = [dataclasses.asdict(proposal) for proposal in proposals[:SHOWN]]
                answer |= {"patterns": state.patterns, "whole": False} | self._meant(state, bare)
                answer |= self._counted(self._delta_config(state))
                answer |= dataclasses.asdict(self.choice(state))
            except DeltaExpError as error:
                answer["error"] = str(error)
                if answer["marks"] and isinstance(error, AddressingError):
                    answer["faults"] = self._faults(bare, answer["marks"])
        return answer

    def preview(self, state: State, pattern: str) -> dict[str, Any]:
        """Return what a pattern would mean, and how it is read; an error in words where it means nothing."""
        with self.lock:
            try:
                bare = self._delta_config(dataclasses.replace(state, patterns=None))
            except DeltaExpError as error:
                return {"error": str(error)}
            units = self._units(pattern, bare)
        if isinstance(units, str):
            return {"error": units}
        by_name = bare.common_structure is not True and any(addressing.matches(pattern, name) for name in self.proposer.order)
        read = "regular expression" if pattern.startswith(addressing.REGEX) else "end of a name" if by_name else "common name"
        return {"error": None, "count": len(units), "read": read, "marks": self.outline.marks(units)}

    def choice(self, state: State) -> Choice:
        """Return the words for the shell.

        Raises:
            ConfigError: If a key or a pattern is not allowed.
        """
        config = self._delta_config(state)
        changes = _changes(config, self._base(state.delta_type))
        words = [f"delta_type={config.delta_type}", *(f"{key}={wording.written(value)}" for key, value in changes.items())]
        override = None
        if state.patterns is not None:
            override = f"modified_modules={wording.written(config.modified_modules)}"
        places = [word for place in self.search_path for word in ("--config-dir", place)]
        command = ["python", "-m", "deltaexp", *places, *self.overrides, *words, *([override] if override else [])]
        return Choice(shlex.quote(override) if override else None, shlex.join(command))

    def file(self, state: State) -> str:
        """Return the text of an experiment's file.

        Raises:
            DeltaExpError: If the delta cannot be put on the backbone.
        """
        with self.lock:
            config = self._delta_config(state)
            trained = self._counted(config)["counts"]["trainable"]
            where = self.config.backbone.name
            about = f"{config.delta_type} on {where}, chosen by `deltaexp pick`: {trained:,} trained parameters."
            return wording.experiment(self.overrides, config, about, self.search_path)

    def save(self, state: State, name: str, replace: bool) -> dict[str, Any]:
        """Write an experiment's file, all of it or nothing.

        Args:
            state: The state.
            name: What the experiment is called.
            replace: Whether a file of that name may be replaced.

        Returns:
            ``path``, and the ``command`` that trains it; or with ``exists`` the path of the file that is there already.

        Raises:
            DeltaExpError: If the name is none, the delta cannot be put on the backbone, or the file cannot be written.
        """
        if not NAME.fullmatch(name):
            raise ConfigError(f"{name!r} is no name for an experiment; take letters, digits, '_', '-' and '.', e.g. my_lora.")
        text = self.file(state)
        path = self.folder / "experiment" / f"{name}.yaml"
        with self.lock:
            if path.exists() and not replace:
                return {"exists": str(path)}
            try:
                write_whole(path, lambda file: file.write(text))
            except OSError as error:
                raise DeltaExpError(f"{str(path)!r} cannot be written: {error.strerror or error}.") from error
        command = ["python", "-m", "deltaexp", "--config-dir", str(self.folder), f"experiment={name}"]
        return {"path": str(path), "command": shlex.join(command)}

    def _base(self, delta_type: str) -> DeltaConfig:
        """Return the config that a delta type has where nothing is chosen."""
        if delta_type not in registry.known():
            raise ConfigError(unknown("delta_type", delta_type, registry.known()))
        if delta_type not in self.bases:
            self.bases[delta_type] = schema.composed([*self.overrides, f"delta_type={delta_type}"], self.search_path)[1]
        return self.bases[delta_type]

    def _delta_config(self, state: State) -> DeltaConfig:
        """Return the checked config of a state.

        Raises:
            ConfigError: If a key or a pattern is not allowed.
        """
        values = self._base(state.delta_type).to_dict()
        for key, text in state.keys.items():
            override = schema.parse([f"{key}={text}"])[0]
            if override.is_sweep_override():
                raise ConfigError(f"{key} is {text!r}, which are several values; give one.")
            values[key] = override.value()
        if state.patterns is not None:
            if len({len(patterns) for patterns in state.patterns}) > 1:
                reads, writes = state.patterns
                raise ConfigError(
                    f"The delta type {state.delta_type!r} goes on pairs, and here are {len(reads)} patterns of where it "
                    f"reads ({listing(reads, 4)}) and {len(writes)} of where it writes ({listing(writes, 4)}). "
                    "Choose as many of both."
                )
            values["modified_modules"] = [pattern for group in zip(*state.patterns, strict=True) for pattern in group]
        return DeltaConfig.from_dict(values)

    def _lists(self, state: State, bare: DeltaConfig) -> tuple[list[list[str]], bool | None]:
        """Return the patterns of a state, those of the defaults included, and how they are read."""
        if state.patterns is not None:
            return state.patterns, bare.common_structure
        filled = copy.deepcopy(bare)
        with contextlib.suppress(AddressingError):  # which counting will say
            targets.find(filled, self.model, self.outline.structure)  # writes the defaults into it
        return _lists(filled.modified_modules or [], bare.paired), filled.common_structure

    def _meant(self, state: State, bare: DeltaConfig) -> dict[str, Any]:
        """Return for every list of patterns what each of them means, and where that is in the rows."""
        lists, common_structure = self._lists(state, bare)
        answer: dict[str, Any] = {
            "lists": [],
            "marks": [],
            "whole": state.patterns is None and not (bare.modified_modules or bare.defaults()),
        }
        for patterns in lists:
            found = {pattern: self._units(pattern, bare, common_structure) for pattern in patterns}
            answer["lists"].append(
                [
                    {"pattern": pattern, "count": 0, "error": units}
                    if isinstance(units, str)
                    else {"pattern": pattern, "count": len(units), "error": None}
                    for pattern, units in ((pattern, found[pattern]) for pattern in patterns)
                ]
            )
            answer["marks"].append(self.outline.marks(_united(found.values())))
        return answer

    def _toggled(self, state: State, bare: DeltaConfig, toggle: Mapping[str, Any]) -> list[Proposal]:
        """Change a state by a click, and return the ways to name what is chosen then."""
        lists, common_structure = self._lists(state, bare)
        lists = [list(patterns) for patterns in lists]
        side = toggle["side"]
        wanted = set(_united(self._units(pattern, bare, common_structure) for pattern in lists[side]))
        if "pattern" in toggle:
            clicked = self._units(toggle["pattern"], bare)
            if isinstance(clicked, str):
                raise AddressingError(clicked)
        else:
            clicked = frozenset(self.outline.chosen(toggle["row"], toggle["digits"])) - {("", None)}
        if wanted >= clicked:
            wanted -= clicked
        else:
            # Either the whole of a fused projection is chosen, or slices of it.
            instead = {(name, part is not None) for name, part in clicked}
            wanted = {(name, part) for name, part in wanted if (name, part is None) not in instead} | clicked
        proposals = []
        if wanted:

            def meaning(pattern: str) -> frozenset[Unit]:
                units = self._units(pattern, bare)
                return frozenset() if isinstance(units, str) else units

            proposals = self.proposer.find(frozenset(wanted), meaning, bare.common_structure)
        lists[side] = proposals[0].patterns if proposals else []
        state.patterns = lists
        return proposals

    def _units(self, pattern: str, bare: DeltaConfig, *common_structure: bool | None) -> frozenset[Unit] | str:
        """Return what the engine takes a pattern to mean under the other keys of a config, or why it means nothing."""
        read = common_structure[0] if common_structure else bare.common_structure
        key = (pattern, read, repr(bare.layers), tuple(bare.exclude_modules))
        if key not in self.meanings:
            # A config of no type: what a type makes of the modules is no matter here.
            config = DeltaConfig("any", [pattern], bare.exclude_modules, common_structure=read, layers=bare.layers)
            try:
                _, sites = targets.find(config, self.model, self.outline.structure)
                self.meanings[key] = frozenset((site.name, site.role if site.rows else None) for site in sites)
            except AddressingError as error:
                self.meanings[key] = str(error)
        return self.meanings[key]

    def _counted(self, config: DeltaConfig) -> dict[str, Any]:
        """Return what a delta would train and save, by the means of `deltaexp.lab.plan`."""
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            delta_model = plan.attach(self.config, config, self.drawn)
            try:
                parts = plan.parts(delta_model, self.drawn)
                saved = delta_model.delta_tensors().values()
                counts = {
                    "trainable": sum(part["trainable"] for part in parts.values()),
                    "saved": sum(part["saved"] for part in parts.values()),
                    "bytes": sum(tensor.numel() * tensor.element_size() for tensor in saved),
                    "layers": len(delta_model.attachments),
                    "parts": parts,
                }
                notes = plan.odd(delta_model, self.model)
            finally:
                delta_model.detach()
        return {"counts": counts, "notes": [*notes, *(str(warning.message) for warning in said)]}

    def _faults(self, bare: DeltaConfig, marks: Sequence[Mapping[str, Any]]) -> dict[int, str]:
        """Return for the rows on whose modules the delta cannot be put why; examined is the first of each row."""
        found: dict[int, str] = {}
        if bare.paired or bare.common_structure is True:
            return found
        for row, offsets in list(marks[0]["rows"].items())[:EXAMINED]:
            name, part = self.outline.units[row][offsets[0]]
            if part is None:
                alone = dataclasses.replace(bare, modified_modules=[f"{addressing.REGEX}^{re.escape(name)}"])
                try:
                    plan.attach(self.config, alone, self.drawn).detach()
                except AddressingError as error:
                    found[row] = str(error)
        return found


def _keys(config: DeltaConfig) -> list[str]:
    """Return the keys of a delta that the page shows fields for."""
    return [f.name for f in dataclasses.fields(config) if f.name not in ("delta_type", "modified_modules")]


def _changes(config: DeltaConfig, base: DeltaConfig) -> dict[str, Any]:
    """Return the keys whose values are others than in ``base``."""
    return {key: getattr(config, key) for key in _keys(config) if getattr(config, key) != getattr(base, key)}


def _lists(patterns: Sequence[str] | None, paired: bool) -> list[list[str]]:
    """Return patterns as the page has them: of pairs two lists, where is read and where is written."""
    patterns = list(patterns or ())
    return [patterns[::2], patterns[1::2]] if paired else [patterns]


def _united(meanings: Iterable[frozenset[Unit] | str]) -> frozenset[Unit]:
    return frozenset(unit for units in meanings if not isinstance(units, str) for unit in units)
