"""Launchers of deltaexp's jobs beyond one process: ``hydra/launcher=joblib``, ``submitit_local``, ``submitit_slurm``, ``ray``.

They have the names and the keys of Hydra's own plugins, of which the last releases (2022 to 2024) end a whole sweep with the
first process that is killed, and ask for packages of that time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from hydra_plugins.deltaexp_sweeping import JobLauncher
from omegaconf import OmegaConf

if TYPE_CHECKING:
    from deltaexp.lab.sweeping.job import Job, Result


def _plain(values: Any) -> Any:
    return OmegaConf.to_container(values, resolve=True) if OmegaConf.is_config(values) else values


class JoblibLauncher(JobLauncher):
    """Several processes on this machine.

    Args:
        n_jobs: How many; -1 is one for each core.
    """

    joins = True

    def __init__(self, n_jobs: int = -1) -> None:
        self.n_jobs = n_jobs

    def setup(self, **options: Any) -> None:
        """Check that joblib is there.

        Raises:
            ConfigError: If it is not.
        """
        from deltaexp.lab.sweeping import launching

        launching.need("joblib", "joblib", "joblib")
        super().setup(**options)

    def run(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, Result]]:
        """Execute jobs, several at a time."""
        from deltaexp.lab.sweeping import launching

        return launching.in_processes(jobs, self.n_jobs)


class SubmititLauncher(JobLauncher):
    """A cluster by Slurm, or processes of this machine that are handled in the same way.

    Args:
        cluster: ``slurm`` or ``local``.
        submitit_folder: Where submitit keeps its files, which a cluster's machines must share; null is in the sweep's folder.
        n_jobs: On this machine, how many jobs are executed at the same time; null is one for each core.
        options: submitit's parameters for one job.
    """

    def __init__(self, cluster: str, submitit_folder: str | None = None, n_jobs: int | None = None, **options: Any) -> None:
        self.cluster, self.folder, self.n_jobs = cluster, submitit_folder, n_jobs
        self.joins = cluster == "local"
        self.options = {key: _plain(value) for key, value in options.items()}

    def setup(self, **options: Any) -> None:
        """Check that submitit is there.

        Raises:
            ConfigError: If it is not.
        """
        from deltaexp.lab.sweeping import launching

        launching.need(f"submitit_{self.cluster}", "submitit", "slurm")
        super().setup(**options)

    def run(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, Result]]:
        """Submit jobs, and yield each when it is done."""
        from deltaexp.lab.sweeping import launching

        return launching.by_submitit(jobs, self.cluster, self.folder, self.n_jobs, self.options)


class RayLauncher(JobLauncher):
    """A cluster of Ray's, or this machine as one.

    Args:
        init: Arguments of ``ray.init``.
        remote: What one job needs, as in ``ray.remote``.
    """

    def __init__(self, init: Any = None, remote: Any = None) -> None:
        self.init, self.remote = _plain(init) or {}, _plain(remote) or {}

    def setup(self, **options: Any) -> None:
        """Check that Ray is there.

        Raises:
            ConfigError: If it is not.
        """
        from deltaexp.lab.sweeping import launching

        launching.need("ray", "ray", "ray")
        super().setup(**options)

    def run(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, Result]]:
        """Execute jobs wherever Ray has room."""
        from deltaexp.lab.sweeping import launching

        return launching.by_ray(jobs, self.init, self.remote)
