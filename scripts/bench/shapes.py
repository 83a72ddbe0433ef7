"""The backbones that are measured: real architectures at small sizes with random weights, and a batch for each."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from deltaexp.errors import unknown


@dataclass(frozen=True)
class Shape:
    """A backbone with its batch, and what its modules are called."""

    name: str
    build: Callable[[str], nn.Module]
    """Makes the backbone, given the attention function."""
    rows: int
    tokens: int
    vocabulary: int
    classes: int
    """Number of classes of the labels; 0 for a language model, the labels of which are its tokens."""
    query_value: tuple[str, ...]
    linears: tuple[str, ...]
    """The linear maps of the blocks."""
    first_block: str

    def batch(self, device: str) -> dict[str, torch.Tensor]:
        """Return a batch with labels, the same every time."""
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(3, self.vocabulary, (self.rows, self.tokens), generator=generator)
        labels = torch.randint(0, self.classes, (self.rows,), generator=generator) if self.classes else ids
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        return {name: tensor.to(device) for name, tensor in batch.items()}


def _bert(hidden: int, layers: int) -> Callable[[str], nn.Module]:
    def build(attention: str) -> nn.Module:
        config = BertConfig(
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=12,
            intermediate_size=4 * hidden,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            num_labels=2,
            attn_implementation=attention,
        )
        return BertForSequenceClassification(config)

    return build


def _llama(
    hidden: int, layers: int, heads: int, key_heads: int, feed_forward: int, vocabulary: int, made: Any = LlamaForCausalLM
) -> Callable:
    def build(attention: str) -> nn.Module:
        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=key_heads,
            intermediate_size=feed_forward,
            use_cache=False,
            pad_token_id=0,
            attn_implementation=attention,
        )
        return made(config)

    return build


def _gpt2(attention: str) -> nn.Module:
    config = GPT2Config(
        vocab_size=8192,
        n_embd=512,
        n_layer=8,
        n_head=8,
        n_positions=256,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        attn_implementation=attention,
    )
    return GPT2LMHeadModel(config)


_BERT_LINEARS = ("query", "key", "value", "attention.output.dense", "intermediate.dense", "[r]layer\\.\\d+\\.output\\.dense")
_BERT = (("query", "value"), _BERT_LINEARS, "bert.encoder.layer.0")
_LLAMA_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_LLAMA = (("q_proj", "v_proj"), _LLAMA_LINEARS, "model.layers.0")
_GPT2 = (("c_attn",), ("c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"), "transformer.h.0")

SHAPES = {
    "minilm": Shape("minilm", _bert(384, 6), 32, 64, 30522, 2, *_BERT),
    "llama": Shape("llama", _llama(512, 8, 8, 4, 1408, 8192), 8, 128, 8192, 0, *_LLAMA),
    "llama-classifier": Shape(
        "llama-classifier", _llama(512, 8, 8, 4, 1408, 8192, LlamaForSequenceClassification), 8, 128, 8192, 2, *_LLAMA
    ),
    "gpt2": Shape("gpt2", _gpt2, 8, 128, 8192, 0, *_GPT2),
    # So little that calls of operations take longer than what they compute.
    "minilm-small": Shape("minilm-small", _bert(384, 6), 1, 16, 30522, 2, *_BERT),
    "llama-small": Shape("llama-small", _llama(512, 8, 8, 4, 1408, 8192), 1, 16, 8192, 0, *_LLAMA),
    "tiny": Shape("tiny", _llama(32, 2, 4, 2, 48, 64), 4, 8, 64, 0, *_LLAMA),  # for trying out
    "bert-base": Shape("bert-base", _bert(768, 12), 32, 128, 30522, 2, *_BERT),
    # Large enough that a GPU is busy: 1.1 billion parameters.
    "llama-1b": Shape("llama-1b", _llama(2048, 16, 32, 8, 8192, 32000), 4, 512, 32000, 0, *_LLAMA),
    # Four blocks of a model of 8 billion parameters: a GPU computes for longer than it takes to call the operations.
    "llama-8b-blocks": Shape("llama-8b-blocks", _llama(4096, 4, 32, 8, 14336, 32000), 4, 1024, 32000, 0, *_LLAMA),
}


def named(names: str, device: str) -> list[str]:
    """Return the names of shapes to measure, which are given with commas between them.

    Raises:
        SystemExit: If one is none, or the device is not there.
    """
    if device != "cpu" and not torch.cuda.is_available():
        raise SystemExit(f"--device {device} needs a GPU that PyTorch can compute on, and there is none.")
    found = names.split(",")
    for name in found:
        if name not in SHAPES:
            raise SystemExit(unknown("shape", name, SHAPES))
    return found


class Backbones:
    """Makes backbones of one shape that share their weights, so that many fit into memory.

    Args:
        shape: The shape.
        device: Where they are made.
        masked: Whether batches have a mask for padding, though there is none: models look at it, for which a GPU has to wait.
    """

    def __init__(self, shape: Shape, device: str, masked: bool = True) -> None:
        self.shape, self.device, self.masked = shape, device, masked
        self._made: dict[tuple[str, torch.dtype], nn.Module] = {}

    def batch(self) -> dict[str, torch.Tensor]:
        """Return a batch with labels, the same every time."""
        batch = self.shape.batch(self.device)
        return batch if self.masked else {name: tensor for name, tensor in batch.items() if name != "attention_mask"}

    def get(self, dtype: torch.dtype = torch.float32, attention: str = "sdpa", own: bool = False) -> Any:
        """Return a backbone, frozen; ``own``: with weights of its own, trainable."""
        key = "weights", dtype
        if key not in self._made:
            torch.manual_seed(0)
            with torch.device(self.device):
                self._made[key] = self.shape.build("sdpa").to(dtype).train().requires_grad_(False)
        first = self._made[key]
        kept: dict[int, torch.Tensor] = {}
        if not own:  # parameters of its own on the same memory, as trainer.speed=auto keeps casts with them
            kept = {id(tensor): nn.Parameter(tensor.detach(), requires_grad=False) for tensor in first.parameters()}
            kept |= {id(tensor): tensor for tensor in first.buffers()}
        made: Any = copy.deepcopy(first, kept)
        made.set_attn_implementation(attention)
        return made.requires_grad_(True) if own else made
