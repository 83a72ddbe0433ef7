"""Checkpoints while training: a folder is one when the digests of all its files lie in it, and not a moment earlier.

===============================  ==========================================================================
``delta_model.safetensors``      the delta, as it is saved in the end: what is trained, and its fixed tensors
``training_state.safetensors``   the optimizer's tensors, torch's random states by process, the delta type's own
``training_state.json``          the scheduler, the optimizer's numbers, other random states, the run's notes
``trainer_state.json``           what transformers' Trainer knows of its progress
``digests.json``                 sha256 of the others, written last
===============================  ==========================================================================

Nothing of the backbone is in it, and nothing that could hold code.
"""

from __future__ import annotations

import json
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from deltaexp.checksum import file_sha256
from deltaexp.lab.writing import sync

RandomState = tuple[dict[str, torch.Tensor], dict[str, Any]]
PREFIX = "checkpoint-"
DIGESTS = "digests.json"
INSIDE = "/"
"""Parts the name of a group of the optimizer's tensors from those in it."""
TENSORS, VALUES = "training_state.safetensors", "training_state.json"
INTERVAL = 60.0
"""Seconds from one checkpoint to the next, where no number of steps is given."""
SHARE = 0.02
"""Part of the time that writing checkpoints may take, where no number of steps is given."""


class Checkpoints:
    """The checkpoints of one run: the newest, and the best where the run goes back to it in the end.

    Args:
        folder: Where they lie.
        every: Steps from one to the next; None goes by time, 0 writes none.
    """

    def __init__(self, folder: Path, every: int | None = None) -> None:
        self.folder, self.every = folder, every
        self.last = time.monotonic()
        self.seconds = 0.0
        """How long it took to write the last one."""

    def path(self, step: int) -> Path:
        """Return the folder of the checkpoint after a step."""
        return self.folder / f"{PREFIX}{step}"

    def due(self, step: int) -> bool:
        """Say whether it is time for one after a step."""
        if self.every is not None:
            return self.every > 0 and step % self.every == 0
        return time.monotonic() - self.last >= max(INTERVAL, self.seconds / SHARE)

    def write(self, step: int, fill: Callable[[Path], None], best: int | None = None) -> Path:
        """Write one, and only when it is complete delete the others.

        Args:
            step: After which step.
            fill: Writes its files into the folder that it is given.
            best: The step of a checkpoint that is kept beside it.
        """
        start = time.monotonic()
        self.folder.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=f".{PREFIX}", dir=self.folder))
        try:
            fill(stage)
            digests = {path.name: file_sha256(path) for path in sorted(stage.iterdir())}
            for name in digests:
                sync(stage / name)
            (stage / DIGESTS).write_text(json.dumps(digests, indent=2) + "\n", encoding="utf-8")
            sync(stage / DIGESTS)
            sync(stage)
            target = self.path(step)
            if target.exists():  # one that a resumed run could not use, or that it has come to a second time
                target.rename(stage / "old")
            stage.rename(target)
            sync(self.folder)
            shutil.rmtree(target / "old", ignore_errors=True)
        finally:
            shutil.rmtree(stage, ignore_errors=True)
        kept = {target, *([self.path(best)] if best else [])}
        for other in self.folder.glob(f"{PREFIX}*"):
            if other not in kept:
                shutil.rmtree(other, ignore_errors=True)
        self.last = time.monotonic()
        self.seconds = self.last - start
        return target

    def newest(self) -> tuple[Path | None, list[str]]:
        """Return the newest one that is complete, and sentences on those that are not."""
        found = {path: path.name.removeprefix(PREFIX) for path in self.folder.glob(f"{PREFIX}*")}
        faults: list[str] = []
        for path in sorted((path for path, step in found.items() if step.isdigit()), key=lambda p: -int(found[p])):
            wrong = fault(path)
            if wrong is None:
                return path, faults
            faults.append(f"{path.name} cannot be used: {wrong}.")
        return None, faults


def step(folder: Path) -> int:
    """Return the number of the step that a checkpoint was written after."""
    return int(folder.name.removeprefix(PREFIX))


def fault(folder: Path) -> str | None:
    """Say what is wrong with a checkpoint; None where all of its files are those that were written."""
    try:
        digests = json.loads((folder / DIGESTS).read_text(encoding="utf-8"))
        for name, digest in digests.items():
            if file_sha256(folder / name) != digest:
                return f"{name} is not the file that was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, AttributeError) as error:
        return f"it cannot be read ({error})"
    return None


def write_state(
    folder: Path,
    optimizer: Any,
    scheduler: Any,
    delta_state: Mapping[str, torch.Tensor],
    values: Mapping[str, Any],
    random_states: Sequence[RandomState],
) -> None:
    """Write all that training goes on from, beside the delta and the Trainer's own state.

    Args:
        folder: Where to.
        optimizer: The optimizer.
        scheduler: The schedule of the learning rate.
        delta_state: What the delta's type keeps while training.
        values: More to remember, for JSON.
        random_states: What `random_state` returned, in every process.
    """
    state = optimizer.state_dict()
    tensors = {f"delta.{name}": value for name, value in delta_state.items()}
    numbers: dict[str, dict[str, Any]] = {}
    for index, entries in state["state"].items():
        for name, value in entries.items():
            if isinstance(value, torch.Tensor):
                tensors[f"optimizer.{index}.{name}"] = value
            elif isinstance(value, Mapping):  # bitsandbytes keeps what is quantised together
                tensors |= {f"optimizer.{index}.{name}{INSIDE}{key}": tensor for key, tensor in value.items()}
            else:
                numbers.setdefault(str(index), {})[name] = value
    for rank, (found, _) in enumerate(random_states):
        tensors |= {f"random.{rank}.{name}": tensor for name, tensor in found.items()}
    plain = {
        "optimizer": {"param_groups": state["param_groups"], "numbers": numbers},
        "scheduler": scheduler.state_dict(),
        "random": [numbers for _, numbers in random_states],
        **values,
    }
    write_tensors(folder / TENSORS, tensors)
    (folder / VALUES).write_text(json.dumps(plain), encoding="utf-8")


def random_state() -> RandomState:
    """Return the random states of this process: torch's as tensors, and those of Python and NumPy for JSON."""
    tensors = {"cpu": torch.random.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"cuda.{n}": state for n, state in enumerate(torch.cuda.get_rng_state_all())}
    kind, keys, *rest = np.random.get_state()
    return tensors, {"python": random.getstate(), "numpy": [kind, np.asarray(keys).tolist(), *rest]}


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors into a file, each as a copy of its own: safetensors refuses those that share memory."""
    plain = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    save_file(plain, path, metadata={"format": "pt"})


def read_values(folder: Path) -> dict[str, Any]:
    """Return what `write_state` wrote that are no tensors."""
    return json.loads((folder / VALUES).read_text(encoding="utf-8"))


def read_delta_state(folder: Path) -> dict[str, torch.Tensor]:
    """Return what the delta's type had kept."""
    return _tensors(folder, "delta")


def load_optimizer(folder: Path, optimizer: Any, scheduler: Any) -> None:
    """Set the states of an optimizer and of a schedule."""
    values = read_values(folder)
    state: dict[int, dict[str, Any]] = {int(n): dict(entries) for n, entries in values["optimizer"]["numbers"].items()}
    for key, value in _tensors(folder, "optimizer").items():
        index, name = key.split(".", 1)
        name, inside, part = name.partition(INSIDE)
        entries = state.setdefault(int(index), {})
        if inside:
            entries.setdefault(name, {})[part] = value
        else:
            entries[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": values["optimizer"]["param_groups"]})
    scheduler.load_state_dict(values["scheduler"])


def load_random(folder: Path, rank: int = 0) -> None:
    """Set the random states of Python, NumPy and torch to those of the process with a number."""
    values, states = read_values(folder)["random"][rank], _tensors(folder, f"random.{rank}")
    version, numbers, gauss = values["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = values["numpy"]
    np.random.set_state((kind, np.asarray(keys, dtype=np.uint32), *rest))
    torch.random.set_rng_state(states.pop("cpu"))
    if torch.cuda.is_available():
        for name, state in states.items():
            if (number := int(name.split(".")[1])) < torch.cuda.device_count():
                torch.cuda.set_rng_state(state, number)


def _tensors(folder: Path, part: str) -> dict[str, torch.Tensor]:
    found = load_file(folder / TENSORS)
    return {name.removeprefix(f"{part}."): value for name, value in found.items() if name.startswith(f"{part}.")}
