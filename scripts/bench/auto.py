"""Measure what ``trainer.speed=auto`` makes of a training step, against PEFT's default and its settings for bf16.

    python scripts/bench/auto.py [--shapes minilm,llama] [--seconds 240] [--out FILE.json]

LoRA of rank 8 on all linear maps, a forward and a backward pass, one thread. Unlike in ``run.py`` every contender has a process
of its own, so that each is as it is for who uses it: ``auto`` keeps freed memory for the next step, and PEFT does not, unless
the name says so. The processes take turns of three steps, while the others wait: one to fill the caches again, as the step
before does in a training, and two that are timed. Ratios are taken round by round.

``auto`` is chosen and applied by `deltaexp.lab.speeding`, as a run does it; "bf16 weights" is the same with
``backbone.dtype=bfloat16``; "one token" also leaves out the tokens that the head does not read in the last block, as a run does
by itself where something is classified (``trainer.shortcuts``).
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import multiprocessing
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from contenders import BF16, Prepared, auto, of_peft, peft_lora
from measure import ratio, seconds, summary
from shapes import SHAPES, Backbones

from deltaexp import one_token
from deltaexp.lab import memory


def shortened(backbones: Backbones, **options: Any) -> Prepared:
    """Return `auto` with one token in the last block."""
    made = auto(backbones, **options)
    delta_model = next(one for one in made.keep if hasattr(one, "attachments"))
    last = one_token.find(made.model, delta_model.attachments)
    if isinstance(last, str):
        raise ValueError(last)
    made.keep.append(one_token.OneToken(made.model, last))
    return made


def theirs(backbones: Backbones, **options: Any) -> Prepared:
    """Return a contender of PEFT's."""
    return of_peft(peft_lora("all"), **options)(backbones)


HALF: dict[str, Any] = {"dtype": BF16, "autocast_adapter_dtype": False}
DEFAULT = "PEFT, fp32 (its default)"
SETTINGS: dict[str, dict[str, Any]] = {
    "PEFT, bf16 adapters": HALF,
    "PEFT, bf16 adapters, eager attention": {**HALF, "attention": "eager"},
    "PEFT, autocast, eager attention": {"autocast": True, "attention": "eager"},
}
KEEPING = "PEFT, bf16 adapters, eager attention, freed memory kept"
CONTENDERS: dict[str, Callable[[Backbones], Prepared]] = {
    DEFAULT: theirs,
    **{name: partial(theirs, **options) for name, options in SETTINGS.items()},
    KEEPING: partial(theirs, **HALF, attention="eager"),
    "auto": auto,
    "auto, bf16 weights": partial(auto, dtype=BF16),
    "auto, one token": shortened,
    "auto, bf16 weights, one token": partial(shortened, dtype=BF16),
}


def process(shape: str, name: str, pipe: Any) -> None:
    """Take steps of a contender each time that something is received, and send how long one took; or why there is none."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    keeps = memory.reusable() and (not name.startswith("PEFT") or name == KEEPING)
    with memory.reused() if keeps else contextlib.nullcontext():
        try:
            made = CONTENDERS[name](Backbones(SHAPES[shape], "cpu"))
            for _ in range(3):
                made.step()
        except ValueError as error:
            pipe.send(str(error))
            return
        gc.collect()
        gc.disable()
        pipe.send(None)
        while pipe.recv():
            gc.collect()
            made.step()
            pipe.send(sum(seconds(made.step, "cpu") for _ in range(2)) / 2)


def measured(shape: str, limit: float) -> dict[str, list[float]]:
    """Return the times of all contenders that there are for a shape, one a round."""
    context = multiprocessing.get_context("spawn")
    pipes = {}
    for name in CONTENDERS:
        pipe, other = context.Pipe()
        context.Process(target=process, args=(shape, name, other), daemon=True).start()
        why = pipe.recv()
        if why is None:
            pipes[name] = pipe
    times: dict[str, list[float]] = {name: [] for name in pipes}
    begun = time.monotonic()
    while len(times[DEFAULT]) < 3 or time.monotonic() - begun < limit:
        for name in list(pipes)[:: 1 if len(times[DEFAULT]) % 2 == 0 else -1]:
            pipes[name].send(True)
            times[name].append(pipes[name].recv())
    for pipe in pipes.values():
        pipe.send(False)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="minilm,llama")
    parser.add_argument("--seconds", type=float, default=240, help="for all measuring together")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    names = options.shapes.split(",")
    results: dict[str, Any] = {}
    for name in names:
        times = measured(name, options.seconds / len(names))
        best = min(SETTINGS, key=lambda key: min(times[key]))
        results[name] = {"best bf16 setting of PEFT": best, "rounds": len(times[DEFAULT]), "contenders": {}}
        print(f"{name}: {len(times[DEFAULT])} rounds; PEFT's best setting for bf16: {best}")
        for key, found in times.items():
            gains = {"default": ratio(times[DEFAULT], found), "bf16": ratio(times[best], found)}
            results[name]["contenders"][key] = {"seconds": summary(found), "faster than PEFT's": gains}
            figures = [min(found) * 1e3, gains["default"]["median"], min(times[DEFAULT]) / min(found)]
            figures += [gains["bf16"]["median"], min(times[best]) / min(found)]
            print(
                "  {:55s} {:7.1f} ms; {:.2f} x PEFT's default (minima {:.2f}), {:.2f} x its best bf16 (minima {:.2f})".format(
                    key, *figures
                )
            )
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
