"""LoRA and its kin against PEFT's, an independent implementation: equal outputs and gradients at equal weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import peft
import pytest
import torch
from models import FAMILIES, attach, slow_but
from torch import nn
from transformers.pytorch_utils import Conv1D

from deltaexp import DeltaModel

MODULES = {
    "t5": ["q", "v", "wi", "wo"],
    "bert": ["query", "key", "value", "dense"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
RANK, ALPHA, DROPOUT = 3, 7, 0.4


@dataclass
class Variant:
    """One type with one choice of its options, and the config of PEFT that means the same."""

    delta_type: str
    keys: dict[str, Any]
    config: Callable[..., Any]
    places: dict[str, str]
    """Where PEFT keeps what we call by the key."""
    config_keys: dict[str, Any] = field(default_factory=dict)
    conv1d: bool = True
    """Whether PEFT's goes on Conv1D, which it shall not, or not rightly, where this is False."""
    tolerance: float | None = None


LORA = {"lora_A": "lora_A.default.weight", "lora_B": "lora_B.default.weight"}
RANKS = {"r": RANK, "lora_alpha": ALPHA, "lora_dropout": DROPOUT}
OWN = {"lora_r": RANK, "lora_alpha": ALPHA, "lora_dropout": DROPOUT}
HADA = {name: f"{name}.default" for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")}
DORA = {**LORA, "magnitude": "lora_magnitude_vector.default.weight"}
KRON = {name: f"{name}.default" for name in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")}
VARIANTS = {
    "lora": Variant("lora", OWN, peft.LoraConfig, LORA, RANKS),
    "rslora": Variant("lora", {**OWN, "lora_scaling": "rslora"}, peft.LoraConfig, LORA, {**RANKS, "use_rslora": True}),
    "dora": Variant("lora", {**OWN, "lora_dora": True}, peft.LoraConfig, DORA, {**RANKS, "use_dora": True}),
    "dora-without-dropout": Variant(
        "lora", {"lora_r": RANK, "lora_dora": True}, peft.LoraConfig, DORA, {"r": RANK, "lora_alpha": 16, "use_dora": True}
    ),
    # PEFT decomposes in float32 and subtracts that from the weight, which costs the digits beyond.
    "pissa": Variant(
        "lora",
        {**OWN, "lora_init": "pissa"},
        peft.LoraConfig,
        LORA,
        {**RANKS, "init_lora_weights": "pissa"},
        tolerance=1e-5,
    ),
    "pissa-dora": Variant(
        "lora",
        {**OWN, "lora_init": "pissa", "lora_dora": True},
        peft.LoraConfig,
        DORA,
        {**RANKS, "init_lora_weights": "pissa", "use_dora": True},
        tolerance=1e-5,
    ),
    "olora": Variant(
        "lora",
        {**OWN, "lora_init": "olora", "lora_scaling": "rslora"},
        peft.LoraConfig,
        LORA,
        {**RANKS, "init_lora_weights": "olora", "use_rslora": True},
        conv1d=False,  # decomposes the transposed weight
        tolerance=1e-5,
    ),
    "adalora": Variant(
        "adalora",
        {"adalora_init_r": RANK, "adalora_target_r": 2, "adalora_alpha": ALPHA, "adalora_dropout": DROPOUT},
        peft.AdaLoraConfig,
        {name: f"{name}.default" for name in ("lora_A", "lora_E", "lora_B")},
        {"init_r": RANK, "target_r": 2, "lora_alpha": ALPHA, "lora_dropout": DROPOUT, "total_step": 10},
    ),
    "vera": Variant(
        "vera",
        {"vera_r": RANK, "vera_dropout": DROPOUT, "vera_seed": 5},
        peft.VeraConfig,
        {"vera_lambda_b": "vera_lambda_b.default", "vera_lambda_d": "vera_lambda_d.default"},
        {"r": RANK, "vera_dropout": DROPOUT, "projection_prng_key": 5},
    ),
    "loha": Variant("loha", {"loha_r": 4, "loha_alpha": 2}, peft.LoHaConfig, HADA, {"r": 4, "alpha": 2}, conv1d=False),
    "lokr": Variant("lokr", {"lokr_r": 2, "lokr_alpha": 5}, peft.LoKrConfig, KRON, {"r": 2, "alpha": 5}, conv1d=False),
    "lokr-both": Variant(
        "lokr",
        {"lokr_r": 1, "lokr_alpha": 5, "lokr_decompose_both": True, "lokr_decompose_factor": 4},
        peft.LoKrConfig,
        KRON,
        {"r": 1, "alpha": 5, "decompose_both": True, "decompose_factor": 4},
        conv1d=False,
    ),
}
Pairs = dict[str, tuple[torch.Tensor, torch.Tensor]]


def as_linear(model: nn.Module) -> None:
    """Put a Linear in the place of every Conv1D, which keeps the same weight transposed."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            linear = nn.Linear(module.nx, module.nf)
            with torch.no_grad():
                linear.weight.copy_(module.weight.T)
                linear.bias.copy_(module.bias)
            model.set_submodule(name, linear)


def twins(name: str, variant: Variant) -> tuple[DeltaModel, nn.Module, Pairs]:
    """Return our delta and PEFT's on equal backbones, as initialised, and the pairs of what is trained."""
    family = FAMILIES[name]
    delta_model = attach(family.build(), variant.delta_type, seed=None, modified_modules=MODULES[name], **variant.keys)
    theirs = family.build()
    if not variant.conv1d:
        as_linear(theirs)
    keys = {**variant.config_keys, "target_modules": [attachment.site for attachment in delta_model.attachments]}
    if variant.conv1d:
        keys["fan_in_fan_out"] = name == "gpt2"
    if variant.config is peft.VeraConfig:  # its layers share what the tuner holds
        peft.VeraModel(theirs, {"default": variant.config(**keys)}, "default")
    else:
        peft.inject_adapter_in_model(variant.config(**keys), theirs)
    pairs = {}
    for attachment in delta_model.attachments:
        module = theirs.get_submodule(attachment.site)
        for own, parameter in attachment.layer.named_parameters():
            holder, _, last = variant.places[own].rpartition(".")
            place = module.get_submodule(holder) if holder.count(".") else getattr(module, holder)
            pairs[f"{attachment.prefix}.{own}"] = (parameter, getattr(place, last))
    assert len(pairs) == len(delta_model.trainable_parameters())
    assert len([p for p in theirs.parameters() if p.requires_grad]) == len(pairs)
    return delta_model, theirs, pairs


@pytest.mark.parametrize("name", slow_but(MODULES, ("t5", "gpt2")))
@pytest.mark.parametrize("training", [pytest.param(False, marks=pytest.mark.slow), True], ids=["eval", "train"])
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_outputs_and_gradients(name: str, training: bool, variant: Variant) -> None:
    inputs = FAMILIES[name].inputs()
    delta_model, theirs, pairs = twins(name, variant)
    ours = delta_model.backbone_model
    plain = FAMILIES[name].build().double()(**inputs).logits
    ours.double()
    theirs.double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for own, other in pairs.values():
            assert own.shape == other.shape
            own.add_(torch.randn(own.shape, generator=generator) * 0.3)
            other.copy_(own)
    close = {} if variant.tolerance is None else {"rtol": variant.tolerance, "atol": variant.tolerance}
    outputs = []
    for model in (ours, theirs):
        model.train(training)
        if variant.delta_type in ("loha", "lokr"):  # PEFT's draw a random number more, for each module
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
                elif isinstance(getattr(module, "dropout", None), float):
                    module.dropout = 0.0
        torch.manual_seed(5)  # the backbones' dropouts and the deltas' draw the same masks
        outputs.append(model(**inputs))
        outputs[-1].loss.backward()
    assert not torch.allclose(outputs[0].logits, plain, rtol=1e-3)
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits, **close)
    torch.testing.assert_close(outputs[0].loss, outputs[1].loss, **close)
    for parameter, (own, other) in pairs.items():
        assert own.grad.abs().max() > 0, parameter
        torch.testing.assert_close(own.grad, other.grad, msg=lambda text, name=parameter: f"{name}: {text}", **close)


@pytest.mark.parametrize("name", slow_but(MODULES, ("gpt2",)))
@pytest.mark.parametrize("variant", [name for name in VARIANTS if "ssa" in name or "dora" in name or name == "olora"])
def test_initial_values_from_the_weight(name: str, variant: str) -> None:
    _, _, pairs = twins(name, VARIANTS[variant])
    for parameter, (own, other) in pairs.items():
        if "magnitude" in parameter:
            torch.testing.assert_close(own, other)
        elif VARIANTS[variant].tolerance:  # a vector and its partner may both have the other sign
            torch.testing.assert_close(own.abs(), other.abs(), rtol=1e-4, atol=1e-5)
            a, b = (parameter.replace("lora_B", "lora_A"), parameter.replace("lora_A", "lora_B"))
            torch.testing.assert_close(pairs[b][0] @ pairs[a][0], pairs[b][1] @ pairs[a][1], rtol=1e-4, atol=1e-5)


def test_the_shared_projection() -> None:
    """From the same seed, ours and PEFT's draw the same matrices."""
    delta_model, theirs, _ = twins("t5", VARIANTS["vera"])
    attachment = delta_model.attachments[-1]
    module = theirs.get_submodule(attachment.site)
    for name in ("vera_A", "vera_B"):
        assert torch.equal(getattr(attachment.layer.projection, name), getattr(module, name)["default"])


def test_dropout_in_eval_mode() -> None:
    ours, inputs = FAMILIES["llama"].build(), FAMILIES["llama"].inputs()
    attach(ours, "lora", modified_modules=["q_proj"], lora_dropout=0.4)
    plain = ours(**inputs).logits
    assert torch.equal(copy.deepcopy(ours)(**inputs).logits, plain)
    ours.train()
    assert not torch.allclose(ours(**inputs).logits, plain)
