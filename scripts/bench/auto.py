"""Measure what ``trainer.speed=auto`` makes of a training step, against PEFT's default and its settings for bf16.

    python scripts/bench/auto.py [--device cuda] [--shapes minilm,llama] [--seconds 240] [--compile] [--out FILE.json]

LoRA of rank 8 on all linear maps, a forward and a backward pass, one thread. Unlike in ``run.py`` every contender has a process
of its own, so that each is as it is for who uses it: ``auto`` keeps freed memory for the next step, and PEFT does not, unless
the name says so. The processes take turns of three steps, while the others wait: one to fill the caches again, as the step
before does in a training, and two that are timed. Ratios are taken round by round.

``auto`` is chosen and applied by `deltaexp.lab.speeding`, as a run does it; "bf16 weights" is the same with
``backbone.dtype=bfloat16``; "one token" also leaves out the tokens that the head does not read in the last block, as a run does
by itself where something is classified (``trainer.shortcuts``).

On a GPU all contenders live in one process, and every time is the mean of a few steps that follow each other as in a training.
There PEFT is also measured with TF32, with Liger's kernels, and with ``--compile`` by torch.compile; and ``auto`` also without
the CUDA graphs that it computes by.
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

import liger
import torch
import transformers
from contenders import auto, of_peft, peft_lora, peft_model
from measure import flops, in_turns, peaks, ratio, seconds, summary
from preparing import BF16, Prepared, prepared
from shapes import SHAPES, Backbones, named

from deltaexp import one_token
from deltaexp.lab import memory, writing
from deltaexp.lab.graphs import StepGraphs


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


def in_tf32(backbones: Backbones) -> Prepared:
    """Return PEFT's default, with products in TF32."""
    torch.set_float32_matmul_precision("high")
    return theirs(backbones)


def compiled(backbones: Backbones) -> Prepared:
    """Return PEFT in bfloat16, compiled."""
    model = peft_model(backbones, peft_lora("all"), attention="sdpa", **HALF)
    return prepared(torch.compile(model), backbones)


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
ON_GPU: dict[str, dict[str, Any]] = {"PEFT, bf16 adapters": HALF, "PEFT, autocast": {"autocast": True}}
GPU_SHAPES = "minilm,bert-base,llama,llama-1b,llama-8b-blocks"
COMPILED = "PEFT, bf16 adapters, torch.compile"
GPU_CONTENDERS: dict[str, Callable[[Backbones], Prepared]] = {
    DEFAULT: theirs,
    "PEFT, fp32 with TF32": in_tf32,
    **{name: partial(theirs, **options) for name, options in ON_GPU.items()},
    "PEFT, bf16 adapters, Liger kernels": partial(liger.prepared_with, config=peft_lora("all")),
    COMPILED: compiled,
    "auto": auto,
    "auto, without CUDA graphs": partial(auto, replayed=False),
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


def measured_on_gpu(shape: str, device: str, limit: float, names: list[str], peak: float) -> dict[str, list[float]]:
    """Return the times of all contenders that there are for a shape, one a round; ``limit`` includes getting them ready."""
    begun = time.monotonic()
    backbones = Backbones(SHAPES[shape], device)
    made: dict[str, Prepared] = {}
    for name in names:
        torch.set_float32_matmul_precision("highest")
        try:
            one = GPU_CONTENDERS[name](backbones)
            one.step = partial(_under, torch.get_float32_matmul_precision(), one.step)
            for _ in range(4):
                one.step()
        except Exception as error:  # one that another version of a library has not is no reason to measure none
            print(f"  {name} could not be measured: {type(error).__name__}: {error}".splitlines()[0], flush=True)
            continue
        made[name] = one
    gc.collect()
    gc.freeze()
    gc.disable()
    steps = {name: one.step for name, one in made.items()}
    times = in_turns(steps, device, limit - (time.monotonic() - begun), 10, lambda: None)
    gc.enable()
    gc.unfreeze()
    for name, one in made.items():
        for replays in (kept for kept in one.keep if isinstance(kept, StepGraphs)):
            if replays.refused:
                print(f"  {name} is not replayed: {replays.refused}", flush=True)
    if "auto" in made:
        floor = 1e3 * flops(made["auto"].once) / peak
        print(f"{shape}: arithmetic floor, the FLOP of auto's step at the measured peak in bf16: {floor:.3f} ms", flush=True)
    return times


def _under(precision: str, step: Callable[[], Any]) -> None:
    """Take a step with the precision of products in float32 that holds for it, and for no other contender."""
    torch.set_float32_matmul_precision(precision)
    step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu, or cuda")
    parser.add_argument("--shapes", help=f"by default minilm,llama; on a GPU {GPU_SHAPES}")
    parser.add_argument("--seconds", type=float, help="for all measuring; by default 240, on a GPU 45 with getting ready")
    parser.add_argument("--compile", action="store_true", help="on a GPU, measure PEFT with torch.compile, too")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    cuda = options.device != "cpu"
    names = named(options.shapes or (GPU_SHAPES if cuda else "minilm,llama"), options.device)
    limit = (options.seconds or (45 if cuda else 240)) / len(names)
    contenders = [name for name in GPU_CONTENDERS if options.compile or name != COMPILED]
    if cuda:
        warnings.simplefilter("ignore")
        transformers.logging.set_verbosity_error()
        peak = peaks(options.device, [BF16])["bfloat16"]
    results: dict[str, Any] = {}
    for name in names:
        if cuda:
            try:
                times = measured_on_gpu(name, options.device, limit, contenders, peak)
            except RuntimeError as error:  # such as a GPU's memory that does not suffice: the other shapes are measured
                print(f"{name} could not be measured: {error}".splitlines()[0], flush=True)
                continue
            gc.collect()
            torch.cuda.empty_cache()
        else:
            times = measured(name, limit)
        results[name] = told(name, times, ON_GPU if cuda else SETTINGS)
        if options.out:
            writing.write_whole(options.out, lambda file: file.write(json.dumps(results, indent=1) + "\n"))


def told(shape: str, times: dict[str, list[float]], settings: dict[str, Any]) -> dict[str, Any]:
    """Print what came out for a shape, and return it for JSON.

    Args:
        shape: Its name.
        times: The times of the contenders, one a round.
        settings: PEFT's settings for bf16, the best of which the others are compared with.
    """
    if DEFAULT not in times or not any(key in times for key in settings):
        print(f"{shape}: there is nothing to compare with", flush=True)
        return {"times": times}
    best = min((key for key in settings if key in times), key=lambda key: min(times[key]))
    result: dict[str, Any] = {"best bf16 setting of PEFT": best, "rounds": len(times[DEFAULT]), "contenders": {}}
    print(f"{shape}: {len(times[DEFAULT])} rounds; PEFT's best setting for bf16: {best}")
    for key, found in times.items():
        gains = {"default": ratio(times[DEFAULT], found), "bf16": ratio(times[best], found)}
        result["contenders"][key] = {"seconds": summary(found), "faster than PEFT's": gains}
        figures = [min(found) * 1e3, gains["default"]["median"], min(times[DEFAULT]) / min(found)]
        figures += [gains["bf16"]["median"], min(times[best]) / min(found)]
        print(
            "  {:55s} {:7.2f} ms; {:.2f} x PEFT's default (minima {:.2f}), {:.2f} x its best bf16 (minima {:.2f})".format(
                key, *figures
            ),
            flush=True,
        )
    return result


if __name__ == "__main__":
    main()
