"""Pretrain the embedded backbone `tiny_t5` from scratch on text that the project generates, and write its folder.

    python scripts/pretrain_tiny_t5.py

The text comes from `pretraining_pairs` of deltaexp/lab/tasks/dates.py: dates and times to be rewritten as an
instruction says. Nothing is downloaded, and no tokenizer is trained: the bytes are numbered as ByT5 numbers them.
The folder gets config.json, generation_config.json, model.safetensors (in bfloat16; load it with
``dtype=torch.float32``) and pretraining.json, which records the command, the versions and the figures measured.
"""

import argparse
import hashlib
import importlib.util
import json
import math
import platform
import time
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import ByT5Tokenizer, T5Config, T5ForConditionalGeneration

ROOT = Path(__file__).resolve().parents[1]
HELD_OUT_SEED_OFFSET = 1_000_000
BUCKET = 32  # batches that are drawn together and sorted by length, so that little of a batch is padding


def load_dates():
    """Load the text generator by its path, so that the script runs without an installed package."""
    path = ROOT / "deltaexp" / "lab" / "tasks" / "dates.py"
    spec = importlib.util.spec_from_file_location("deltaexp_dates_for_pretraining", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build_model(seed: int) -> T5ForConditionalGeneration:
    """Build the untrained backbone: shallow, because copying between encoder and decoder is learnt sooner that way."""
    torch.manual_seed(seed)
    tokenizer = ByT5Tokenizer()
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=128,
        d_kv=32,
        num_heads=4,
        d_ff=384,
        num_layers=2,
        num_decoder_layers=2,
        feed_forward_proj="gated-gelu",
        relative_attention_num_buckets=32,
        relative_attention_max_distance=64,
        dropout_rate=0.0,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    return T5ForConditionalGeneration(config)


def encode(tokenizer: ByT5Tokenizer, pairs: list[tuple[str, str]]) -> dict[str, torch.Tensor]:
    """Turn pairs into a padded batch; padding in the labels is -100, which the loss leaves out."""
    sources = tokenizer([source for source, _ in pairs], padding=True, return_tensors="pt")
    labels = tokenizer([target for _, target in pairs], padding=True, return_tensors="pt").input_ids
    labels[labels == tokenizer.pad_token_id] = -100
    return {"input_ids": sources.input_ids, "attention_mask": sources.attention_mask, "labels": labels}


def batches(dates, tokenizer: ByT5Tokenizer, steps: int, batch_size: int, seed: int):
    """Yield `steps` batches; within each bucket they are of similar length and in a shuffled order."""
    pairs = dates.pretraining_pairs(steps * batch_size, seed)
    shuffle = torch.Generator().manual_seed(seed)
    for start in range(0, steps, BUCKET):
        count = min(BUCKET, steps - start)
        bucket = [next(pairs) for _ in range(count * batch_size)]
        bucket.sort(key=lambda pair: len(pair[0]))
        for index in torch.randperm(count, generator=shuffle).tolist():
            yield encode(tokenizer, bucket[index * batch_size : (index + 1) * batch_size])


@torch.no_grad()
def evaluate(model, tokenizer: ByT5Tokenizer, pairs: list[tuple[str, str]]) -> tuple[float, float]:
    """Return the mean loss per byte and the fraction of pairs that greedy generation gets exactly right."""
    model.eval()
    total_loss, total_bytes, correct = 0.0, 0, 0
    for start in range(0, len(pairs), 250):
        part = pairs[start : start + 250]
        batch = encode(tokenizer, part)
        count = int((batch["labels"] != -100).sum())
        total_loss += float(model(**batch).loss) * count
        total_bytes += count
        output = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=32,
            do_sample=False,
            num_beams=1,
        )
        texts = tokenizer.batch_decode(output, skip_special_tokens=True)
        correct += sum(text == target for text, (_, target) in zip(texts, part, strict=True))
    model.train()
    return total_loss / total_bytes, correct / len(pairs)


def train(model, dates, tokenizer: ByT5Tokenizer, args: argparse.Namespace) -> float:
    """Train in place and return the mean loss of the last hundred steps."""
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.98))

    def factor(step: int) -> float:
        progress = min(1.0, step / args.steps)
        return min(1.0, (step + 1) / args.warmup) * (0.02 + 0.98 * 0.5 * (1.0 + math.cos(math.pi * progress)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    model.train()
    recent: list[float] = []
    start = time.perf_counter()
    for step, batch in enumerate(batches(dates, tokenizer, args.steps, args.batch_size, args.seed), start=1):
        loss = model(**batch).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        recent = [*recent[-99:], float(loss.detach())]
        if step % args.report_every == 0 or step == args.steps:
            seconds = time.perf_counter() - start
            print(f"step {step}/{args.steps}  loss {sum(recent) / len(recent):.4f}  {seconds:.0f} s", flush=True)
    return sum(recent) / len(recent)


def text_digest(dates, seed: int) -> str:
    """Return the sha256 of the first thousand training pairs: whether the generator still makes the same text."""
    return hashlib.sha256(repr(list(dates.pretraining_pairs(1000, seed))).encode()).hexdigest()


def write(model, folder: Path, record: dict) -> dict:
    """Write the folder with weights in bfloat16 and return the record with the checksum and the sizes added."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    weights = folder / "model.safetensors"
    record["model_safetensors"] = {
        "md5": hashlib.md5(weights.read_bytes(), usedforsecurity=False).hexdigest(),
        "bytes": weights.stat().st_size,
        "dtype": "bfloat16",
    }
    (folder / "pretraining.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "deltaexp" / "assets" / "tiny_t5")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--warmup", type=int, default=300)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--report-every", type=int, default=200)
    parser.add_argument("--held-out", type=int, default=1000, help="pairs on which the result is measured")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    dates = load_dates()
    tokenizer = ByT5Tokenizer()
    model = build_model(args.seed)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{parameters} parameters, {args.steps} steps of {args.batch_size} pairs", flush=True)

    start = time.perf_counter()
    train_loss = train(model, dates, tokenizer, args)
    seconds = time.perf_counter() - start
    held_out = list(dates.pretraining_pairs(args.held_out, args.seed + HELD_OUT_SEED_OFFSET))
    full = evaluate(model, tokenizer, held_out)
    rounded = evaluate(model.bfloat16().float(), tokenizer, held_out)
    untouched = evaluate(model, tokenizer, [(row["source"], row["target"]) for row in dates.generate("test", 500)])
    record = {
        "command": "python scripts/pretrain_tiny_t5.py",
        "seed": args.seed,
        "steps": args.steps,
        "batch_size": args.batch_size,
        "learning_rate": args.learning_rate,
        "warmup": args.warmup,
        "threads": args.threads,
        "parameters": parameters,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "text_sha256": text_digest(dates, args.seed),
        "training_seconds": round(seconds, 1),
        "training_loss_of_last_100_steps": round(train_loss, 5),
        "held_out_pretraining_pairs": {
            "rows": args.held_out,
            "seed": args.seed + HELD_OUT_SEED_OFFSET,
            "loss_float32": round(full[0], 5),
            "exact_match_float32": full[1],
            "loss_bfloat16": round(rounded[0], 5),
            "exact_match_bfloat16": rounded[1],
        },
        "task_dates_test_untouched": {"rows": 500, "loss": round(untouched[0], 4), "exact_match": untouched[1]},
    }
    print(json.dumps(write(model.bfloat16(), args.out, record), indent=2))


if __name__ == "__main__":
    main()
