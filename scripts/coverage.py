"""On how many of transformers' architectures every delta type attaches by default, and with what.

Builds each architecture that has a default config, of causal language models, sequence-to-sequence models, and classifiers of
text and of images, on the meta device, attaches every type there and takes it out again. Also compares the modules that LoRA
takes with those that PEFT lists for a model type. Run: ``python scripts/coverage.py --out deltaexp/docs/coverage.md``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import re
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import track
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from deltaexp import AutoDeltaConfig, AutoDeltaModel, DeltaExpError, registry
from deltaexp.errors import listing

AUTO_CLASSES = {
    "AutoModelForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "AutoModelForSeq2SeqLM": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "AutoModelForSequenceClassification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "AutoModelForImageClassification": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
}
DEPTHS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers", "num_decoder_layers")
"""Fields of configs that say how many blocks there are."""
WHOLE = ("lora", "adapter", "bitfit")
"""The types that are attached to backbones of full depth; the others, to save time, to at most four blocks of each."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


def architectures() -> Iterator[tuple[str, str, str]]:
    """Yield auto class, model type and class name; a class once, under the first model type that has it."""
    seen = set()
    for auto_class, names in AUTO_CLASSES.items():
        for model_type, class_name in names.items():
            class_name = class_name if isinstance(class_name, str) else class_name[0]
            if class_name not in seen:
                seen.add(class_name)
                yield auto_class, model_type, class_name


def build(auto_class: str, model_type: str, depth: int | None = None) -> Any:
    """Build an architecture from its default config, with ``depth`` blocks at the most where that is possible."""
    with quiet(), torch.device("meta"):
        whole = CONFIG_MAPPING[model_type]()
        if depth is not None:
            less = {
                name: depth for name in DEPTHS if isinstance(getattr(whole, name, None), int) and getattr(whole, name) > depth
            }
            with contextlib.suppress(Exception):  # many configs have lists as long as the model is deep
                return getattr(transformers, auto_class).from_config(CONFIG_MAPPING[model_type](**less))
        return getattr(transformers, auto_class).from_config(whole)


def measure(types: list[str], limit: int | None) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Return, for every architecture and type, what was attached to, or why nothing was; and what could not be built."""
    found: dict[str, dict[str, Any]] = {}
    unbuilt: dict[str, str] = {}
    for auto_class, model_type, class_name in track(
        list(architectures())[:limit], "architectures", console=Console(stderr=True)
    ):
        try:
            deep, backbone = build(auto_class, model_type), build(auto_class, model_type, depth=4)
        except Exception as error:  # whatever a model says to its own default config
            unbuilt[class_name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            continue
        row: dict[str, Any] = {}
        for name in types:
            start = time.perf_counter()
            config = AutoDeltaConfig.from_dict({"delta_type": name})
            try:
                with quiet():
                    delta = AutoDeltaModel.from_config(config, backbone_model=deep if name in WHOLE else backbone)
                row[name] = {
                    "modules": {pattern or "the backbone": len(names) for pattern, names in delta.targets.items()},
                    "parameters": delta.counts()["delta"],
                }
                delta.detach()
            except DeltaExpError as error:
                row[name] = {"reason": str(error)}
            except Exception as error:  # a fault, which is to be seen, and no reason to lose the rest
                row[name] = {"reason": f"FAULT {type(error).__name__}: {error}"}
            row[name]["seconds"] = round(time.perf_counter() - start, 3)
        found[class_name] = {"model_type": model_type, "auto_class": auto_class, "types": row}
    return found, unbuilt


def agreement() -> list[tuple[str, str, str, str]]:
    """Compare what LoRA takes by default with PEFT's list, for the model types that both know."""
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as THEIRS

    first = {kind: auto_class for auto_class, names in reversed(AUTO_CLASSES.items()) for kind in names}
    rows = []
    for model_type, theirs in sorted(THEIRS.items()):
        if model_type not in first:
            continue
        try:
            backbone = build(first[model_type], model_type)
            with quiet():
                delta = AutoDeltaModel.from_config(AutoDeltaConfig.from_dict({"delta_type": "lora"}), backbone_model=backbone)
        except Exception as error:
            rows.append((model_type, "-", f"{theirs}", str(error).splitlines()[0]))
            continue
        if isinstance(theirs, str):  # an expression over whole names
            theirs = {name.rsplit(".", 1)[-1] for name, _ in backbone.named_modules() if re.fullmatch(theirs, name)}
        ours = sorted({a.site.rsplit(".", 1)[-1] for a in delta.attachments})
        rows.append((model_type, listing(ours, 9), listing(sorted(theirs), 9), explained(ours, sorted(theirs), delta)))
    return rows


def explained(ours: list[str], theirs: list[str], delta: Any) -> str:
    """Say how the two lists differ."""
    if ours == theirs:
        parts = sorted({a.saved_as for a in delta.attachments if a.rows is not None})
        return f"the same; ours on the slices {listing(parts)}" if parts else "the same"
    if set(ours) > set(theirs):
        return "theirs, and more: they leave out a part of attention's q and v (or the stacks that have other names)"
    if set(theirs) > set(ours):
        return "ours are q and v of attention; theirs are these and more"
    if any(a.rows is not None for a in delta.attachments):
        return "the projection is fused: ours are its q and v slices"
    return "other modules"


def markdown(found: dict, unbuilt: dict, types: list[str], rows: list[tuple[str, str, str, str]], seconds: float) -> str:
    """Return the report."""
    lines = [
        "# What attaches to what",
        "",
        f"Made by `python scripts/coverage.py` with transformers {transformers.__version__} in {seconds:.0f} s: {len(found)} "
        f"architectures built from their default configs on the meta device; {len(unbuilt)} more do not build from theirs. "
        f"{listing([f'`{name}`' for name in WHOLE])} were attached at full depth, the others to at most four blocks.",
        "",
        "| `delta_type` | attaches to | on which modules, and on how many architectures |",
        "| --- | --- | --- |",
    ]
    for name in types:
        good = [row["types"][name] for row in found.values() if "modules" in row["types"][name]]
        kinds = Counter(", ".join(f"`{p}`" for p in entry["modules"]) for entry in good)
        what = "; ".join(f"{kind} ({count})" for kind, count in kinds.most_common(6))
        more = len(kinds) - 6
        lines.append(f"| `{name}` | {len(good)} of {len(found)} | {what}{f'; {more} other combinations' if more > 0 else ''} |")
    lines += ["", "## Where a type does not attach by default, and why", ""]
    for name in types:
        bad = {key: row["types"][name]["reason"] for key, row in found.items() if "reason" in row["types"][name]}
        if bad:
            lines.append(f"- `{name}`, {len(bad)}:")
            reasons: dict[str, list[str]] = {}
            for key, reason in bad.items():
                reasons.setdefault(shortened(reason, key), []).append(key)
            lines += [f"    - {', '.join(sorted(keys))}: {reason}" for reason, keys in sorted(reasons.items())]
    lines += ["", "## LoRA's default modules and PEFT's", ""]
    same = sum(row[3].startswith("the same") for row in rows)
    lines += [f"{same} of the {len(rows)} model types that both know have the same modules.", ""]
    lines += ["| model type | deltaexp | PEFT | |", "| --- | --- | --- | --- |", *(f"| {' | '.join(row)} |" for row in rows)]
    lines += ["", "## Architectures that do not build from their default config", ""]
    lines += [f"- {name}: {reason}" for name, reason in sorted(unbuilt.items())]
    return "\n".join(lines) + "\n"


def shortened(reason: str, class_name: str) -> str:
    """Return the first sentence of a reason, without names that only one architecture has."""
    return reason.split(". ")[0].replace(class_name, "this model")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="write the report there as well")
    parser.add_argument("--json", type=Path, help="write all that was found there")
    parser.add_argument("--types", nargs="+", default=registry.known(), help="the delta types; all by default")
    parser.add_argument("--limit", type=int, help="only so many architectures")
    options = parser.parse_args()
    start = time.perf_counter()
    found, unbuilt = measure(options.types, options.limit)
    report = markdown(found, unbuilt, options.types, agreement(), time.perf_counter() - start)
    print(report)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(report, encoding="utf-8")
    if options.json:
        options.json.write_text(json.dumps({"found": found, "unbuilt": unbuilt}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
