"""A small classification task and backbone on disk, for runs that need no network."""

import json
from pathlib import Path

import torch
from datasets import Dataset
from transformers import BertConfig, BertModel, BertTokenizerFast

WORDS = ["a", "good", "fine", "great", "bad", "poor", "awful", "film", "plot", "the", "was"]


def bert(folder: Path) -> Path:
    """Write a random BERT encoder, without a classifier, and its tokenizer."""
    folder.mkdir(parents=True)
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    tokenizer = BertTokenizerFast(vocab=str(vocabulary))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=32, initializer_range=0.3,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def reviews(folder: Path, rows: int = 64) -> Path:
    """Write splits of reviews in which one word tells the label."""
    folder.mkdir(parents=True)
    for split, count in (("train", rows), ("validation", 32), ("test", 16)):
        table = [
            {"sentence": f"the {WORDS[7 + i % 2]} was {WORDS[1 + i % 3] if i % 2 else WORDS[4 + i % 3]}", "label": i % 2}
            for i in range(count)
        ]
        Dataset.from_list(table).to_parquet(str(folder / f"{split}.parquet"))
    return folder


def read_results(folder: Path) -> dict:
    """Read the results of a run."""
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))
