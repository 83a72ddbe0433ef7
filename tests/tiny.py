"""Tiny models with random weights of as many of transformers' architectures as one rule can shrink."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto

VOCABULARY = 64
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32, "d_model": 32, "n_embd": 32, "dim": 32, "embed_dim": 32, "emb_dim": 32, "word_embed_proj_dim": 32,
    "embedding_size": 32, "d_embed": 32, "attention_hidden_size": 32, "embed_size": 32, "rnn_hidden_size": 32,
    "intermediate_size": 48, "d_ff": 48, "n_inner": 48, "hidden_dim": 48, "ffn_dim": 48, "d_inner": 48,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "ffn_hidden_size": 48, "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24, "expert_ffn_dim": 24, "feed_forward_proj_size": 48,
    "num_hidden_layers": 2, "num_layers": 2, "n_layer": 2, "n_layers": 2, "encoder_layers": 2, "decoder_layers": 2,
    "num_decoder_layers": 2, "num_encoder_layers": 2, "num_hidden_groups": 1,
    "num_attention_heads": 4, "n_head": 4, "num_heads": 4, "n_heads": 4, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "num_key_value_heads": 2, "num_attention_groups": 2, "head_dim": 8, "d_kv": 8, "d_head": 8,
    "kv_channels": 8, "attention_head_size": 8,
    "n_positions": 64, "max_position_embeddings": 64, "n_ctx": 64, "max_target_positions": 64, "max_source_positions": 64,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "n_group": 1, "topk_group": 1, "num_experts_per_token": 2, "moe_topk": 2, "moe_k": 2, "rotary_dim": 4,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8, "qk_head_dim": 12,
    "state_size": 8, "mamba_d_state": 8, "time_step_rank": 4, "mamba_expand": 2, "mamba_n_heads": 4, "mamba_d_head": 16,
    "image_size": 32, "patch_size": 4, "num_labels": 3, "sliding_window": 16, "window_size": 4,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "sep_token_id": 2, "cls_token_id": 1,
    "first_k_dense_replace": 1, "initializer_range": 0.2, "rope_theta": 10000.0, "type_vocab_size": 2,
}  # fmt: skip
"""What a config's field is set to where it has one of that name."""
PER_STAGE = {
    "depths": 1,
    "hidden_sizes": 8,
    "embed_dims": 8,
    "dims": 8,
    "num_heads": 2,
    "num_attention_heads": 2,
    "embed_dim": 8,
}
"""The same for fields with a number for every stage: it doubles from one to the next, unless it is 1."""


def _sizes(*names: str) -> dict[str, Any]:
    return {name: SIZES[name] for name in names}


_TEXT = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
_IMAGE = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "clip": {"text_config": _sizes(*_TEXT), "vision_config": _sizes(*_IMAGE), "projection_dim": 16},
    "convnext": {"num_hidden_layers": 4},
    "convnextv2": {"num_hidden_layers": 4},
    "esm": {"vocab_size": VOCABULARY},
    "esmc": {"num_key_value_heads": 4},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3": {"text_config": _sizes(*_TEXT, "num_key_value_heads", "head_dim"), "vision_config": _sizes(*_IMAGE)},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "hiera": {"hidden_size": 256},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 8},
    "mobilebert": {"initializer_range": 0.05},
    "nemotron": {"num_key_value_heads": 2},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"]},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "resnet": {"hidden_sizes": [32, 32, 64, 64]},
    "swin": {"depths": [2, 2], "num_heads": [2, 4], "window_size": 2},
    "donut-swin": {"depths": [2, 2], "num_heads": [2, 4], "window_size": 2},
    "zamba2": {
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_key_value_heads": 4,
        "n_mamba_heads": 4,
        "mamba_headdim": 16,
        "layers_block_type": ["linear_attention", "hybrid"],
        "hybrid_layer_ids": [1],
    },
    "zaya": {"num_experts_per_tok": 1},
}
"""What does not follow the rule: fields that depend on each other or are None, and hybrids, which get a layer of each kind."""
AUTO_CLASSES = {
    "causal": ("AutoModelForCausalLM", modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    "seq2seq": ("AutoModelForSeq2SeqLM", modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
    "classification": (
        "AutoModelForSequenceClassification",
        modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    ),
    "image": ("AutoModelForImageClassification", modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES),
}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the remarks of models on their configs."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(level)


def tiny_config(model_type: str) -> Any:
    """Return the config of a small model of a type."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[model_type]
    default = config_class()
    names = set(default.to_dict()) | set(getattr(config_class, "attribute_map", {}))
    values: dict[str, Any] = {}
    for name in names:
        old = getattr(default, name, None)
        if isinstance(old, (list, tuple)) and name in PER_STAGE and all(isinstance(item, int) for item in old):
            values[name] = [PER_STAGE[name] * (2**stage if PER_STAGE[name] > 1 else 1) for stage in range(len(old))]
        elif name in SIZES and isinstance(old, (int, float)):
            values[name] = SIZES[name]
    if "qk_rope_head_dim" in names:  # multi-head latent attention rotates a part of a head and shares no keys
        values |= {"head_dim": SIZES["qk_rope_head_dim"], "num_key_value_heads": SIZES["num_attention_heads"]}
    config = config_class(**{**values, **EXCEPTIONS.get(model_type, {})})
    if hasattr(config, "use_cache"):
        config.use_cache = False
    for name, value in {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 1}.items():
        if getattr(config, name, None) is None:
            setattr(config, name, value)
    return config


def tiny_model(kind: str, model_type: str, seed: int = 0) -> nn.Module:
    """Return a small model with random weights, in eval mode; the same seed gives the same weights."""
    auto_class = getattr(transformers, AUTO_CLASSES[kind][0])
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = auto_class.from_config(tiny_config(model_type))
        for parameter in backbone.parameters():
            if parameter.dim() == 1:
                nn.init.normal_(parameter, mean=float(parameter.detach().mean()), std=0.05)
    return backbone.eval()


def tiny_inputs(kind: str, config: Any) -> dict[str, torch.Tensor]:
    """Return a batch of two with labels."""
    generator = torch.Generator().manual_seed(1)
    if kind == "image":
        size = getattr(config, "image_size", 32)
        size = size if isinstance(size, int) else size[0]
        channels = getattr(config, "num_channels", 3)
        pixels = torch.randn(2, channels, size, size, generator=generator)
        return {"pixel_values": pixels, "labels": torch.tensor([0, 1])}
    ids = torch.randint(3, VOCABULARY, (2, 8), generator=generator)
    ids[:, -1] = 2
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    labels = torch.tensor([0, 1]) if kind == "classification" else torch.randint(3, VOCABULARY, (2, 8), generator=generator)
    return {**batch, "labels": labels}
