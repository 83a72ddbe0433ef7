"""What of a run's training can be replayed as CUDA graphs (`deltaexp.lab.graphs`), and how its batches are computed for it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from deltaexp.frozen import TOKENS
from deltaexp.lab.config import RunConfig
from deltaexp.lab.graphs import KEPT, Batch, Padding, StepGraphs, differ, rounded
from deltaexp.lab.tasks.kinds.base import IGNORED, position_limit
from deltaexp.registry import DeltaConfig

if TYPE_CHECKING:
    from deltaexp.lab.shortcuts import Shortcuts
    from deltaexp.lab.training import DeltaTrainer

WORK = 2**42
"""Parameters times tokens of a batch from which a GPU computes for longer than the CPU needs to begin its operations."""
PATCHES = 256
"""Tokens that an input counts for that is no text, such as an image."""
TOLERANCE = 0.005, 0.1
"""By how much a batch's loss, and its gradients, may differ with padding, by the rounding of half precision."""
WEIGHT = "weight of the batch"
"""The input that stands for what the loss of a batch counts."""


def refused(config: RunConfig) -> str | None:
    """Say in a clause what of a config speaks against replaying its steps; None where nothing does."""
    if config.trainer.compile:
        return "the model is compiled"
    if config.trainer.gradient_checkpointing:
        return "activations are computed twice"
    if config.backbone.device_map:
        return "the backbone is placed by a device_map"
    return None


@contextlib.contextmanager
def replayed(wanted: bool, trainer: DeltaTrainer, short: Shortcuts, target: int, console: Any) -> Iterator[dict[str, Any]]:
    """Within this context a trainer's steps are replayed, if that is wanted; yield what becomes known of that in the end.

    Args:
        wanted: Whether.
        trainer: The trainer.
        short: What its run leaves out.
        target: The length of the longest target that a decoder is given.
        console: Where to say what was replayed.
    """
    facts: dict[str, Any] = {}
    if not wanted:
        yield facts
        return
    trainer.replays = replays = Replays(trainer, short, target)
    try:
        yield facts
    finally:
        trainer.replays = None
        facts |= replays.facts()
        replays.steps = None  # what was recorded holds memory of the GPU
        why = f"; not all, as {facts['told']}" if facts["told"] else ""
        console.print(f"  CUDA graphs: {facts['replayed']:,} batches replayed, of {facts['shapes']} shapes{why}", markup=False)


class Replays:
    """The steps of a run, replayed where that can be.

    Args:
        trainer: Its trainer.
        short: What it leaves out.
        target: The length of the longest target that a decoder is given.
    """

    def __init__(self, trainer: DeltaTrainer, short: Shortcuts, target: int) -> None:
        self.trainer, self.shortcut = trainer, short.shortcut if short.shortcut and short.shortcut.training else None
        self.model: Any = trainer.model
        self.steps: StepGraphs | None = None
        self.told: str | None = None
        """Why nothing is replayed, or not everything, in a clause."""
        self._size = sum(parameter.numel() for parameter in self.model.parameters())
        self._checked = False
        delta = trainer.delta_model
        parameters = list(delta.trainable_parameters().values())
        if not parameters:
            self.told = "nothing is trained"
            return
        if trainer.args.n_gpu > 1:
            self.told = "several GPUs share a batch"
            return
        if type(delta.config).after_step is not DeltaConfig.after_step:
            self.told = f"{delta.config.delta_type} changes its layers while training"
            return
        lengths, pad = trainer.splits["train"].lengths, getattr(getattr(trainer.kind, "processor", None), "pad_token_id", None)
        padding = None
        if lengths and pad is not None:
            room = (position_limit(self.model.config, trainer.kind.processor) or 0) - delta.config.positions()
            padding = Padding(pad, IGNORED, rounded(max(lengths), room), rounded(target, room))
        self.steps = StepGraphs(self._loss, parameters, padding=padding, state=list(self.model.buffers()))

    def step(self, inputs: Batch, weight: torch.Tensor | None) -> torch.Tensor | None:
        """Return the loss of a batch, with its gradients added to those of the parameters; None where it is not replayed."""
        if self.steps is None:
            return None
        if self._work(inputs) > WORK:
            self.told = "large batches keep the GPU busy by themselves"
            return None
        extra = {} if weight is None else {WEIGHT: weight}
        if self.shortcut is not None:
            # Of rows that are several texts, such as a question with each of its answers, the model makes as many rows.
            texts = {name: inputs[name].flatten(0, -2) for name in (*TOKENS, "attention_mask") if name in inputs}
            known = self.shortcut.known(texts)
            if known is None:
                self.told = "there are texts of which no activations are kept"
                return None
            extra[KEPT] = known
        padding = self.steps.padding
        if not self._checked and padding is not None and padding.changes(inputs):
            self._checked = True
            if not self._pads_alike(self.steps, inputs, padding):
                self.steps.padding = None
        found = self.steps.step({**inputs, **extra}, self.trainer.current_gradient_accumulation_steps)
        self.told = self.steps.refused or self.steps.left or self.told
        return found

    def facts(self) -> dict[str, Any]:
        """Return what was replayed, for JSON."""
        steps = self.steps
        return {"shapes": steps.shapes if steps else 0, "replayed": steps.replayed if steps else 0, "told": self.told}

    def _work(self, inputs: Batch) -> int:
        """Return parameters times tokens of a batch."""
        ids = inputs.get("input_ids")
        tokens = ids.numel() if ids is not None else PATCHES * len(next(iter(inputs.values())))
        return self._size * tokens

    def _loss(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the loss of a batch as the Trainer computes it in a training step."""
        trainer = self.trainer
        given = dict(inputs)
        trainer._weight, known = given.pop(WEIGHT, None), given.pop(KEPT, None)
        trainer.model.train()
        try:
            if self.shortcut is not None:
                self.shortcut.given = known
            with trainer.compute_loss_context_manager():
                return trainer.compute_loss(trainer.model, given) / trainer.current_gradient_accumulation_steps
        finally:
            if self.shortcut is not None:
                self.shortcut.given = None

    def _pads_alike(self, steps: StepGraphs, inputs: Batch, padding: Padding) -> bool:
        """Say whether loss and gradients of a batch are the same with padding: of a new delta the loss alone tells nothing."""
        model, was = self.model, self.model.training
        model.eval()
        try:
            with steps.recorder.aside():
                expected, found = (self._outcome(steps, batch) for batch in (inputs, padding.padded(inputs)))
        except Exception:  # what a model cannot compute at all is told by the step itself
            return False
        finally:
            model.train(was)
        return not differ(found, expected, *TOLERANCE)

    def _outcome(self, steps: StepGraphs, inputs: Batch) -> list[torch.Tensor]:
        """Return the loss of a batch, and all gradients."""
        with self.trainer.compute_loss_context_manager():
            loss = self.trainer.compute_loss(self.model, dict(inputs))
        found = torch.autograd.grad(loss, steps.parameters, allow_unused=True, materialize_grads=True)
        return [loss.detach(), *found]
