"""Delta models: a delta attached to a backbone, trained, saved, loaded and taken out again."""

from __future__ import annotations

import contextlib
import copy
import inspect
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from torch import nn

from deltaexp import __version__, addressing, checkpoint, hub, registry, verification
from deltaexp.card import plain_card
from deltaexp.checksum import digests
from deltaexp.errors import AddressingError, CheckpointError, ConfigError, DeltaExpError, listing
from deltaexp.registry import DeltaConfig, SavedWith
from deltaexp.structure import backbone_modules, backbone_parameters, backbone_tensors, common_names
from deltaexp.surgery import Attachment, prepare
from deltaexp.verification import HashCheck

OWNED = "_deltaexp_owned"
"""Attribute of a backbone: the names of its own parameters that an attached delta has taken charge of."""


class DeltaModel:
    """A delta attached to a backbone.

    Making one attaches it: the backbone's forward pass contains the delta from then on, and the backbone is used, trained
    and saved as before. What belongs to the delta are the layers it put in and the parameters that ``unfrozen_modules``
    names; `freeze_module` freezes the rest, `save_finetuned` saves exactly these, `detach` takes them out.

    Args:
        backbone_model: Any torch module.
        config: The delta's config; keys of the config may be given by name instead.

    Raises:
        ConfigError: If a key or value is not allowed.
        AddressingError: If a pattern matches no module, or one that this type of delta cannot modify.
    """

    config_class: ClassVar[type[DeltaConfig] | None] = None
    """The config of the direct classes, `LoraModel` and so on."""

    def __init__(self, backbone_model: nn.Module, config: DeltaConfig | None = None, **keys: Any) -> None:
        if self.config_class is not None and config is None:
            config = DeltaConfig.from_dict({"delta_type": self.config_class.delta_type, **keys})
        elif config is None or keys:
            raise ConfigError("Give either a config or, to a class such as LoraModel, the keys of its config.")
        self.backbone_model = backbone_model
        self.config = copy.deepcopy(config)
        if self.config.modified_modules is None:
            # Written out, so that a saved delta still means the same modules when a later version's defaults differ.
            self.config.modified_modules = list(config.default_modules)
            self.config.common_structure = True
        self.hash_check: HashCheck | None = None
        """What the check of a delta loaded by `from_finetuned` found; None for one that was not loaded."""
        self.targets = self._resolve(default=config.modified_modules is None)
        """For every pattern of ``modified_modules``, the names of the modules that it means."""
        chosen = {name for names in self.targets.values() for name in names}
        ordered = [name for name, _ in backbone_modules(backbone_model) if name in chosen]
        self.attachments: list[Attachment] = prepare(config, ordered, backbone_model)
        self.attached = False
        # Parameters of the backbone that the delta owns, by name: what they were without it, and with it.
        self._without: dict[str, torch.Tensor] = {}
        self._with: dict[str, torch.Tensor] = {}
        self.attach()

    def _resolve(self, default: bool) -> dict[str, list[str]]:
        """Find the modules to modify; ``default`` says that the delta type chose them, not the user."""
        try:
            return addressing.resolve(
                self.config.modified_modules or [],
                [name for name, _ in backbone_modules(self.backbone_model)],
                common=common_names(self.backbone_model),
                common_structure=self.config.common_structure,
                exclude=self.config.exclude_modules,
            )
        except AddressingError as error:
            if not default:
                raise
            raise AddressingError(
                f"The default modules of {self.config.delta_type!r} are not found in this "
                f"{type(self.backbone_model).__name__}: {error} Name the modules to modify in modified_modules."
            ) from error

    def attach(self) -> None:
        """Put the delta into the backbone; a second call changes nothing."""
        if self.attached:
            return
        done: list[Attachment] = []
        try:
            for attachment in self.attachments:
                attachment.insert()
                done.append(attachment)
            self._own()
        except DeltaExpError:
            for attachment in done:
                attachment.remove()
            raise
        self.attached = True

    def detach(self) -> None:
        """Take the delta out, which leaves the backbone bit for bit as it was; a second call changes nothing."""
        if not self.attached:
            return
        for attachment in self.attachments:
            attachment.remove()
        parameters = dict(self.backbone_model.named_parameters())
        self._with = {name: parameters[name].detach().clone() for name in self._without}
        _assign(parameters, self._without)
        self.backbone_model.__dict__.setdefault(OWNED, set()).difference_update(self._without)
        if not self.backbone_model.__dict__[OWNED]:
            del self.backbone_model.__dict__[OWNED]
        self.attached = False

    @contextlib.contextmanager
    def detached(self) -> Iterator[nn.Module]:
        """Within this context the backbone is without the delta."""
        was = self.attached
        self.detach()
        try:
            yield self.backbone_model
        finally:
            if was:
                self.attach()

    def freeze_module(self, exclude: Sequence[str] | None = None) -> None:
        """Freeze the backbone except for what is to be trained, which is also what is saved.

        Other deltas in the same backbone are left as they are.

        Args:
            exclude: Patterns of modules or parameters that stay trainable; "deltas" stands for this delta's layers. They
                become the config's ``unfrozen_modules``, whose present value is taken where nothing is given.

        Raises:
            AddressingError: If a pattern matches nothing.
        """
        before = self.config.unfrozen_modules
        if exclude is not None:
            self.config.unfrozen_modules = list(exclude)
        parameters = backbone_parameters(self.backbone_model)
        try:
            owned = self._unfrozen_names(parameters)
            if self.attached:
                self._own()
            else:  # `attach` takes charge of what is new
                self._without = {name: value for name, value in self._without.items() if name in owned}
                self._with = {name: value for name, value in self._with.items() if name in owned}
        except AddressingError:
            self.config.unfrozen_modules = before
            raise
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in owned)
        for attachment in self.attachments:
            attachment.layer.requires_grad_("deltas" in self.config.unfrozen_modules)

    def _own(self) -> None:
        """Take charge of the parameters that ``unfrozen_modules`` names, and let go of those it no longer does."""
        parameters = backbone_parameters(self.backbone_model)
        owned = self._unfrozen_names(parameters)
        # Kept with the backbone, so that a copy of it knows as well; two owners could not both restore what was.
        everyones: set[str] = self.backbone_model.__dict__.setdefault(OWNED, set())
        mine = set(self._without) if self.attached else set()
        taken = sorted(owned & (everyones - mine))
        if taken:
            raise AddressingError(
                f"{listing(taken, 3)} in unfrozen_modules belongs to another delta that is attached to this backbone. "
                "Detach that one first, or leave the module to one of the two."
            )
        _assign(parameters, {name: value for name, value in self._without.items() if name not in owned})
        self._without = {n: self._without.get(n, parameters[n]).detach().clone() for n in parameters if n in owned}
        _assign(parameters, {name: value for name, value in self._with.items() if name in owned})
        self._with = {}  # from here on the parameters themselves are what is trained
        everyones -= mine
        everyones |= owned

    def _unfrozen_names(self, parameters: Mapping[str, nn.Parameter]) -> set[str]:
        """Return the names of the backbone's parameters that ``unfrozen_modules`` means."""
        # A tied parameter may be named by any of its names; it is saved under its first.
        first = {id(parameter): name for name, parameter in parameters.items()}
        names = [name for name, _ in self.backbone_model.named_parameters(remove_duplicate=False)]
        tied = dict(self.backbone_model.named_parameters(remove_duplicate=False))
        own = [name for name in names if id(tied[name]) in first]
        result = set()
        for pattern in self.config.unfrozen_modules:
            if pattern == "deltas":
                continue
            found = {first[id(tied[name])] for name in own if addressing.covers(pattern, name)}
            if not found:
                addressing.resolve([pattern], [*own, *dict(backbone_modules(self.backbone_model))])
                raise AddressingError(f"The pattern {pattern!r} in unfrozen_modules means no parameter.")
            result |= found
        return result

    def base_tensors(self) -> dict[str, torch.Tensor]:
        """Return what the delta does not own: the backbone's other parameters and its persistent buffers."""
        return {n: value for n, value in backbone_tensors(self.backbone_model).items() if n not in self._without}

    def delta_tensors(self) -> dict[str, torch.Tensor]:
        """Return what is saved: the delta's layers and the parameters it owns, under their names in a checkpoint."""
        result: dict[str, torch.Tensor] = {}
        for attachment in self.attachments:
            # Under the type's own name, also where another delta on the module made this one "lora_1".
            prefix = ".".join(part for part in (attachment.site, self.config.attribute) if part)
            result.update(attachment.layer.named_parameters(prefix=prefix))
        parameters = backbone_parameters(self.backbone_model) if self.attached else self._with
        result.update({name: parameters[name] for name in self._without})
        return result

    def save_finetuned(
        self, save_directory: str | Path, *, card: str | None = None, backbone_name: str | None = None
    ) -> checkpoint.Manifest:
        """Save the delta: tensors, config, digests and a model card (see `deltaexp.checkpoint`).

        Args:
            save_directory: Where to; made if it does not exist.
            card: Text of the model card; a plain one is written where none is given.
            backbone_name: What to record as the backbone's name, if not the name it was loaded under.

        Raises:
            CheckpointError: If the folder cannot be written; what it held before is kept.
        """
        stray = [n for n, p in backbone_parameters(self.backbone_model).items() if p.requires_grad and n not in self._without]
        if stray:
            warnings.warn(
                f"{len(stray)} parameters of the backbone are trainable and not part of the delta ({listing(stray, 3)}): "
                "what they learnt is not saved. Call freeze_module(), or name them in unfrozen_modules, before training.",
                stacklevel=2,
            )
        self.config.saved_with = self._record(backbone_name)
        text = plain_card(self.config) if card is None else card
        return checkpoint.write(save_directory, self.config, self.delta_tensors(), digests(self.base_tensors()), text)

    def _record(self, name: str | None) -> SavedWith:
        config = getattr(self.backbone_model, "config", None)
        name = name or getattr(config, "_name_or_path", None) or None
        if name and Path(name).is_dir():
            name = Path(name).name  # where a folder lies is nobody else's business
        return SavedWith(
            backbone_class=type(self.backbone_model).__name__,
            backbone_checkpoint_name=name,
            backbone_revision=getattr(config, "_commit_hash", None),
            deltaexp_version=__version__,
            transformers_version=transformers.__version__,
        )

    @classmethod
    def from_finetuned(
        cls, path_or_repo: str | Path, backbone_model: nn.Module, check_hash: bool = True, **hub_options: Any
    ) -> DeltaModel:
        """Load a saved delta onto its backbone, checked, with everything else frozen.

        Args:
            path_or_repo: A folder, or a repository of the Hugging Face Hub such as ``"DeltaHub/sst2-t5-base"``.
            backbone_model: The backbone that the delta was trained on.
            check_hash: Compare the md5 of the model after loading with the one of the trained model.
            **hub_options: For a repository: ``revision``, ``token``, ``cache_dir``, ``force_download``,
                ``local_files_only``.

        Raises:
            CheckpointError: If it is no delta, is damaged or does not fit; the backbone is left as it was.
            BackboneMismatchError: If the backbone is not the one that the delta was trained on.
            HubError: If the repository cannot be fetched.
        """
        saved = checkpoint.read(hub.fetch(path_or_repo, **hub_options))
        if cls.config_class is not None and not isinstance(saved.config, cls.config_class):
            raise CheckpointError(
                f"{str(path_or_repo)!r} holds a delta of type {saved.config.delta_type!r}, and {cls.__name__} loads "
                f"{cls.config_class.delta_type!r}. Use AutoDeltaModel.from_finetuned, which loads any type."
            )
        if check_hash:
            verification.check_class(saved, type(backbone_model).__name__)
            verification.check_shapes(saved, backbone_tensors(backbone_model))
        was_trainable = {parameter: parameter.requires_grad for parameter in backbone_model.parameters()}
        delta_model = direct_class(type(saved.config))(backbone_model, saved.config)
        try:
            delta_model.load_tensors(saved.tensors, str(saved.folder))
            if check_hash:
                delta_model.hash_check = verification.check_model(
                    saved, digests(delta_model.base_tensors()), digests(delta_model.delta_tensors())
                )
            else:
                delta_model.hash_check = verification.skipped(saved)
            delta_model.freeze_module()
        except BaseException:
            delta_model.detach()
            for parameter, trainable in was_trainable.items():
                parameter.requires_grad_(trainable)
            raise
        return delta_model

    def load_tensors(self, tensors: Mapping[str, torch.Tensor], where: str) -> None:
        """Set the delta's tensors, all of them and no others.

        Args:
            tensors: The values under the names of `delta_tensors`.
            where: What to call their source in an error.

        Raises:
            CheckpointError: If a name, shape or dtype does not fit; then nothing is set.
        """
        own = self.delta_tensors()
        checkpoint.check_names(own, tensors, f"The delta in {where!r}", "its config describes on this backbone")
        wrong = [
            f"{name} has shape {list(tensors[name].shape)} where {list(value.shape)} is needed"
            for name, value in own.items()
            if tensors[name].shape != value.shape
        ]
        wrong += [
            f"{name} has dtype {tensors[name].dtype} and the backbone's is {value.dtype}"
            for name, value in own.items()
            if name in self._without and tensors[name].dtype != value.dtype
        ]
        if wrong:
            raise CheckpointError(
                f"The delta in {where!r} does not fit this backbone: {listing(wrong, 3)}. Nothing was loaded; load it onto "
                "the backbone it was trained on."
            )
        for name, value in own.items():
            # A layer takes the saved dtype, whatever the backbone's is.
            value.data = tensors[name].to(value.device, copy=True)

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Return every parameter of the backbone, deltas included, that requires a gradient."""
        return {name: p for name, p in self.backbone_model.named_parameters() if p.requires_grad}

    def counts(self) -> dict[str, int]:
        """Return the numbers of parameters: of the backbone, trainable, and in the saved delta."""
        return {
            "backbone": sum(p.numel() for p in backbone_parameters(self.backbone_model).values()),
            "trainable": sum(p.numel() for p in self.trainable_parameters().values()),
            "delta": sum(p.numel() for p in self.delta_tensors().values()),
        }

    def log(self, visualization: bool = True) -> None:
        """Print the structure, and how much of it is trainable and delta."""
        from deltaexp.visualize import Visualization

        view = Visualization(self.backbone_model)
        if visualization:
            view.structure_graph()
        view.print_counts(self.counts())


def _assign(parameters: Mapping[str, nn.Parameter], values: Mapping[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, value in values.items():
            parameters[name].copy_(value)


def direct_class(config_class: type[DeltaConfig]) -> type[DeltaModel]:
    """Return the class that makes one type of delta: for `LoraConfig` it is `LoraModel`."""
    name = config_class.__name__.removesuffix("Config") + "Model"
    module = sys.modules[__name__]
    found = module.__dict__.get(name)
    if found is None or found.config_class is not config_class:
        doc = f"{inspect.getdoc(config_class)}\n\n{inspect.getdoc(DeltaModel)}"
        found = type(name, (DeltaModel,), {"config_class": config_class, "__doc__": doc, "__module__": __name__})
        setattr(module, name, found)  # where pickle looks for it
    return found


def __getattr__(name: str) -> type[DeltaModel]:
    """Find `LoraModel` and its kin by name (PEP 562)."""
    for delta_type in registry.known() if name.endswith("Model") else []:
        config_class = registry.get(delta_type)
        if config_class.__name__ == name.removesuffix("Model") + "Config":
            return direct_class(config_class)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
