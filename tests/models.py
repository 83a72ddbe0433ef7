"""Tiny backbones with random weights, built from configs: the ones that the engine's tests put deltas into."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from deltaexp import AutoDeltaConfig, AutoDeltaModel, DeltaModel
from deltaexp.checksum import digests, model_md5
from deltaexp.structure import backbone_tensors

VOCABULARY = 32


def _t5() -> nn.Module:
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCABULARY,
            d_model=16,
            d_kv=6,  # heads x d_kv differs from d_model, so that a confusion of the two shows
            d_ff=24,
            num_layers=2,
            num_heads=2,
            decoder_start_token_id=0,
        )
    )


def _bert() -> nn.Module:
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=16,
            initializer_range=0.2,
            num_labels=3,
        )
    )


def _gpt2() -> nn.Module:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=16,
            n_layer=2,
            n_head=2,
            n_positions=32,
            initializer_range=0.2,
            bos_token_id=0,
            eos_token_id=None,
            pad_token_id=0,
        )
    )


def _llama() -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
            initializer_range=0.2,
            bos_token_id=0,
            eos_token_id=None,
            pad_token_id=0,
        )
    )


@dataclass(frozen=True)
class Family:
    """One kind of backbone."""

    name: str
    make: Callable[[], nn.Module]
    linear: tuple[str, str]
    """Suffixes of two linear modules in each block, the first one of attention."""

    def build(self, seed: int = 0) -> nn.Module:
        """Return the backbone in eval mode; the same seed gives the same weights, bit for bit."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            backbone = self.make()
            for parameter in backbone.parameters():
                if parameter.dim() == 1:  # no norm weight is one and no bias zero, so that none can be forgotten
                    nn.init.normal_(parameter, mean=float(parameter.mean().detach()), std=0.05)
        return backbone.eval()

    def inputs(self) -> dict[str, torch.Tensor]:
        """Return a batch of two with padding and labels."""
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(1, VOCABULARY, (2, 7), generator=generator)
        mask = torch.ones_like(ids)
        if self.name in ("t5", "bert"):
            mask[1, 5:] = 0
        if self.name == "t5":
            labels = torch.randint(1, VOCABULARY, (2, 5), generator=generator)
        else:
            labels = torch.tensor([0, 2]) if self.name == "bert" else ids.clone()
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


FAMILIES = {
    family.name: family
    for family in (
        Family("t5", _t5, ("SelfAttention.q", "DenseReluDense.wo")),
        Family("bert", _bert, ("attention.self.query", "output.dense")),
        Family("gpt2", _gpt2, ("attn.c_attn", "mlp.c_proj")),
        Family("llama", _llama, ("self_attn.q_proj", "mlp.down_proj")),
    )
}


def slow_but(names: Iterable[str], quick: Collection[str]) -> list[Any]:
    """Return parameters for a test of which those not in ``quick`` are run with the slow ones."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


def attach(backbone: nn.Module, delta_type: str = "lora", *, seed: int | None = 7, **keys: object) -> DeltaModel:
    """Put a delta into a backbone, freeze the rest, and move its layers as training would, unless ``seed`` is None."""
    config = AutoDeltaConfig.from_dict({"delta_type": delta_type, **keys})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0 if seed is None else seed)
        delta_model = AutoDeltaModel.from_config(config, backbone_model=backbone)
    delta_model.freeze_module()
    if seed is not None:
        perturb(delta_model, seed)
    return delta_model


def perturb(delta_model: DeltaModel, seed: int = 7) -> None:
    """Add noise to every parameter of a delta, and so to what it owns of the backbone."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in parameters(delta_model).values():
            value.add_(torch.randn(value.shape, generator=generator).to(value.dtype) * 0.3)


def parameters(delta_model: DeltaModel) -> dict[str, nn.Parameter]:
    """Return what of a delta is trained; the rest of what is saved are fixed tensors such as random projections."""
    return {name: value for name, value in delta_model.delta_tensors().items() if isinstance(value, nn.Parameter)}


def logits(backbone: nn.Module, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the logits without a gradient."""
    with torch.no_grad():
        return backbone(**inputs).logits


def md5(backbone: nn.Module) -> str:
    """Return the md5 of a backbone without the deltas in it."""
    return model_md5(digests(backbone_tensors(backbone)))


def values(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return copies of tensors."""
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def same(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> bool:
    """Say whether names, dtypes and values are equal."""
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )


def snapshot(backbone: nn.Module) -> tuple:
    """Return all that a refused operation must leave as it was."""
    return (
        md5(backbone),
        list(backbone.state_dict()),
        [(name, parameter.requires_grad) for name, parameter in backbone.named_parameters()],
        [(name, type(module), module.training) for name, module in backbone.named_modules()],
        [(name, len(module._forward_hooks)) for name, module in backbone.named_modules()],
    )


def train_step(delta_model: DeltaModel, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Take one step of plain gradient descent on all that is trainable, and return the gradients."""
    backbone = delta_model.backbone_model
    backbone.zero_grad(set_to_none=True)
    backbone(**inputs).loss.backward()
    gradients = {name: p.grad.clone() for name, p in backbone.named_parameters() if p.grad is not None}
    torch.optim.SGD(delta_model.trainable_parameters().values(), lr=0.5).step()
    backbone.zero_grad(set_to_none=True)
    return gradients
