"""Make reference checkpoints with the released OpenDelta, which ``tests/interop/test_opendelta.py`` reads with deltaexp.

This runs in an environment of its own, with Python 3.11 and without deltaexp::

    pip install "torch==2.13.0" "transformers==4.30.2" "opendelta==0.3.2" "numpy<2" safetensors
    python scripts/opendelta_golden.py --out tests/golden [BACKBONE ...]

Below ``--out`` it writes, for every backbone,

- ``backbones/NAME``: ``config.json`` and ``model.safetensors`` of a tiny model with random weights, and
  ``golden.safetensors`` with an input and ``logits_backbone``, what the plain model computes for it;
- ``NAME/CASE``: ``config.json`` and ``pytorch_model.bin`` as OpenDelta saved them, ``golden.json`` with the config that was
  given and the names and shapes of the trained parameters in their order, and ``golden.safetensors`` with the ``logits``, and
  with the input where the case has another one.

Two runs write the same tensors. The cases of t5, bert, gpt2 and t5_square in ``tests/golden`` were made in the same way, with
larger backbones.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from opendelta import AutoDeltaConfig, AutoDeltaModel
from safetensors.torch import save_file
from torch import nn

SMALL = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
"""Sizes as BERT and its kin call them."""
STD = {"low_rank_adapter": 0.3, "compacter": 0.4}
"""Standard deviation of the trained parameters, where it is not 0.05: that of factors that are multiplied is larger."""


def bart() -> nn.Module:
    """BART that scales its embeddings, and whose encoder and decoder differ in heads and widths."""
    return transformers.BartForConditionalGeneration(
        transformers.BartConfig(
            vocab_size=100,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=8,
            encoder_ffn_dim=24,
            decoder_ffn_dim=40,
            max_position_embeddings=64,
            init_std=0.2,
            scale_embedding=True,
        )
    )


def opt() -> nn.Module:
    """OPT, whose embeddings are narrower than its layers."""
    return transformers.OPTForCausalLM(
        transformers.OPTConfig(
            vocab_size=100,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            ffn_dim=24,
            max_position_embeddings=64,
            word_embed_proj_dim=16,
            init_std=0.2,
        )
    )


def roberta() -> nn.Module:
    """RoBERTa, which counts positions from its padding id."""
    config = transformers.RobertaConfig(**SMALL, num_labels=3, type_vocab_size=2)
    return transformers.RobertaForSequenceClassification(config)


def deberta_v2() -> nn.Module:
    """DeBERTa with relative positions as in its third version."""
    config = transformers.DebertaV2Config(
        **SMALL,
        num_labels=3,
        type_vocab_size=0,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        share_att_key=True,
        norm_rel_ebd="layer_norm",
        position_buckets=16,
        position_biased_input=False,
    )
    return transformers.DebertaV2ForSequenceClassification(config)


def distilbert() -> nn.Module:
    """DistilBERT, which OpenDelta's common structure does not know."""
    config = transformers.DistilBertConfig(
        vocab_size=100,
        dim=32,
        n_layers=2,
        n_heads=4,
        hidden_dim=24,
        max_position_embeddings=64,
        num_labels=3,
        initializer_range=0.2,
    )
    return transformers.DistilBertForSequenceClassification(config)


BACKBONES: dict[str, Callable[[], nn.Module]] = {
    "bart": bart,
    "deberta_v2": deberta_v2,
    "distilbert": distilbert,
    "opt": opt,
    "roberta": roberta,
}
PREFIX = {"delta_type": "prefix", "prefix_token_num": 4, "reparameterize": False}
SHARED_PREFIX = {**PREFIX, "reparameterize": True, "embed_dim": 8, "mid_dim": 8}
SOFT_PROMPT = {"delta_type": "soft_prompt", "soft_token_num": 5}
ADAPTER = {"delta_type": "adapter", "bottleneck_dim": 4}
PARALLEL_ADAPTER = {"delta_type": "parallel_adapter", "bottleneck_dim": 4}
NO_MASK, TOKEN_TYPES = "no_mask", "token_types"
"""What the names of cases end with that have an input of their own."""
CASES: dict[str, dict[str, dict[str, Any]]] = {
    "bart": {
        "adapter": {**ADAPTER, "modified_modules": ["self_attn.out_proj", "fc2"], "exclude_modules": ["model.encoder"]},
        "parallel_adapter": {**PARALLEL_ADAPTER, "modified_modules": ["fc1", "fc2"]},
        "prefix": {**PREFIX, "modified_modules": ["self_attn"]},
        "prefix_reparam": {**SHARED_PREFIX, "modified_modules": ["self_attn"]},
        "soft_prompt": SOFT_PROMPT,
        f"soft_prompt_{NO_MASK}": SOFT_PROMPT,
    },
    "deberta_v2": {
        "bitfit": {"delta_type": "bitfit"},
        "lora": {"delta_type": "lora"},
        "parallel_adapter": PARALLEL_ADAPTER,
        "soft_prompt": SOFT_PROMPT,
    },
    "distilbert": {
        "adapter_unfrozen_heads": {
            **ADAPTER,
            "modified_modules": ["attention.out_lin", "ffn.lin2"],
            "unfrozen_modules": ["deltas", "classifier", "pre_classifier"],
        },
        "bitfit": {"delta_type": "bitfit", "modified_modules": ["attention", "ffn", "sa_layer_norm"]},
        "compacter": {"delta_type": "compacter", "modified_modules": ["attention.out_lin", "ffn.lin2"], "reduction_factor": 8},
        "lora_regex": {
            "delta_type": "lora",
            "modified_modules": [r"[r]layer\.[0-9]+\.attention\.[qk]_lin", "1.ffn.lin1"],
            "lora_r": 4,
        },
        "soft_prompt": SOFT_PROMPT,
    },
    "opt": {
        "adapter_ff": {**ADAPTER, "modified_modules": ["ff@"], "common_structure": True},
        "bitfit": {"delta_type": "bitfit"},
        "lora": {"delta_type": "lora"},
        "parallel_adapter": {**PARALLEL_ADAPTER, "modified_modules": ["fc1", "fc2"]},
        "soft_prompt": SOFT_PROMPT,
    },
    "roberta": {
        "adapter_ff": {**ADAPTER, "modified_modules": ["ff@"], "common_structure": True},
        "bitfit": {"delta_type": "bitfit"},
        "low_rank_adapter_no_width": {"delta_type": "low_rank_adapter", "reduction_factor": 64},
        "parallel_adapter": PARALLEL_ADAPTER,
        "prefix_reparam": SHARED_PREFIX,
        f"soft_prompt_{NO_MASK}": SOFT_PROMPT,
        f"soft_prompt_{TOKEN_TYPES}": SOFT_PROMPT,
    },
}


def make_backbone(name: str, folder: Path) -> nn.Module:
    """Save a backbone into ``folder``, and return it as it is loaded again."""
    torch.manual_seed(0)
    model = BACKBONES[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # no norm weight is one and no bias zero, so that none can be forgotten
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder, safe_serialization=True)
    (folder / "generation_config.json").unlink(missing_ok=True)
    return type(model).from_pretrained(folder).eval()


def make_inputs(config: Any) -> dict[str, torch.Tensor]:
    """Return a batch of two, the second sequence padded."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(5, 90, (2, 10), generator=generator)
    mask = torch.ones_like(ids)
    ids[1, 7:] = config.pad_token_id or 0
    mask[1, 7:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.randint(5, 90, (2, 6), generator=generator)
        inputs["decoder_input_ids"][:, 0] = config.decoder_start_token_id
    return inputs


def inputs_of(case: str, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the input of a case, which is the backbone's unless the name says otherwise."""
    if case.endswith(NO_MASK):
        return {name: tensor for name, tensor in inputs.items() if name != "attention_mask"}
    if case.endswith(TOKEN_TYPES):
        return {**inputs, "token_type_ids": (torch.arange(10) > 4).long().expand(2, 10)}
    return inputs


def logits(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return what a model computes; OpenDelta lengthens masks in place, so it gets copies."""
    with torch.no_grad():
        return model(**{name: tensor.clone() for name, tensor in inputs.items()}).logits.contiguous()


def make_case(config: dict[str, Any], model: nn.Module, inputs: dict[str, torch.Tensor], own: bool, folder: Path) -> float:
    """Put a delta into a fresh ``model``, save it and what it computes, and return how far it moves the logits."""
    plain = logits(model, inputs)
    torch.manual_seed(1)
    delta = AutoDeltaModel.from_config(AutoDeltaConfig.from_dict(json.loads(json.dumps(config))), model)
    delta.freeze_module(set_state_dict=True)
    model.eval()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    torch.manual_seed(42)
    with torch.no_grad():
        for parameter in trained.values():
            parameter.normal_(0, STD.get(config["delta_type"], 0.05))
    changed = logits(model, inputs)
    delta.save_finetuned(str(folder))
    save_file(
        {**({k: v.contiguous() for k, v in inputs.items()} if own else {}), "logits": changed}, folder / "golden.safetensors"
    )
    facts = {
        "config": config,
        "backbone_class": type(model).__name__,
        "trainable_parameters": {name: list(parameter.shape) for name, parameter in trained.items()},
    }
    lines = [f"{json.dumps(key)}: {json.dumps(value, separators=(',', ':'))}" for key, value in facts.items()]
    (folder / "golden.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    return float((changed[:, -plain.shape[1] :] - plain).abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backbones", nargs="*", metavar="BACKBONE", help=f"of {', '.join(BACKBONES)}; all if none is named")
    parser.add_argument("--out", type=Path, required=True, help="folder to write into; what a case had there is replaced")
    arguments = parser.parse_args()
    if unknown := set(arguments.backbones) - set(BACKBONES):
        parser.error(f"no backbone is called {', '.join(sorted(unknown))}; choose from {', '.join(BACKBONES)}")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)  # OpenDelta prints every config
    for name in arguments.backbones or BACKBONES:
        home = arguments.out / "backbones" / name
        model = make_backbone(name, home)
        inputs = make_inputs(model.config)
        save_file({**inputs, "logits_backbone": logits(model, inputs)}, home / "golden.safetensors")
        for case, config in CASES[name].items():
            given = inputs_of(case, inputs)
            # OpenDelta writes over a file but leaves others, so a case is made elsewhere and moved.
            with tempfile.TemporaryDirectory() as stage:
                fresh = type(model).from_pretrained(home).eval()
                moved = make_case(config, fresh, given, given is not inputs, Path(stage, case))
                shutil.rmtree(arguments.out / name / case, ignore_errors=True)
                shutil.copytree(Path(stage, case), arguments.out / name / case)
            print(f"{name}/{case}: the logits move by {moved:.3f}")


if __name__ == "__main__":
    main()
