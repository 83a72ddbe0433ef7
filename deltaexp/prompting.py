"""Soft prompts in a transformers model: learned vectors in front of the input's embeddings, by public PyTorch hooks.

A prompt layer (`deltaexp.deltas.soft_prompt`) hangs on the module that turns token ids into hidden states. A pre-hook there
replaces the ids by their embeddings with the prompt in front, and lengthens whatever else has one entry a token. Nothing that
the caller passed is changed: every longer tensor is a new one. Once a cache holds the prompt, only the mask and the positions
are changed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from deltaexp.errors import AddressingError, DeltaExpError

POSITIONS = ("position_ids", "cache_position")
CACHES = ("cache", "past_key_values", "cache_params")
"""What models call the keys and values of tokens before: the first since transformers 5.24, the second until then."""
"""Inputs that count the tokens."""
ZEROS = ("token_type_ids", "mm_token_type_ids", "global_attention_mask")
"""Inputs with one entry a token that are 0 for a soft token."""
TARGETS = ("start_positions", "end_positions")
"""Inputs that name a token by its number."""
CROSS_MASKS = ("encoder_attention_mask", "encoder_padding_mask")


def connect(layer: Any, module: nn.Module, name: str) -> list[Any]:
    """Register the hooks of a prompt layer; those that need it find it by its name, as a replica of the module does too."""
    handles = [module.register_forward_pre_hook(partial(add_prompt, name=name), with_kwargs=True)]
    if layer.cut:
        handles.append(module.register_forward_hook(partial(cut_prompt, name=name)))
    (decoder,) = layer.decoder
    if decoder is not None:
        hook = partial(lengthen_cross_mask, tokens=layer.tokens)
        handles.append(decoder.register_forward_pre_hook(hook, with_kwargs=True))
    return handles


class Place:
    """Where in a backbone soft prompts go.

    Args:
        model: A model of transformers, whole or without its head.

    Raises:
        AddressingError: If it takes no embeddings of tokens.
    """

    def __init__(self, model: nn.Module) -> None:
        self.module = model
        """The module whose input ids become embeddings."""
        self.decoder: nn.Module | None = None
        """The decoder that attends to the module's output."""
        self.cut = False
        """Whether what the module returns is shortened to the tokens again."""
        whole: Any = model
        if getattr(whole.config, "is_encoder_decoder", False):
            encoder, decoder = whole.get_encoder(), whole.get_decoder()
            if encoder is not model and decoder not in (model, encoder):
                self.module, self.decoder = encoder, decoder
        elif _pools_last_token(whole):
            # The head looks for the last token that is no padding, in the ids that it was given itself.
            self.module, self.cut = whole.base_model, True
        self.weight = _weight(self.module)
        """The token embeddings, shape ``(vocabulary, dim)``."""

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the embeddings that the model itself makes of token ids."""
        return _embed(self.module, ids)


def find_place(root: nn.Module, target: nn.Module | None = None) -> Place:
    """Return where soft prompts go in a model, or in the first model of transformers inside a wrapper.

    Args:
        root: The model or the wrapper.
        target: The module that the prompt hangs on, where that is known already.

    Raises:
        AddressingError: If there is none, or it has no token embeddings.
    """
    for inner in root.modules():
        if hasattr(inner, "get_input_embeddings") and hasattr(inner, "config"):
            place = Place(inner)
            if target is None or place.module is target:
                return place
    raise AddressingError(
        f"A soft prompt goes in front of a model's token embeddings, and {type(root).__name__} contains no model of "
        "transformers that has any. Leave modified_modules out, or name such a model."
    )


def place_name(name: str, module: nn.Module) -> str:
    """Return the name of the module that a soft prompt hangs on, for the module called ``name`` that was chosen."""
    target = find_place(module).module
    below = next(below for below, inner in module.named_modules() if inner is target)
    return ".".join(part for part in (name, below) if part)


def _weight(module: Any) -> torch.Tensor:
    """Return the weight of a module's token embeddings."""
    try:
        embedding = module.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        embedding = None
    weight = getattr(embedding, "weight", None)
    takes = set(inspect.signature(module.forward).parameters)
    if not isinstance(weight, torch.Tensor) or weight.dim() != 2 or not takes >= {"input_ids", "inputs_embeds"}:
        raise AddressingError(
            f"A soft prompt goes in front of a model's token embeddings, and {type(module).__name__} has no token embeddings "
            "that could be given in place of ids. Choose a delta type that works on modules, such as lora or adapter."
        )
    return weight


def _pools_last_token(model: Any) -> bool:
    """Say whether a model classifies a sequence by the state of its last token, as those built on a causal model do."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

    kind = getattr(model.config, "model_type", None)
    return "ForSequenceClassification" in type(model).__name__ and kind in CAUSAL and kind not in MASKED


def add_prompt(module: nn.Module, args: tuple, kwargs: dict[str, Any], *, name: str) -> tuple[tuple, dict[str, Any]]:
    """Forward pre-hook: put the prompt in front of the input, or make room for the one that the cache holds."""
    layer: Any = getattr(module, name)
    kwargs = _named(module, args, kwargs)
    ids, embeddings, mask = kwargs.get("input_ids"), kwargs.get("inputs_embeds"), kwargs.get("attention_mask")
    if mask is None and layer.pad_id is not None and ids is not None:
        mask = (ids != layer.pad_id).long()
    changed: dict[str, Any] = {}
    if mask is not None:
        if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
            raise DeltaExpError(
                "A soft prompt lengthens the attention mask, which must have the shape (batch, length) for that. Pass such "
                "a mask, or none; generate with a dynamic cache."
            )
        changed["attention_mask"] = _in_front(mask, layer.tokens, 1)
    cached = _is_cached(kwargs)
    for key in POSITIONS:
        if kwargs.get(key) is not None:
            changed[key] = kwargs[key] + layer.tokens if cached else _positions(kwargs[key], layer.tokens)
    if not cached:
        if embeddings is None:
            if ids is None:
                raise DeltaExpError("A soft prompt needs the input's input_ids or inputs_embeds, and neither was passed.")
            embeddings = nn.functional.embedding(ids, _weight(module)) if layer.raw else _embed(module, ids)
        changed |= {"input_ids": None, "inputs_embeds": layer(embeddings)}
        changed |= {key: _in_front(kwargs[key], layer.tokens, 0) for key in ZEROS if kwargs.get(key) is not None}
        changed |= {key: kwargs[key] + layer.tokens for key in TARGETS if kwargs.get(key) is not None}
        labels = kwargs.get("labels")
        if labels is not None and labels.shape == embeddings.shape[:2] and not labels.is_floating_point():
            changed["labels"] = _in_front(labels, layer.tokens, -100)  # the index that losses ignore
    return (), {**kwargs, **changed}


def cut_prompt(module: nn.Module, args: tuple, output: Any, *, name: str) -> Any:
    """Forward hook: take the prompt's positions off the hidden states."""
    layer: Any = getattr(module, name)
    if isinstance(output, tuple):
        return (output[0][:, layer.tokens :], *output[1:])
    output[next(iter(output))] = output[0][:, layer.tokens :]
    return output


def lengthen_cross_mask(module: nn.Module, args: tuple, kwargs: dict[str, Any], *, tokens: int) -> tuple[tuple, dict[str, Any]]:
    """Forward pre-hook of a decoder: let it attend to the prompt's positions in what the encoder returned."""
    kwargs = _named(module, args, kwargs)
    states = kwargs.get("encoder_hidden_states")
    for key in CROSS_MASKS:
        mask = kwargs.get(key)
        if mask is not None and states is not None and mask.shape[-1] < states.shape[1]:
            kwargs = {**kwargs, key: _in_front(mask, tokens, 1)}
    return (), kwargs


def _named(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call by their names."""
    if not args:
        return kwargs
    forward: Callable[..., Any] = module.forward
    return {**dict(zip(inspect.signature(forward).parameters, args, strict=False)), **kwargs}


def _embed(module: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return the embeddings that a model itself makes of token ids."""
    embeddings = module.get_input_embeddings()(ids)
    scale = getattr(module, "embed_scale", None)
    # Some encoders (Pegasus, Marian) scale what they look up, and not what they are given.
    return embeddings * scale if isinstance(scale, (int, float)) else embeddings


def _is_cached(kwargs: dict[str, Any]) -> bool:
    """Say whether a cache holds the beginning of the sequence, and with it the prompt."""
    for key in CACHES:
        cache = kwargs.get(key)
        if cache is None:
            continue
        if not hasattr(cache, "get_seq_length"):
            return len(cache) > 0
        try:
            return cache.get_seq_length() > 0
        except ValueError:  # a state-space model's cache counts no tokens
            return cache.has_previous_state()
    return False


def _in_front(tensor: torch.Tensor, tokens: int, value: int) -> torch.Tensor:
    """Return a tensor with ``tokens`` more entries in front of its last dimension."""
    return torch.cat([tensor.new_full((*tensor.shape[:-1], tokens), value), tensor], dim=-1)


def _positions(positions: torch.Tensor, tokens: int) -> torch.Tensor:
    """Return positions that count the prompt too, from the same first number."""
    first = positions.amin(-1, keepdim=True) + torch.arange(tokens, device=positions.device)
    return torch.cat([first, positions + tokens], dim=-1)
