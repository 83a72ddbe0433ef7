"""Several processes that train one delta together, as ``torchrun`` and ``accelerate launch`` start them.

What the launcher says of a process are the variables ``RANK``, ``WORLD_SIZE`` and ``LOCAL_RANK``. The first process, of rank
0, alone claims the run's folder, prints, logs, writes, verifies and pushes. Nothing here imports torch before `start`.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, TypeVar

from deltaexp.errors import ConfigError

T = TypeVar("T")
LAUNCHER = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""The variables without which a process is on its own."""
PATIENCE = 10.0
"""Seconds in which a process that is not to tell of an error is ended by the launcher, because another one has told."""
LONG = timedelta(days=7)
"""How long processes wait for the first one, which may be at work on something that it does alone."""
OTHER_WAYS = {
    "ACCELERATE_USE_FSDP": "FSDP, which is trainer.sharding=fsdp here",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed, which deltaexp does not use; trainer.sharding=fsdp shards the backbone",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM, which deltaexp does not use; trainer.sharding=fsdp shards the backbone",
}
"""Variables by which accelerate asks for another way of training, and what to say to it."""

_group: Any = None


def count() -> int:
    """Return the number of processes."""
    return int(os.environ["WORLD_SIZE"]) if all(os.environ.get(name) for name in LAUNCHER) else 1


def rank() -> int:
    """Return the number of this process, from 0."""
    return int(os.environ["RANK"]) if count() > 1 else 0


def is_main() -> bool:
    """Say whether this is the first process, or the only one."""
    return rank() == 0


def check(sharding: str | None) -> None:
    """Check that the launcher and the config agree.

    Raises:
        ConfigError: If they do not.
    """
    for name, text in OTHER_WAYS.items():
        if os.environ.get(name, "").lower() in ("1", "true", "yes"):
            raise ConfigError(f"accelerate is configured for {text}. Launch with --multi_gpu, or with torchrun.")
    if sharding is not None and count() == 1:
        raise ConfigError(
            f"trainer.sharding={sharding} parts the backbone between several processes, and there is one. Start them with "
            "`torchrun --nproc-per-node 2 -m deltaexp ...`, or leave it out."
        )


def start(cpu: bool) -> None:
    """Join the other processes, where there are any; a second call changes nothing.

    Args:
        cpu: Whether to stay on the CPU where there are GPUs.

    Raises:
        ConfigError: If there are fewer GPUs than processes on this machine.
    """
    global _group
    if count() == 1 or _group is not None:
        return
    import torch
    from torch import distributed

    gpu = torch.cuda.is_available() and not cpu
    if gpu:
        here, local = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", "0"))
        if local >= here:
            raise ConfigError(
                f"There are more processes on this machine than GPUs, of which there are {here}; each process needs one of its "
                f"own. Launch {here}, or add trainer.cpu=true."
            )
        torch.cuda.set_device(local)
    if not distributed.is_initialized():
        distributed.init_process_group("nccl" if gpu else "gloo")
    _group = distributed.new_group(backend="gloo", timeout=LONG)
    if not is_main():
        import warnings

        import datasets
        import transformers

        warnings.simplefilter("ignore")  # the first process says the same
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        datasets.disable_progress_bars()


def finish() -> None:
    """Part from the other processes."""
    global _group
    if _group is not None:
        import gc

        from torch import distributed

        # What reduces gradients goes before the group does. Where it is the last that holds it, PyTorch waits for the group's
        # threads with the interpreter's lock, and these for the lock, for ever.
        gc.collect()
        distributed.destroy_process_group()
        _group = None


def broadcast(value: T) -> T:
    """Return what the first process calls this with; all must call it, and get a copy."""
    if _group is None:
        return value
    from torch import distributed

    box = [value]
    distributed.broadcast_object_list(box, src=0, group=_group)
    return box[0]


def gather(value: T) -> list[T]:
    """Return what every process calls this with, by their ranks."""
    if _group is None:
        return [value]
    from torch import distributed

    found: list[Any] = [None] * count()
    distributed.all_gather_object(found, value, group=_group)
    return found


def wait() -> None:
    """Wait until all processes have come here."""
    if _group is not None:
        from torch import distributed

        distributed.barrier(group=_group)


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """Let the first process do what is in this context before the others, who find in a cache what it has made."""
    if not is_main():
        wait()
    yield
    if is_main():
        wait()


def speaks() -> bool:
    """Say whether this process is the one that tells of an error that it has met: the first to meet one, and only that one.

    In the others the error is the same, or comes of the first one's end. They wait here, so that their end does not make the
    launcher end the one that is about to tell.
    """
    if count() == 1:
        return True
    if _first():
        return True
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:  # until the launcher ends this process
        time.sleep(0.05)
    # Without torch nobody can be asked: if the first process has no error to tell of, this one is alone with it.
    return "torch" not in sys.modules


def _first() -> bool:
    if "torch" not in sys.modules:
        return is_main()  # before torch is there, all processes do the same
    from torch import distributed

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        # The launcher's own store, which outlives the processes.
        store = distributed.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=PATIENCE))
        return store.add(f"deltaexp/error/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", 1) == 1
    except Exception:  # without torchrun the first process holds the store, and where it has ended it has told
        return is_main()
