"""Label smoothing (Szegedy et al., 2016, https://arxiv.org/abs/1512.00567) by transformers' own smoother."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from deltaexp.errors import ConfigError
from deltaexp.lab.tasks.kinds.base import IGNORED
from deltaexp.lab.trainer import LabelSmoother


class Smoother(LabelSmoother):
    """transformers' smoother, also where a soft prompt makes the logits ``(batch, length, classes)`` longer than the labels."""

    def __init__(self, epsilon: float) -> None:
        super().__init__(epsilon=epsilon)

    def __call__(self, model_output: Any, labels: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        """Return the loss."""
        logits = model_output["logits"] if isinstance(model_output, dict) else model_output[0]
        if labels.dim() == 2 and logits.dim() == 3:
            labels = nn.functional.pad(labels, (logits.shape[1] - labels.shape[1], 0), value=IGNORED)
        return super().__call__(model_output, labels, *arguments, **options)


def prepared(inputs: dict[str, Any], model: Any) -> dict[str, Any]:
    """Return a batch with what the model makes of the labels itself, for a loss that is computed outside of it.

    Raises:
        ConfigError: If there are no labels, or they are no classes.
    """
    labels = inputs.get("labels")
    if labels is None or labels.is_floating_point():
        raise ConfigError(
            "trainer.label_smoothing spreads the probability of one class over all, and this task's targets are no classes. "
            "Leave it out."
        )
    # A classifier on an encoder-decoder makes its decoder's input of the text, whatever the label.
    if labels.dim() == 2 and "decoder_input_ids" not in inputs and hasattr(model, "prepare_decoder_input_ids_from_labels"):
        return {**inputs, "decoder_input_ids": model.prepare_decoder_input_ids_from_labels(labels=labels)}
    return inputs
