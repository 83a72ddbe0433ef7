"""Measure what training the jobs of a sweep in one (`sweep.joint=auto`) takes beside training them one after the other.

    python scripts/joint_speed.py [--batches 1,4,16] [--types lora,adapter] [--seeds 1,2] [--steps 100] [KEY=VALUE ...]

For each batch size the same sweep on the embedded backbone is run with and without it, each time as a command of its own, in
turns. What is compared are the seconds that the jobs trained for (each job's share, where they trained in one) and those of the
whole sweeps, medians over the rounds; and by how much the deltas differ, as a part of their norm. Set OMP_NUM_THREADS=1
where other work goes on. Runs with heads of their own are those of

    python scripts/joint_speed.py task=sst2 task.answer=head task.data=FOLDER
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from sweep_speed import RESULTS, WEIGHTS, WORDS, command


def outcomes(folder: Path) -> dict[str, dict[str, Any]]:
    """Return what the jobs of a sweep found, by their folders' names."""
    return {path.parent.parent.name: json.loads(path.read_text()) for path in sorted(folder.glob(f"*/delta/{RESULTS}"))}


def difference(one: Path, other: Path) -> float:
    """Return by how much two deltas differ, as a part of the norm."""
    first, second = load_file(one), load_file(other)
    vectors = [torch.cat([each[name].flatten() for name in sorted(first)]) for each in (first, second)]
    return float((vectors[0] - vectors[1]).norm() / vectors[1].norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", default="1,4,16")
    parser.add_argument("--types", default="lora,adapter")
    parser.add_argument("--seeds", default="1,2")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("words", nargs="*", help="other keys of the runs")
    options = parser.parse_args()
    table = Table(
        "rows of a batch", "a step of all (of single ones)", "training (ratio)", "the sweep (ratio)", "deltas differ by"
    )
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for batch in map(int, options.batches.split(",")):
            found: dict[str, list[tuple[float, float]]] = {"off": [], "auto": []}
            said, differences = [], []
            for number in range(options.rounds):
                for joint in ("off", "auto"):
                    folder = Path(name, f"{batch}-{number}-{joint}")
                    words = ["-m", *WORDS, f"trainer.max_steps={options.steps}", f"trainer.batch_size={batch}", *options.words]
                    words += [f"delta_type={options.types}", f"seed={options.seeds}", f"sweep.joint={joint}"]
                    wall, _ = command([*words, f"hydra.sweep.dir={folder}"], Path(name, "cache"))
                    results = outcomes(folder)
                    found[joint].append((sum(one["seconds"]["train"] for one in results.values()), wall))
                    if joint == "auto":
                        said.append([one["trained_together"] and one["trained_together"]["time"] for one in results.values()])
                        pairs = [(Path(name, f"{batch}-{number}-{which}") for which in ("auto", "off")) for _ in results]
                        differences += [
                            difference(*(place / job / "delta" / WEIGHTS for place in pair))
                            for pair, job in zip(pairs, results, strict=True)
                        ]
            ratios = [
                statistics.median(auto[place] / off[place] for off, auto in zip(found["off"], found["auto"], strict=True))
                for place in (0, 1)
            ]
            rows.append({"batch": batch, "step": said, "train": ratios[0], "sweep": ratios[1], "differences": differences})
            told = ", ".join(sorted({"-" if value is None else f"{value:.2f}" for one in said for value in one}))
            table.add_row(str(batch), told, f"{ratios[0]:.2f}", f"{ratios[1]:.2f}", f"{max(differences):.1e}")
    Console(width=120).print(table)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
