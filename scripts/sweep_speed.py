"""Measure how long a sweep takes beside the same runs as commands of their own, and compare their deltas byte by byte.

    python scripts/sweep_speed.py [--types lora,adapter] [--seeds 1,2,3] [--steps 60] [--launcher joblib] [KEY=VALUE ...]

All train on the embedded backbone. One half of the single commands is run before the sweep and one half after it, so that what
else the machine does at some time weighs on both. Each side has a cache of its own, which is empty at first. CPU seconds are
those of all threads; they tell more than wall time where other work goes on. With a launcher the sweep is executed in several
processes: set OMP_NUM_THREADS=1, for sums are rounded otherwise by another number of threads.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TYPES = "lora,adapter,parallel_adapter,compacter,bitfit,ia3,reft,lokr"
WORDS = ["task.validation_rows=100", "task.test_rows=200", "trainer.learning_rate=0.01", "trainer.progress=false"]
WEIGHTS, RESULTS = "delta_model.safetensors", "results.json"


def command(words: list[str], cache: Path) -> tuple[float, float]:
    """Run the command line, and return its wall and CPU seconds."""
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "DELTAEXP_CACHE": str(cache), "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run([sys.executable, "-m", "deltaexp", *words], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"deltaexp {' '.join(words)} failed:\n{done.stdout}\n{done.stderr}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return time.perf_counter() - start, cpu


def digest(delta: Path) -> str:
    return hashlib.sha256((delta / WEIGHTS).read_bytes()).hexdigest()


def phases(deltas: list[Path]) -> dict[str, float]:
    """Return the mean seconds of what a job consists of."""
    found = [json.loads((delta / RESULTS).read_text(encoding="utf-8"))["seconds"] for delta in deltas]
    names = dict.fromkeys(name for seconds in found for name in seconds)
    return {name: sum(seconds.get(name, 0.0) for seconds in found) / len(found) for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", default=TYPES)
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--launcher", help="of the sweep, such as joblib; by default one process does all")
    parser.add_argument("--json", type=Path)
    parser.add_argument("words", nargs="*", help="other keys of the runs")
    options = parser.parse_args()
    common = [*WORDS, f"trainer.max_steps={options.steps}", *options.words]
    each = list(itertools.product(options.types.split(","), options.seeds.split(",")))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        single: dict[tuple[str, str], tuple[float, float]] = {}

        def alone(which: list[tuple[str, str]]) -> None:
            for delta_type, seed in which:
                place = f"hydra.run.dir={folder / 'single' / f'{delta_type}-{seed}'}"
                words = [*common, f"delta_type={delta_type}", f"seed={seed}", place]
                single[delta_type, seed] = command(words, folder / "cache1")

        alone(each[: len(each) // 2])
        words = ["-m", *common, f"delta_type={options.types}", f"seed={options.seeds}", f"hydra.sweep.dir={folder / 'sweep'}"]
        words += [f"hydra/launcher={options.launcher}"] if options.launcher else []
        sweep = command(words, folder / "cache2")
        alone(each[len(each) // 2 :])
        inside = {(t, s): next((folder / "sweep").glob(f"{t}-seed{s}-*")) / "delta" for t, s in each}
        outside = {(t, s): folder / "single" / f"{t}-{s}" / "delta" for t, s in each}
        same = sum(digest(inside[key]) == digest(outside[key]) for key in each)
        spent = {"sweep": phases(list(inside.values())), "single": phases(list(outside.values()))}
    wall, cpu = (sum(seconds[number] for seconds in single.values()) for number in (0, 1))
    found: dict[str, Any] = {
        "jobs": len(each), "same_deltas": same, "steps": options.steps, "single_wall": wall, "single_cpu": cpu,
        "sweep_wall": sweep[0], "sweep_cpu": sweep[1], "ratio_wall": sweep[0] / wall, "ratio_cpu": sweep[1] / cpu,
        "phases": spent,
    }  # fmt: skip
    print(f"{len(each)} jobs of {options.steps} steps; {same} of {len(each)} deltas are the same bytes")
    print(f"wall s: one by one {wall:.1f}, as a sweep {sweep[0]:.1f}, ratio {found['ratio_wall']:.3f}")
    print(f"CPU s:  one by one {cpu:.1f}, as a sweep {sweep[1]:.1f}, ratio {found['ratio_cpu']:.3f}")
    for side, seconds in spent.items():
        print(f"a job, {side}: " + ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items()))
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    if same < len(each):
        raise SystemExit("The deltas differ.")


if __name__ == "__main__":
    main()
