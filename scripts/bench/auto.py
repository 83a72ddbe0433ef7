"""Measure what ``trainer.speed=auto`` makes of a training step, against PEFT's default and its settings for bf16.

    python scripts/bench/auto.py [--shapes minilm,llama] [--seconds 60] [--out FILE.json]

As in ``run.py``: LoRA of rank 8 on all linear maps, a forward and a backward pass, all contenders in turns within one process,
with one thread, ratios round by round. ``auto`` is chosen and applied by `deltaexp.lab.speeding`, as a run does it; "bf16
weights" is the same with ``backbone.dtype=bfloat16``. Freed memory is kept for the next step, as in ``run.py``, for all alike.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from contenders import BF16, auto, of_peft, peft_lora
from measure import in_turns, ratio, summary
from shapes import SHAPES, Backbones

from deltaexp.lab import memory

PEFT = {
    "PEFT, fp32 (its default)": {},
    "PEFT, bf16 adapters": {"dtype": BF16, "autocast_adapter_dtype": False},
    "PEFT, bf16 adapters, eager attention": {"dtype": BF16, "autocast_adapter_dtype": False, "attention": "eager"},
    "PEFT, autocast, eager attention": {"autocast": True, "attention": "eager"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="minilm,llama")
    parser.add_argument("--seconds", type=float, default=60, help="for all measuring together")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    names = options.shapes.split(",")
    results: dict[str, Any] = {}
    for name in names:
        backbones = Backbones(SHAPES[name], "cpu")
        made = {key: of_peft(peft_lora("all"), **keys)(backbones) for key, keys in PEFT.items()}
        made["auto"] = auto(backbones)
        made["auto, bf16 weights"] = auto(backbones, dtype=BF16)
        for one in made.values():
            for _ in range(2):
                one.step()
        gc.collect()
        gc.disable()
        steps = {key: one.step for key, one in made.items()}
        with memory.reused() if memory.reusable() else contextlib.nullcontext():
            times = in_turns(steps, "cpu", options.seconds / len(names), 200, lambda: None)
        gc.enable()
        default, *low = list(PEFT)
        best = min(low, key=lambda key: min(times[key]))
        results[name] = {"best bf16 setting of PEFT": best, "rounds": len(times[default]), "contenders": {}}
        print(f"{name}: {len(times[default])} rounds; PEFT's best setting for bf16: {best}")
        for key, found in times.items():
            gains = {"default": ratio(times[default], found), "bf16": ratio(times[best], found)}
            results[name]["contenders"][key] = {"seconds": summary(found), "faster than PEFT's": gains}
            figures = [min(found) * 1e3, gains["default"]["median"], min(times[default]) / min(found)]
            figures += [gains["bf16"]["median"], min(times[best]) / min(found)]
            print(
                "  {:38s} {:7.1f} ms; {:.2f} x PEFT's default (minima {:.2f}), {:.2f} x its best bf16 (minima {:.2f})".format(
                    key, *figures
                )
            )
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
