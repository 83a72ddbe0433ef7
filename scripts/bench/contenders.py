"""What is measured against what: full fine-tuning, the frozen limit, PEFT's methods, and ours."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import liger
import peft
import torch
from preparing import BF16, Contender, Group, Prepared, prepared
from shapes import Backbones, Shape
from torch import nn

from deltaexp import AutoDeltaConfig, AutoDeltaModel, half_attention, route, speed
from deltaexp.lab import graphs, replaying, schema, speeding
from deltaexp.norms_and_gelus import InFew

RANK, ALPHA = 8, 16
FP32 = torch.float32
LIMIT = "frozen limit"


def limit(backbones: Backbones, **options: Any) -> Prepared:
    """Return the forward pass, and the gradient with respect to all activations from the first block's input on."""
    model = backbones.get(**options)
    entered: list[torch.Tensor] = []

    def enter(_: nn.Module, args: tuple) -> tuple:
        entered[:] = [args[0].detach().requires_grad_()]
        return (*entered, *args[1:])

    model.get_submodule(backbones.shape.first_block).register_forward_pre_hook(enter)
    return prepared(model, backbones, entered=entered)


def full(backbones: Backbones, **options: Any) -> Prepared:
    """Return full fine-tuning."""
    return prepared(backbones.get(own=True, **options), backbones)


def pattern(names: tuple[str, ...]) -> str:
    """Return the regular expression by which PEFT finds modules."""
    return "|".join(rf".*\.{name.replace('[r]', '')}" for name in names)


def peft_model(
    backbones: Backbones, config: Callable[[Shape], Any], dtype: torch.dtype, attention: str, own: bool = False, **options: Any
) -> Any:
    """Return a backbone in PEFT's hands."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(backbones.get(dtype, attention), config(backbones.shape), **options)
    # The head is the same work for everyone, so nobody trains it.
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.requires_grad_(False)
    return model


def of_peft(
    config: Callable[[Shape], Any],
    dtype: torch.dtype = FP32,
    attention: str = "sdpa",
    autocast: bool = False,
    **options: Any,
) -> Callable[[Backbones], Prepared]:
    """Return what makes a contender of PEFT's."""
    return lambda backbones: prepared(peft_model(backbones, config, dtype, attention, **options), backbones, autocast=autocast)


def ours(
    keys: Callable[[Shape], dict[str, Any]],
    dtype: torch.dtype = FP32,
    attention: str = "sdpa",
    autocast: bool = False,
    own: bool = False,
    in_few: bool = False,
    **switches: bool,
) -> Callable[[Backbones], Prepared]:
    """Return what makes a contender of ours, under some switches of `deltaexp.speed`; ``in_few``: as a run has its backbone."""

    def make(backbones: Backbones) -> Prepared:
        backbone = backbones.get(dtype, attention, own=own)
        delta = attached(backbone, keys(backbones.shape))
        around = partial(speed.configured, **switches) if switches else contextlib.nullcontext
        made = prepared(backbone, backbones, autocast=autocast, around=around)
        made.keep += [delta, InFew(backbone)] if in_few else [delta]
        return made

    return make


def attached(backbone: Any, keys: dict[str, Any]) -> Any:
    """Return a delta on a backbone, everything else frozen."""
    config = AutoDeltaConfig.from_dict(keys)
    delta = AutoDeltaModel.from_config(config, backbone_model=backbone)
    delta.freeze_module()
    return delta


def auto(backbones: Backbones, kind: str = "all", dtype: torch.dtype = FP32, replayed: bool = True) -> Prepared:
    """Return a LoRA as a run with ``trainer.speed=auto`` computes it; ``replayed``: by CUDA graphs, where it does so."""
    model = backbones.get(dtype)
    delta = attached(model, our_lora(kind)(backbones.shape))
    on = [] if backbones.device != "cpu" else ["trainer.cpu=true"]
    choice = speeding.choose(schema.composed(["trainer.speed=auto", *on])[0], model)
    # Attention is set for the whole process, and so for the others: in its own steps only. Memory is kept for all alike.
    applied = contextlib.ExitStack()
    applied.enter_context(speeding.applied(dataclasses.replace(choice, attention=False, memory=False), model))
    around = half_attention.registered if choice.attention else contextlib.nullcontext
    made = prepared(model, backbones, autocast=choice.trainer.precision == "bf16", around=around)
    made.keep += [delta, applied, InFew(model)]
    ids = backbones.batch()["input_ids"]
    if replayed and choice.graphs and model.num_parameters() * ids.numel() <= replaying.WORK:
        _replay(made, backbones)
    return made


def _replay(made: Prepared, backbones: Backbones) -> None:
    """Let a step be taken as a run does where steps are CUDA graphs: replayed, or computed as ever where that cannot be."""
    trained = [parameter for parameter in made.model.parameters() if parameter.requires_grad]
    replays = graphs.StepGraphs(lambda inputs: made.forward(inputs).loss, trained)
    batch, eager = backbones.batch(), made.step

    def step() -> None:
        if replays.step(batch) is None:
            eager()
        for parameter in trained:
            parameter.grad = None

    made.step = step
    made.keep.append(replays)


def lora_modules(kind: str, shape: Shape) -> tuple[str, ...]:
    return {"q,v": shape.query_value, "all": shape.linears}[kind]


def peft_lora(kind: str, **keys: Any) -> Callable[[Shape], Any]:
    return lambda shape: peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=pattern(lora_modules(kind, shape)), lora_dropout=0.0, **keys
    )


def our_lora(kind: str, **keys: Any) -> Callable[[Shape], dict[str, Any]]:
    return lambda shape: {
        "delta_type": "lora",
        "lora_r": RANK,
        "lora_alpha": ALPHA,
        "modified_modules": list(lora_modules(kind, shape)),
        "common_structure": False,
        **keys,
    }


def training_fp32() -> Group:
    """Return LoRA in float32 against the limit."""
    found = [
        Contender(LIMIT, "torch", "limit", "fp32", limit),
        Contender("full fine-tuning", "torch", "full", "fp32", full),
    ]
    for kind in ("q,v", "all"):
        found.append(Contender(f"PEFT LoRA {kind}", "peft", f"lora {kind}", "fp32", of_peft(peft_lora(kind))))
        found.append(Contender(f"LoRA {kind}", "deltaexp", f"lora {kind}", "fp32", ours(our_lora(kind))))
        hooks = ours(our_lora(kind), fused=False)
        found.append(Contender(f"LoRA {kind}, by hooks", "deltaexp", f"lora {kind} by hooks", "fp32", hooks))
        run = ours(our_lora(kind), in_few=True)
        found.append(Contender(f"LoRA {kind}, in a run", "deltaexp", f"lora {kind} in a run", "fp32", run))
    return Group("training, fp32", True, found, LIMIT)


def training_bf16(device: str) -> Group:
    """Return LoRA with bfloat16, each library's under several settings."""
    found = [Contender(LIMIT, "torch", "limit", "bf16", partial(limit, dtype=BF16))]
    if device == "cpu":  # where the backward pass of sdpa is slow in bfloat16
        found.append(
            Contender(f"{LIMIT}, eager attention", "torch", "limit", "bf16", partial(limit, dtype=BF16, attention="eager"))
        )
    for kind in ("q,v", "all"):
        theirs: dict[str, dict[str, Any]] = {
            "fp32 adapters": {"dtype": BF16},
            "bf16 adapters": {"dtype": BF16, "autocast_adapter_dtype": False},
            "autocast": {"autocast": True},
        }
        mine: dict[str, dict[str, Any]] = {
            "fp32 delta": {"dtype": BF16},
            "delta cast": {"dtype": BF16, "delta_in_backbone_dtype": True},
            "autocast": {"autocast": True},
        }
        if device == "cpu":
            theirs["bf16 adapters, eager attention"] = {**theirs["bf16 adapters"], "attention": "eager"}
            mine["delta cast, eager attention"] = {**mine["delta cast"], "attention": "eager"}
        for setting, options in theirs.items():
            make = of_peft(peft_lora(kind), **options)
            found.append(Contender(f"PEFT LoRA {kind}: {setting}", "peft", f"lora {kind}", "bf16", make))
        for setting, options in mine.items():
            found.append(
                Contender(f"LoRA {kind}: {setting}", "deltaexp", f"lora {kind}", "bf16", ours(our_lora(kind), **options))
            )
        found.append(Contender(f"LoRA {kind}: speed=auto", "deltaexp", f"lora {kind}", "bf16", partial(auto, kind=kind)))
    found.append(Contender("PEFT LoRA all: its default, fp32", "peft", "lora all in fp32", "fp32", of_peft(peft_lora("all"))))
    return Group("training, bf16", True, found, LIMIT)


def methods() -> Group:
    """Return every method that both libraries have, and those that only we have."""
    found = [Contender(LIMIT, "torch", "limit", "fp32", limit)]

    def both(method: str, theirs: Callable[[Shape], Any], keys: Callable[[Shape], dict[str, Any]]) -> None:
        found.append(Contender(f"PEFT {method}", "peft", method, "fp32", of_peft(theirs)))
        found.append(Contender(method, "deltaexp", method, "fp32", ours(keys, own=False)))

    def targets(shape: Shape) -> str:
        return pattern(shape.query_value)

    def modules(shape: Shape) -> dict[str, Any]:
        return {"modified_modules": list(shape.query_value), "common_structure": False}

    def task(shape: Shape) -> str:
        return "SEQ_CLS" if shape.classes else "CAUSAL_LM"

    both("dora", peft_lora("q,v", use_dora=True), our_lora("q,v", lora_dora=True))
    both("rslora", peft_lora("q,v", use_rslora=True), our_lora("q,v", lora_scaling="rslora"))
    both(
        "adalora",
        lambda shape: peft.AdaLoraConfig(init_r=12, target_r=8, total_step=1000, target_modules=targets(shape)),
        lambda shape: {"delta_type": "adalora", **modules(shape)},
    )
    both(
        "vera",
        lambda shape: peft.VeraConfig(r=256, target_modules=targets(shape)),
        lambda shape: {"delta_type": "vera", **modules(shape)},
    )
    both(
        "loha",
        lambda shape: peft.LoHaConfig(r=8, alpha=8, target_modules=targets(shape)),
        lambda shape: {"delta_type": "loha", **modules(shape)},
    )
    both(
        "lokr",
        lambda shape: peft.LoKrConfig(r=8, alpha=8, target_modules=targets(shape)),
        lambda shape: {"delta_type": "lokr", **modules(shape)},
    )
    both(
        "ia3",
        lambda shape: peft.IA3Config(
            target_modules=pattern((shape.linears[1], shape.linears[2], shape.linears[-1])),
            feedforward_modules=pattern((shape.linears[-1],)),
        ),
        lambda shape: {"delta_type": "ia3", "modified_modules": ["attn.k", "attn.v", "ff.w2"], "common_structure": True},
    )
    both(
        "ln_tuning",
        lambda shape: peft.LNTuningConfig(target_modules=r".*(LayerNorm|layernorm|norm)"),
        lambda shape: {"delta_type": "ln_tuning"},
    )
    both(
        "prefix",
        lambda shape: peft.PrefixTuningConfig(task_type=task(shape), num_virtual_tokens=6),
        lambda shape: {"delta_type": "prefix", "prefix_token_num": 6, "reparameterize": False},
    )
    both(
        "soft_prompt",
        lambda shape: peft.PromptTuningConfig(task_type=task(shape), num_virtual_tokens=20),
        lambda shape: {"delta_type": "soft_prompt", "soft_token_num": 20},
    )
    for method in ("adapter", "parallel_adapter", "bitfit", "compacter", "low_rank_adapter"):
        found.append(Contender(method, "deltaexp", method, "fp32", ours(lambda shape, method=method: {"delta_type": method})))
    for one in found:
        if one.name in ("ln_tuning", "bitfit"):  # they train the backbone's own parameters
            one.make = ours(lambda shape, method=one.method: {"delta_type": method}, own=True)
    return Group("methods, fp32", True, found, LIMIT)


def inference(precision: str) -> Group:
    """Return the backbone alone, with one LoRA on all linear maps, merged, and with four of them mixed in a batch."""
    dtype = {"fp32": FP32, "bf16": BF16}[precision]

    def backbone(backbones: Backbones) -> Prepared:
        return prepared(backbones.get(dtype), backbones, training=False)

    def peft_one(backbones: Backbones) -> Prepared:
        model = peft_model(backbones, peft_lora("all"), dtype, "sdpa", autocast_adapter_dtype=dtype == FP32)
        return prepared(model, backbones, training=False)

    def peft_mixed(backbones: Backbones) -> Prepared:
        config = peft_lora("all")(backbones.shape)
        model = peft_model(backbones, peft_lora("all"), dtype, "sdpa", autocast_adapter_dtype=dtype == FP32)
        names = ["default", "b", "c", "d"]
        for name in names[1:]:
            model.add_adapter(name, config, autocast_adapter_dtype=dtype == FP32)
        chosen = [names[row * 4 // backbones.shape.rows] for row in range(backbones.shape.rows)]
        return prepared(model, backbones, training=False, adapter_names=chosen)

    def our_one(backbones: Backbones, merged: bool = False) -> Prepared:
        model = backbones.get(dtype, own=merged)
        delta = attached(model, our_lora("all")(backbones.shape))
        if merged:
            delta.merge()
        made = prepared(model, backbones, training=False)
        made.keep.append(delta)
        return made

    def our_mixed(backbones: Backbones) -> Prepared:
        model = backbones.get(dtype)
        deltas = [attached(model, our_lora("all")(backbones.shape)) for _ in range(4)]
        chosen = [deltas[row * 4 // backbones.shape.rows] for row in range(backbones.shape.rows)]
        made = prepared(model, backbones, training=False, around=lambda: route(chosen))
        made.keep += deltas
        return made

    found = [
        Contender("backbone", "torch", "backbone", precision, backbone),
        Contender("PEFT LoRA all", "peft", "unmerged", precision, peft_one),
        Contender("PEFT 4 LoRAs in a batch", "peft", "mixed", precision, peft_mixed),
        Contender("LoRA all", "deltaexp", "unmerged", precision, our_one),
        Contender("4 LoRAs in a batch", "deltaexp", "mixed", precision, our_mixed),
        Contender("LoRA all, merged", "deltaexp", "merged", precision, lambda backbones: our_one(backbones, merged=True)),
    ]
    return Group(f"inference, {precision}", False, found, "backbone")


def groups(shape: Shape, device: str) -> Iterator[Group]:
    """Return what is measured of a shape."""
    large = shape.name in ("llama-1b", "llama-8b-blocks")  # in float32 it would only take time
    if not large:
        yield training_fp32()
    low = training_bf16(device)
    if device != "cpu" and not shape.classes:
        for name, loss in (("Liger kernels", True), ("Liger kernels but for the loss", False)):
            make = partial(liger.prepared_with, config=peft_lora("all"), loss=loss)
            low.contenders.append(Contender(f"PEFT LoRA all: bf16 adapters, {name}", "peft", "lora all", "bf16", make))
    yield low
    if not large:
        yield methods()
        yield inference("fp32")
    if device != "cpu":
        yield inference("bf16")
