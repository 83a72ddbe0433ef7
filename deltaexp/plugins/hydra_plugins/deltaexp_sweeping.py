"""What Hydra finds of deltaexp: it takes plugins only from the package ``hydra_plugins``, and reads all that is in it.

Any application of Hydra in the same environment reads this too, so it imports no more than Hydra itself until it is used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

if TYPE_CHECKING:
    from deltaexp.lab.sweeping.job import Job, Result


class JobLauncher(Launcher):
    """A launcher of whole jobs: a subclass implements `run`, and works with every sweeper.

    Jobs and results are pickled, and `deltaexp.lab.sweeping.job.execute`, which makes the one of the other, is a function of
    a module: any pool of processes or machines can take them.
    """

    at_once: int | None = None
    """How many jobs it is to be given at once, at most; any number where it is None."""
    joins: bool = False
    """Whether it trains jobs in one where ``sweep.joint`` says so."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep what Hydra hands to a launcher."""
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def run(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, Result]]:
        """Execute jobs, and yield each with its result as soon as that is there.

        A caller that has seen enough closes the iterator: jobs that have not begun are not begun then.
        """
        raise NotImplementedError

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Do what other sweepers ask for, such as Optuna's: run jobs that are given as overrides, and wait for all."""
        from deltaexp.lab.sweeping import sweep

        return sweep.launch(self, job_overrides)


class LocalLauncher(JobLauncher):
    """One job after the other in this process, which keeps the backbone between them."""

    at_once = 1
    joins = True

    def run(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, Result]]:
        """Execute jobs in their order, or several at once where they may be trained in one."""
        from deltaexp.lab.sweeping import team

        for together in team.formed(jobs):
            yield from team.execute_together(together)


class DeltaSweeper(Sweeper):
    """Every combination of values, in which a delta type takes those of its own keys only.

    Args:
        params: Keys with their values; they are read again from the config, with what is typed on top.
        max_batch_size: How many jobs a launcher is given at once, at most; all of them where it is null.
    """

    def __init__(self, params: dict[str, Any] | None = None, max_batch_size: int | None = None) -> None:
        self.max_batch_size = max_batch_size

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep what Hydra hands to a sweeper, and make its launcher."""
        from hydra.core.plugins import Plugins

        self.config = config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        """Plan the jobs, and have those done that are left to do.

        Raises:
            ConfigError: If one cannot run; none has begun then.
            SweepError: If one failed.
        """
        from deltaexp.lab.sweeping import sweep

        assert self.config is not None  # Hydra calls `setup` first
        sweep.sweep(self.config, self.launcher, arguments, self.max_batch_size)
