"""The kinds of tasks: how rows become tensors and answers become a metric; one module for those that are alike."""

from __future__ import annotations

from typing import Any

from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from deltaexp.errors import ConfigError
from deltaexp.lab.taskconfig import TaskConfig
from deltaexp.lab.tasks.kinds import chat, choices, heads, images, language, questions, text, tokens
from deltaexp.lab.tasks.kinds.base import Kind, Split

__all__ = ["Kind", "Split", "architecture", "choose"]

ENCODER, DECODER, ENCODER_DECODER, IMAGE = "encoder", "decoder", "encoder-decoder", "image model"

FORMS: dict[str, dict[tuple[str, str], type[Kind]]] = {
    "classification": {
        (ENCODER, "head"): heads.Classification,
        (DECODER, "head"): heads.Classification,
        (ENCODER_DECODER, "head"): heads.Classification,
        (DECODER, "text"): text.DecoderLabels,
        (ENCODER_DECODER, "text"): text.Labels,
    },
    "regression": {
        (ENCODER, "head"): heads.Regression,
        (DECODER, "head"): heads.Regression,
        (ENCODER_DECODER, "head"): heads.Regression,
    },
    "token_classification": {
        (ENCODER, "head"): tokens.TokenClassification,
        (DECODER, "head"): tokens.TokenClassification,
        (ENCODER_DECODER, "head"): tokens.TokenClassification,
    },
    "multiple_choice": {
        (ENCODER, "head"): choices.Choices,
        (DECODER, "text"): choices.DecoderChoices,
        (ENCODER_DECODER, "text"): choices.TextChoices,
    },
    "causal_lm": {(DECODER, "text"): language.CausalLM},
    "instruction": {(DECODER, "text"): chat.Instruction, (ENCODER_DECODER, "text"): chat.InstructionText},
    "extractive_qa": {
        (ENCODER, "head"): questions.Span,
        (DECODER, "text"): questions.DecoderAnswer,
        (ENCODER_DECODER, "text"): questions.Answer,
    },
    "image_classification": {(IMAGE, "head"): images.ImageClassification},
    "seq2seq": {(DECODER, "text"): text.DecoderText, (ENCODER_DECODER, "text"): text.Text},
}
"""For every kind of task, how each architecture answers it: with a head or as text."""


def architecture(settings: Any) -> str:
    """Return which of the architectures a backbone with these settings has."""
    model_type = settings.model_type
    if getattr(settings, "is_encoder_decoder", False):
        return ENCODER_DECODER
    sees = hasattr(settings, "vision_config") and model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if sees or hasattr(settings, "image_size") or model_type in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES:
        return IMAGE
    causal = model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return DECODER if causal else ENCODER


def choose(task: TaskConfig, settings: Any, name: str = "") -> type[Kind]:
    """Return how a backbone does a task.

    Args:
        task: The task.
        settings: The backbone's config.
        name: What to call the backbone in an error.

    Raises:
        ConfigError: If backbones of this architecture cannot do it, or not in the way that ``task.answer`` asks for.
    """
    forms, built = FORMS[task.kind], architecture(settings)
    mine = [answer for (wanted, answer) in forms if wanted == built]
    told = f"The task {task.name!r} is of the kind {task.kind!r}"
    which = f"the backbone {name!r} ({settings.model_type}) is {_an(built)}"
    if not mine:
        others = " or ".join(_an(wanted) for wanted in sorted({wanted for wanted, _ in forms}))
        raise ConfigError(f"{told}, which needs {others}; {which}. Choose another backbone or task.")
    # Text where a language model can write it, as it needs no new head; on an encoder there is nothing but a head.
    answer = task.answer if task.answer != "auto" else "text" if "text" in mine else mine[0]
    if answer not in mine:
        raise ConfigError(
            f"{told} and is to be answered by task.answer={answer}, which cannot be: {which}, which answers by {mine[0]}."
        )
    form = forms[built, answer]
    classes = form.auto_class()
    if type(settings) not in classes._model_mapping and not getattr(settings, "auto_map", None):
        raise ConfigError(
            f"{told}, for which transformers has no class of the backbone {name!r} ({settings.model_type}): none is "
            f"known to {classes.__name__}. Choose another backbone" + (" or task.answer=text." if "text" in mine else ".")
        )
    return form


def _an(built: str) -> str:
    return f"{'a' if built == DECODER else 'an'} {built}"
