"""Writing a plain checkpoint of transformers with a delta in its weights, for programs that know nothing of deltas."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from deltaexp.checkpoint import dump
from deltaexp.errors import CheckpointError, DeltaExpError, listing
from deltaexp.interop.writing import check_new, new_folder
from deltaexp.lazy import Layer

if TYPE_CHECKING:
    from deltaexp.model import DeltaModel

LOCAL = ("_name_or_path", "name_or_path")
"""Keys in which transformers may record where on this machine something was loaded from."""


def export(delta_model: DeltaModel, folder: str | Path, tokenizer: Any = None) -> str:
    """Merge a delta, save the backbone, and take the delta out of the weights again (see `deltaexp.interop.export`).

    Raises:
        CheckpointError: If the delta is no change of weights, or the backbone cannot be saved; then nothing is written.
    """
    check_new(folder)
    backbone: Any = delta_model.backbone_model
    if not hasattr(backbone, "save_pretrained"):
        raise CheckpointError(
            f"A {type(backbone).__name__} has no save_pretrained, so there is no plain checkpoint of it. Only models of "
            "transformers can be exported with to=merged."
        )
    with _merged(delta_model, _sample(backbone)) as report:
        left = [name for name, module in backbone.named_modules() if isinstance(module, Layer)]
        if left:
            raise CheckpointError(
                f"Another delta is attached to the backbone ({listing(left, 2)}), and would be saved as well. Detach it first."
            )
        with new_folder(folder) as stage:
            backbone.save_pretrained(stage)
            if tokenizer is not None:
                tokenizer.save_pretrained(stage)
            _forget_places(stage)
    return f"Wrote a plain {type(backbone).__name__} to {str(folder)!r}. {report}"


@contextmanager
def _merged(delta_model: DeltaModel, sample: Mapping[str, torch.Tensor] | None) -> Iterator[Any]:
    """Within this context a delta is merged; afterwards it is as it was before.

    Raises:
        CheckpointError: If it cannot be merged.
    """
    was_attached, was_merged = delta_model.attached, delta_model.merged
    try:
        report = delta_model.merge(sample)
    except DeltaExpError as error:
        raise CheckpointError(f"The delta cannot be exported as a plain checkpoint: {error}") from error
    try:
        yield report
    finally:
        if not was_merged:
            delta_model.unmerge()
        if not was_attached:
            delta_model.detach()


def _sample(backbone: Any) -> dict[str, torch.Tensor] | None:
    """Return token ids on which the logits are compared; None for a backbone that takes none."""
    settings: Any = getattr(backbone, "config", None)
    size = getattr(settings.get_text_config(), "vocab_size", None) if hasattr(settings, "get_text_config") else None
    main = getattr(backbone, "main_input_name", "input_ids")
    if not isinstance(size, int) or main != "input_ids":
        return None
    like: nn.Parameter = next(backbone.parameters())
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, size, (2, 8), generator=generator, device="cpu").to(like.device)
    if getattr(settings, "pad_token_id", None) is not None:
        ids[ids == settings.pad_token_id] = (settings.pad_token_id + 1) % size
    sample = {"input_ids": ids}
    if getattr(settings, "is_encoder_decoder", False):
        sample["decoder_input_ids"] = ids[:, :4].clone()
    return sample


def _forget_places(stage: Path) -> None:
    """Take out of the written files where on this machine the backbone or the tokenizer was loaded from."""
    for path in stage.glob("*.json"):
        values = json.loads(path.read_text(encoding="utf-8"))
        found = [key for key in LOCAL if isinstance(values, dict) and key in values]
        if found:
            text = dump({key: value for key, value in values.items() if key not in found})
            path.write_text(text, encoding="utf-8")
