"""What a run tells while it goes on and when it is done: its phases, its results, the versions that made them."""

from __future__ import annotations

import contextlib
import platform
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

from deltaexp import __version__, checkpoint
from deltaexp.lab.tasks.kinds import Kind


@dataclass
class Clock:
    """Measures the phases of a run in seconds, and announces them."""

    console: Console
    seconds: dict[str, float] = field(default_factory=dict)
    """The seconds of every phase that is over; those of a run that is continued are added to those before."""
    running: dict[str, float] = field(default_factory=lambda: {"total": time.perf_counter()})

    @contextlib.contextmanager
    def phase(self, name: str, what: str) -> Iterator[None]:
        """Time what happens in this context, under ``name``."""
        self.console.print(f"[bold]{what}[/bold]")
        self.running[name] = time.perf_counter()
        yield
        self.seconds = self.read(name)
        del self.running[name]

    def leave_out(self, seconds: float) -> None:
        """Leave seconds that have passed out of all phases that are running, and of the total."""
        self.running = {name: start + seconds for name, start in self.running.items()}

    def read(self, *names: str) -> dict[str, float]:
        """Return the seconds until now, of all that is running or only of what is named."""
        now = time.perf_counter()
        running = {name: self.seconds.get(name, 0.0) + now - start for name, start in self.running.items()}
        return {**self.seconds, **{name: round(s, 3) for name, s in running.items() if name in names or not names}}


def about_lengths(kind: Kind, rows: Mapping[str, int], truncated: Mapping[str, int]) -> Iterator[str]:
    """Yield sentences on what of the data is longer than the task or the backbone allows."""
    wanted, length = kind.task.max_source_length, kind.source_length
    if length < wanted and any(truncated.values()):
        yield f"the backbone takes inputs of at most {length} tokens, fewer than task.max_source_length={wanted}"
    for split, count in truncated.items():
        if count:
            limit = f"task.max_source_length={wanted}" if length == wanted else str(length)
            yield f"{count:,} of {rows[split]:,} rows of {split} are longer than {limit} tokens and were cut"


def together(processes: int, rows: int, sharding: str | None) -> str:
    """Say how several processes train together; nothing of one."""
    if processes == 1:
        return ""
    return f", in {processes} processes with {rows:,} rows in a step" + (f", sharded by {sharding}" if sharding else "")


def versions() -> dict[str, str]:
    """Return the versions of what computes, and the device."""
    from importlib.metadata import version

    packages = ("accelerate", "datasets", "huggingface_hub", "hydra-core", "safetensors", "scikit-learn", "tokenizers")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine() + " CPU"
    return {
        "deltaexp": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        **{package: version(package) for package in packages},
        "platform": platform.system(),
        "device": device,
    }


def print_results(console: Console, results: dict[str, Any], folder: Path, loader: str) -> None:
    """Print a short table, and the lines that load the delta."""
    table = Table("metric", "backbone as it is", "with the delta", title=f"on {results['evaluated_on']}")
    before, after = results["metrics"].get("before", {}), results["metrics"]["after"]
    for name, value in after.items():
        table.add_row(name, f"{before[name]:.4f}" if name in before else "-", f"{value:.4f}")
    console.print(table)
    seconds, verification = results["seconds"], results["verification"]
    size = (folder / checkpoint.WEIGHTS).stat().st_size
    console.print(
        f"{results['parameters']['delta']:,} parameters saved in {size:,} bytes; hash check {verification['hash']}, logits "
        f"after reloading differ by {verification['max_logit_difference']:.2g}; {seconds['total']:.1f} s in all, "
        f"{seconds['train']:.1f} s of them training"
    )
    console.print(f"delta: {folder}\n\n{loader}\n", markup=False)
    console.print("from deltaexp import AutoDeltaModel", markup=False)
    console.print(f'delta_model = AutoDeltaModel.from_finetuned("{folder}", backbone_model=backbone_model)', markup=False)
