"""The last block of a classifier that reads the first token only, computed for that token alone.

With ``H``, shape ``(rows, length, dim)``, what enters the block, and ``h = H[:, :1]``: the query, the feed-forward, the
normalisations and all that deltas add to them are computed from ``h``, keys and values from all of ``H``. What leaves the block
has the length 1, and the head reads its token number 0 as before. The same numbers are added up as in the whole block, so that
the result is equal to rounding.

It is for blocks in which the attention reads what enters the block, as in BERT and those built like it, and calls the attention
interface of transformers. Whether the head reads no other token is for the caller to try out.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from deltaexp.attention import calls_interface, own_function
from deltaexp.hooks import first_input
from deltaexp.structure import blocks, common_structure
from deltaexp.surgery import Attachment

MASKED = ("eager", "sdpa")
"""Attention functions whose masks have four dimensions, ``(rows, heads, queries, keys)``."""


@dataclass(frozen=True)
class LastBlock:
    """The last block of a backbone, with the parts of its attention."""

    block: nn.Module
    core: Any
    """The module that computes attention."""
    query: nn.Module
    key: nn.Module
    value: nn.Module
    out: nn.Module | None
    """What leads out of the attention, where it is a part of `core`."""
    drops: bool
    """Whether anything in the block is random while training, of which there would be less."""


def find(model: Any, attachments: list[Attachment]) -> LastBlock | str:
    """Return the last block of a backbone, if it can be computed for one token; if not, say in a clause why.

    Args:
        model: The backbone.
        attachments: The deltas' layers in it.
    """
    stacks = blocks(model)
    if len(stacks) != 1:
        return f"the backbone has {'more than one' if stacks else 'no'} stack of blocks"
    name = stacks[0][-1]
    block = model.get_submodule(name)
    roles = {
        role.name: other
        for other, found in common_structure(model).items()
        if other.startswith(f"{name}.")
        for role in found
        if role.rows is None
    }
    cores = [inner for _, inner in block.named_modules() if calls_interface(inner)]
    if len(cores) != 1 or not {"attn.q", "attn.k", "attn.v"} <= roles.keys():
        return "the attention of its last block is not computed from one query, key and value"
    core: Any = cores[0]
    parts = [model.get_submodule(roles[role]) for role in ("attn.q", "attn.k", "attn.v")]
    own = set(core.modules())
    if (
        not own.issuperset(parts)
        or getattr(core, "is_causal", True)
        or not hasattr(core, "scaling")
        or not isinstance(getattr(core, "attention_head_size", None), int)
        or not isinstance(getattr(core, "dropout", None), nn.Dropout)
    ):
        return "the attention of its last block is not like BERT's"
    if core.config._attn_implementation.removeprefix("deltaexp_") not in MASKED:
        return "its attention function is neither eager nor sdpa"
    for attachment in attachments:
        if f"{attachment.site}.".startswith(f"{name}.") and not attachment.layer.tokenwise:
            return f"{type(attachment.layer).__name__} in its last block does not compute every token by itself"
        if attachment.after is not None and {attachment.module, attachment.after} & {*parts[1:]}:
            return "a delta leads from or to its keys and values"
    proj = model.get_submodule(roles["attn.proj"]) if "attn.proj" in roles else None
    drops = any(isinstance(inner, nn.modules.dropout._DropoutNd) and inner.p > 0 for inner in block.modules())
    return LastBlock(block, core, parts[0], parts[1], parts[2], proj if proj in own else None, drops)


class FirstToken:
    """Lets the last block compute the first token only, until `remove`.

    While it is computed, the attention has a ``forward`` of its own; hooks on it, on the block and on all in it are called as
    ever.

    Args:
        last: The block.
    """

    def __init__(self, last: LastBlock) -> None:
        self.last = last
        self._handles = [
            last.block.register_forward_pre_hook(self._enter, with_kwargs=True),
            last.block.register_forward_hook(self._leave, always_call=True),
        ]

    def remove(self) -> None:
        """Let the block compute all tokens again."""
        for handle in self._handles:
            handle.remove()

    def _enter(self, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        states, core = first_input(args, kwargs), self.last.core
        if (block.training and self.last.drops) or states.dim() != 3 or "forward" in core.__dict__:
            return None
        core.forward = partial(_attention, self.last, states)
        first = states[:, :1]
        if args:
            return (first, *args[1:]), kwargs
        return args, {**kwargs, next(iter(kwargs)): first}

    def _leave(self, block: nn.Module, args: tuple, output: Any) -> None:
        self.last.core.__dict__.pop("forward", None)


def _attention(
    last: LastBlock,
    everything: torch.Tensor,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, Any]:
    """Compute the attention of the first token to all.

    Args:
        last: The block.
        everything: What enters it, shape ``(rows, length, dim)``.
        hidden_states: The first token of that, shape ``(rows, 1, dim)``.
        attention_mask: As the attention function takes it, for all queries; those of the first token are taken.
        **kwargs: What else that takes.

    Returns:
        The attention's output, shape ``(rows, 1, dim)``, and its weights where they are returned.
    """
    core = last.core

    def heads(projection: nn.Module, states: torch.Tensor) -> torch.Tensor:
        return projection(states).unflatten(-1, (-1, core.attention_head_size)).transpose(1, 2)

    if attention_mask is not None:
        attention_mask = attention_mask[:, :, :1]
    function = own_function(core, core.config._attn_implementation)
    output, weights = function(
        core,
        heads(last.query, hidden_states),
        heads(last.key, everything),
        heads(last.value, everything),
        attention_mask,
        dropout=core.dropout.p if core.training else 0.0,
        scaling=core.scaling,
        **kwargs,
    )
    output = output.flatten(2).contiguous()
    return output if last.out is None else last.out(output), weights
