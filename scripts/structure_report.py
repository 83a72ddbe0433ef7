"""Print, for every architecture of transformers' auto classes, what the common structure finds in it.

Run ``python scripts/structure_report.py [--full] [MODEL_TYPE ...]``: the models are built from their default configs on the
meta device, each class once. With ``--full``, every role of every architecture is printed, repeated names folded.
"""

from __future__ import annotations

import argparse
import re
import time
import warnings
from collections import Counter
from collections.abc import Iterator

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto

from deltaexp.structure import blocks, common_structure, linear_dims

AUTO = {
    "CausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "Seq2SeqLM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "SequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "ImageClassification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
}
NEEDED = {
    "into the token mixing": ({"attn.q", "attn.v"}, {"attn.v"}, {"mixer.in"}, {"conv"}),
    "out of it": ({"attn.proj"}, {"ff.w2"}, {"mixer.out"}, {"conv"}),
    "norms": ({"layer_norm"},),
}


def architectures(chosen: list[str], refused: list[tuple[str, str, str]]) -> Iterator[tuple[str, str, nn.Module]]:
    """Yield the auto class, model type and model of every class that can be built; note the others in ``refused``."""
    seen = set()
    for auto, mapping in AUTO.items():
        for model_type, classes in getattr(modeling_auto, mapping).items():
            if chosen and model_type not in chosen:
                continue
            try:
                config = transformers.CONFIG_MAPPING[model_type]()
                with torch.device("meta"):
                    if isinstance(classes, tuple):
                        model = getattr(transformers, classes[0])(config)
                    else:
                        model = getattr(transformers, f"AutoModelFor{auto}").from_config(config)
            except Exception as error:  # whatever keeps a default config from being built is what is reported
                refused.append((auto, model_type, f"{type(error).__name__}: {str(error).strip().splitlines()[0][:110]}"))
                continue
            if type(model) not in seen:
                seen.add(type(model))
                yield auto, model_type, model


def fold(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "N", name)


def show(model: nn.Module) -> None:
    roles: Counter[tuple[str, str]] = Counter()
    found = common_structure(model)
    for name, given in found.items():
        described = " ".join(
            role.name + (f"[{role.rows.groups}x{role.rows.size}:{role.rows.start}+{role.rows.width}]" if role.rows else "")
            for role in given
        )
        if described not in ("layer_norm", "embedding"):
            roles[fold(name), described] += 1
    for stack in blocks(model):
        print(f"    stack of {len(stack)}: {stack[0]} ... {stack[-1]}")
    for (name, described), count in roles.items():
        print(f"    {count:4d} {name}: {described}")
    inside = tuple(f"{block}." for stack in blocks(model) for block in stack)
    rest = Counter(
        fold(n) + str(linear_dims(m))
        for n, m in model.named_modules()
        if linear_dims(m) and n not in found and n.startswith(inside)
    )
    for name, count in rest.items():
        print(f"         - {count} {name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model_types", nargs="*")
    parser.add_argument("--full", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    refused: list[tuple[str, str, str]] = []
    total, have, missing, seconds = 0, Counter(), [], 0.0
    for auto, model_type, model in architectures(options.model_types, refused):
        total += 1
        start = time.perf_counter()
        names = {role.name for given in common_structure(model).values() for role in given}
        seconds += (took := time.perf_counter() - start)
        lacks = [what for what, ways in NEEDED.items() if not any(way <= names for way in ways)]
        have.update(what for what in NEEDED if what not in lacks)
        have["blocks"] += bool(blocks(model))
        if lacks or not blocks(model):
            missing.append(f"| {type(model).__name__} | {', '.join(lacks or ['blocks'])} | {', '.join(sorted(names))} |")
        if options.full:
            print(f"{type(model).__name__} [{model_type}] AutoModelFor{auto} {took:.2f} s")
            show(model)
    print(f"\n{total} architectures, {seconds:.1f} s for the common structure of all\n")
    for what in [*NEEDED, "blocks"]:
        print(f"- {what}: {have[what]}")
    print("\n| lacking | what | has |\n| --- | --- | --- |")
    print("\n".join(missing))
    print("\n| cannot be built | auto class | because |\n| --- | --- | --- |")
    for auto, model_type, reason in refused:
        print(f"| {model_type} | {auto} | {reason} |")


if __name__ == "__main__":
    main()
