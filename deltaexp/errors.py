"""The errors a user sees: whole sentences that say what was given, what is allowed, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from deltaexp.redaction import redact


class DeltaExpError(Exception):
    """Base of every error that deltaexp raises on purpose; the command line prints it without a traceback."""


class ConfigError(DeltaExpError):
    """A key, a choice or a value of the configuration cannot be used."""


class AddressingError(DeltaExpError):
    """A pattern matches no module, or matches a module on which the delta cannot be put."""


class CheckpointError(DeltaExpError):
    """A saved delta is incomplete, damaged, or does not fit the backbone it is loaded onto."""


class MissingFileError(CheckpointError):
    """A file that belongs to a saved delta is not there, or one is there that nobody recorded."""


class DamagedFileError(CheckpointError):
    """The bytes of a saved file are not the bytes that were written."""


class UnsafeFileError(CheckpointError):
    """A file wants more than a delta may: code to run, a path outside of its folder, more memory than its tensors have."""


class TensorError(CheckpointError):
    """The saved tensors are not those that the delta's config describes on this backbone."""


class MissingTensorError(TensorError):
    """A tensor that the config describes was not saved."""


class ExtraTensorError(TensorError):
    """A tensor was saved that the config does not describe: a delta writes only what its config owns."""


class EmptyTensorError(TensorError):
    """A saved tensor has no elements."""


class TensorShapeError(TensorError):
    """A saved tensor has another shape than the config describes."""


class TensorDtypeError(TensorError):
    """A saved tensor has another dtype than it must have."""


class HashMismatchError(CheckpointError):
    """The model after loading is not the model that was trained."""


class BackboneMismatchError(HashMismatchError):
    """The backbone is not the one that the delta was trained on."""


class BackboneRevisionError(BackboneMismatchError):
    """The backbone is another revision than the one that the delta was trained on."""


class BackboneDtypeError(BackboneMismatchError):
    """The backbone is held in another dtype than the one in which the delta was trained."""


class BackboneSettingsError(BackboneMismatchError):
    """The backbone's settings are others than those with which the delta was trained."""


class DeltaMismatchError(HashMismatchError):
    """The delta's own tensors are not those that were trained."""


class ProbeMismatchError(HashMismatchError):
    """On the stored probe batch the model computes other logits than the trained model did."""


class TaskError(DeltaExpError):
    """The data of a task cannot be loaded or do not have the expected form."""


class RunError(DeltaExpError):
    """A run cannot begin in the folder that it was given, or cannot be continued there."""


class InterruptedRunError(RunError):
    """A run stopped before it was done, for want of disk or memory; the message says what is kept and how to go on."""


class RunningElsewhereError(RunError):
    """Another process is at work on the run."""


class SweepError(DeltaExpError):
    """Some jobs of a sweep failed; the message says which and why."""


class PrunedRunError(RunError):
    """A search gave a run up while it trained, because others did better by then; it leaves no delta."""


class HubError(DeltaExpError):
    """The Hugging Face Hub cannot be reached, or refuses what was asked of it; secrets in what it says are left out."""

    def __init__(self, message: str) -> None:
        super().__init__(redact(message))


class HubConflictError(HubError):
    """What was to be changed on the Hub has been changed by somebody else."""


class CardError(DeltaExpError):
    """The model card is not one that the Hugging Face Hub takes."""


def nearest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """Return the at most ``count`` names of ``known`` that are most like ``name``, best first."""
    # Case and separators are what people get wrong most often, so they do not count.
    folded: dict[str, str] = {}
    for candidate in known:
        folded.setdefault(candidate.lower().replace("-", "_"), candidate)
    close = difflib.get_close_matches(name.lower().replace("-", "_"), folded, n=count, cutoff=0.5)
    return [folded[key] for key in close]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the name of ``known`` nearest to ``name``, or the empty string."""
    close = nearest(name, known, 1)
    return f" Did you mean {close[0]!r}?" if close else ""


def listing(names: Iterable[object], limit: int = 12) -> str:
    """Return ``names`` as "a, b, c", cut after ``limit`` with the number that was left out."""
    items = [str(name) for name in names]
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """Return the sentence for a ``name`` that is none of the ``known`` names of its ``kind``."""
    names = sorted(known)
    return f"There is no {kind} {name!r}.{did_you_mean(name, names)} Known: {listing(names, 40)}."
