"""What a run wants to be told of, or to change, while transformers' Trainer trains."""

from __future__ import annotations

import warnings
from typing import Any

from deltaexp.errors import listing
from deltaexp.lab import processes
from deltaexp.lab.checkpoints import Checkpoints
from deltaexp.lab.tracking import Trackers
from deltaexp.lab.trainer import EarlyStoppingCallback, TrainerCallback
from deltaexp.model import DeltaModel


class LogCallback(TrainerCallback):
    """Hands the training log to the trackers of a run."""

    def __init__(self, trackers: Trackers) -> None:
        self.trackers = trackers

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Pass on what a run that is continued has logged before, of which a tracker may have lost the last."""
        for entry in state.log_history:
            self.trackers.log(entry, entry["step"])

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        """Pass an entry on."""
        self.trackers.log(logs or {}, state.global_step)


class EarlyStopping(EarlyStoppingCallback):
    """transformers' early stopping, which looks at the evaluations in a training alone.

    Before and after it what is measured is named otherwise, and transformers would say that early stopping is disabled.
    """

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        """Look whether the metric is better than before."""
        if any(name.startswith("eval_") for name in metrics):
            super().on_evaluate(args, state, control, metrics, **kwargs)


class LossCallback(TrainerCallback):
    """Sets what the loss had added up to in a checkpoint, so that the next entry of the log is the mean that it would be."""

    def __init__(self, trainer: Any, loss: float, since: int) -> None:
        self.trainer, self.loss, self.since = trainer, loss, since

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Set it, once the Trainer has begun its own count."""
        trainer = self.trainer
        trainer._tr_loss += self.loss
        trainer._total_loss_scalar -= self.loss  # the mean in the end is this session's
        trainer._globalstep_last_logged = self.since


class CheckpointCallback(TrainerCallback):
    """Has a checkpoint written when one is due."""

    def __init__(self, saved: Checkpoints) -> None:
        self.checkpoints = saved

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Find the best checkpoint again, in a folder that may have been moved since."""
        if state.best_global_step:
            state.best_model_checkpoint = str(self.checkpoints.path(state.best_global_step))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Ask for one; transformers asks for those after an evaluation and in the end."""
        due = self.checkpoints.due(state.global_step)
        if due if self.checkpoints.every is not None else processes.broadcast(due):  # each process has its own clock
            control.should_save = True


class StepCallback(TrainerCallback):
    """Tells the delta's type of every optimizer step, while the gradients are there (AdaLoRA moves its budget then)."""

    def __init__(self, delta_model: DeltaModel) -> None:
        self.delta_model = delta_model

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        """Pass the number of the step on; after the first, say what the loss does not depend on."""
        if state.global_step == 0:
            idle = [name for name, p in self.delta_model.trainable_parameters().items() if p.grad is None]
            if idle:
                warnings.warn(
                    f"{len(idle)} trainable parameters have no gradient ({listing(idle, 3)}): the backbone does not call their "
                    "modules on this data, so they stay as they are. Leave these modules out of modified_modules.",
                    stacklevel=2,
                )
        self.delta_model.after_step(state.global_step + 1, state.max_steps)
