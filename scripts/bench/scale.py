"""What training takes as it grows: memory of a step, time of a step, and memory of the data.

    python scripts/bench/scale.py [--parts memory,time,data] [--types lora,prefix] [--out DIR]

``memory``  the peak of a training step on the CPU, per delta type, as a function of the delta's size, layers, rows and tokens,
            beside what `deltaexp plan` says of the same run. Measured as by `scripts/plan_accuracy.py`: the lab trains in a
            process of its own in which every freed tensor goes back to the system (MALLOC_MMAP_THRESHOLD_).
``time``    the processor's seconds of a forward and a backward pass against the number of tokens, beside the frozen limit,
            taken in turns in one process, so that the ratios hold on a busy machine.
``data``    the memory that is the process's own (not of files that are mapped into memory, which the system takes back when it
            needs room) while the lab reads and tokenises a set, and draws an epoch's order, against the number of rows.

Writes ``results.json``, ``results.txt`` and, where matplotlib is installed, ``results.png`` to ``--out``. About a quarter
of an hour of two cores.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import itertools
import json
import os
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import plan_accuracy
from rich.console import Console
from rich.table import Table

WITHIN = 0.2
"""How far the plan may be off."""
TYPES = {
    "lora": ("lora_r", (1, 8, 64, 256)),
    "adapter": ("bottleneck_dim", (8, 64, 256)),
    "prefix": ("prefix_token_num", (4, 16, 64)),
    "bitfit": (None, ()),
    "ia3": (None, ()),
    "full": (None, ()),
}
"""The delta types, each with the key of its size and values of it."""
LAYERS, ROWS, TOKENS = (2, 4, 8), (4, 8, 16), (64, 128, 256, 512)
BASE = {"layers": 4, "rows": 8, "tokens": 128}
LENGTHS = (32, 64, 128, 256, 512, 1024)
SETS = {"classification": "one column, a label", "template": "a template, a label's name", "packed text": "task.packing"}
DATA_ROWS, WORDS = (5_000, 20_000, 80_000), 320


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="memory,time,data")
    parser.add_argument("--types", default=",".join(TYPES), help="delta types of the part memory")
    parser.add_argument("--seconds", type=float, default=120, help="for the part time")
    parser.add_argument("--small", action="store_true", help="few and small points, for trying out")
    parser.add_argument("--out", type=Path, default=Path("outputs/scale"))
    parser.add_argument("--child", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser.parse_args()


# Memory of a step.


def points(delta_type: str, small: bool) -> Iterator[tuple[str, int, dict[str, int], list[str]]]:
    """Yield what is varied, its value, the sizes of the backbone and the batch, and the delta's own overrides."""
    key, values = TYPES[delta_type]
    for value in values[:1] if small else values:
        yield str(key), value, BASE, [f"{key}={value}"]
    for name, numbers in (("layers", LAYERS), ("rows", ROWS), ("tokens", TOKENS)):
        for number in numbers[:1] if small else numbers:
            yield name, number, {**BASE, name: number}, []


def prepare(folder: Path) -> None:
    """Write decoders with random weights, and rows that are one batch each time: of full length, all but one.

    As in most batches, that one has some padding, so that attention has a mask.
    """
    import torch
    import transformers

    for layers in LAYERS:
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=384, hidden_size=384, num_hidden_layers=layers, num_attention_heads=6, num_key_value_heads=3,
            intermediate_size=1024, max_position_embeddings=1024,
        )  # fmt: skip
        transformers.LlamaForCausalLM(config).save_pretrained(folder / f"{layers}-layers")
    for count in ROWS:
        place = folder / f"{count}-rows"
        place.mkdir()
        full, short = (json.dumps({"source": "a" * 2 * max(TOKENS), "target": "b" * length}) for length in (64, 8))
        for split in ("train", "validation"):
            (place / f"{split}.jsonl").write_text(f"{full}\n" * (count - 1) + f"{short}\n", encoding="utf-8")


def words(folder: Path, delta_type: str, sizes: dict[str, int], own: list[str]) -> list[str]:
    """Return the overrides of a run."""
    target = 16
    return [
        "trainer.cpu=true", "trainer.precision=fp32", f"delta_type={delta_type}", *own,
        "backbone=local", f"backbone.source={folder}/{sizes['layers']}-layers", "backbone.name=decoder",
        "backbone.tokenizer=byt5", "task=dates", f"task.data={folder}/{sizes['rows']}-rows", "task.train_rows=null",
        "task.validation_rows=2", "task.test_split=null", "task.test_rows=null",
        f"task.max_source_length={sizes['tokens'] - target}", f"task.max_target_length={target}",
        f"trainer.batch_size={sizes['rows']}", "trainer.eval_batch_size=1", "trainer.max_steps=2", "trainer.save_every=0",
        "trainer.progress=false",
    ]  # fmt: skip


def memory(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Measure all points of all delta types, and plan them."""
    from deltaexp.lab import plan, schema

    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        prepare(folder)
        os.environ["DELTAEXP_CACHE"] = str(folder / "cache")
        for delta_type in options.types.split(","):
            chosen = list(points(delta_type, options.small))
            overrides = [words(folder, delta_type, sizes, own) for _, _, sizes, own in chosen]
            peaks = child("memory", json.dumps(overrides), MALLOC_MMAP_THRESHOLD_="131072")["peaks"]
            table = Table("what", "value", "planned MiB", "measured MiB", "difference", title=f"{delta_type}: a training step")
            lines = []
            for (name, value, sizes, _), words_of, peak in zip(chosen, overrides, peaks, strict=True):
                planned = sum(plan.make(*schema.composed(words_of)).memory["cpu"].training.values())
                lines.append({"what": name, "value": value, **sizes, "planned": planned, "measured": peak})
                off = planned / peak - 1
                table.add_row(
                    name, str(value), f"{planned / 2**20:.1f}", f"{peak / 2**20:.1f}", f"{off:+.1%}",
                    style="red" if abs(off) > WITHIN else None,
                )  # fmt: skip
            console.print(table)
            found[delta_type] = lines
    worst = max(abs(line["planned"] / line["measured"] - 1) for lines in found.values() for line in lines)
    console.print(f"Largest difference: {worst:.1%}; it should be below {WITHIN:.0%}.")
    return found


def peaks_of(overrides: list[list[str]]) -> dict[str, Any]:
    """Train each of some runs, in this process, and return their peaks."""
    plan_accuracy.peak(overrides[0])  # what libraries take once and keep is not a step's
    return {"peaks": [plan_accuracy.peak(one) for one in overrides]}


# Time of a step.


def times(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Measure steps in turns for sequences of several lengths."""
    import torch
    from contenders import LIMIT, limit, our_lora, ours
    from measure import in_turns, ratio, summary
    from shapes import SHAPES, Backbones

    torch.set_num_threads(1)
    lengths = LENGTHS[:2] if options.small else LENGTHS
    made = {
        LIMIT: limit,
        "lora q,v": ours(our_lora("q,v")),
        "lora all": ours(our_lora("all")),
        "adapter": ours(lambda _: {"delta_type": "adapter"}),
        "prefix": ours(lambda _: {"delta_type": "prefix", "reparameterize": False}),
        "full": ours(lambda _: {"delta_type": "full"}, own=True),
    }
    table = Table(
        "tokens", *made, title="a forward and a backward pass, 2 rows, Llama shape: ms (multiple of the frozen limit)"
    )
    found: dict[str, Any] = {}
    for length in lengths:
        shape = dataclasses.replace(SHAPES["tiny" if options.small else "llama"], rows=2, tokens=length)
        backbones = Backbones(shape, "cpu")
        ready = {name: make(backbones) for name, make in made.items()}
        for one in ready.values():
            one.step()
        gc.collect()
        rounds = in_turns(
            {name: one.step for name, one in ready.items()}, "cpu", options.seconds / len(lengths), 50, lambda: None
        )
        found[str(length)] = {
            name: {"seconds": summary(values), "ratio": ratio(values, rounds[LIMIT])} for name, values in rounds.items()
        }
        cells = (f"{1e3 * one['seconds']['median']:.1f} ({one['ratio']['median']:.2f})" for one in found[str(length)].values())
        table.add_row(str(length), *cells)
    console.print(table)
    return found


# Memory of the data.


def data(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Measure what reading and tokenising sets of several sizes takes."""
    rows = (200, 400) if options.small else DATA_ROWS
    table = Table("rows", "MB of the file", *SETS, title="the process's own memory for data, MiB at the peak (seconds)")
    found: dict[str, Any] = {name: [] for name in SETS}
    for count in rows:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            size = write_rows(folder, count)
            for name in SETS:
                # A cache of its own, in which nothing is tokenised yet.
                settings = {"DELTAEXP_CACHE": str(folder / name), "HF_DATASETS_CACHE": str(folder / f"{name}-datasets")}
                settings |= {"MALLOC_MMAP_THRESHOLD_": "131072"}
                one = child("data", name, str(folder), **settings)
                found[name].append({"rows": count, "file_bytes": size, **one})
        cells = (f"{found[name][-1]['peak'] / 2**20:.1f} ({found[name][-1]['seconds']:.1f})" for name in SETS)
        table.add_row(f"{count:,}", f"{size / 1e6:.1f}", *cells)
    console.print(table)
    return found


def write_rows(folder: Path, count: int) -> int:
    """Write a training split with so many rows, a validation split, and a backbone with a fast tokenizer; return bytes."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    names = [f"word{number}" for number in range(997)]
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "bos_token": "[BOS]", "eos_token": "[EOS]"}
    vocabulary = {token: number for number, token in enumerate([*special.values(), *names])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder / "backbone")
    config: Any = transformers.LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        pad_token_id=0, max_position_embeddings=256,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "backbone")
    (folder / "data").mkdir()
    for split, rows in (("train", count), ("validation", 100)):
        with (folder / "data" / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            for number in range(rows):
                text = " ".join(names[(number * 31 + place * place) % len(names)] for place in range(WORDS))
                label = number % 2
                file.write(json.dumps({"sentence": text, "label": label, "word": ["no", "yes"][label]}) + "\n")
    return (folder / "data" / "train.jsonl").stat().st_size


def data_of(name: str, place: str) -> dict[str, Any]:
    """Read and tokenise a set as a run does, and draw the order of an epoch; return the peak of memory and the seconds."""
    import transformers
    from torch.utils.data import RandomSampler

    from deltaexp.lab import backbones, schema
    from deltaexp.lab.parallel import Share
    from deltaexp.lab.samplers import EpochSampler
    from deltaexp.lab.tasks import data as task_data
    from deltaexp.lab.tasks.kinds import choose

    sentences = ["task=sst2", "task.answer=head"]
    own = {
        "classification": sentences,
        "template": [*sentences, "task.inputs=['{sentence} and so on']", "task.target=word", "task.labels=[no,yes]"],
        "packed text": ["task=wikitext", "task.subset=null", "task.inputs=[sentence]"],
    }
    config, _ = schema.composed([
        "delta_type=lora", "backbone=local", f"backbone.source={place}/backbone", "backbone.name=b", *own[name],
        f"task.data={place}/data", "task.test_split=null", "task.max_source_length=64",
    ])  # fmt: skip
    settings = backbones.settings_of(config.backbone)
    tokenizer = transformers.AutoTokenizer.from_pretrained(config.backbone.source)
    kind_class = choose(config.task, settings, config.backbone.name)
    with sampled() as peak:
        start = time.perf_counter()
        loaded = task_data.load(config.task, kind_class, progress=False)
        task = dataclasses.replace(config.task, labels=loaded.labels)
        split = kind_class(task, tokenizer, settings).splits(loaded)["train"]
        took = time.perf_counter() - start
        order = Share(EpochSampler(RandomSampler(split.features), 0, lambda: 0), 32, 0, 1)
        for number in itertools.islice(order, 64):
            split.features[number]
    return {"peak": peak[0], "seconds": took, "features": len(split.features)}


@contextlib.contextmanager
def sampled() -> Iterator[list[int]]:
    """Within this context the process's own memory is looked at all the time; what it grows by at most is in the list."""
    gc.collect()
    before, most, ended = own_memory(), [0], threading.Event()

    def look() -> None:
        while not ended.wait(0.005):
            most[0] = max(most[0], own_memory() - before)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    yield most
    ended.set()
    thread.join()


def own_memory() -> int:
    """Return the bytes of resident memory that no file stands for."""
    from deltaexp.lab import memory as resident

    return resident._status("RssAnon")


def child(*words_of: str, **environment: str) -> Any:
    """Return what this script finds out in a process of its own."""
    return plan_accuracy.answer([str(Path(__file__).resolve()), "--child", *words_of], **environment)


# Results.


def plot(results: dict[str, Any], target: Path) -> None:
    """Draw what was measured; nothing where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [name for name in ("size", "layers", "rows", "tokens") if "memory" in results]
    panels += [name for name in ("time", "data") if name in results]
    figure, axes = pyplot.subplots(
        -(-len(panels) // 2), 2, figsize=(10, 3.4 * -(-len(panels) // 2)), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, name in zip(axes.flat, panels, strict=False):
        axis.set_xscale("log", base=2)
        if name in ("time", "data"):
            series = results[name]
            if name == "time":
                for which in next(iter(series.values())):
                    values = [1e3 * one[which]["seconds"]["median"] for one in series.values()]
                    axis.plot([int(length) for length in series], values, marker="o", ms=3, label=which)
                axis.set(xlabel="tokens", ylabel="ms of a step", yscale="log")
            else:
                for which, lines in series.items():
                    values = [line["peak"] / 2**20 for line in lines]
                    axis.plot([line["rows"] for line in lines], values, marker="o", ms=3, label=which)
                axis.set(xlabel="rows of the set", ylabel="MiB for data", ylim=(0, None))
        else:
            for number, (delta_type, lines) in enumerate(results["memory"].items()):
                own = (TYPES[delta_type][0],) if name == "size" else (name,)
                chosen = [line for line in lines if line["what"] in own]
                xs, colour = [line["value"] for line in chosen], f"C{number}"
                axis.plot(xs, [line["measured"] / 2**20 for line in chosen], "o", ms=4, color=colour)
                axis.plot(xs, [line["planned"] / 2**20 for line in chosen], color=colour, lw=1, label=delta_type)
            axis.set(xlabel="rank, bottleneck, tokens of a prefix" if name == "size" else name, ylabel="MiB of a step")
            axis.set_title("points: measured, lines: deltaexp plan", fontsize=8, loc="left")
        axis.legend(fontsize=7)
    figure.savefig(target, dpi=110)
    pyplot.close(figure)


def main() -> int:
    options = arguments()
    warnings.simplefilter("ignore")
    if options.child:
        what, *rest = options.child
        print(json.dumps(peaks_of(json.loads(rest[0])) if what == "memory" else data_of(*rest)))
        return 0
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    begun, console = time.monotonic(), Console(width=150, record=True, highlight=False)
    parts = {"memory": memory, "time": times, "data": data}
    results: dict[str, Any] = {
        "machine": {
            "cores": os.cpu_count(), "load": os.getloadavg(), "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
    }  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.parts.split(","):
        results[name] = parts[name](options, console)
    results["wall_seconds"] = round(time.monotonic() - begun, 1)
    (options.out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    console.save_text(str(options.out / "results.txt"))
    plot(results, options.out / "results.png")
    print(f"Written to {options.out} after {results['wall_seconds']} s.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
