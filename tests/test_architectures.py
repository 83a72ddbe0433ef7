"""Deltas in real tiny models of many architectures: gradients, training, saving, loading and taking out."""

from __future__ import annotations

import copy
import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import attach, md5, parameters, snapshot, values
from packaging.version import Version
from tiny import quiet, tiny_inputs, tiny_model
from torch import nn

from deltaexp import AutoDeltaModel, DeltaModel, HashCheck, registry
from deltaexp.errors import AddressingError, DeltaExpError
from deltaexp.structure import backbone_parameters, common_names

KEYS: dict[str, dict[str, Any]] = {
    "soft_prompt": {"soft_token_num": 4},
    "prefix": {"embed_dim": 8, "mid_dim": 8},
    "vera": {"vera_r": 8},
    "compacter": {"reduction_factor": 4},
    "low_rank_adapter": {"reduction_factor": 4},
    "peft": {"peft": {"peft_type": "LORA", "target_modules": "all-linear"}},
}
"""Keys of the delta types that would be too large for a tiny model, or too narrow; PEFT knows few architectures by itself."""


@dataclass(frozen=True)
class Plain:
    """A tiny model without a delta, and what it computes."""

    backbone: nn.Module
    inputs: dict[str, torch.Tensor]
    logits: torch.Tensor
    md5: str
    idle: frozenset[str]
    """The parameters that have no gradient, because this forward pass does not need them."""

    def copy(self) -> nn.Module:
        return copy.deepcopy(self.backbone)


def logits(backbone: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad(), quiet():
        return backbone(**inputs).logits


@functools.lru_cache(maxsize=1)
def plain(kind: str, model_type: str) -> Plain:
    # PyTorch's choice of a kernel, and so the last bit, may depend on whether a weight is frozen, as it is beside a delta.
    backbone = tiny_model(kind, model_type).requires_grad_(False)
    inputs = tiny_inputs(kind, backbone.config)
    used = copy.deepcopy(backbone).requires_grad_(True)
    with quiet():
        used(**inputs).loss.backward()
    idle = {name for name, parameter in backbone_parameters(used).items() if no_gradient(parameter.grad)}
    return Plain(backbone, inputs, logits(backbone, inputs), md5(backbone), frozenset(idle))


def train_step(backbone: nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Take one step on all that is trainable, of one length whatever the gradients' size, and return the gradients."""
    with quiet():
        backbone(**inputs).loss.backward()
    trained = {name: parameter for name, parameter in backbone.named_parameters() if parameter.grad is not None}
    torch.optim.Adam(trained.values(), lr=0.01).step()
    gradients = {name: parameter.grad for name, parameter in trained.items()}
    backbone.zero_grad(set_to_none=True)
    return gradients


def no_gradient(gradient: torch.Tensor | None) -> bool:
    return gradient is None or not gradient.abs().max() > 0


def excused(delta_model: DeltaModel, without: Plain) -> set[str]:
    """Return the delta's parameters that cannot have a gradient, as the backbone's own at their places have none."""
    result = set(without.idle)
    roles = common_names(without.backbone)
    for attachment in delta_model.attachments:
        own = {name for name in backbone_parameters(without.backbone) if name.startswith(f"{attachment.site}.")}
        key = delta_model.config.delta_type == "bitfit" and {"attn.k", "crossattn.k"} & set(roles.get(attachment.site, ()))
        if key or (own and own <= without.idle):
            result |= {f"{attachment.prefix}.{name}" for name, _ in attachment.layer.named_parameters()}
    # The softmax takes away a bias that all keys have.
    for name, found in roles.items():
        if {"attn.k", "crossattn.k"} & set(found):
            result.add(f"{name}.bias")
    return result


def check(kind: str, model_type: str, delta_type: str, folder: Path) -> None:
    """Attach a delta by default to a tiny model, train it for a step, save and load it, and detach it."""
    without = plain(kind, model_type)
    backbone, inputs = without.copy(), without.inputs
    assert math.isfinite(float(without.logits.abs().max()))
    delta_model = attach(backbone, delta_type, **KEYS.get(delta_type, {}))
    assert not torch.equal(logits(backbone, inputs), without.logits)

    tensors = {**dict(backbone.named_parameters()), **dict(backbone.named_buffers())}
    before, delta = values(tensors), set(parameters(delta_model))
    assert delta
    assert set(delta_model.trainable_parameters()) == delta
    gradients = train_step(backbone, inputs)
    assert gradients.keys() <= delta
    still = {name for name in delta if no_gradient(gradients.get(name))}
    assert still - excused(delta_model, without) == set()
    assert len(still) < len(delta)
    moved = {name for name in before if not torch.equal(before[name], tensors[name])}
    assert moved <= delta - still
    # A step of less than the last bit of a value leaves it.
    small = {name for name in delta - still if gradients[name].abs().max() < 1e-12}
    assert delta - still - small <= moved

    trained = logits(backbone, inputs)
    delta_model.save_finetuned(folder)
    fresh = without.copy()
    loaded = AutoDeltaModel.from_finetuned(folder, backbone_model=fresh)
    assert loaded.hash_check is HashCheck.MATCH
    assert torch.equal(logits(fresh, inputs), trained)

    for model in (delta_model, loaded):
        model.detach()
        assert md5(model.backbone_model) == without.md5
        assert torch.equal(logits(model.backbone_model.requires_grad_(False), inputs), without.logits)


ARCHITECTURES = {
    "causal": """
        apertus bailing_hybrid bamba biogpt bloom codegen cohere2 deepseek_v3 diffllama exaone4 falcon falcon_h1 falcon_mamba
        gemma2 gemma3_text glm4_moe gpt2 gpt_bigcode gpt_neo gpt_neox gpt_oss gptj granitemoehybrid jamba jetmoe lfm2 llama
        longcat_flash mamba mamba2 minicpm3 mixtral mpt olmo2 opt persimmon phi3 phimoe qwen2_moe qwen3 recurrent_gemma rwkv
        stablelm whisper xglm xlnet xlstm zamba2
    """,
    "seq2seq": """
        bart bigbird_pegasus fsmt longt5 m2m_100 marian mt5 nllb-moe pegasus prophetnet switch_transformers t5 umt5
    """,
    "classification": """
        albert bert canine convbert deberta deberta-v2 distilbert electra esm flaubert fnet funnel ibert layoutlm big_bird
        megatron-bert modernbert mpnet nystromformer roberta roformer squeezebert tapas xlm yoso
    """,
    "image": """
        beit convnext dinov2 mobilevit poolformer pvt regnet resnet segformer swiftformer swin vit
    """,
}
"""Model types of all four auto classes: encoders, decoders, both; mixtures of experts, state spaces, recurrences, hybrids,
convolutions and vision; attention of every kind, fused and not."""
PAIRS = [(kind, model_type) for kind, names in ARCHITECTURES.items() for model_type in names.split()]
QUICK = [
    *[("causal", name) for name in ("deepseek_v3", "gpt_neox", "jamba", "mamba", "mixtral", "rwkv")],
    *[("seq2seq", name) for name in ("bart", "switch_transformers")],
    *[("classification", name) for name in ("deberta-v2", "distilbert")],
    *[("image", name) for name in ("convnext", "swin")],
]
"""Those that are tested every time."""
THOROUGH = ("lora", "adapter", "bitfit")
OTHERS = [name for name in registry.known() if not (name in THOROUGH or registry.get(name).trains_nothing)]
PER_TYPE = 8
"""How many architectures every other type is tested on, in turn."""
OWN_ATTENTION = """
    bailing_hybrid bloom codegen falcon falcon_mamba gpt_neo gptj mamba mamba2 mpt rwkv xglm xlnet xlstm fsmt prophetnet canine
    convbert deberta deberta-v2 flaubert fnet funnel ibert big_bird megatron-bert mpnet nystromformer roformer squeezebert tapas
    xlm yoso convnext mobilevit poolformer pvt regnet resnet swiftformer
"""
THROUGH_THE_INTERFACE = {"codegen", "gptj"} if Version(transformers.__version__) >= Version("5.24") else set()
"""What of these has come to use transformers' attention interface since."""
NO_TOKENS = {*ARCHITECTURES["image"].split(), "canine", "fsmt", "ibert"}
REFUSED = {
    "prefix": set(OWN_ATTENTION.split()) - THROUGH_THE_INTERFACE,
    "soft_prompt": NO_TOKENS,
    "parallel_adapter": {"poolformer", "regnet", "resnet", "squeezebert"},
    "reft": {"poolformer", "regnet", "resnet"},
    "compacter": {"regnet"},
    "peft": {"deepseek_v3", "falcon_h1", "falcon_mamba", "glm4_moe", "longcat_flash", "mamba", "mamba2", "mixtral"},
}
"""Where a type cannot go by default, which it says when it is attached."""
FAILS_LATER = {
    "parallel_adapter": {"ibert"},  # attention returns a tuple in a tuple
    "reft": {"convnext", "squeezebert", "swiftformer"},  # blocks hand on images; a block's forward is called without its hooks
    "peft": {"jamba"},  # PEFT's all-linear means a linear map that the model does not call
    "full": {"phimoe"},  # the noise on every weight saturates the router
    "compacter": {"pvt"},  # the narrowest stage leaves a bottleneck that the noise saturates
}
"""Where it does not compute, or learn, which is only seen when the model runs."""


def test_there_is_a_variety() -> None:
    assert len(PAIRS) == len(set(PAIRS)) >= 80
    assert set(QUICK) <= set(PAIRS)


@pytest.mark.parametrize(("kind", "model_type"), QUICK)
def test_lora(kind: str, model_type: str, tmp_path: Path) -> None:
    check(kind, model_type, "lora", tmp_path / "delta")


@pytest.mark.slow
@pytest.mark.parametrize("delta_type", THOROUGH)  # the architecture changes last, so that it is built once
@pytest.mark.parametrize(("kind", "model_type"), PAIRS)
def test_every_architecture(kind: str, model_type: str, delta_type: str, tmp_path: Path) -> None:
    check(kind, model_type, delta_type, tmp_path / "delta")


def in_turn() -> list[tuple[str, str, str]]:
    """Return for every other type some of the architectures that it goes on, other ones for each type."""
    result = []
    for number, delta_type in enumerate(OTHERS):
        no = REFUSED.get(delta_type, set()) | FAILS_LATER.get(delta_type, set())
        possible = [pair for pair in PAIRS if pair[1] not in no]
        step = len(possible) // PER_TYPE
        result += [(*possible[(number + step * turn) % len(possible)], delta_type) for turn in range(PER_TYPE)]
    return result


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "model_type", "delta_type"), in_turn())
def test_every_other_type(kind: str, model_type: str, delta_type: str, tmp_path: Path) -> None:
    check(kind, model_type, delta_type, tmp_path / "delta")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern:RuntimeWarning")
@pytest.mark.parametrize("delta_type", REFUSED)
def test_refusals_change_nothing(delta_type: str) -> None:
    for kind, model_type in PAIRS:
        if model_type in REFUSED[delta_type]:
            backbone = tiny_model(kind, model_type)
            before = snapshot(backbone)
            with pytest.raises(AddressingError):
                attach(backbone, delta_type, **KEYS.get(delta_type, {}))
            assert snapshot(backbone) == before


@pytest.mark.parametrize(
    ("kind", "model_type", "delta_type"),
    [
        ("causal", "jetmoe", "adapter"),  # its experts are two modules with a tensor each, of which only the whole has a width
        ("causal", "nemotron", "ln_tuning"),  # LayerNorm1P
        ("causal", "zamba2", "parallel_adapter"),  # attention reads two hidden states, and makes one
        ("causal", "falcon_mamba", "bitfit"),  # norms whose weight is a stand-in of another size
        ("causal", "phimoe", "bitfit"),  # a router that chooses in its own forward pass
        ("causal", "longcat_flash", "bitfit"),  # a router that does not call its linear map
        ("causal", "mamba", "adapter"),  # fused kernels do not call the way out
        ("image", "hiera", "reft"),  # blocks between stages change the width
    ],
)
def test_what_is_unlike_the_rest(kind: str, model_type: str, delta_type: str, tmp_path: Path) -> None:
    check(kind, model_type, delta_type, tmp_path / "delta")


def test_modules_that_are_left_out() -> None:
    bitfit = attach(plain("causal", "longcat_flash").copy(), "bitfit")
    assert not [name for name in bitfit.delta_tensors() if ".router.classifier." in name]
    adapter = attach(plain("causal", "mamba").copy(), "adapter")
    assert [attachment.site for attachment in adapter.attachments] == [f"backbone.layers.{n}.mixer" for n in (0, 1)]
    lora = attach(plain("causal", "zaya").copy(), "lora", modified_modules=["all-linear"])
    assert not [attachment.site for attachment in lora.attachments if ".mlp.gate." in attachment.site]


def test_a_soft_prompt_needs_plain_embeddings() -> None:
    with pytest.raises(AddressingError, match="more than vectors"):
        attach(plain("classification", "ibert").copy(), "soft_prompt", **KEYS["soft_prompt"])


def test_reft_says_that_channels_come_first() -> None:
    without = plain("image", "convnext")
    backbone = without.copy()
    attach(backbone, "reft")
    with pytest.raises(DeltaExpError, match="channels of an image come first"):
        logits(backbone, without.inputs)
