"""``hydra/sweeper=optuna``: a search by Optuna over deltaexp's jobs, with the syntax of Hydra's own Optuna sweeper.

Hydra's (hydra-optuna-sweeper 1.3.0) needs Optuna before version 3, prunes nothing and keeps no trial that was under way.
"""

from __future__ import annotations

from typing import Any

from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf


class OptunaSweeper(Sweeper):
    """One study for each combination of the values of some keys, all of them with the same number of trials.

    Args:
        params: Keys with their values, fixed or to be searched, as ``hydra.sweeper.params`` of a config gives them.
        options: See ``conf/hydra/sweeper/optuna.yaml``.
    """

    def __init__(self, params: Any = None, **options: Any) -> None:
        self.params = params
        self.options = {k: OmegaConf.to_container(v) if OmegaConf.is_config(v) else v for k, v in options.items()}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Check the options, and make the launcher.

        Raises:
            ConfigError: If an option cannot be, or Optuna is not there.
        """
        from hydra.core.plugins import Plugins

        from deltaexp.lab.sweeping import search

        self.config, self.checked = config, search.options_of(self.options)
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Have all trials done that are left to do, and what was chosen measured.

        Raises:
            ConfigError: If something cannot be searched; nothing has begun then.
            SweepError: If a study came to nothing, or a final run failed.
        """
        from deltaexp.lab.sweeping import search

        assert self.config is not None, "set up before"
        search.search(self.config, self.launcher, arguments, self.checked)
