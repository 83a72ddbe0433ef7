"""LoRA on a Llama-shaped backbone of 1.1 billion random parameters in bfloat16: seconds of a step and memory at its peak.

    python scripts/bench/one_billion.py [--device cuda] [--rows 1] [--tokens 512] [--steps 3] [--out DIR]
    python scripts/bench/one_billion.py --lab      the whole lab on it: loading, training, saving, verifying

The backbone is made in bfloat16 from its config alone: there is no copy in float32. LoRA goes on all linear maps of its blocks,
in float32, and AdamW trains it. Told are the resident memory at the peak (on a GPU: what PyTorch's tensors hold), that above
what the process held before the backbone was made, and what `deltaexp plan` says of the same run. glibc keeps some of what was
freed; with ``MALLOC_MMAP_THRESHOLD_=131072`` in the environment it gives it back.

``--lab`` writes the backbone into a temporary folder and calls the command line on it, as for any checkpoint of one's own.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from contenders import RANK, attached, our_lora
from measure import seconds
from shapes import SHAPES
from transformers import LlamaConfig, LlamaForCausalLM

from deltaexp.__main__ import main as command_line
from deltaexp.lab import memory as resident
from deltaexp.lab import plan, schema

TINY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu, or cuda")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="threads of the CPU")
    parser.add_argument("--attention", default="sdpa", help="sdpa or eager")
    parser.add_argument("--checkpointing", action="store_true", help="compute activations again in the backward pass")
    parser.add_argument("--lab", action="store_true", help="a whole run of the lab instead of steps alone")
    parser.add_argument("--tiny", action="store_true", help="a backbone of 100,000 parameters, for trying out")
    parser.add_argument("--out", type=Path, default=Path("outputs/one_billion"))
    return parser.parse_args()


def settings(options: argparse.Namespace) -> LlamaConfig:
    """Return the backbone's config, which is Llama 3.2's with the vocabulary of Llama 2."""
    large = {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8,
    }  # fmt: skip
    return LlamaConfig(
        vocab_size=32000, max_position_embeddings=4096, pad_token_id=0, use_cache=False, architectures=["LlamaForCausalLM"],
        dtype="bfloat16", **(TINY if options.tiny else large),
    )  # fmt: skip


def backbone(options: argparse.Namespace) -> Any:
    """Make the backbone with random weights, in bfloat16 from the beginning."""
    torch.manual_seed(0)
    with torch.device(options.device):
        return LlamaForCausalLM._from_config(settings(options), dtype=torch.bfloat16, attn_implementation=options.attention)


def words(options: argparse.Namespace, folder: Path, data: str) -> list[str]:
    """Return the overrides of a run of the lab that trains the same."""
    modules = ",".join(SHAPES["llama-1b"].linears)
    return [
        "delta_type=lora", f"lora_r={RANK}", f"modified_modules=[{modules}]",
        "backbone=local", f"backbone.source={folder}", "backbone.name=llama-1b", "backbone.tokenizer=byt5",
        "backbone.dtype=bfloat16", f"backbone.attention={options.attention}",
        "task=wikitext", f"task.data={data}", "task.subset=null", f"task.max_source_length={options.tokens}",
        "task.test_split=null", "trainer.precision=fp32", f"trainer.batch_size={options.rows}", "trainer.eval_batch_size=1",
        f"trainer.max_steps={options.steps}", "trainer.log_every=1",
        f"trainer.gradient_checkpointing={str(options.checkpointing).lower()}",
        *(["trainer.cpu=true"] if options.device == "cpu" else []),
    ]  # fmt: skip


def steps(options: argparse.Namespace) -> dict[str, Any]:
    """Take some steps, and return what they took."""
    gc.collect()
    measure = resident.PeakMemory()
    start = time.perf_counter()
    model = backbone(options).train()
    made = time.perf_counter() - start
    attached(model, our_lora("all")(SHAPES["llama-1b"]))
    if options.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    ids = torch.randint(3, model.config.vocab_size, (options.rows, options.tokens), device=options.device)

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    times = [seconds(step, options.device) for _ in range(options.steps)]
    found = measure.read()
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "trained": sum(parameter.numel() for parameter in trained),
        "seconds_to_make": round(made, 2),
        "seconds": [round(value, 3) for value in times],
        "peak_bytes": found["cuda"] if options.device != "cpu" else found["process"],
        "peak_above_start": found.get("cuda", found.get("training")) if options.device != "cpu" else found.get("training"),
    }


def planned(options: argparse.Namespace) -> int:
    """Return the bytes that `deltaexp plan` names for a step."""
    with tempfile.TemporaryDirectory() as place:
        settings(options).save_pretrained(place)
        memory = plan.make(*schema.composed(words(options, Path(place), "not/needed"))).memory
    return sum(memory["cpu" if options.device == "cpu" else "gpu"].training.values())


def lab(options: argparse.Namespace) -> dict[str, Any]:
    """Run the lab on a backbone that is a folder, and return what it recorded."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "backbone"
        backbone(options).save_pretrained(folder)
        gc.collect()
        text = "One line of a text that is long enough to fill some blocks of tokens, which are bytes here.\n"
        rows = json.dumps({"text": text}) + "\n"
        count = options.tokens * options.rows * options.steps // len(text) + 2 * options.tokens // len(text) + 2
        data = Path(place) / "data"
        data.mkdir()
        (data / "train.jsonl").write_text(rows * count)
        (data / "validation.jsonl").write_text(rows * 2)
        run = Path(place) / "run"
        command = [*words(options, folder, str(data)), "trainer.evaluate_before=false", f"hydra.run.dir={run}"]
        if command_line(command):
            raise SystemExit("The run failed.")
        found = json.loads((run / "delta" / "results.json").read_text())
    return {key: found[key] for key in ("parameters", "seconds", "peak_memory_bytes", "verification", "steps")}


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    if options.lab:
        found = lab(options)
        print(json.dumps(found, indent=1))
    else:
        found = steps(options)
        found["planned_bytes"] = planned(options)
        print(
            f"{found['parameters']:,} parameters, of which LoRA's {found['trained']:,} are trained; batch "
            f"{options.rows} x {options.tokens}, {options.attention} attention\n"
            f"made in {found['seconds_to_make']:.1f} s; steps: {', '.join(f'{value:.2f}' for value in found['seconds'])} s\n"
            f"peak: {found['peak_bytes'] / 2**30:.2f} GiB"
        )
        if found["peak_above_start"] is not None:
            share = found["planned_bytes"] / found["peak_above_start"] - 1
            print(
                f"peak above the process before: {found['peak_above_start'] / 2**30:.2f} GiB; planned: "
                f"{found['planned_bytes'] / 2**30:.2f} GiB ({share:+.1%})"
            )
    found |= {
        "options": {name: str(value) for name, value in vars(options).items()},
        "malloc_mmap_threshold": os.environ.get("MALLOC_MMAP_THRESHOLD_"),
        "torch": torch.__version__,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "results.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
