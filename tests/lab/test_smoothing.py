"""Label smoothing: what it computes, and for which tasks it is none."""

import pytest
import torch
from models import FAMILIES, attach
from torch import nn

from deltaexp.errors import ConfigError
from deltaexp.lab.smoothing import Smoother, prepared


def expected(logits: torch.Tensor, labels: torch.Tensor, epsilon: float) -> torch.Tensor:
    """PyTorch's own, in which the target has 1 - epsilon + epsilon / classes."""
    return nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), label_smoothing=epsilon, ignore_index=-100)


def test_it_is_pytorchs() -> None:
    model, inputs = FAMILIES["bert"].build(), FAMILIES["bert"].inputs()
    labels = inputs.pop("labels")
    outputs = model(**inputs)
    torch.testing.assert_close(Smoother(0.2)(outputs, labels), expected(outputs.logits, labels, 0.2))


def test_text_to_text_gets_the_decoders_input() -> None:
    model, inputs = FAMILIES["t5"].build(), FAMILIES["t5"].inputs()
    inputs["labels"][1, 3:] = -100
    ready = prepared(dict(inputs), model)
    labels = ready.pop("labels")
    outputs = model(**ready)
    torch.testing.assert_close(outputs.logits, model(**inputs).logits)
    torch.testing.assert_close(Smoother(0.1)(outputs, labels), expected(outputs.logits, labels, 0.1))
    torch.testing.assert_close(Smoother(0.0)(outputs, labels), model(**inputs).loss)


def test_a_soft_prompt_in_front_of_a_causal_model() -> None:
    delta_model = attach(FAMILIES["gpt2"].build(), "soft_prompt", soft_token_num=3)
    inputs = FAMILIES["gpt2"].inputs()
    labels = inputs.pop("labels")
    outputs = delta_model.backbone_model(**inputs)
    assert outputs.logits.shape[1] == labels.shape[1] + 3
    # The last vector of the prompt tells the first token.
    found = Smoother(0.1)(outputs, labels, shift_labels=True)
    torch.testing.assert_close(found, expected(outputs.logits[:, 2:-1], labels, 0.1))
    plain = delta_model.backbone_model(**inputs, labels=labels).loss
    torch.testing.assert_close(Smoother(0.0)(outputs, labels, shift_labels=True), plain)


@pytest.mark.parametrize("labels", [None, torch.tensor([0.5, 2.0])])
def test_targets_that_are_no_classes(labels: torch.Tensor | None) -> None:
    inputs = {"input_ids": torch.ones(2, 3, dtype=torch.long)}
    if labels is not None:
        inputs["labels"] = labels
    with pytest.raises(ConfigError, match=r"this task's targets are no classes"):
        prepared(inputs, FAMILIES["bert"].build())
