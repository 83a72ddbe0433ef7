"""Measure training steps and inference with deltas: full fine-tuning, the frozen limit, PEFT, and deltaexp, in turns.

    python scripts/bench/run.py [--device cuda] [--shapes minilm,llama] [--groups training] [--seconds 300] [--out DIR]

The frozen limit is the forward pass and the gradient with respect to the activations, without that of any weight: what is left
when a delta costs nothing. A step is a forward and a backward pass, without the optimizer; everyone's head is frozen. All
contenders of a group are timed in turns within one process, and ratios are taken round by round, so that they hold on a busy
machine, where the times themselves do not. Saved bytes are those of the tensors that wait for the backward pass, each storage
once, parameters not counted. On the CPU freed memory is kept for the next step, as trainer.speed=auto keeps it, for all alike:
otherwise the C library gives some of it back, and whose step pays for that depends on whose came before.

On a GPU small shapes are bound by what calls the kernels. With ``--graphs`` every step is captured as a CUDA graph, which is
replayed: what the kernels themselves take is compared. A batch has no mask then, as it has no padding.

Writes ``results.json`` (after every group), ``results.txt`` and, where matplotlib is installed, ``results.png`` to ``--out``.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import platform
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu
import peft
import torch
import transformers
from contenders import groups
from measure import DTYPES, flops, in_turns, peaks, ratio, saved_bytes, summary
from preparing import Contender, Group, Prepared
from report import plot, show, targets
from rich.console import Console
from rich.progress import Progress
from shapes import SHAPES, Backbones, named

import deltaexp
from deltaexp.errors import unknown
from deltaexp.lab import memory, writing


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu, or cuda")
    parser.add_argument("--shapes", help=f"of {', '.join(SHAPES)}; by default minilm,llama, on a GPU llama-1b too")
    parser.add_argument("--groups", default="", help="only groups of contenders the name of which contains this")
    parser.add_argument(
        "--only", default="", help="only contenders the name of which contains this, and what they are compared with"
    )
    parser.add_argument("--seconds", type=float, help="for all measuring; by default 600, on a GPU 45 with getting ready")
    parser.add_argument("--rounds", type=int, default=200, help="the most rounds of a group")
    parser.add_argument("--threads", type=int, default=1, help="threads of the CPU")
    parser.add_argument("--tf32", action="store_true", help="let float32 products be computed in TF32 on a GPU")
    parser.add_argument("--graphs", action="store_true", help="on a GPU, replay every step as a CUDA graph")
    parser.add_argument("--out", type=Path, default=Path("outputs/bench"))
    return parser.parse_args()


def machine(options: argparse.Namespace) -> dict[str, Any]:
    """Return what the figures depend on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    found = {
        "device": options.device,
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": options.threads,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "deltaexp": deltaexp.__version__,
        "python": platform.python_version(),
    }
    if options.device != "cpu":
        found |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "tf32": options.tf32}
    return found


def measured(
    group: Group,
    backbones: Backbones,
    seconds: float,
    options: argparse.Namespace,
    progress: Progress,
    most: dict[str, float],
) -> dict[str, Any]:
    """Measure a group: per contender the times, and against another one their ratios.

    Args:
        group: The group.
        backbones: Makes what it is measured on.
        seconds: How long; on a GPU with what it takes to get ready.
        options: The command line's.
        progress: What is told of each round.
        most: What the machine can do, from `measure.peaks`.
    """
    begun, cuda = time.monotonic(), options.device != "cpu"
    name = f"{backbones.shape.name}: {group.name}"
    task = progress.add_task(name, total=None)
    ready: dict[str, tuple[Contender, Prepared]] = {}
    steps: dict[str, Callable[[], Any]] = {}
    graphs = gpu.Graphs() if options.graphs else None
    failed: dict[str, str] = {}
    gc.collect()
    gc.freeze()  # what is there already need not be looked at in every round
    chosen = [one for one in group.contenders if options.only in one.name or one.name == group.against]
    for one in chosen:
        try:
            made = one.make(backbones)
            step = made.step if graphs is None else made.once
            for _ in range(2):
                step()
            steps[one.name] = step if graphs is None else graphs.captured(step)
        except Exception as error:  # a contender that another version of a library has not is no reason to measure none
            failed[one.name] = first_line(error)
            continue
        ready[one.name] = one, made
    found: dict[str, Any] = {"against": group.against, "training": group.training, "graphs": options.graphs, "failed": failed}
    if group.against not in ready:
        gc.unfreeze()
        progress.remove_task(task)
        return {**found, "contenders": {}}
    if cuda:
        seconds -= time.monotonic() - begun
    gc.disable()
    try:
        times = in_turns(steps, options.device, seconds, options.rounds, lambda: progress.advance(task))
    finally:
        gc.enable()
        gc.unfreeze()
    base = times[group.against]
    result = {}
    for key, (one, made) in ready.items():
        result[key] = {
            "library": one.library,
            "method": one.method,
            "precision": one.precision,
            "seconds": summary(times[key]),
            "ratio": ratio(times[key], base),
            "times": [round(value, 6) for value in times[key]],
        }
        if group.training:
            result[key]["saved_bytes"] = saved_bytes(made.model, made.forward)
            trained = sum(parameter.numel() for parameter in made.model.parameters() if parameter.requires_grad)
            result[key]["trained_parameters"] = trained
        if cuda:
            try:
                counted, peak = flops(made.once), gpu.peak_memory(made.once)
            except RuntimeError as error:
                failed[f"{key}: its FLOP and memory"] = first_line(error)
                continue
            floor = counted / most[DTYPES[one.precision]]
            result[key] |= {"flops": counted, "of_peak": floor / result[key]["seconds"]["median"], "peak_bytes": peak}
    against, made = ready[group.against]
    found["flops"] = flops(made.once)
    if cuda:
        found["floor_seconds"] = found["flops"] / most[DTYPES[against.precision]]
    progress.remove_task(task)
    return {**found, "contenders": result}


def first_line(error: Exception) -> str:
    """Return what an error is, in a line."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def write(out: Path, results: dict[str, Any]) -> None:
    """Write what has been measured so far."""
    writing.write_whole(out / "results.json", lambda file: file.write(json.dumps(results, indent=1) + "\n"))


def main() -> None:
    options = arguments()
    cuda = options.device != "cpu"
    if options.graphs and not cuda:
        raise SystemExit("--graphs is for a GPU: give --device cuda, too.")
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(options.threads)
    torch.set_float32_matmul_precision("high" if options.tf32 else "highest")
    begun = time.monotonic()
    console = Console(width=190 if cuda else 150, record=True)
    names = named(options.shapes or ("minilm,llama,llama-1b" if cuda else "minilm,llama"), options.device)
    chosen = [
        (shape, group) for shape in names for group in groups(SHAPES[shape], options.device) if options.groups in group.name
    ]
    if not chosen:
        raise SystemExit(unknown("group", options.groups, [group.name for group in groups(SHAPES[names[0]], options.device)]))
    total = options.seconds or (45 if cuda else 600)
    weight = sum(len(group.contenders) for _, group in chosen)
    results: dict[str, Any] = {
        "machine": machine(options),
        "peaks": peaks(options.device, [torch.float32, torch.bfloat16]),
        "shapes": {},
    }
    options.out.mkdir(parents=True, exist_ok=True)
    heap = contextlib.nullcontext() if cuda or not memory.reusable() else memory.reused()
    packing = gpu.without_packing() if options.graphs else contextlib.nullcontext()
    with heap, packing, Progress(console=Console(stderr=True), transient=True) as progress:
        for name in names:
            backbones = Backbones(SHAPES[name], options.device, masked=not options.graphs)
            for group in (group for shape, group in chosen if shape == name):
                seconds = total * len(group.contenders) / weight
                try:
                    found = measured(group, backbones, seconds, options, progress, results["peaks"])
                except RuntimeError as error:  # such as a GPU's memory that does not suffice: the other groups are measured
                    found = {"contenders": {}, "failed": {f"{name}: {group.name}": first_line(error)}}
                results["shapes"].setdefault(name, {})[group.name] = found
                show(console, name, group.name, found, results["peaks"])
                write(options.out, results)
                gc.collect()
                if cuda:
                    torch.cuda.empty_cache()
    results["targets"] = targets(results)
    results["wall_seconds"] = round(time.monotonic() - begun, 1)
    for line in results["targets"]:
        console.print(line["text"], style="green" if line["met"] else "red", highlight=False)
    write(options.out, results)
    console.save_text(str(options.out / "results.txt"))
    plot(results, options.out / "results.png")
    print(f"Written to {options.out} after {results['wall_seconds']} s.")


if __name__ == "__main__":
    main()
