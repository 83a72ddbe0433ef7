"""What the runs of one process have in common and need to be made once: the backbone, the data, the backbone's own scores.

A backbone is lent to one run after the other. Before it is lent again, what a run may have changed is set back, and then all
of it is compared with what was loaded: each tensor's digest, the tree of modules, their hooks and attributes. If anything
differs, it is loaded anew. So a run ends in the same bytes whether it shares or not.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from deltaexp.checksum import model_sha256
from deltaexp.digest_cache import model_digests
from deltaexp.lab import backbones, processes
from deltaexp.lab.backbones import Backbone
from deltaexp.lab.config import RunConfig
from deltaexp.lab.shortcuts import Shortcuts
from deltaexp.lab.taskconfig import TaskConfig
from deltaexp.lab.telling import Clock
from deltaexp.model import DeltaModel

T = TypeVar("T")
KEPT = 8
"""How many of the other things are remembered, those that were used last."""
PLAIN = (int, float, str, bool, type(None))


class Shared:
    """What is kept between runs.

    Args:
        active: Whether anything is kept; if not, every run makes its own.
    """

    def __init__(self, active: bool = True) -> None:
        self.active = active
        self.loads = 0
        """How often a backbone was loaded."""
        self._kept: tuple[str, Backbone, _State] | None = None
        self._lent: tuple[str, Backbone, _State] | None = None
        self._made: dict[str, Any] = {}

    joined: dict[str, Any] | None = None
    """With how many runs a run was trained in one, and what part of the time that took; None for one that was not."""

    def once(self, key: Any, make: Callable[[], T]) -> T:
        """Return what ``make`` makes, which was made before where something with this key, of JSON, was."""
        if not self.active:
            return make()
        name = json.dumps(key, sort_keys=True, default=dataclasses.asdict)
        found = self._made.pop(name) if name in self._made else make()
        self._made[name] = found
        while len(self._made) > KEPT:
            del self._made[next(iter(self._made))]
        return found

    def backbone(self, config: RunConfig, task: TaskConfig) -> Backbone:
        """Return what `deltaexp.lab.backbones.load` would; what its checkpoint lacks is initialised from the present seed."""
        if not self.active or not _shareable(config):
            self._kept, self._lent = None, None
            return backbones.load(config.backbone, task)
        key = json.dumps([config.backbone, task], sort_keys=True, default=dataclasses.asdict)
        kept, self._kept = self._kept, None
        if kept is not None and kept[0] == key and kept[2].is_restored():
            self._lent = kept
            kept[2].initialise_anew()
        else:
            kept = None  # which makes room
            backbone = backbones.load(config.backbone, task)
            self.loads += 1
            self._lent = key, backbone, _State(backbone)
        return self._lent[1]

    @contextlib.contextmanager
    def untouched(self, config: RunConfig, task: TaskConfig, delta_model: DeltaModel) -> Iterator[nn.Module]:
        """Yield the backbone of a run without its delta: the one that was lent if it is as it was, else one loaded for this.

        Whoever puts a delta into it takes it out again.
        """
        if self._lent is not None:
            with delta_model.detached() as plain:
                if self._lent[2].is_restored():
                    yield plain
                    return
                self._lent = None
        device = next(delta_model.backbone_model.parameters()).device
        yield backbones.moved(backbones.load(config.backbone, task).model, device)

    def give_back(self, delta_model: DeltaModel) -> None:
        """Take a run's delta out of the backbone that was lent to it, which is kept for the next run."""
        if self._lent is not None:
            self._kept, self._lent = self._lent, None
            delta_model.detach()
            self._kept[1].model.to(self._kept[2].device)

    def train(self, trainer: Any, short: Shortcuts, checkpoint: Path | None, clock: Clock) -> None:
        """Have a run trained, from a checkpoint on where there is one.

        Args:
            trainer: Its trainer.
            short: What it leaves out.
            checkpoint: The folder of the checkpoint.
            clock: What measures the run.
        """
        trainer.train_from(checkpoint)

    def put_aside(self, delta_model: DeltaModel) -> bool:
        """Take a run's delta out of the backbone, for another run to use that; say whether it is as it was when it was lent."""
        assert self._lent is not None
        delta_model.detach()
        self._kept, self._lent = self._lent, None
        self._kept[1].model.to(self._kept[2].device)
        return self._kept[2].is_restored()

    def take_up(self, device: torch.device) -> Any:
        """Lend the backbone again to a run that has put its delta aside, on a device, and return it."""
        if self._lent is None:
            self._lent, self._kept = self._kept, None
        assert self._lent is not None
        return self._lent[1].model.to(device)

    def settings(self) -> list[tuple[Any, dict[str, Any]]]:
        """Return the configs of the backbone that is lent, with what is in them."""
        return [] if self._lent is None else [(config, copy.deepcopy(vars(config))) for config in self._lent[2].of_model()]

    def set(self, settings: list[tuple[Any, dict[str, Any]]]) -> None:
        """Give configs back what was in them."""
        _set(settings)

    def clear(self) -> None:
        """Keep nothing any more."""
        self._kept, self._lent = None, None
        self._made.clear()


def _shareable(config: RunConfig) -> bool:
    """Say whether a run uses its backbone in a way that can be compared with what was loaded."""
    backbone, trainer = config.backbone, config.trainer
    special = backbone.quantization or backbone.device_map or backbone.trust_remote_code
    return not (special or trainer.compile or trainer.sharding) and processes.count() == 1


class _State:
    """A backbone as it was when it had been loaded.

    Args:
        backbone: The backbone.
    """

    def __init__(self, backbone: Backbone) -> None:
        self.model: Any = backbone.model
        self.missing = {name for name, _ in self.model.named_parameters() if name in backbone.missing}
        self.device = next(self.model.parameters()).device
        self.configs = [(config, copy.deepcopy(vars(config))) for config in self.of_model()]
        self.modes = {name: module.training for name, module in self.model.named_modules()}
        self.trained = {name: parameter.requires_grad for name, parameter in self.model.named_parameters()}
        self.tree, self.digest = self._tree(), self._digest()

    def initialise_anew(self) -> None:
        """Give the parameters that the checkpoint lacked new values, as loading it now would."""
        if not self.missing:
            return
        # transformers initialises the modules without this mark, and in them the tensors without it.
        marks = [module for module in self.model.modules() if module.__dict__.pop("_is_hf_initialized", False)]
        parameters = dict(self.model.named_parameters())
        for name, tensor in [*parameters.items(), *self.model.named_buffers()]:
            tensor._is_hf_initialized = name not in self.missing
        self.model.initialize_weights()
        for tensor in [*parameters.values(), *self.model.buffers()]:
            del tensor._is_hf_initialized
        for module in marks:
            module._is_hf_initialized = True

    def is_restored(self) -> bool:
        """Set back what a run changes, and say whether the backbone is as it was then."""
        _set(self.configs)
        for name, module in self.model.named_modules():
            module.training = self.modes.get(name, False)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self.trained.get(name, False))
            parameter.grad = None
        return self._tree() == self.tree and self._digest() == self.digest

    def of_model(self) -> list[Any]:
        """Return all configs of the backbone."""
        every = [getattr(module, name, None) for module in self.model.modules() for name in ("config", "generation_config")]
        return list({id(config): config for config in every if config is not None}.values())

    def _tree(self) -> list[Any]:
        """Return the modules with all that is plain in them, and how many hooks hang on each."""
        return [
            (
                name,
                type(module),
                {key: value if isinstance(value, PLAIN) else None for key, value in vars(module).items()},
                {key: len(value) for key, value in vars(module).items() if key.endswith("hooks")},
            )
            for name, module in self.model.named_modules()
        ]

    def _digest(self) -> str:
        """Return a digest of all tensors, apart from those that the checkpoint lacked."""
        tensors = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        return model_sha256(model_digests(self.model, {n: t.detach() for n, t in tensors.items() if n not in self.missing}))


def _set(settings: list[tuple[Any, dict[str, Any]]]) -> None:
    for config, values in settings:
        vars(config).clear()
        vars(config).update(copy.deepcopy(values))


OF_PROCESS = Shared()
"""What the jobs of a sweep share that are executed in this process."""
