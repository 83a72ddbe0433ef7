"""Adapters made by PEFT itself, and what PEFT's models compute, for the tests of both directions."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models import FAMILIES
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn

from deltaexp import AutoDeltaModel, DeltaModel

KEYS: dict[str, dict] = {
    "BEFT": {},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 4},
    "DELORA": {},
    "FOURIERFT": {"n_frequency": 10},
    "GRALORA": {"r": 4, "gralora_k": 2},
    "HIRA": {},
    "HRA": {},
    "IA3": {"feedforward_modules": []},
    "LN_TUNING": {},
    "LOHA": {},
    "LOKR": {},
    "LORA": {"r": 2, "use_dora": True, "bias": "lora_only"},
    "MISS": {"r": 4},
    "OFT": {"oft_block_size": 4},
    "PROMPT_TUNING": {"num_virtual_tokens": 3},
    "P_TUNING": {"num_virtual_tokens": 3},
    "RANDLORA": {"r": 4},
    "ROAD": {"group_size": 4},
    "SHIRA": {"r": 2},
    "TRAINABLE_TOKENS": {"token_indices": [11, 14, 15]},
    "VBLORA": {"num_vectors": 8, "vector_length": 4, "r": 2},
    "VERA": {},
    "WAVEFT": {"n_frequency": 10},
}
"""What is tested of each method; the modules are chosen in `settings`."""
KNOWN = {kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING}
"""What the PEFT that is installed has."""
WITHOUT_MODULES = {"PROMPT_TUNING", "P_TUNING", "TRAINABLE_TOKENS"}
quiet = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing:FutureWarning",
    "ignore:.past_key_values:FutureWarning",
    "ignore::UserWarning:peft",
    "ignore:Unsupported layer type:UserWarning",
)
TASKS = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}
TARGETS = {
    "llama": ["q_proj", "down_proj"],
    "bert": ["query", "value"],
    "t5": ["q", "wo"],
    "gpt2": ["c_attn", "c_proj"],
}
NORMS = {"llama": ["input_layernorm"], "bert": ["LayerNorm"], "t5": ["layer_norm"], "gpt2": ["ln_1"]}
HEADS = {"llama": "lm_head", "bert": "classifier"}


def made(name: str, config: peft.PeftConfig, folder: Path) -> torch.Tensor:
    """Put an adapter of PEFT's on a family's backbone, move it as training would, save it; return its logits."""
    family = FAMILIES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = peft.get_peft_model(family.build(), config).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
        result = _logits(model, name)
    model.save_pretrained(str(folder))
    return result


def loaded_by_peft(name: str, folder: Path) -> torch.Tensor:
    """Return the logits of what PEFT loads from a folder."""
    family = FAMILIES[name]
    model = peft.PeftModel.from_pretrained(family.build(), str(folder)).eval()
    with torch.no_grad():
        return _logits(model, name)


def _logits(model: nn.Module, name: str) -> torch.Tensor:
    try:
        return model(**FAMILIES[name].inputs()).logits
    except ValueError as error:
        if "does not support past key values" not in str(error):
            raise
        # PEFT 0.21 looks for an argument of a name that it no longer has since transformers 5.24.
        pytest.skip(f"PEFT {peft.__version__} cannot put a prefix on {name} under this transformers")


def unchecked(folder: Path, backbone: nn.Module) -> DeltaModel:
    """Load an adapter, which cannot be checked by a hash."""
    with warnings.catch_warnings(record=True) as said:  # not only this one: some of PEFT's layers warn when they are made
        warnings.simplefilter("always")
        delta_model = AutoDeltaModel.from_finetuned(folder, backbone_model=backbone)
    pattern = re.compile(r"saved by PEFT.* whether this is the right backbone is unknown")
    assert any(pattern.search(str(warning.message)) for warning in said)
    return delta_model


def lora(name: str, **keys: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 2, "target_modules": TARGETS[name], **keys})


def settings(method: str, name: str) -> dict:
    """Return the keys of PEFT's config of a method for one family of backbones."""
    keys = {"peft_type": method, **KEYS[method]}
    if method == "LN_TUNING":
        keys["target_modules"] = ["LayerNorm" if name == "bert" else "input_layernorm"]
    elif method not in WITHOUT_MODULES:
        keys["target_modules"] = ["query", "value"] if name == "bert" else ["q_proj", "down_proj"]
    return keys
