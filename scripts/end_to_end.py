"""E2E, WikiText and GSM8K from the command line to checked metrics, with small models that this script makes itself.

The quality of the answers is not the point. Each run writes its answers down, and its metrics are computed anew from them,
or from the saved delta, by the benchmark's own library or by a few plain lines that share nothing with deltaexp.

    python scripts/end_to_end.py --data FOLDER

FOLDER holds the folders e2e_nlg, wikitext2_raw and gsm8k with parquet files, as on the Hub. Needs the extra ``metrics``.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu import corpus_bleu
from transformers import ByT5Tokenizer, GPT2Config, GPT2LMHeadModel

from deltaexp import AutoDeltaModel

LENGTH = 256
"""Positions of a window of WikiText."""


def decoder(folder: Path) -> Path:
    """Write a small random decoder on bytes; return its folder."""
    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=384, n_embd=128, n_layer=4, n_head=4, n_positions=1024, bos_token_id=1, eos_token_id=1, pad_token_id=0
        )  # fmt: skip
        GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def run(folder: Path, *words: str) -> dict[str, Any]:
    """Make one run by the command line where it is not there yet; return its results."""
    results = folder / "delta" / "results.json"
    if not results.exists():
        common = ["trainer.cpu=true", "trainer.progress=false", "trainer.evaluate_before=false"]
        common += ["task.save_predictions=true", f"hydra.run.dir={folder}"]
        command = [sys.executable, "-m", "deltaexp", *words, *common, "resume=true"]
        print("+", " ".join(command), flush=True)
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return json.loads(results.read_text(encoding="utf-8"))


def answers(folder: Path) -> list[dict[str, Any]]:
    """Return the answers that a run wrote down."""
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]


def check(what: str, metric: str, ours: float, theirs: float) -> None:
    """Print two numbers that have to be the same."""
    same = math.isclose(ours, theirs, rel_tol=1e-5, abs_tol=1e-9)
    print(f"{what:22} {metric:12} deltaexp {ours:12.6f}   reference {theirs:12.6f}   {'equal' if same else 'NOT EQUAL'}")
    if not same:
        raise SystemExit(1)


def check_e2e(what: str, folder: Path, results: dict[str, Any]) -> None:
    """Compare BLEU with sacrebleu's and ROUGE with rouge-score's, with all references of each list of facts."""
    by_facts: dict[str, str] = {}
    references: dict[str, list[str]] = {}
    for line in answers(folder):
        by_facts.setdefault(line["inputs"]["text"], line["prediction"])
        references.setdefault(line["inputs"]["text"], []).append(line["reference"])
    most = max(map(len, references.values()))
    streams = [[texts[n] if n < len(texts) else None for texts in references.values()] for n in range(most)]
    bleu = corpus_bleu([by_facts[source] for source in references], streams).score
    check(what, "bleu", results["metrics"]["after"]["bleu"], bleu)
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    rouge = [scorer.score_multi(texts, by_facts[source])["rougeL"].fmeasure for source, texts in references.items()]
    check(what, "rougeL", results["metrics"]["after"]["rouge"], sum(rouge) / len(rouge))


def check_wikitext(what: str, folder: Path, results: dict[str, Any], data: Path, backbone: Path) -> None:
    """Compare the perplexity with that of a plain loop over the text, with the delta loaded from its folder."""
    texts = pd.read_parquet(data / "wikitext2_raw" / "test.parquet")["text"]
    text = "".join(row if row.endswith("\n") or number == len(texts) - 1 else f"{row}\n" for number, row in enumerate(texts))
    ids = [1, *ByT5Tokenizer()(text, add_special_tokens=False)["input_ids"]]
    model = GPT2LMHeadModel.from_pretrained(backbone, dtype=torch.float32)
    AutoDeltaModel.from_finetuned(folder / "delta", backbone_model=model)
    model.eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for start in range(0, len(ids) - 1, LENGTH - 1):
            window = torch.tensor([ids[start : start + LENGTH]])
            logits = model(window).logits[0, :-1].double().log_softmax(-1)
            total -= logits[torch.arange(len(logits)), window[0, 1:]].sum().item()
            count += len(logits)
    check(what, "perplexity", results["metrics"]["after"]["perplexity"], math.exp(total / count))


def check_gsm8k(what: str, folder: Path, results: dict[str, Any]) -> None:
    """Compare the accuracy with that by the pattern of the benchmark's own code."""

    def number(text: str) -> str:
        match = re.compile(r"#### (\-?[0-9\.\,]+)").search(text)
        return match.group(1).strip().replace(",", "") if match else "[invalid]"

    lines = answers(folder)
    right = [number(line["prediction"]) == number(line["reference"]) for line in lines]
    check(what, "gsm8k", results["metrics"]["after"]["gsm8k"], sum(right) / len(right))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("outputs/end_to_end"))
    parser.add_argument("--steps", type=int, default=200)
    chosen = parser.parse_args()
    data, out = chosen.data.resolve(), chosen.out.resolve()
    backbone = decoder(out / "bytes_gpt2")
    small = ["backbone=local", f"backbone.source={backbone}", "backbone.name=bytes_gpt2", "backbone.tokenizer=byt5"]
    full = ["delta_type=full", "trainer.learning_rate=1e-3", f"trainer.max_steps={chosen.steps}", "trainer.batch_size=16"]
    lengths = ["task.max_source_length=320", "task.max_target_length=320"]
    e2e = ["task=e2e_nlg", f"task.data={data / 'e2e_nlg'}", "task.validation_rows=32", "task.test_rows=200", *lengths]
    folder = out / "e2e_t5"
    check_e2e("E2E, tiny_t5", folder, run(folder, *full, "backbone=tiny_t5", *e2e))
    folder = out / "e2e_gpt2"
    check_e2e("E2E, bytes_gpt2", folder, run(folder, *full, *small, *e2e))
    folder = out / "wikitext"
    wikitext = [
        "task=wikitext",
        f"task.data={data / 'wikitext2_raw'}",
        "task.train_split=validation",
        "task.validation_split=test",
    ]
    wikitext += ["task.test_split=null", f"task.max_source_length={LENGTH}"]
    check_wikitext("WikiText, bytes_gpt2", folder, run(folder, *full, *small, *wikitext), data, backbone)
    folder = out / "gsm8k"
    gsm8k = ["task=gsm8k", f"task.data={data / 'gsm8k'}", "task.validation_rows=8", "task.test_rows=50"]
    gsm8k += ["task.max_source_length=320", "task.max_target_length=192"]
    check_gsm8k("GSM8K, bytes_gpt2", folder, run(folder, *full, *small, *gsm8k))


if __name__ == "__main__":
    main()
