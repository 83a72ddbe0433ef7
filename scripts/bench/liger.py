"""PEFT on a backbone with Liger's kernels (https://github.com/linkedin/Liger-Kernel), where these are installed."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import peft
from preparing import BF16, Prepared, prepared
from shapes import Backbones, Shape
from transformers.models.llama import modeling_llama

PATCHED = ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP")
"""What Liger replaces in transformers' module, for every model of the process."""


def prepared_with(backbones: Backbones, config: Callable[[Shape], Any], loss: bool = True) -> Prepared:
    """Return a contender of PEFT's with Liger's kernels.

    Args:
        backbones: Those of a Llama.
        config: Returns PEFT's config for a shape.
        loss: Whether the head and the loss are computed by a kernel of Liger's, too: it asks the GPU for the number of labels,
            so that such a step cannot be captured.

    Raises:
        ValueError: If Liger is not installed, or has no kernels for the backbone.
    """
    if backbones.shape.classes:
        raise ValueError("Liger's kernels are measured for language models only")
    try:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance as apply
    except ImportError as error:
        raise ValueError(f"Liger is not installed: {error}") from error
    model = backbones.get(BF16)
    before = {name: getattr(modeling_llama, name) for name in PATCHED}
    try:
        apply(model=model, fused_linear_cross_entropy=loss)
        patched = {name: getattr(modeling_llama, name) for name in PATCHED}
    finally:
        _put(before)

    @contextlib.contextmanager
    def around() -> Iterator[None]:
        _put(patched)
        try:
            yield
        finally:
            _put(before)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(model, config(backbones.shape), autocast_adapter_dtype=False)
    return prepared(wrapped, backbones, around=around)


def _put(found: dict[str, Any]) -> None:
    for name, value in found.items():
        setattr(modeling_llama, name, value)
