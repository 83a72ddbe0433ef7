"""A small classification task and backbone on disk, for runs that need no network."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizerFast,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    ResNetConfig,
    ResNetModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)

from deltaexp.__main__ import main
from deltaexp.lab.report import resampling

WORDS = ["a", "good", "fine", "great", "bad", "poor", "awful", "film", "plot", "the", "was"]


def bert(folder: Path, **settings: Any) -> Path:
    """Write a random BERT encoder, without a classifier, and its tokenizer."""
    folder.mkdir(parents=True)
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    tokenizer = BertTokenizerFast(vocab=str(vocabulary))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=32, initializer_range=0.3, **settings,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


CHAT = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""A chat template."""


def byte_tokenizer(chat: bool = False, ends: bool = False) -> PreTrainedTokenizerFast:
    """Make a tokenizer with a token for each byte, and special ones.

    Args:
        chat: Whether it has a chat template.
        ends: Whether it puts an end after each text, as T5's does.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<pad>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"]
    tokenizer = Tokenizer(models.BPE({token: n for n, token in enumerate(special + alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if ends:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", additional_special_tokens=special[2:],
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    if chat:
        fast.chat_template = CHAT
    return fast


def gpt2(folder: Path) -> Path:
    """Write a random GPT-2 and a byte-level tokenizer without a chat template."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=261, n_embd=32, n_layer=2, n_head=2, n_positions=256, eos_token_id=1, bos_token_id=1, pad_token_id=0
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def llama(folder: Path) -> Path:
    """Write a random Llama and a byte-level tokenizer with a chat template."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=261, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=256, eos_token_id=1, bos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer(chat=True).save_pretrained(folder)
    return folder


def t5(folder: Path) -> Path:
    """Write a random T5 and a byte-level tokenizer."""
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=261, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, decoder_start_token_id=0, pad_token_id=0,
        eos_token_id=1,
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(folder)
    byte_tokenizer(ends=True).save_pretrained(folder)
    return folder


def vit(folder: Path) -> Path:
    """Write a random ViT without a classifier, for images of 16 by 16 pixels, and its image processor."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=16, patch_size=4,
        initializer_range=0.3,
    )  # fmt: skip
    ViTModel(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def resnet(folder: Path) -> Path:
    """Write a random ResNet without a classifier, with batch normalisation, and its image processor."""
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    ResNetModel(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def table(folder: Path, rows: list[dict], evaluated: list[dict] | None = None) -> Path:
    """Write rows as the splits of a data set; the first few are validation and test too, unless there are others for these."""
    folder.mkdir(parents=True)
    for split in ("train", "validation", "test"):
        Dataset.from_list(rows if split == "train" else evaluated or rows[:4]).to_parquet(str(folder / f"{split}.parquet"))
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


QUICK = ("trainer=smoke", "trainer.progress=false", "task.name=t", "task.max_source_length=64", "task.max_target_length=8")


def trained(folder: Path, backbone: Path, data: Path, *overrides: str) -> dict[str, Any]:
    """Train a delta for three steps by the command line, load it as its card says, and return the run's results.

    Args:
        folder: Where the run goes.
        backbone: The folder of a backbone.
        data: The folder of a data set.
        overrides: What is typed on the command line, beside the names of these.
    """
    words = ["backbone=local", "backbone.name=small", f"backbone.source={backbone}", f"task.data={data}", *QUICK, *overrides]
    assert main([*words, f"hydra.run.dir={folder}"]) == 0
    delta = folder / "delta"
    results = read_results(delta)
    assert results["verification"]["hash"] == "match"
    assert results["verification"]["max_logit_difference"] == 0.0
    metrics = results["metrics"]
    assert metrics["after"].keys() == metrics["before"].keys() >= {"loss", results["task_metric"]}
    card = (delta / "README.md").read_text(encoding="utf-8")
    code = card.split("```python\n")[1].split("```")[0]
    scope: dict[str, Any] = {}
    exec(code.replace("PATH_OR_REPO", str(delta)).replace("FOLDER_OF_THE_BACKBONE", str(backbone)), scope)
    assert scope["delta_model"].hash_check.value == "match"
    used_again(delta, data, results)
    return results


def used_again(delta: Path, data: Path, results: dict[str, Any]) -> None:
    """Measure a run's delta again and have it answer the rows without their targets: the numbers and answers are the run's."""
    measured = delta.parent / "measured"
    words = ["trainer.progress=false", f"delta={delta}"]
    assert main(["eval", *words, f"out={measured}", "predictions=true"]) == 0
    assert json.loads((measured / "metrics.json").read_text())["deltas"][0]["metrics"] == results["metrics"]["after"]
    answers = [json.loads(line) for line in (measured / f"predictions/{delta.parent.name}.jsonl").read_text().splitlines()]
    # The report, which resamples stored answers, makes the same number of them.
    metric = results["task_metric"]
    if metric != "loss":
        stored = resampling.read(measured / f"predictions/{delta.parent.name}.jsonl", results["labels"])
        assert math.isclose(resampling.score(stored, metric, metric), results["metrics"]["after"][metric], rel_tol=1e-6)
    task = results["config"]["task"]
    rows, source = Dataset.from_parquet(str(data / f"{results['evaluated_on']}.parquet")), measured / "rows.parquet"
    # A conversation is the target itself, up to its last answer.
    rows.remove_columns([name for name in rows.column_names if task["inputs"] and name == task["target"]]).to_parquet(
        str(source)
    )
    assert main(["predict", *words, f"input={source}", f"out={measured / 'answers.jsonl'}"]) == 0
    found = [json.loads(line) for line in (measured / "answers.jsonl").read_text().splitlines()]
    assert len(found) == len(rows)
    if task["kind"] == "causal_lm":  # which is measured as one text, and answers row by row
        assert {"window", "prediction"} == set(answers[0])
        assert all(row["prediction"]["tokens"] > 0 for row in found if row[task["inputs"][0]])
    else:
        assert [row["prediction"] for row in found] == [row["prediction"] for row in answers]
