"""Measure how long saving, loading and verifying a delta take, beside PEFT's saving and loading of the same one.

    python scripts/checkpoint_speed.py [--layers 24] [--repeat 5] [--json FILE]

A GPT-2 with random weights (medium size by default) is written to a temporary folder. For every repetition it is loaded anew,
and a LoRA of rank 8 on the same modules is saved and loaded by either library. PEFT checks nothing of the backbone; deltaexp
compares every tensor of it, the first time by hashing and then by what it remembers of the files. transformers maps the file
into memory and reads it when it is used, so loading is timed with and without reading. All in one process.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from rich.console import Console
from rich.table import Table
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.utils import logging

from deltaexp import AutoDeltaConfig, AutoDeltaModel, HashCheck, checkpoint, verification
from deltaexp.digest_cache import cache_dir


def timed(action: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = action()
    return time.perf_counter() - start, result


def forget() -> None:
    """Forget the digests that are remembered, so that the next check has to hash."""
    for path in (cache_dir() / "digests").glob("*"):
        path.unlink()


def measure(folder: Path, place: Path, seconds: dict[str, list[float]]) -> None:
    """Do everything once, and add the seconds."""

    def backbone() -> Any:
        took, model = timed(lambda: GPT2LMHeadModel.from_pretrained(place))
        seconds.setdefault("transformers: load the backbone", []).append(took)
        return model

    def take(name: str, action: Callable[[], Any]) -> Any:
        took, result = timed(action)
        seconds.setdefault(name, []).append(took)
        return result

    def load(name: str, **options: Any) -> Any:
        model = backbone()
        loaded = take(name, lambda: AutoDeltaModel.from_finetuned(folder / "delta", model, **options))
        assert loaded.hash_check is (HashCheck.MATCH if options.get("check_hash", True) else HashCheck.SKIPPED)

    model = backbone()
    name = "transformers: load the backbone and read its weights"
    took, _ = timed(lambda: [parameter.detach().sum() for parameter in model.parameters()])
    seconds.setdefault(name, []).append(took + seconds["transformers: load the backbone"][-1])
    forget()
    model = backbone()
    config = AutoDeltaConfig.from_dict({"delta_type": "lora", "modified_modules": ["c_attn"], "lora_r": 8})
    delta_model = AutoDeltaModel.from_config(config, model)
    delta_model.freeze_module()
    take("deltaexp: save, the backbone hashed", lambda: delta_model.save_finetuned(folder / "delta"))
    take("deltaexp: save, the backbone remembered", lambda: delta_model.save_finetuned(folder / "delta"))
    load("deltaexp: load and verify, the backbone remembered")
    forget()
    load("deltaexp: load and verify, the backbone hashed")
    load("deltaexp: load unverified (check_hash=False)", check_hash=False)
    take("deltaexp: verify files, tensors and hash", lambda: verification.check_saved(checkpoint.read(folder / "delta")))

    wrapped = peft.get_peft_model(backbone(), peft.LoraConfig(r=8, target_modules=["c_attn"], fan_in_fan_out=True))
    take("PEFT: save", lambda: wrapped.save_pretrained(folder / "peft"))
    model = backbone()
    take("PEFT: load (nothing is verified)", lambda: peft.PeftModel.from_pretrained(model, folder / "peft"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder, place = Path(name), Path(name) / "backbone"
        os.environ["DELTAEXP_CACHE"] = str(folder / "cache")
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(n_layer=options.layers, n_embd=1024, n_head=16))
        size = sum(parameter.nbytes for parameter in model.parameters())
        model.save_pretrained(place)
        del model
        measure(folder / "warm", place, {})
        for number in range(options.repeat):
            measure(folder / str(number), place, seconds)
        delta = (folder / "0" / "delta" / checkpoint.WEIGHTS).stat().st_size
    table = Table("what", "median s", "lowest s", title=f"backbone {size / 1e9:.2f} GB, delta {delta / 1e6:.2f} MB")
    for what, found in seconds.items():
        table.add_row(what, f"{statistics.median(found):.3f}", f"{min(found):.3f}")
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps({"backbone_bytes": size, "delta_bytes": delta, "seconds": seconds}, indent=2) + "\n")


if __name__ == "__main__":
    main()
