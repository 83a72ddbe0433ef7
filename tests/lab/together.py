"""Runs in several processes, as torchrun starts this file in each of them: one after the other, to import torch only once."""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

MODULE = ["-m", "deltaexp"]


def launch(words: list[str], folder: Path, processes: int = 2) -> "subprocess.CompletedProcess[str]":
    """Start ``torchrun words`` in a folder, and wait for its end."""
    return launch_with(["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)], words, folder)


def launch_with(launcher: list[str], words: list[str], folder: Path) -> "subprocess.CompletedProcess[str]":
    """Start a launcher, a Python module, in a folder, and wait for its end."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    environment["PYTHONWARNINGS"] = "ignore"
    command = [sys.executable, *launcher, *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False)


def run_together(
    jobs: list[tuple[Path, list[str]]], folder: Path, processes: int = 2, stop: tuple[str, int] | None = None
) -> None:
    """Do runs, each in its folder by its overrides, in several processes.

    Args:
        jobs: The runs.
        folder: Where the processes work.
        processes: How many there are.
        stop: The name of a run's folder, and the step in which all processes end as if they were killed.
    """
    plain = json.dumps([[[str(path), words] for path, words in jobs], stop])
    done = launch([__file__, plain], folder, processes)
    assert (done.returncode == 0) == (stop is None), done.stdout + done.stderr


def work(jobs: list[Any], stop: Any) -> None:
    """Be one of the processes."""
    from torch.nn.parallel import DistributedDataParallel

    from deltaexp.lab import processes, schema
    from deltaexp.lab.callbacks import StepCallback
    from deltaexp.lab.run import run

    after_step = StepCallback.on_optimizer_step
    for folder, words in jobs:

        def step(self: Any, args: Any, state: Any, control: Any, folder: str = folder, **options: Any) -> None:
            if stop is not None and [Path(folder).name, state.global_step] == stop:
                processes.wait()
                os._exit(9)
            after_step(self, args, state, control, **options)

        StepCallback.on_optimizer_step = step  # type: ignore[method-assign]
        run(*schema.composed(words), folder if processes.is_main() else "elsewhere")
    processes.finish()
    left = [one for one in gc.get_objects() if type(one) is DistributedDataParallel]
    assert not left, "what reduces gradients has outlived the group, and may hang at its end"


if __name__ == "__main__":
    work(*json.loads(sys.argv[1]))
