"""Measure what it costs to switch between deltas that are in memory, against loading each from disk when it is needed.

    python scripts/switching.py [--deltas 4] [--layers 8] [--width 512]

The backbone is a Llama with random weights. "switch" is ``detach`` of one delta and ``attach`` of the next; "load" is
``detach`` and `AutoDeltaModel.from_finetuned`, with and without the check of the model's hash. The figures are medians.
"""

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from deltaexp import AutoDeltaConfig, AutoDeltaModel


def seconds(action: Callable[[int], object], times: int) -> float:
    """Return the median time that ``action(number)`` takes."""
    measured = []
    for number in range(times):
        start = time.perf_counter()
        action(number)
        measured.append(time.perf_counter() - start)
    return statistics.median(measured)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("deltas", 4), ("layers", 8), ("width", 512), ("times", 20)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=options.width,
        intermediate_size=options.width * 3,
        num_hidden_layers=options.layers,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    backbone = LlamaForCausalLM(config).eval()
    count = sum(parameter.numel() for parameter in backbone.parameters())
    print(f"backbone of {count:,} parameters, {options.deltas} deltas of each type\n")
    print(f"{'type':10} {'parameters':>11} {'switch':>11} {'load':>11} {'load, checked':>14}")
    for delta_type in ("lora", "adapter", "ia3", "bitfit", "prefix"):
        with tempfile.TemporaryDirectory() as folder:
            deltas = []
            for number in range(options.deltas):
                made = AutoDeltaModel.from_config(
                    AutoDeltaConfig.from_dict({"delta_type": delta_type}), backbone_model=backbone
                )
                made.save_finetuned(Path(folder) / str(number))
                made.detach()
                deltas.append(made)
            current = [deltas[0]]
            current[0].attach()

            def switch(number: int, deltas: list = deltas, current: list = current) -> None:
                current[0].detach()
                current[0] = deltas[(number + 1) % len(deltas)]
                current[0].attach()

            def load(number: int, check_hash: bool = False, folder: str = folder, current: list = current) -> None:
                current[0].detach()
                path = Path(folder) / str(number % options.deltas)
                current[0] = AutoDeltaModel.from_finetuned(path, backbone, check_hash=check_hash)

            def checked(number: int, load: Callable = load) -> None:
                load(number, True)

            times = seconds(switch, options.times), seconds(load, options.times), seconds(checked, max(options.times // 4, 1))
            current[0].detach()
        switching, loading, checking = (f"{1000 * value:.2f} ms" for value in times)
        parameters = deltas[0].counts()["delta"]
        print(f"{delta_type:10} {parameters:>11,} {switching:>11} {loading:>11} {checking:>14}")


if __name__ == "__main__":
    main()
