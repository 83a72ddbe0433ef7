"""Learned keys and values in front of a model's own attention, through transformers' attention interface.

A modelling file of transformers computes queries, keys and values and hands them to the function that its config names
(``config._attn_implementation``: eager, sdpa, flash_attention_2, flex_attention). While an attention module carries
layers, its ``config`` is a view of the real one, in which that name is the one of `attend`. This function puts what the
layers give in front of the keys and values, extends the mask, and calls the function that the real config names. So

- nothing of the model knows about it: masks are made, and the config is saved, by the real config's name, which may also
  be changed (``set_attn_implementation``) while layers are attached;
- what is put in front has no position, is never masked, and does not go into the cache of a generation;
- a module without layers computes exactly what it did.

A module that computes attention itself, without the interface, cannot carry layers; `attention_cores` does not find it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import AttentionInterface

from deltaexp.errors import AddressingError, DeltaExpError
from deltaexp.indices import index
from deltaexp.lazy import Layer
from deltaexp.tree import backbone_modules

CARRIED = "_deltaexp_prefixes"
"""Attribute of an attention module: the layers that it carries, in their order."""
NAME = "deltaexp_"
"""What the name under which `attend` is registered starts with; the name of the model's own function follows."""


def attention_cores(module: nn.Module) -> list[str]:
    """Return the names, relative to ``module``, of the modules in it (or itself, "") that call the attention interface."""
    return [name for name, inner in backbone_modules(module) if calls_interface(inner)]


def chooses_by_name(core: nn.Module) -> bool:
    """Say whether an attention masks by the name of the attention function, which `attend` hides from it.

    Sparse attentions of the DeepSeek-V3.2 kind do: they apply their choice of keys only where the name is eager or sdpa.
    """
    return ("eager", "sdpa") in _forward(core).__code__.co_consts


def carry(core: Any, layer: Layer) -> Carried:
    """Let an attention module compute with what ``layer()`` returns in front of its keys and values.

    That are a key of shape ``(length, key heads * head_dim)`` and a value of shape ``(length, key heads * value head_dim)``.
    """
    layers = core.__dict__.setdefault(CARRIED, [])
    layers.append(layer)
    layers.sort(key=lambda other: other.order)
    if not isinstance(core.config, ConfigView):
        core.config = ConfigView(core.config, NAME, attend)
    return Carried(core, layer)


@dataclass
class Carried:
    """That a module carries a layer; ``remove`` ends it."""

    core: Any
    layer: Layer

    def remove(self) -> None:
        """Let the module compute without the layer again."""
        layers = self.core.__dict__[CARRIED]
        layers.remove(self.layer)
        if not layers:
            del self.core.__dict__[CARRIED]
            self.core.config = self.core.config.original


class ConfigView:
    """A config as an attention module sees it that is to call a function of ours: the real one, but for the function's name.

    Args:
        original: The real one.
        start: What the name starts with; the name of the model's own function follows.
        function: The function, which is called in the place of that.
    """

    def __init__(self, original: Any, start: str, function: Callable[..., Any]) -> None:
        self.__dict__.update(original=original, start=start, function=function)

    @property
    def _attn_implementation(self) -> str:
        # The rest of the name stays visible, because modelling code asks whether it contains "flash".
        name = f"{self.start}{self.original._attn_implementation or 'eager'}"
        if name not in AttentionInterface._global_mapping:  # not at import, so that it also holds in an unpickled model
            AttentionInterface.register(name, self.function)
        return name

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what copy and pickle look for is not the original's
            raise AttributeError(name)
        return getattr(self.__dict__["original"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.original, name, value)


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any = None,
    *args: Any,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute attention as the model does, with the module's layers in front of keys and values.

    Args:
        module: The attention module.
        query: Shape ``(batch, heads, queries, head_dim)``.
        key: Shape ``(batch, key heads, keys, head_dim)``, those of the cache included.
        value: Shape ``(batch, key heads, keys, value head_dim)``.
        attention_mask: As the model's own function takes it.
        *args: What else that takes.
        **kwargs: What else that takes by name.
    """
    layers: list[Any] = module.__dict__[CARRIED]
    if any(layer.batch_rows is not None for layer in layers):
        return _by_rows(module, layers, query, (key, value, attention_mask, *args), kwargs)
    return _behind(layers, module, query, key, value, attention_mask, *args, **kwargs)


def _by_rows(
    module: nn.Module, layers: list[Any], query: torch.Tensor, others: tuple[Any, ...], named: dict[str, Any]
) -> tuple[torch.Tensor, None]:
    """Compute attention of the rows of a batch with the layers of each, rows with the same layers together.

    Weights, which may be of different lengths, are not returned.

    Args:
        module: The attention module.
        layers: All that it carries.
        query: As in `attend`.
        others: What else `attend` is given.
        named: What else it is given by name.
    """
    rows = len(query)
    if any(isinstance(value, BlockMask) for value in (*others, *named.values())):
        raise DeltaExpError(
            "Prefixes of some rows of a batch cannot go with flex attention, whose masks are those of all rows. Choose sdpa "
            "with model.set_attn_implementation('sdpa')."
        )
    sharing: dict[tuple[Any, ...], list[int]] = {}
    theirs = [None if layer.batch_rows is None else layer.batch_rows.every(query[:, 0, 0]) for layer in layers]
    for row in range(rows):
        mine = tuple(layer for layer, own in zip(layers, theirs, strict=True) if own is None or row in own)
        sharing.setdefault(mine, []).append(row)
    order = [row for numbers in sharing.values() for row in numbers]
    outputs = []
    for mine, numbers in sharing.items():
        # As a rule they follow one another.
        follow = numbers[-1] - numbers[0] == len(numbers) - 1
        where: Any = slice(numbers[0], numbers[-1] + 1) if follow else index(tuple(numbers), query.device)

        def of_rows(value: Any, where: Any = where) -> Any:
            return value[where] if isinstance(value, torch.Tensor) and value.dim() > 1 and len(value) == rows else value

        own = [of_rows(value) for value in others], {name: of_rows(value) for name, value in named.items()}
        outputs.append(_behind(list(mine), module, query[where], *own[0], **own[1])[0])
    output = torch.cat(outputs)
    if order == sorted(order):
        return output, None
    return output[index(tuple(sorted(range(rows), key=order.__getitem__)), output.device)], None


def _behind(
    layers: list[Any],
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    *args: Any,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute attention with what some layers give in front of keys and values; see `attend`."""
    view: Any = module.config
    name = view.original._attn_implementation or "eager"
    learned = [layer() for layer in layers]
    keys, count = key.shape[2], sum(len(first) for first, _ in learned)
    if learned:
        _refuse(name, count + keys, kwargs)
        attention_mask = _extended(module, name, attention_mask, query.shape[2], keys, count, kwargs.get("is_causal"))
        if kwargs.get("position_bias") is not None:
            quirk = any(layer.opendelta_positions for layer in layers)
            kwargs["position_bias"] = _bias(module, kwargs["position_bias"], query.shape[2], count, quirk)
    key = torch.cat([*(_heads(first, key) for first, _ in learned), key], dim=2)
    value = torch.cat([*(_heads(second, value) for _, second in learned), value], dim=2)
    module.__dict__["config"] = view.original  # flash attention chooses its kernel by the name in module.config
    try:
        return own_function(module, name)(module, query, key, value, attention_mask, *args, **kwargs)
    finally:
        module.__dict__["config"] = view


def forget_bias(core: nn.Module, args: tuple, output: Any) -> Any:
    """Forward hook for T5's attention: hand on no relative bias after a layer that has OpenDelta's positions."""
    if any(layer.opendelta_positions for layer in core.__dict__.get(CARRIED, ())):
        return (output[0], None, *output[2:])
    return output


COUNTED = ("bert", "gpt2")
"""Kinds of models with learned positions that simply count the tokens where nobody says otherwise, as all rotary ones do."""


def positioned(backbone: nn.Module) -> nn.Module:
    """Return the model in a backbone that takes the positions of its tokens.

    Raises:
        AddressingError: If there is none, or it does not simply count the tokens where nobody says otherwise.
    """
    found = [
        inner
        for inner in backbone.modules()
        if hasattr(inner, "get_input_embeddings")
        and {"input_ids", "inputs_embeds", "position_ids"} <= set(inspect.signature(inner.forward).parameters)
    ]
    model: Any = found[-1] if found else None
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if model is None or not (hasattr(model, "rotary_emb") or kind in COUNTED):
        raise AddressingError(
            f"The positions in a {type(backbone).__name__} cannot be moved behind a prefix: it does not take them, or "
            "counts them in a way of its own. Use a prefix with prefix_positions=none."
        )
    return model


def shift_positions(module: nn.Module, args: tuple, kwargs: dict[str, Any], *, count: int) -> tuple[tuple, dict[str, Any]]:
    """Forward pre-hook: let the positions of the tokens start at ``count``."""
    forward: Callable[..., Any] = module.forward
    kwargs = {**dict(zip(inspect.signature(forward).parameters, args, strict=False)), **kwargs}
    positions = kwargs.get("position_ids")
    if positions is None:
        given: Any = kwargs["inputs_embeds"] if kwargs.get("input_ids") is None else kwargs["input_ids"]
        # The second name is that of transformers before 5.24.
        cache: Any = kwargs.get("cache", kwargs.get("past_key_values"))
        past = cache.get_seq_length() if cache is not None else 0
        positions = torch.arange(past, past + given.shape[1], device=given.device).unsqueeze(0)
    return (), {**kwargs, "position_ids": positions + count}


def _forward(core: nn.Module) -> Any:
    return inspect.unwrap(type(core).forward)


def calls_interface(module: nn.Module) -> bool:
    """Say whether a module's own code calls the attention interface."""
    code = getattr(_forward(module), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names and hasattr(module, "config")


def own_function(module: nn.Module, name: str) -> Callable[..., Any]:
    """Return the attention function that a module would call, found as its own code finds it.

    A modelling file may have its own table; eager is in no table, but is the function that the code gives as the default.
    """
    forward = _forward(module)
    names = (n for n in forward.__code__.co_names if n.endswith("eager_attention_forward"))
    default = forward.__globals__.get(next(names, ""))
    table = forward.__globals__["ALL_ATTENTION_FUNCTIONS"]
    found = table.get(name, default)
    if found is None:
        raise DeltaExpError(
            f"{type(module).__name__} has no attention function {name!r}, so a prefix cannot call it. "
            "Load the backbone with another attn_implementation, such as sdpa."
        )
    return found


def _refuse(name: str, keys: int, kwargs: dict[str, Any]) -> None:
    """Refuse what would silently mask a prefix, or mix sequences."""
    problem = None
    if name.startswith("paged|"):
        problem = "continuous batching keeps keys and values in pages, where a prefix is not"
    elif "flash" in name:
        window, position_ids = kwargs.get("sliding_window"), kwargs.get("position_ids")
        jumps = position_ids is not None and len(position_ids) == 1 and (position_ids.diff() != 1).any()
        if window is not None and window < keys:
            problem = "it would mask the prefix beyond the sliding window"
        elif jumps or kwargs.get("cu_seq_lens_k") is not None:
            problem = "the batch is packed, and a prefix would be in front of its first sequence only"
    if problem:
        raise DeltaExpError(
            f"Prefix tuning cannot go with {name!r} here: {problem}. Choose sdpa with model.set_attn_implementation('sdpa')."
        )


def _extended(module: nn.Module, name: str, mask: Any, queries: int, keys: int, count: int, is_causal: bool | None) -> Any:
    """Return the mask for ``count`` more keys in front, which every query sees."""
    if isinstance(mask, BlockMask):
        inner = mask.mask_mod

        def mask_mod(batch: Any, head: Any, q: Any, k: Any) -> Any:
            return (k < count) | inner(batch, head, q, (k - count).clamp(min=0))

        batch, heads = mask.shape[:2]
        return create_block_mask(mask_mod, batch, heads, queries, count + keys, device=mask.kv_num_blocks.device)
    if mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        # Without a mask, eager and flex attention mask nothing, and flash attention counts the causal order from the end,
        # where more keys in front change nothing. sdpa counts it from the start.
        if not causal or queries == 1 or name == "eager" or "flex" in name or "flash" in name:
            return None
        parameter = next(module.parameters())
        mask = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=parameter.device).tril()
    mask = mask[..., :keys]
    # A mask of two dimensions says which tokens there are; additive ones have four.
    front = mask.new_full((*mask.shape[:-1], count), mask.dtype == torch.bool or mask.dim() == 2)
    return torch.cat([front, mask], dim=-1)


def _bias(module: Any, bias: torch.Tensor, queries: int, count: int, quirk: bool) -> torch.Tensor:
    """Return T5's relative bias for ``count`` more keys in front: none for them.

    With ``quirk``, as OpenDelta has it: the prefix has the positions before the text in the layer that makes the bias, and
    later layers have no bias at all.
    """
    keys = bias.shape[-1]
    if quirk and module.has_relative_attention_bias:
        start = count + keys - queries
        return module.compute_bias(queries, count + keys, device=bias.device, past_seen_tokens=start).to(bias.dtype)
    bias = torch.zeros_like(bias) if quirk else bias
    return torch.cat([bias.new_zeros((*bias.shape[:-1], count)), bias], dim=-1)


def _heads(learned: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return learned keys or values, shape ``(length, width)``, as ``(batch, heads, length, head_dim)``."""
    batch, heads, _, dim = like.shape
    own = learned.shape[-1] // dim
    if own * dim != learned.shape[-1] or heads % own:
        raise DeltaExpError(
            f"A prefix of width {learned.shape[-1]} does not fit attention with {heads} heads of size {dim}; "
            "this attention shapes its keys in a way of its own. Choose other modules, or another delta type."
        )
    split = learned.to(like).unflatten(-1, (own, dim)).transpose(0, 1)
    # Where a model repeats its key heads for groups of queries before it calls the interface, so are the learned ones.
    return split.repeat_interleave(heads // own, dim=0).expand(batch, -1, -1, -1)
