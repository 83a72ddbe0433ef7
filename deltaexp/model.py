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

from deltaexp import (
    __version__,
    checkpoint,
    hub,
    interop,
    merging,
    ownership,
    planning,
    quantised,
    registry,
    surgery,
    targets,
    verification,
)
from deltaexp import probe as probes
from deltaexp.card import plain_card
from deltaexp.checksum import digests
from deltaexp.digest_cache import digesting, model_digests
from deltaexp.errors import AddressingError, CheckpointError, ConfigError, DeltaExpError, TensorDtypeError, listing
from deltaexp.ownership import Ownership, originals
from deltaexp.registry import DeltaConfig, SavedWith
from deltaexp.structure import backbone_parameters, backbone_tensors, common_structure
from deltaexp.surgery import Attachment, prepare
from deltaexp.verification import HashCheck


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
        self._put(backbone_model, config)

    def _put(self, backbone_model: nn.Module, config: DeltaConfig, structure: targets.Structure | None = None) -> None:
        """Attach a new delta; ``structure`` is the backbone's, where that is known already."""
        quantised.settle(backbone_model)
        self.backbone_model = backbone_model
        self.config = copy.deepcopy(config)
        self.hash_check: HashCheck | None = None
        """What the check of a delta loaded by `from_finetuned` found; None for one that was not loaded."""
        self.combination: Any = None
        """How `deltaexp.combine` made it, a `deltaexp.combining.Combination`; None for one that it did not make."""
        self.targets, sites = targets.find(self.config, backbone_model, structure)
        """For every pattern of ``modified_modules``, the names of the modules that it means."""
        self.attachments: list[Attachment] = prepare(self.config, sites)
        self._ownership = Ownership(backbone_model)
        self._in_place = ownership.in_place(self.config, sites, backbone_model)
        """The backbone's own parameters that the type trains in place, under their first names."""
        if not (self.attachments or self._in_place or config.trains_nothing):
            raise AddressingError(
                f"The delta type {config.delta_type!r} finds nothing to modify in {listing(self.targets)}. "
                "Name other modules in modified_modules."
            )
        self.merge_record: merging.Merge | None = None
        self.attached = False
        self.attach()

    def attach(self) -> None:
        """Put the delta into the backbone; a second call changes nothing."""
        if self.attached:
            return
        surgery.insert(self.attachments)
        try:
            self._ownership.take(self._owned_names())
        except DeltaExpError:
            surgery.remove(self.attachments)
            raise
        self.attached = True

    def detach(self) -> None:
        """Take the delta out, which leaves the backbone bit for bit as it was; a second call changes nothing."""
        if not self.attached:
            return
        if self.merged:
            merging.restore(self)
        else:
            surgery.remove(self.attachments)
        self._ownership.release()
        self.attached = False

    @contextlib.contextmanager
    def detached(self) -> Iterator[nn.Module]:
        """Within this context the backbone is without the delta."""
        was, merged = self.attached, self.merged
        self.detach()
        try:
            yield self.backbone_model
        finally:
            if was:
                self.attach()
            if merged:
                self.merge()

    @property
    def merged(self) -> bool:
        """Whether the delta is attached by being folded into the backbone's weights."""
        return self.merge_record is not None

    def merge(self, inputs: Mapping[str, Any] | None = None) -> merging.MergeReport:
        """Attach the delta by folding its layers into the weights they change, and return the measured error.

        Until `unmerge` or `detach` the layers are out of the module tree and cannot be trained; what is saved is the same.
        Parameters that the delta trains in place stay as they are. A second call returns the report of the first.

        Args:
            inputs: A batch for the backbone, by keywords, on which the logits before and after are compared.

        Raises:
            DeltaExpError: If a layer cannot be folded exactly (see `deltaexp.merging`); then nothing has changed.
        """
        return merging.merge(self, inputs)

    def unmerge(self) -> None:
        """Give the weights their values back, bit for bit, and put the layers in again; nothing where it is not merged."""
        merging.unmerge(self)

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
        try:
            owned = self._owned_names()
            if self.attached:
                self._ownership.take(owned)
            else:  # `attach` takes charge of what is new
                self._ownership.forget(owned)
        except AddressingError:
            self.config.unfrozen_modules = before
            raise
        deltas = "deltas" in self.config.unfrozen_modules
        trained = ownership.unfrozen(self.config, self.backbone_model) | (self._in_place if deltas else set())
        others = set(originals(self.backbone_model)) - owned
        for name, parameter in backbone_parameters(self.backbone_model).items():
            if name not in others:
                parameter.requires_grad_(name in trained)
        for attachment in self.attachments:
            attachment.layer.requires_grad_(deltas)

    def _owned_names(self) -> set[str]:
        """Return the names of the backbone's parameters that the delta owns: its type's and ``unfrozen_modules``'."""
        return ownership.unfrozen(self.config, self.backbone_model) | self._in_place

    def base_tensors(self) -> dict[str, torch.Tensor]:
        """Return what the delta was put on: the backbone's parameters as they were without it, and its persistent buffers.

        What ``unfrozen_modules`` names is left out: a new head has no value that it had before.
        """
        without, heads = originals(self.backbone_model), ownership.unfrozen(self.config, self.backbone_model)
        tensors = backbone_tensors(self.backbone_model)
        return {name: without.get(name, value) for name, value in tensors.items() if name not in heads}

    def delta_tensors(self) -> dict[str, torch.Tensor]:
        """Return what is saved: the delta's layers and the parameters it owns, under their names in a checkpoint."""
        return {**surgery.saved_tensors(self.attachments), **self._ownership.values()}

    def penalty(self) -> torch.Tensor | None:
        """Return what the delta's type adds to the loss while training; None where it adds nothing."""
        return self.config.penalty([attachment.layer for attachment in self.attachments])

    def after_step(self, step: int, total_steps: int) -> None:
        """Tell the delta's type that optimizer step number ``step``, from 1, is done; the gradients must be there still."""
        self.config.after_step([attachment.layer for attachment in self.attachments], step, total_steps)

    def learning_rate_factors(self) -> dict[nn.Parameter, float]:
        """Return what the learning rate is multiplied by for the delta's parameters; 1 for those that are not in it.

        An optimizer takes them as ``[{"params": [p], "lr": factor * lr} for p, factor in factors.items()]``.
        """
        return {
            tensor: factor
            for name, tensor in self.delta_tensors().items()
            if isinstance(tensor, nn.Parameter) and (factor := self.config.learning_rate_factor(name)) != 1.0
        }

    def save_finetuned(
        self,
        save_directory: str | Path,
        *,
        card: str | None = None,
        backbone_name: str | None = None,
        probe: Mapping[str, Any] | None = None,
    ) -> checkpoint.Manifest:
        """Save the delta: tensors, config, digests and a model card (see `deltaexp.checkpoint`).

        Args:
            save_directory: Where to; made if it does not exist.
            card: Text of the model card; a plain one is written where none is given.
            backbone_name: What to record as the backbone's name, if not the name it was loaded under.
            probe: A batch for the backbone, by keywords, to save with the logits on it (see `from_finetuned`).

        Raises:
            CheckpointError: If the folder cannot be written; what it held before is kept.
        """
        owned = self._owned_names() | set(originals(self.backbone_model))
        stray = [n for n, p in backbone_parameters(self.backbone_model).items() if p.requires_grad and n not in owned]
        if stray:
            warnings.warn(
                f"{len(stray)} parameters of the backbone are trainable and not part of the delta ({listing(stray, 3)}): "
                "what they learnt is not saved. Call freeze_module(), or name them in unfrozen_modules, before training.",
                stacklevel=2,
            )
        self.config.saved_with = self._record(backbone_name)
        text = plain_card(self.config) if card is None else card
        base = model_digests(self.backbone_model, self.base_tensors())
        sample = None if probe is None else probes.record(self.backbone_model, probe)
        settings = verification.settings(self.backbone_model)
        return checkpoint.write(save_directory, self.config, self.delta_tensors(), base, text, sample, settings)

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
            origin=self.config.saved_with.origin,
        )

    @classmethod
    def from_finetuned(
        cls,
        path_or_repo: str | Path,
        backbone_model: nn.Module,
        check_hash: bool = True,
        check_probe: bool = False,
        **hub_options: Any,
    ) -> DeltaModel:
        """Load a saved delta onto its backbone, checked, with everything else frozen.

        Args:
            path_or_repo: A folder, or a repository of the Hugging Face Hub such as ``"DeltaHub/sst2-t5-base"``.
            backbone_model: The backbone that the delta was trained on.
            check_hash: Compare the md5 of the model after loading with the one of the trained model.
            check_probe: Compare the logits on the probe batch that was saved with the delta, too.
            **hub_options: For a repository: ``revision``, ``token``, ``cache_dir``, ``force_download``,
                ``local_files_only``.

        Raises:
            CheckpointError: If it is no delta, is damaged or does not fit; the backbone is left as it was.
            BackboneMismatchError: If the backbone is not the one that the delta was trained on.
            ProbeMismatchError: If the logits differ, or none were saved.
            HubError: If the repository cannot be fetched.
        """
        folder = hub.fetch(path_or_repo, needs="all" if check_probe else "delta", **hub_options)
        saved = interop.read(folder, backbone_model)
        if cls.config_class is not None and not isinstance(saved.config, cls.config_class):
            raise CheckpointError(
                f"{str(path_or_repo)!r} holds a delta of type {saved.config.delta_type!r}, and {cls.__name__} loads "
                f"{cls.config_class.delta_type!r}. Use AutoDeltaModel.from_finetuned, which loads any type."
            )
        revision = getattr(getattr(backbone_model, "config", None), "_commit_hash", None)
        # Other threads hash the backbone while the delta is put into it, which leaves the memory of its tensors alone.
        without = {**backbone_tensors(backbone_model), **originals(backbone_model)} if check_hash else {}
        with digesting(backbone_model, without, saved.algorithm) as digested:
            verification.check_saved(saved, everything=False)
            if check_hash:
                verification.check_backbone(saved, backbone_model, without, revision)
            structure = common_structure(backbone_model)
            planning.check(saved.config, backbone_model, saved.tensors, str(saved.folder), structure)
            was_trainable = {parameter: parameter.requires_grad for parameter in backbone_model.parameters()}
            delta_model = object.__new__(direct_class(type(saved.config)))
            delta_model._put(backbone_model, saved.config, structure)
            try:
                delta_model.load_tensors(saved.tensors, str(saved.folder))
                if check_hash:
                    heads = ownership.unfrozen(delta_model.config, backbone_model)
                    base = {name: digest for name, digest in digested().items() if name not in heads}
                    delta = digests(delta_model.delta_tensors(), saved.algorithm)
                    delta_model.hash_check = verification.check_model(saved, base, delta, revision)
                    verification.check_settings(saved, verification.settings(backbone_model))
                else:
                    delta_model.hash_check = verification.skipped(saved)
                delta_model.freeze_module()
                if check_probe:
                    probes.compare(backbone_model, checkpoint.read_probe(saved) or {})
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
        if self.merged:
            raise CheckpointError(f"The delta in {where!r} cannot be loaded into one that is merged; call unmerge() first.")
        own, owned = self.delta_tensors(), self._ownership.values()
        checkpoint.check_names(own, tensors, f"The delta in {where!r}", "its config describes on this backbone")
        planning.check_shapes({name: tuple(value.shape) for name, value in own.items()}, tensors, where)
        for name, value in own.items():
            found = tensors[name].dtype
            # A layer takes the saved dtype, whatever the backbone's is; a parameter of the backbone has to fit.
            if found != value.dtype if name in owned else found.is_floating_point != value.dtype.is_floating_point:
                raise TensorDtypeError(
                    f"The delta in {where!r} does not fit this backbone: {name} has dtype {found}, and {value.dtype} is "
                    "needed. Nothing was loaded; load it onto the backbone it was trained on."
                )
        for name, value in own.items():
            value.data = tensors[name].to(value.device, copy=True)

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Return every parameter of the backbone, deltas included, that requires a gradient."""
        return {name: p for name, p in self.backbone_model.named_parameters() if p.requires_grad}

    def counts(self) -> dict[str, int]:
        """Return the numbers of parameters: of the backbone, trainable, and in the saved delta."""
        return {
            "backbone": sum(quantised.numel(p) for p in backbone_parameters(self.backbone_model).values()),
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
