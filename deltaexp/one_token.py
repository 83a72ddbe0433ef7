"""The last block of a classifier that reads one token of each row, computed for that token alone.

Let ``H``, shape ``(rows, length, dim)``, enter the block, and ``h``, shape ``(rows, 1, dim)``, be the tokens of it that are
read: the first ones in BERT and its kin, the last ones that are no padding in Llama and its kin. Keys and values are computed
from ``H``; the query, what leads out of the attention, the feed-forward, the normalisations and all that deltas add to them
from ``h``. The same numbers are added up as in the whole block, so that the result is equal to rounding.

Nothing of a block's code has to be known for that, as it is called twice. First with ``H``, until it calls the attention
interface of transformers, where this call ends: now keys, values and the mask are there. (A query that a module of its own
makes is left out meanwhile.) Then with ``h``, and of the inputs that have one entry a token, such as rotary embeddings, those
of ``h``; where it calls the interface, it computes with the keys and values of ``H``, and the mask's rows of ``h``. What leaves
the block is repeated to the full length, so that the head finds its token wherever it looks for it.

An attention that computes by itself, as DeBERTa's, is a call of its module: the first call ends behind it, and the second one
takes over what it has made of ``h``. Then what is saved is what follows the attention.

It is for blocks in which nothing else than one attention looks at other tokens, and for heads that read no other, which
`deltaexp.lab.shortcuts` tries out.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map
from transformers.cache_utils import Cache

from deltaexp.attention import ConfigView, calls_interface, chooses_by_name, own_function
from deltaexp.frozen import StandIn, random_in, standing_in
from deltaexp.hooks import first_input
from deltaexp.structure import blocks, common_structure
from deltaexp.surgery import Attachment
from deltaexp.tree import place

MASKED = ("eager", "sdpa")
"""Attention functions whose masks have four dimensions, ``(rows, heads, queries, keys)``."""
HEADS = ("SequenceClassification", "MultipleChoice")
"""What is in the names of classes whose heads may read one token."""
ASKED = ("output_hidden_states", "output_attentions", "use_cache", "cache", "past_key_values")
"""Inputs that ask for what is between the blocks, or give it."""


@dataclass(frozen=True)
class LastBlock:
    """The last block of a backbone, of which one token of each row may be enough."""

    block: nn.Module
    core: Any
    """The module in it that calls the attention interface; None for an attention that is only known as a module."""
    part: tuple[nn.Module, str] | None
    """With `core`, the module that makes queries and nothing else, or None; without it, that of the attention: the module that
    has it, and its name there."""
    read: str
    """Which token the head reads, if it reads one: ``first``, or ``last`` for the last one that is no padding."""
    random: str | None
    """What is random in the block while training, of which there would be less."""


def find(model: Any, attachments: list[Attachment]) -> LastBlock | str:
    """Return the last block of a backbone, if it can be computed for one token; if not, say in a clause why.

    Args:
        model: The backbone.
        attachments: The deltas' layers in it.
    """
    if not any(part in type(model).__name__ for part in HEADS):
        return "its head reads more than one token"
    stacks = blocks(model)
    if len(stacks) != 1:
        return f"the backbone has {len(stacks)} stacks of blocks, not 1"
    name = stacks[0][-1]
    for attachment in attachments:
        if f"{attachment.site}.".startswith(f"{name}.") and not attachment.layer.tokenwise:
            return f"{type(attachment.layer).__name__} in its last block does not compute every token by itself"
    # transformers' heads on causal models have this in common.
    last = "last_non_pad_token" in inspect.unwrap(type(model).forward).__code__.co_varnames
    read, block = "last" if last else "first", model.get_submodule(name)
    random = random_in({f"{name}.{inner}".rstrip("."): module for inner, module in block.named_modules()})
    roles = {
        other: {role.name for role in found if role.rows is None}
        for other, found in common_structure(model).items()
        if other.startswith(f"{name}.")
    }
    cores: list[Any] = [inner for inner in block.modules() if calls_interface(inner)]
    names = [core.config._attn_implementation.removeprefix("deltaexp_") for core in cores if not chooses_by_name(core)]
    if len(cores) == len(names) == 1 and names[0] in MASKED:
        return LastBlock(block, cores[0], _query(model, roles, attachments), read, random)
    found = [other for other, its in roles.items() if its & {"attn", "mixer"}]
    if len(found) != 1:
        return "its last block has no attention that is a module of its own"
    inside = set(model.get_submodule(found[0]).modules())
    if any(one.after is not None and one.module in inside and one.after not in inside for one in attachments):
        return "a delta leads out of the attention of its last block"
    return LastBlock(block, None, place(model, found[0]), read, random)


def _query(model: Any, roles: dict[str, set[str]], attachments: list[Attachment]) -> tuple[nn.Module, str] | None:
    """Return where the module is that makes queries and nothing else; None where there is none that could be left out."""
    found = [name for name, its in roles.items() if its == {"attn.q"}]
    if len(found) != 1 or not isinstance(query := model.get_submodule(found[0]), nn.Linear):
        return None
    # What a delta hands on from there may go to the keys or values.
    paired = any(attachment.module is query and attachment.after is not None for attachment in attachments)
    return None if paired else place(model, found[0])


class OneToken:
    """Lets the last block compute the token that is read only, until `remove`.

    All is computed where the block is in training mode and something in it is random, where the model is asked for what is
    between its blocks, and where the head has no tokens to look for its own by.

    Args:
        model: The backbone.
        last: Its last block.
    """

    def __init__(self, model: Any, last: LastBlock) -> None:
        self.model, self.last = model, last
        self._head: tuple[torch.Tensor | None, int] | None = None
        """During the model's forward pass: the numbers of the tokens that are read, None for the first, and the length."""
        self._open: contextlib.ExitStack | None = None
        """During the block's."""
        self._length = 0
        self._handles: list[Any] = []
        self.put()

    def put(self) -> None:
        """Let the block compute the token that is read only; a second call changes nothing."""
        if not self._handles:
            self._handles = [
                self.model.register_forward_pre_hook(self._begin, with_kwargs=True),
                self.model.register_forward_hook(self._end, always_call=True),
                self.last.block.register_forward_pre_hook(self._enter, with_kwargs=True),
                self.last.block.register_forward_hook(self._leave, always_call=True),
            ]

    def remove(self) -> None:
        """Let the block compute all tokens again."""
        while self._handles:
            self._handles.pop().remove()

    def _begin(self, model: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        _, *takes = inspect.signature(type(model).forward).parameters
        named = {**dict(zip(takes, args, strict=False)), **kwargs}
        if any(named.get(name) not in (None, False) for name in ASKED):
            return None
        if self.last.read == "first":
            self._head = None, 0
        elif named.get("input_ids") is not None:
            self._head = _last(named["input_ids"], model.config), named["input_ids"].shape[1]
        return (), {**named, **({"use_cache": False} if "use_cache" in takes else {})}

    def _end(self, model: nn.Module, args: tuple, output: Any) -> None:
        self._head = None

    def _enter(self, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        states = first_input(args, kwargs)
        cached = any(isinstance(value, Cache) for value in (*args, *kwargs.values()))
        if self._head is None or states.dim() != 3 or cached or (block.training and self.last.random):
            return None
        rows, length = states.shape[:2]
        numbers, given = self._head
        # Learned tokens are in front of those that the model is given.
        numbers = torch.zeros(rows, dtype=torch.long, device=states.device) if numbers is None else numbers + (length - given)
        reading = _Reading(numbers, length)
        self._open, self._length = contextlib.ExitStack(), length
        try:
            if self.last.core is None:
                self._open.enter_context(_stand_in(self.last.part, lambda module: _Attention(module, reading)))
                block.forward(*args, **kwargs)
            else:
                self._open.enter_context(_viewed(self.last.core, reading))
                with _stand_in(self.last.part, NoQuery):
                    block.forward(*args, **kwargs)
        except _Reached:
            return tree_map(reading.of_tokens, (args, kwargs))
        raise RuntimeError("the last block has not called its attention")

    def _leave(self, block: nn.Module, args: tuple, output: Any) -> Any:
        if self._open is None:
            return None
        self._open.close()
        self._open = None
        if isinstance(output, (tuple, list)):
            return (output[0].expand(-1, self._length, -1), *output[1:])
        return None if output is None else output.expand(-1, self._length, -1)


class NoQuery(StandIn):
    """What is in the place of the module that makes queries while nobody needs them."""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return zeros, shape ``(rows, length, out_dim)``."""
        x = first_input(args, kwargs)
        return x.new_zeros(*x.shape[:-1], self.out_features)


class _Attention(StandIn):
    """What is in the place of an attention that ends the first call, and gives its tokens to the second.

    Args:
        block: The attention.
        reading: The two calls.
    """

    def __init__(self, block: nn.Module, reading: _Reading) -> None:
        super().__init__(block)
        self.reading = reading
        self.found: tuple[Any] | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the attention does, for the tokens that are read."""
        if self.found is None:
            output = self.__dict__["block"](*args, **kwargs)
            self.found = (tree_map(self.reading.of_tokens, output),)
            raise _Reached
        return self.found[0]


def _stand_in(place: tuple[nn.Module, str] | None, make: Callable[[nn.Module], StandIn]) -> Any:
    """Within this context something is in the place of a module; without a place, nothing is."""
    return standing_in(place[0], {place[1]: make(getattr(*place))}) if place else contextlib.nullcontext()


@contextlib.contextmanager
def _viewed(core: Any, reading: _Reading) -> Iterator[None]:
    """Within this context an attention calls `_attend`."""
    own = core.config
    core.__dict__["config"] = _View(own, reading)
    try:
        yield
    finally:
        core.__dict__["config"] = own


def _last(ids: torch.Tensor, config: Any) -> torch.Tensor:
    """Return the numbers of the tokens that heads on causal models read, shape ``(rows,)``, found as they find them."""
    padding = config.get_text_config().pad_token_id
    numbers = torch.arange(ids.shape[1], device=ids.device, dtype=torch.int32)
    return (numbers * (ids != padding if padding is not None else torch.ones_like(ids))).argmax(-1)


class _Reached(Exception):
    """The block has come to the attention interface, and keys and values are there."""


class _View(ConfigView):
    """The config of an attention that is computed for some of the tokens."""

    def __init__(self, original: Any, reading: _Reading) -> None:
        super().__init__(original, "deltaexp_tokens_", _attend)
        self.__dict__["reading"] = reading


def _attend(module: Any, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Take the place of an attention function, with its arguments."""
    return module.config.reading.attend(module, *args, **kwargs)


class _Reading:
    """The two calls of a block.

    Args:
        numbers: The numbers of the tokens that are read, shape ``(rows,)``.
        length: The number of all tokens.
    """

    def __init__(self, numbers: torch.Tensor, length: int) -> None:
        self.numbers, self.length = numbers, length
        self._rows = torch.arange(len(numbers), device=numbers.device)
        self._found: tuple[Any, ...] | None = None
        """What the first call gave to the attention function: key, value, mask and position bias."""

    def of_tokens(self, value: Any) -> Any:
        """Return the part of an input that belongs to the tokens that are read, and what has no entry a token as it is.

        Args:
            value: Of shape ``(rows, length)`` or ``(rows, length, dim)``, where ``rows`` may also be 1, or anything else.
        """
        rows = len(self.numbers)
        if not isinstance(value, torch.Tensor) or value.dim() not in (2, 3):
            return value
        if value.shape[1] != self.length or value.shape[0] not in (1, rows):
            return value
        return value.expand(rows, *value.shape[1:])[self._rows, self.numbers].unsqueeze(1)

    def attend(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Keep keys and values and end the first call; in the second one, compute attention with them.

        Args:
            module: The attention module.
            query: Shape ``(rows, heads, queries, head_dim)``.
            key: Shape ``(rows, key heads, queries, head_dim)``; `value` likewise.
            value: See `key`.
            attention_mask: Shape ``(rows or 1, heads or 1, queries, keys)``, or None.
            **kwargs: What else the attention function takes by name.
        """
        if self._found is None:
            self._found = key, value, attention_mask, kwargs.get("position_bias")
            raise _Reached
        key, value, attention_mask, bias = self._found
        view = module.config
        name = view.original._attn_implementation or "eager"
        causal = getattr(module, "is_causal", True) if kwargs.get("is_causal") is None else kwargs["is_causal"]
        if attention_mask is not None:
            attention_mask = self._of_queries(attention_mask)
        elif causal and name.endswith("sdpa"):  # which masks by itself as long as there is more than one query
            attention_mask = (torch.arange(key.shape[2], device=key.device) <= self.numbers[:, None])[:, None, None]
        if bias is not None:
            kwargs["position_bias"] = self._of_queries(bias)
        module.__dict__["config"] = view.original  # learned keys and values find their own name there
        try:
            return own_function(module, name)(module, query, key, value, attention_mask, **kwargs)
        finally:
            module.__dict__["config"] = view

    def _of_queries(self, mask: torch.Tensor) -> torch.Tensor:
        """Return the rows of a mask that are those of the tokens that are read, shape ``(rows, heads or 1, 1, keys)``."""
        if mask.shape[2] == 1:  # the same for all queries
            return mask
        return mask.expand(len(self.numbers), -1, -1, -1)[self._rows, :, self.numbers].unsqueeze(2)
