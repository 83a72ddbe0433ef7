"""Measure later epochs of training a delta in the top blocks of a classifier: all computed, from kept activations, and so on.

    python scripts/bench/cached.py [--shape minilm] [--top 2] [--steps 2] [--seconds 120] [--threads 1] [--out FILE]

The MiniLM shape (hidden size 384, 6 blocks), batches of 32 rows of 64 tokens, or a classifier of the Llama shape (hidden size
512, 8 blocks), batches of 8 rows of 128 tokens; LoRA on query and value of the top blocks and a trained head. An epoch is a
forward pass, a backward pass and a step of AdamW on every batch. The contenders take their epochs in turns and see the same
batches in the same order, so that in the end their weights can be compared. Ratios are taken round by round against computing
all. Activations are looked up by the rows' tokens in a file that is mapped into memory, as in a run.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from measure import in_turns, ratio, summary
from rich.console import Console
from rich.table import Table
from shapes import SHAPES, Backbones, Shape

from deltaexp import AutoDeltaConfig, AutoDeltaModel, frozen, one_token
from deltaexp.frozen import Frozen, Shortcut
from deltaexp.lab.activations import Folder, Known, Texts, computed
from deltaexp.model import DeltaModel
from deltaexp.one_token import LastBlock, OneToken

PLAIN, KEPT, BOTH = "all computed", "kept activations", "kept activations, one token only in the last block"
TARGET = 0.35
"""The most that an epoch from kept activations may take, as a part of one in which all is computed (issue 7)."""


class Contender:
    """A classifier with a delta in its top blocks, which trains by epochs.

    Args:
        backbones: Where the backbone comes from.
        top: The number of blocks with a delta.
        batches: What it trains on.
    """

    def __init__(self, backbones: Backbones, top: int, batches: list[dict[str, torch.Tensor]]) -> None:
        self.model, self.batches = backbones.get(), batches
        torch.manual_seed(1)
        config = AutoDeltaConfig.from_dict({"delta_type": "lora", "layers": f"last:{top}"})
        self.delta_model: DeltaModel = AutoDeltaModel.from_config(config, backbone_model=self.model)
        # Backbones share their weights, so that a trained head has to be its own.
        head = "classifier" if hasattr(self.model, "classifier") else "score"
        setattr(self.model, head, torch.nn.Linear(self.model.config.hidden_size, self.model.config.num_labels))
        self.delta_model.freeze_module(exclude=["deltas", head])
        self.trained = {name: p.detach() for name, p in self.delta_model.trainable_parameters().items()}
        self.optimizer = torch.optim.AdamW(self.delta_model.trainable_parameters().values(), lr=1e-3)

    def epoch(self) -> None:
        """Train on every batch once."""
        for batch in self.batches:
            self.model(**batch).loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def go_on_from(self, texts: Texts, folder: Folder) -> None:
        """Keep what the blocks below the delta make of texts, and go on from it."""
        found: Any = frozen.find(self.model)
        assert isinstance(found, Frozen), found
        assert found.random is None
        self.model.eval()
        values = folder.get(
            {"depth": found.depth}, (texts.tokens, self.model.config.hidden_size), torch.float32,
            lambda: computed(texts, found.block_inputs, torch.device("cpu")),
        )  # fmt: skip
        self.model.train()
        known = Known()
        known.add(texts, values)
        Shortcut(found, known.find, training=True)

    def read_one_token(self) -> None:
        """Compute in the last block the token that the head reads only."""
        last = one_token.find(self.model, self.delta_model.attachments)
        assert isinstance(last, LastBlock), last
        assert last.random is None
        OneToken(self.model, last)


def batches(shape: Shape, count: int) -> tuple[list[dict[str, torch.Tensor]], Texts]:
    """Return batches of random rows, and the rows as texts."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, shape.vocabulary, (count * shape.rows, shape.tokens), generator=generator)
    labels = torch.randint(0, shape.classes, (count * shape.rows,), generator=generator)
    parts = zip(ids.split(shape.rows), labels.split(shape.rows), strict=True)
    made = [{"input_ids": i, "attention_mask": torch.ones_like(i), "labels": label} for i, label in parts]
    return made, Texts.of(Dataset.from_dict({"input_ids": ids.tolist()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=("minilm", "llama-classifier"), default="minilm")
    parser.add_argument("--top", type=int, default=2, help="blocks with a delta")
    parser.add_argument("--steps", type=int, default=2, help="batches of an epoch")
    parser.add_argument("--rounds", type=int, default=50, help="the most rounds")
    parser.add_argument("--seconds", type=float, default=60, help="after which no round is begun, once there were three")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="a file for the figures, as JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows, texts = batches(SHAPES[options.shape], options.steps)
    backbones = Backbones(SHAPES[options.shape], "cpu")
    contenders = {name: Contender(backbones, options.top, rows) for name in (PLAIN, KEPT, BOTH)}
    with tempfile.TemporaryDirectory() as place:
        folder = Folder(2**40, Path(place))
        begun = time.thread_time()
        contenders[KEPT].go_on_from(texts, folder)
        first = time.thread_time() - begun
        contenders[BOTH].go_on_from(texts, folder)
        contenders[BOTH].read_one_token()
        steps = {name: one.epoch for name, one in contenders.items()}
        for step in steps.values():
            step()  # warms up
        gc.collect()
        gc.disable()
        times = in_turns(steps, "cpu", options.seconds, options.rounds, lambda: None)
    result: dict[str, Any] = {"shape": options.shape, "top": options.top, "steps": options.steps}
    result["computing_once_seconds"] = first
    table = Table("later epochs", "seconds, median", "ratio, median", "quartiles", "weights differ by")
    for name, one in contenders.items():
        plain = contenders[PLAIN].trained
        difference = max(float((one.trained[key] - value).abs().max()) for key, value in plain.items())
        against = ratio(times[name], times[PLAIN])
        result[name] = {"seconds": summary(times[name]), "ratio": against, "largest_difference": difference}
        quartiles = f"{against['q1']:.3f} to {against['q3']:.3f}"
        table.add_row(name, f"{summary(times[name])['median']:.3f}", f"{against['median']:.3f}", quartiles, f"{difference:.2g}")
    console = Console(width=130)
    console.print(table)
    largest = max(float(value.abs().max()) for value in contenders[PLAIN].trained.values())
    met = result[BOTH]["ratio"]["median"] <= TARGET
    console.print(
        f"{len(times[PLAIN])} rounds of {len(rows)} steps; the largest weight is {largest:.3g}. Activations: {first:.2f} s."
    )
    console.print(f"At most {TARGET} of computing all: {'met' if met else 'not met'}.", style="green" if met else "red")
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
