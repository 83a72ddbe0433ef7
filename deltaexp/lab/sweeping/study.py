"""One Optuna study: what was tried, what is tried next, and a record of it on disk that a search goes on from.

Optuna (Akiba et al., 2019, https://arxiv.org/abs/1907.10902) keeps trials, samplers and pruners; here it is asked and told from
outside, because the runs are jobs of a sweep. Each question is put to a sampler made anew, with a seed of the trial's number: a
search that was stopped then asks for what it would have asked for without the stop.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import warnings
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltaexp.errors import ConfigError, RunError, listing, unknown
from deltaexp.lab.writing import write_whole
from deltaexp.redaction import is_secret

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial

FILE = "optuna.log"
"""Where a search keeps its studies by default, in the sweep's folder: a journal, which also works on network file systems."""
SAMPLERS = {"tpe": "TPESampler", "random": "RandomSampler", "gp": "GPSampler"}
PRUNERS = {
    "none": "NopPruner", "median": "MedianPruner", "percentile": "PercentilePruner",
    "successive_halving": "SuccessiveHalvingPruner", "hyperband": "HyperbandPruner",
}  # fmt: skip
TRIAL = "trial.json"
"""What the folder of a trial's run holds: where to report to, and when to give up."""


@dataclass(frozen=True)
class Method:
    """How values are chosen, and which trials are given up early."""

    sampler: str = "tpe"
    sampler_options: Mapping[str, Any] = field(default_factory=dict)
    pruner: str = "none"
    pruner_options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        needed()
        self.make_sampler("", 0)
        self.make_pruner()

    def make_sampler(self, study: str, number: int) -> BaseSampler:
        """Return the sampler that chooses the values of a trial.

        Raises:
            ConfigError: If there is none of this name, or it has no such option.
        """
        seed = zlib.crc32(f"{self.seed}/{study}/{number}".encode())
        return _made("samplers", "sampler", self.sampler, SAMPLERS, {"seed": seed, **self.sampler_options})

    def make_pruner(self) -> Any:
        """Return the pruner.

        Raises:
            ConfigError: If there is none of this name, or it has no such option.
        """
        return _made("pruners", "pruner", self.pruner, PRUNERS, self.pruner_options)


def _made(module: str, what: str, name: str, known: Mapping[str, str], options: Mapping[str, Any]) -> Any:
    import optuna

    if name not in known:
        raise ConfigError(unknown(f"hydra.sweeper.{what}", name, known))
    kind = getattr(getattr(optuna, module), known[name])
    allowed = [key for key in inspect.signature(kind.__init__).parameters if key not in ("self", "seed")]
    for option in options:
        if option not in allowed and option != "seed":
            raise ConfigError(unknown(f"key of hydra.sweeper.{what}_options", option, allowed))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return kind(**options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"hydra.sweeper.{what}={name} cannot be made with {dict(options)}: {error}") from error


def needed() -> None:
    """Check that Optuna is installed, and have it speak only of what is wrong.

    Raises:
        ConfigError: If it is not.
    """
    if find_spec("optuna") is None:
        raise ConfigError('hydra/sweeper=optuna needs the package optuna: pip install "deltaexp[search]".')
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)


def place(storage: str | None, folder: str | Path) -> str:
    """Return where studies are kept: a file in the sweep's folder, another file, or the URL of a database.

    Raises:
        ConfigError: If a URL holds a password, which would be written into files.
    """
    if storage is None:
        return str(Path(folder, FILE).resolve())
    if "://" not in storage:
        return str(Path(storage).resolve())
    if is_secret(storage):
        raise ConfigError(
            "hydra.sweeper.storage holds a password. It is kept in files, so leave the password out and put it where the "
            "database's client looks for it, such as ~/.pgpass or ~/.my.cnf."
        )
    return storage


def opened(storage: str) -> BaseStorage:
    """Return Optuna's storage at a place.

    Raises:
        RunError: If it cannot be opened.
    """
    import optuna
    from optuna.storages import journal

    try:
        if "://" in storage:
            return optuna.storages.get_storage(storage)
        Path(storage).parent.mkdir(parents=True, exist_ok=True)
        return optuna.storages.JournalStorage(journal.JournalFileBackend(storage))
    except Exception as error:  # of a database's client, or of a file that is no journal
        raise RunError(f"The studies in {storage!r} cannot be opened: {type(error).__name__}: {error}") from error


@dataclass(frozen=True)
class Trial:
    """What is to be tried, or was."""

    number: int
    params: Mapping[str, Any]
    state: str = "running"
    """``running``, ``complete``, ``pruned`` or ``fail``."""
    value: float | None = None
    """The metric on the validation split: in the end, or where it was pruned."""


class Study:
    """A study of a fixed number of trials, each with values for the same keys.

    Args:
        name: Its name in the storage.
        storage: Where it is kept; see `place`.
        method: How values are chosen and trials are pruned.
        space: What is searched, by key.
        budget: The number of trials.
        maximise: Whether a higher value is the better one.
        first: What the first trial is given.
        about: What the study is about, for JSON: one that is there must be about the same.

    Raises:
        ConfigError: If there is a study of this name that is about something else.
        RunError: If the storage cannot be opened.
    """

    def __init__(
        self, name: str, storage: str, method: Method, space: Mapping[str, BaseDistribution], budget: int, maximise: bool,
        first: Mapping[str, Any] | None = None, about: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        import optuna
        from optuna.distributions import distribution_to_json

        self.name, self.storage, self.method, self.space, self.budget = name, storage, method, dict(space), budget
        self.maximise = maximise
        self._storage = opened(storage)
        self._study = optuna.create_study(
            storage=self._storage, study_name=name, load_if_exists=True, pruner=method.make_pruner(),
            direction="maximize" if maximise else "minimize",
        )  # fmt: skip
        spaces = {key: json.loads(distribution_to_json(one)) for key, one in self.space.items()}
        self._claim({"searched": spaces, **(about or {})})
        if first is not None and not self._study.get_trials(deepcopy=False):
            self._study.enqueue_trial(dict(first))

    def _claim(self, about: Mapping[str, Any]) -> None:
        """Note what the study is about, or check that it is that.

        Raises:
            ConfigError: If it is about something else.
        """
        about, known = json.loads(json.dumps(about)), self._study.user_attrs
        other = [sentence for key, value in about.items() for sentence in _changes(key, known.get(key, value), value)]
        if other:
            raise ConfigError(
                f"The study {self.name!r} in {self.storage!r} was made for something else: {listing(other, 3)}. Trials of the "
                "two are not comparable; name another folder (hydra.sweep.dir), or the values that it was made for."
            )
        for key, value in about.items():
            if key not in known:
                self._study.set_user_attr(key, value)

    @property
    def trials(self) -> list[Trial]:
        """All trials that have begun, in their order, without those that never ran and those that were tried again."""
        found = self._study.get_trials(deepcopy=False)
        again = {trial.user_attrs.get("again") for trial in found}
        return [
            _view(trial)
            for trial in found
            if trial.state.name != "WAITING" and "half" not in trial.user_attrs and trial.number not in again
        ]

    def unfinished(self) -> list[Trial]:
        """Return the trials that were begun and of which nothing is known yet: they are to go on."""
        return [trial for trial in self.trials if trial.state == "running" and trial.params.keys() == self.space.keys()]

    def ask(self) -> Trial | None:
        """Return what is to be tried next, None where the budget is spent."""
        import optuna

        self._give_up_halves()
        if len(self.trials) >= self.budget:
            return None
        number = len(self._study.get_trials(deepcopy=False))
        self._study.sampler = self.method.make_sampler(self.name, number)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            asked = self._study.ask(self.space)
        return Trial(asked.number, dict(asked.params))

    def _give_up_halves(self) -> None:
        """Forget trials that were being asked for when the process was killed: they lack values, and never ran."""
        for trial in self._study.get_trials(deepcopy=False):
            half = trial.state.name == "RUNNING" and trial.params.keys() != self.space.keys()
            if half:
                self._storage.set_trial_user_attr(trial._trial_id, "half", True)
                self._study.tell(trial.number, state=_state("FAIL"))

    def tell(self, number: int, state: str, value: float | None = None) -> Trial:
        """Note what came of a trial.

        Args:
            number: The trial's.
            state: ``complete``, ``pruned`` or ``fail``.
            value: The metric, in the end or where it was pruned.
        """
        if value is not None and not math.isfinite(value):
            state, value = "fail", None
        trial = self._study.trials[number]
        if trial.state.is_finished():
            return _view(trial)
        if state == "pruned" and value is not None and not trial.intermediate_values:
            self._storage.set_trial_intermediate_value(trial._trial_id, 0, value)  # its twin's, which was pruned before
        self._study.tell(number, value if state == "complete" else None, state=_state(state.upper()))
        return _view(self._study.trials[number])

    def retry(self) -> int:
        """Have the trials that failed tried again, with the same values; return how many there are."""
        failed = [trial for trial in self.trials if trial.state == "fail"]
        for trial in failed:
            self._study.enqueue_trial(dict(trial.params), user_attrs={"again": trial.number})
        return len(failed)

    def best(self) -> Trial | None:
        """Return the trial with the best value among those that went to the end, the earliest of equals."""
        done = [trial for trial in self.trials if trial.state == "complete" and trial.value is not None]
        sign = -1.0 if self.maximise else 1.0
        return min(done, key=lambda trial: (sign * (trial.value or 0.0), trial.number), default=None)

    def hand_out(self, number: int, folder: Path, metric: str) -> None:
        """Write into a run's folder which trial it is, and what it reports."""
        folder.mkdir(parents=True, exist_ok=True)
        values = {
            "storage": self.storage, "study": self.name, "number": number, "metric": metric,
            "pruner": self.method.pruner, "pruner_options": dict(self.method.pruner_options),
        }  # fmt: skip
        text = json.dumps(values, indent=2) + "\n"
        write_whole(folder / TRIAL, lambda file: file.write(text))


def _changes(key: str, old: Any, new: Any) -> list[str]:
    """Say in what two values differ, key by key where they are mappings."""
    if isinstance(old, dict) and isinstance(new, dict):
        both = sorted(old.keys() | new.keys())
        return [sentence for one in both for sentence in _changes(f"{key} {one}", old.get(one), new.get(one))]
    return [] if old == new else [f"{key} ({old!r}, now {new!r})"]


def _state(name: str) -> Any:
    from optuna.trial import TrialState

    return TrialState[name]


def _view(trial: FrozenTrial) -> Trial:
    return Trial(trial.number, dict(trial.params), trial.state.name.lower(), trial.value)


def table(studies: Sequence[Study]) -> list[dict[str, Any]]:
    """Return for each study its best trial and how its budget was spent."""
    rows = []
    for study in studies:
        states = [trial.state for trial in study.trials]
        counts = {state: states.count(state) for state in ("complete", "pruned", "fail")}
        best = study.best()
        rows.append({"study": study.name, **counts, "best": None if best is None else dataclasses.asdict(best)})
    return rows
