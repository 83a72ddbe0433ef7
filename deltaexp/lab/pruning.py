"""Runs that are trials of a search: what they measure while training is reported, and those without prospects end early.

A search writes ``trial.json`` into the folder of a run before the run begins; a run without one is no trial.
"""

from __future__ import annotations

import json
import shutil
from typing import Any

from deltaexp.errors import PrunedRunError, RunError
from deltaexp.lab.recovery import CHECKPOINTS, Claim
from deltaexp.lab.sweeping import study
from deltaexp.lab.trainer import TrainerCallback


class Pruning(TrainerCallback):
    """Reports the metric of each evaluation on the validation split to Optuna, and stops training where its pruner says so.

    Args:
        values: What ``trial.json`` says.
        claim: The run.
    """

    def __init__(self, values: dict[str, Any], claim: Claim) -> None:
        import optuna

        study.needed()
        method = study.Method(pruner=values["pruner"], pruner_options=values["pruner_options"])
        self.metric, self.number, self.pruner, self.claim = values["metric"], values["number"], method.make_pruner(), claim
        self.storage = study.opened(values["storage"])
        self.study = optuna.load_study(study_name=values["study"], storage=self.storage, pruner=self.pruner)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **_: Any) -> None:
        """Report an evaluation while training; those before and after it are no part of the curve."""
        value, trial = (metrics or {}).get(f"eval_{self.metric}"), self.study.trials[self.number]
        if value is None or trial.state.is_finished():
            return
        self.storage.set_trial_intermediate_value(trial._trial_id, state.global_step, value)
        if state.global_step < state.max_steps and self.pruner.prune(self.study, self.study.trials[self.number]):
            self.claim.record.pruned = {"step": state.global_step, "metric": self.metric, "value": value}
            self.claim.record.write(self.claim.folder)
            control.should_training_stop = True


def callbacks(claim: Claim) -> list[TrainerCallback]:
    """Return what reports for a run, which is nothing where it is no trial of a search.

    Raises:
        RunError: If what a search wrote into its folder cannot be understood.
    """
    path = claim.folder / study.TRIAL
    if not path.exists():
        return []
    try:
        return [Pruning(json.loads(path.read_text(encoding="utf-8")), claim)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{str(path)!r} does not say which trial of a search this is ({error}). Start the search again."
        ) from error


def check(claim: Claim) -> None:
    """Check that a run was not given up; one that was keeps no checkpoints.

    Raises:
        PrunedRunError: If it was.
    """
    if claim.record.pruned:
        shutil.rmtree(claim.folder / CHECKPOINTS, ignore_errors=True)
        step, metric, value = (claim.record.pruned[key] for key in ("step", "metric", "value"))
        raise PrunedRunError(f"pruned after step {step:,}: with {metric} {value:.4f} it was behind the search's other trials.")
