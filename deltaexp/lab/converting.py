"""Exporting and importing deltas from the command line: the backbone is loaded, the delta put on it, and written anew."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from torch import nn

from deltaexp import checkpoint, hub, interop
from deltaexp.auto import AutoDeltaConfig
from deltaexp.errors import CheckpointError, DeltaExpError
from deltaexp.interop import opendelta, peft_files
from deltaexp.lab import backbones
from deltaexp.lab.config import RunConfig
from deltaexp.model import DeltaModel
from deltaexp.verification import HashCheck

AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}
"""What loads a backbone for each task of PEFT's."""


def export(
    place: str, out: str, to: str, config: RunConfig, *, revision: str | None = None, console: Console | None = None
) -> int:
    """Write a saved delta in another format, and print what was written.

    Args:
        place: A folder or a repository.
        out: The new folder.
        to: The format, one of `deltaexp.interop.FORMATS`.
        config: Names the backbone.
        revision: The revision of the repository.
        console: Where to print; standard output where none is given.

    Raises:
        DeltaExpError: If the delta cannot be loaded on this backbone, or the format cannot hold it.
    """
    console = console or Console(highlight=False, soft_wrap=True)
    folder = hub.fetch(place, revision=revision, needs="all")
    backbone = _backbone(config, folder)
    delta_model = DeltaModel.from_finetuned(folder, backbone_model=backbone)
    tokenizer = None
    if to == "merged":
        _name_labels(backbone, folder)
        tokenizer = _tokenizer(config)
    text = interop.export(delta_model, out, to, tokenizer=tokenizer)
    console.print(text, markup=False)
    return 0


def import_(place: str, out: str, config: RunConfig, *, revision: str | None = None, console: Console | None = None) -> int:
    """Save a delta of another library as one of deltaexp, and print what is known of it.

    Raises:
        DeltaExpError: If it is none, or does not fit this backbone.
    """
    console = console or Console(highlight=False, soft_wrap=True)
    folder = hub.fetch(place, revision=revision, needs="all")
    if (folder / checkpoint.WEIGHTS).exists():
        raise CheckpointError(f"{place!r} holds a delta of deltaexp already. Copy it as it is, or write it for others: export.")
    backbone = _backbone(config, folder)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*whether this is the right backbone is unknown")  # said below
        delta_model = DeltaModel.from_finetuned(folder, backbone_model=backbone)
    record = delta_model.config.saved_with
    name = record.backbone_checkpoint_name or peft_files.public_name(config.backbone.source.partition(":")[2] or None)
    delta_model.save_finetuned(out, backbone_name=name)
    console.print(
        f"Saved a {delta_model.config.delta_type} delta of {record.origin} to {out!r}: {delta_model.counts()['delta']:,} "
        f"parameters on a {type(backbone).__name__}.",
        markup=False,
    )
    if delta_model.hash_check is HashCheck.UNKNOWN:
        console.print(
            f"Whether it was trained on this backbone, {config.backbone.name or name}, is unknown: {record.origin} records "
            "nothing that could be compared. From now on it is known: digests of this backbone and of the delta were saved.",
            markup=False,
        )
    return 0


def _backbone(config: RunConfig, folder: Path) -> nn.Module:
    """Load the backbone as the class for which the delta was trained, as far as anything tells."""
    delta_config = AutoDeltaConfig.from_finetuned(folder)
    if opendelta.recognised(folder):
        return backbones.load_recorded(config.backbone, folder, delta_config, labels=_labels(folder))
    if not peft_files.recognised(folder):
        return backbones.load_recorded(config.backbone, folder, delta_config)
    adapter = peft_files.read_values(folder)
    place = backbones.location(config.backbone.source)
    options: dict[str, Any] = {"revision": config.backbone.revision} if config.backbone.revision else {}
    try:
        settings = transformers.AutoConfig.from_pretrained(place, **options)
    except (OSError, ValueError) as error:
        raise DeltaExpError(f"The config of the backbone {config.backbone.source!r} could not be read: {error}") from error
    mapping = adapter.values.get("auto_mapping")
    name = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    auto = getattr(transformers, AUTO_CLASSES.get(str(adapter.values.get("task_type")), ""), None)
    if name is None and auto is not None and type(settings) in auto._model_mapping:
        name = auto._model_mapping[type(settings)].__name__
    name = name or next(iter(settings.architectures or []), None)
    delta_config.saved_with = dataclasses.replace(delta_config.saved_with, backbone_class=name)
    return backbones.load_recorded(config.backbone, folder, delta_config, labels=_labels(folder))


def _labels(folder: Path) -> int | None:
    """Return how many labels the head in another library's folder has; None where there is none."""
    read = peft_files.read_adapter if peft_files.recognised(folder) else opendelta.read_tensors
    found: Any = read(folder)
    tensors: dict[str, torch.Tensor] = getattr(found, "tensors", found)
    words = ("classifier", "score", "qa_outputs")
    shapes = [t.shape for name, t in sorted(tensors.items()) if t.dim() == 2 and not set(words).isdisjoint(name.split("."))]
    return shapes[-1][0] if shapes else None


def _name_labels(backbone: Any, folder: Path) -> None:
    """Write the labels of the run that saved a delta into the backbone's config, where there are as many."""
    try:
        labels = json.loads((folder / checkpoint.RESULTS).read_text(encoding="utf-8"))["config"]["task"]["labels"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    fits = isinstance(labels, list) and all(isinstance(label, str) for label in labels)
    if fits and labels and len(labels) == getattr(backbone.config, "num_labels", None):
        backbone.config.id2label = dict(enumerate(labels))
        backbone.config.label2id = {label: number for number, label in enumerate(labels)}


def _tokenizer(config: RunConfig) -> Any:
    """Return the backbone's tokenizer; None where it has none."""
    try:
        return backbones.load_tokenizer(config.backbone, backbones.location(config.backbone.source))
    except (OSError, ValueError):
        return None
