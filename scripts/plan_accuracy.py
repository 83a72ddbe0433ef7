"""How near `deltaexp plan` comes to the memory that training takes on the CPU.

For three backbones (an encoder, a decoder and an encoder-decoder with random weights) and four delta types, a process of its
own loads the backbone, attaches the delta and trains for some steps, by the lab's own functions and with every row as long as
the config allows. Its resident memory at the peak of training, above what it was before the backbone was loaded, is compared
with what the command says.

glibc's allocator holds more than PyTorch asks for: it cannot use all of what was freed again. The comparison is with a process
in which every tensor is returned to the system (MALLOC_MMAP_THRESHOLD_); ``--glibc`` measures the other as well. With
``--device cuda`` it is what PyTorch's tensors hold on the GPU at the peak.

    python scripts/plan_accuracy.py                        all twelve, a few minutes
    python scripts/plan_accuracy.py --types prefix --backbones encoder --json FILE
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROWS, LENGTH, TARGET, STEPS = 16, 128, 32, 3
TYPES = ("lora", "adapter", "bitfit", "full")
BACKBONES = ("encoder", "decoder", "encoder-decoder")
WITHIN = 0.2


def prepare(folder: Path) -> None:
    """Write the backbones, with random weights, and rows that fill a batch."""
    import torch
    import transformers

    torch.manual_seed(0)
    models: dict[str, Any] = {
        # As sentence-transformers/all-MiniLM-L6-v2.
        "encoder": transformers.BertModel(
            transformers.BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
        ),
        "decoder": transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=8000, hidden_size=512, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=4,
                intermediate_size=1408, max_position_embeddings=512,
            )
        ),
        "encoder-decoder": transformers.T5ForConditionalGeneration(
            transformers.T5Config(vocab_size=8000, d_model=384, d_ff=1024, num_layers=4, num_heads=6, decoder_start_token_id=0)
        ),
    }  # fmt: skip
    for name, model in models.items():
        model.save_pretrained(folder / name)
    for split in ("train", "validation", "test"):
        rows = [
            {"sentence": "a" * 2 * LENGTH, "label": n % 2, "source": "a" * 2 * LENGTH, "target": "b" * 2 * TARGET}
            for n in range(64)
        ]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    for kind in BACKBONES:
        data = folder / f"{kind}-data"
        data.mkdir()
        for split in ("train", "validation", "test"):
            (data / f"{split}.jsonl").symlink_to(folder / f"{split}.jsonl")


def words(folder: Path, backbone: str, delta_type: str, device: str, precision: str, speed: str) -> list[str]:
    """Return the overrides of a run."""
    return [
        *(["trainer.cpu=true"] if device == "cpu" else []), f"trainer.precision={precision}", f"trainer.speed={speed}",
        f"delta_type={delta_type}",
        "backbone=local", f"backbone.source={folder / backbone}", f"backbone.name={backbone}", "backbone.tokenizer=byt5",
        f"task={'sst2' if backbone == 'encoder' else 'dates'}", f"task.data={folder / f'{backbone}-data'}",
        "task.train_rows=64", "task.validation_rows=4", "task.test_rows=null",
        f"task.max_source_length={LENGTH if backbone != 'decoder' else LENGTH - TARGET}", f"task.max_target_length={TARGET}",
        f"trainer.batch_size={ROWS}", "trainer.eval_batch_size=1", f"trainer.max_steps={STEPS}", "trainer.save_every=0",
        "trainer.progress=false",
    ]  # fmt: skip


def peak(overrides: list[str]) -> int:
    """Train as a run does, and return the bytes at the peak above what was held before; in a process of its own."""
    import torch

    from deltaexp import AutoDeltaModel
    from deltaexp.lab import backbones, schema, speeding, training
    from deltaexp.lab import memory as measured
    from deltaexp.lab.checkpoints import Checkpoints
    from deltaexp.lab.tasks import data as task_data
    from deltaexp.lab.tasks.kinds import choose

    measured.PeakMemory()  # what an earlier training of this process has left is gone
    config, delta_config = schema.composed(overrides)
    kind_class = choose(config.task, backbones.settings_of(config.backbone), config.backbone.name)
    data = task_data.load(config.task, kind_class, progress=False)
    before = measured._status("VmRSS")
    backbone = backbones.load(config.backbone, config.task)
    delta_model = AutoDeltaModel.from_config(delta_config, backbone_model=backbone.model)
    delta_model.freeze_module(exclude=[*delta_config.unfrozen_modules, *backbone.new])
    kind = backbone.kind(config.task, backbone.processor, backbone.model.config, delta_config.positions())
    splits = kind.splits(data)
    with tempfile.TemporaryDirectory() as place:
        saved = Checkpoints(Path(place), 0)
        choice = speeding.choose(config, backbone.model)
        trainer = training.build(choice.trainer, delta_model, kind, splits, saved, {"data": 0, "dropout": 0}, [])
        if config.trainer.cpu:
            measured.CLEAR.write_text("5")  # the high-water mark begins here
        with speeding.applied(choice, backbone.model):
            trainer.train_from(None)
    return measured._status("VmHWM") - before if config.trainer.cpu else torch.cuda.max_memory_allocated()


def answer(command: list[str], **environment: str) -> Any:
    """Return the JSON that a command of Python's prints at last."""
    settings = {"OMP_NUM_THREADS": "1", **os.environ, **environment}
    done = subprocess.run([sys.executable, "-W", "ignore", *command], capture_output=True, text=True, env=settings, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout[done.stdout.index("{") :])


def main() -> int:
    """Print the table; 0 if all are near enough."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", default=list(TYPES))
    parser.add_argument("--backbones", nargs="+", choices=BACKBONES, default=list(BACKBONES))
    parser.add_argument("--glibc", action="store_true", help="measure with glibc's own settings as well")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16", "auto"), default="fp32")
    parser.add_argument("--speed", choices=("off", "auto"), default="off", help="trainer.speed; with --precision auto")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--train", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        print(json.dumps({"peak": peak(options.train)}))
        return 0
    from deltaexp.lab import plan, schema

    figures = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        prepare(folder)
        os.environ["DELTAEXP_CACHE"] = str(folder / "cache")
        print(
            "| backbone | delta_type | planned MiB | measured MiB | difference | with glibc's own settings |\n"
            + "| --- " * 6
            + "|"
        )
        for backbone in options.backbones:
            for delta_type in options.types:
                overrides = words(folder, backbone, delta_type, options.device, options.precision, options.speed)
                memory = plan.make(*schema.composed(overrides)).memory
                planned = sum(memory["cpu" if options.device == "cpu" else "gpu"].training.values())
                command = [str(Path(__file__).resolve()), "--train", *overrides]
                found = answer(command, MALLOC_MMAP_THRESHOLD_="131072")["peak"]
                glibc = answer(command)["peak"] if options.glibc else None
                figures.append(
                    {"backbone": backbone, "delta_type": delta_type, "planned": planned, "measured": found, "glibc": glibc}
                )
                shown = "" if glibc is None else f"{glibc / 2**20:.0f} MiB"
                numbers = f"{planned / 2**20:.0f} | {found / 2**20:.0f} | {planned / found - 1:+.1%}"
                print(f"| {backbone} | {delta_type} | {numbers} | {shown} |", flush=True)
    worst = max(abs(figure["planned"] / figure["measured"] - 1) for figure in figures)
    print(f"\nLargest difference: {worst:.1%}; it must be below {WITHIN:.0%}.")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0 if worst < WITHIN else 1


if __name__ == "__main__":
    sys.exit(main())
