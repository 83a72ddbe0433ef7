"""Check that a sweep which is killed on the way ends in the deltas of one that is not, and how long both take.

    python scripts/sweep_kill_resume.py --out FOLDER [KEY=VALUE ...]

The sweep is ``experiment=delta_comparison``, with the overrides given. It runs once undisturbed; then in another folder, where
it is killed with SIGKILL as often as ``--kills`` says, at moments spread over its jobs, while one of them is being trained. The
same command continues it each time. The sha256 of every delta's tensors and config are compared in the end.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from deltaexp.checksum import file_sha256

FILES = ("delta_model.safetensors", "config.json")


def start(folder: Path, words: list[str]) -> subprocess.Popen:
    command = [sys.executable, "-m", "deltaexp", "-m", "experiment=delta_comparison", *words, f"hydra.sweep.dir={folder}"]
    with open(folder.with_suffix(".log"), "a", encoding="utf-8") as log:
        return subprocess.Popen([*command, "trainer.progress=false"], stdout=log, stderr=subprocess.STDOUT)


def finished(folder: Path) -> int:
    return len(list(folder.glob("*/delta")))


def training(folder: Path) -> bool:
    """Say whether a job is at work that has no delta yet."""
    return any(not (path.parent / "delta").exists() for path in folder.glob("*/run.json"))


def run(folder: Path, words: list[str], kill_after: list[int]) -> tuple[float, list[int]]:
    """Run a sweep to its end; return the seconds that it took in all, and how many jobs were done when it was killed."""
    begin, killed = time.perf_counter(), []
    for count in kill_after:
        process = start(folder, words)
        while not (finished(folder) >= count and training(folder)):
            if process.poll() is not None:
                sys.exit(f"The sweep ended before it could be killed; see {folder.with_suffix('.log')}.")
            time.sleep(0.02)
        time.sleep(2)  # into its training
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        killed.append(finished(folder))
    if start(folder, words).wait():
        sys.exit(f"The sweep failed; see {folder.with_suffix('.log')}.")
    return time.perf_counter() - begin, killed


def digests(folder: Path) -> dict[str, str]:
    return {f"{path.name}/{file}": file_sha256(path / "delta" / file) for path in folder.glob("*-seed*") for file in FILES}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where the two sweeps go")
    parser.add_argument("--kills", type=int, default=2, help="how often the second is killed")
    parser.add_argument("words", nargs="*", help="more overrides")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True)
    out = asked.out.resolve()
    whole, _ = run(out / "undisturbed", asked.words, [])
    jobs = len(json.loads((out / "undisturbed" / "sweep.json").read_text(encoding="utf-8"))["jobs"])
    again, killed = run(out / "killed", asked.words, [jobs * (n + 1) // (asked.kills + 1) for n in range(asked.kills)])
    first, second = digests(out / "undisturbed"), digests(out / "killed")
    same = first == second and len(first) == jobs * len(FILES)
    print(f"{jobs} jobs; undisturbed {whole:.0f} s; killed when {killed} of them were done, {again:.0f} s in all")
    print(f"{len(first)} files of deltas, {sum(first[name] == second.get(name) for name in first)} of them the same bytes")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
