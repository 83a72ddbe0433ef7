"""The part of a backbone below the lowest delta, which computes the same for a text in every epoch, and how to leave it out.

Let block ``k`` be the lowest one in which something is trained or a delta hangs. What leaves block ``k - 1`` for a text
depends on its tokens alone: on no parameter that is trained, and on neither the batch that the text is in nor its padding, as
far as the architecture keeps texts apart, which `deltaexp.lab.shortcuts` tries out. Where these activations, shape ``(tokens,
dim)``, are known, the model's own forward pass goes on from them: while it runs, a stand-in is in the place of each block below
``k``. The first ones hand on what they are given, and the last returns the known activations. Masks, positions and all that a
model makes before, between and after its blocks are made as ever, and each block keeps its number. Some blocks hand on more
than hidden states, such as T5's position biases: as these are the same for all texts of a length, they are made for one text.

Of an encoder-decoder the encoder's blocks are looked at.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from deltaexp.gathered import Casts
from deltaexp.hooks import first_input
from deltaexp.lazy import Layer
from deltaexp.speed import settings
from deltaexp.structure import blocks
from deltaexp.tree import above, leaf, parent

TOKENS = ("input_ids", "token_type_ids")
"""Inputs with one number a token on which activations may depend."""
LENGTHS = 16
"""Of how many lengths what blocks hand on beside hidden states is remembered."""
RANDOM = ("drop", "jitter", "noise")
"""What is in the names of probabilities and sizes of what is random while training."""


@dataclass(frozen=True)
class Frozen:
    """The frozen blocks of a backbone."""

    base: Any
    """The model that takes the tokens and has the blocks."""
    blocks: nn.ModuleList
    """All blocks."""
    depth: int
    """How many of them are below the lowest delta."""
    random: str | None
    """What is random in them, or before them, while training; None where nothing is known to be."""
    kind: str = "blocks"
    """What the blocks are called."""

    def block_inputs(self, tokens: dict[str, torch.Tensor]) -> torch.Tensor | None:
        """Return what leaves the last frozen block, shape ``(rows, length, dim)``; None where it is no such tensor.

        Args:
            tokens: The inputs of the model by name: those in `TOKENS` that it is given, and ``attention_mask``.

        Raises:
            ValueError: If they depend on what is trained, which may lie before the blocks and be made after them.
        """
        states, _ = self.outputs(tokens)
        if isinstance(states, torch.Tensor) and states.requires_grad:
            raise ValueError("they depend on what is trained")
        plain = isinstance(states, torch.Tensor) and states.dim() == 3 and states.shape[:2] == tokens["input_ids"].shape
        return states if plain else None

    def outputs(self, tokens: dict[str, torch.Tensor]) -> tuple[Any, tuple[Any, ...] | None]:
        """Return the hidden states that leave the last frozen block, and in a tuple what it returns beside them.

        That is None where it returns nothing else, and each part that the next block does not take is None.

        Args:
            tokens: See `block_inputs`.

        Raises:
            ValueError: If the blocks are not called one after another, each once.
        """
        found: list[Any] = []
        above = {str(number): _Stop(block) for number, block in enumerate(self.blocks) if number == self.depth}

        def leave(module: nn.Module, args: tuple, output: Any) -> None:
            found.append(output)
            if not above:
                raise _Reached

        handle = self.blocks[self.depth - 1].register_forward_hook(leave)
        try:
            with standing_in(self.blocks, above):
                self.base.forward(**tokens, **_without_cache(self.base, {}))
        except _Reached as reached:
            (output,), taken = found, reached.args
        else:
            raise ValueError("the blocks are not called one after another")
        finally:
            handle.remove()
        if not isinstance(output, (tuple, list)):
            return output, None
        return output[0], tuple(part if any(part is other for other in taken) else None for part in output[1:])


class StandIn(nn.Module):
    """What is in a block's place while it is left out: it hands on its first input, or returns known activations.

    Args:
        block: The block, whose attributes it seems to have.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.__dict__["block"] = block  # not as a child, which the backbone has already
        self.known: torch.Tensor | None = None
        self.beside: tuple[Any, ...] | None = None
        """What the block returns beside hidden states."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the activations, shape ``(rows, length, dim)``, and what the block returns beside them."""
        states = first_input(args, kwargs) if self.known is None else self.known
        return states if self.beside is None else (states, *self.beside)


class _Reached(Exception):
    """What is above the frozen blocks need not be computed."""


class _Stop(StandIn):
    """What is in the place of the block above the frozen ones while these are computed alone."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise _Reached(*args, *kwargs.values())


@contextlib.contextmanager
def standing_in(container: nn.Module, others: Mapping[str, StandIn]) -> Iterator[None]:
    """Within this context other modules are in the places of children of a module."""
    own = {name: container._modules[name] for name in others}
    container._modules.update(others)
    try:
        yield
    finally:
        container._modules.update(own)


def find(model: Any) -> Frozen | str:
    """Return the frozen blocks of a backbone with its deltas; if there are none, say in a clause why.

    What goes on from their activations is the innermost model around them that takes tokens. What is trained outside of the
    blocks must lie behind them, in the order in which the modules were made.
    """
    stacks, both = blocks(model), getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if len(stacks) != 1 + both:
        return f"the backbone has {len(stacks)} stacks of blocks, not {1 + both}"
    stack, modules = stacks[0], dict(model.named_modules(remove_duplicate=False))
    holder = parent(stack[0])
    container, order = modules[holder], {name: number for number, name in enumerate(modules)}
    if not isinstance(container, nn.ModuleList) or [leaf(name) for name in stack] != list(container._modules):
        return "the backbone's blocks are not one list"
    base = next((name for name in above(holder) if "input_ids" in inspect.signature(modules[name].forward).parameters), None)
    if base is None:
        return "no model around the blocks takes tokens"
    end, depth = max(order[name] for name in modules if _within(name, stack[-1])), len(stack)
    for name in _changed(modules):
        number = next((number for number, block in enumerate(stack) if _within(name, block)), None)
        if number is not None:
            depth = min(depth, number)
        elif order[name] < end or _around(name, holder):
            return f"{name or 'the whole model'}, which lies before or around the blocks, is trained, or something hangs on it"
    if depth == 0:
        return "a delta is in the first block"
    below = [
        name
        for name in modules
        if (order[name] <= end and not any(_within(name, block) for block in stack[depth:]))
        and (not _around(name, holder) or not base or _within(name, base))
    ]
    random = random_in({name: modules[name] for name in below})
    return Frozen(modules[base], container, depth, random, "encoder blocks" if both else "blocks")


def _within(name: str, outer: str) -> bool:
    return f"{name}.".startswith(f"{outer}.")


def _around(name: str, holder: str) -> bool:
    return not name or _within(holder, name)


def _changed(modules: dict[str, nn.Module]) -> Iterator[str]:
    """Yield the names of the modules that are trained, that a delta hangs on, or on which there are hooks.

    Those of `deltaexp.gathered` on the whole model look at nothing that passes by.
    """
    for name, module in modules.items():
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        if isinstance(module, Layer):
            yield parent(name)
        elif any(not isinstance(getattr(hook, "__self__", None), Casts) for hook in hooks) or any(
            parameter is not None and parameter.requires_grad for parameter in module._parameters.values()
        ):
            yield name


def random_in(modules: dict[str, nn.Module]) -> str | None:
    """Return what is random in modules while training, such as ``dropout of 0.1 in embeddings.dropout``; None for nothing."""
    for name, module in modules.items():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            return f"the statistics of {name}"
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            return f"dropout of {module.p:g} in {name}"
        for key, value in vars(module).items():
            if isinstance(value, float) and value > 0 and any(word in key for word in RANDOM):
                return f"{key} of {value:g} in {name or 'the model'}"
    return None


class Shortcut:
    """Lets a backbone's forward pass go on from known activations, until `remove`.

    Args:
        frozen: The frozen blocks.
        known: Returns what leaves the last of them, shape ``(rows, length, dim)``, given the inputs of the model by name (those
            in `TOKENS`, and ``attention_mask``); None where it is not known, in which case all is computed.
        training: Whether also while the backbone is in training mode.
    """

    def __init__(self, frozen: Frozen, known: Callable[[dict[str, torch.Tensor]], torch.Tensor | None], training: bool) -> None:
        self.frozen, self.known, self.training = frozen, known, training
        self.used = 0
        """How many forward passes have gone on from known activations."""
        self.given: torch.Tensor | None = None
        """What is known of the next batch, for who has asked already."""
        self._others = {str(number): StandIn(frozen.blocks[number]) for number in range(frozen.depth)}
        self._beside: dict[int, tuple[Any, ...] | None] = {}
        """What the last frozen block returns beside hidden states, by the length of the texts; under 0 if it is nothing."""
        self._recorded: dict[int, Any] = {}
        """What of that recorded operations read where it is (`deltaexp.lab.graphs`), by its identity."""
        self._open: contextlib.ExitStack | None = None
        self._handles: list[Any] = []
        self.put()

    def put(self) -> None:
        """Let the backbone's forward pass go on from known activations; a second call changes nothing."""
        if not self._handles:
            self._handles = [
                self.frozen.base.register_forward_pre_hook(self._enter, with_kwargs=True),
                self.frozen.base.register_forward_hook(self._leave, always_call=True),
            ]

    def remove(self) -> None:
        """Let the backbone compute everything again."""
        while self._handles:
            self._handles.pop().remove()

    def _enter(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        if module.training and not self.training:
            return None
        named = {**dict(zip(inspect.signature(module.forward).parameters, args, strict=False)), **kwargs}
        given = {name: value for name, value in named.items() if value is not None and value is not False}
        if "input_ids" not in given or not given.keys() <= {*TOKENS, "attention_mask", "return_dict"}:
            return None
        activations = self.given
        if activations is None:
            activations = self.known({name: given[name] for name in (*TOKENS, "attention_mask") if name in given})
        if activations is None:
            return None
        self.used += 1
        beside = self._beside_of(given)
        for other in self._others.values():
            other.beside = beside
        self._others[str(self.frozen.depth - 1)].known = activations
        self._open = contextlib.ExitStack()
        self._open.enter_context(standing_in(self.frozen.blocks, self._others))
        return (), {**named, **_without_cache(module, named)}

    def _beside_of(self, given: dict[str, Any]) -> tuple[Any, ...] | None:
        """Return what the last frozen block returns beside hidden states, computed for one text without padding."""
        kept, length = self._beside, given["input_ids"].shape[1]
        if 0 not in kept and length not in kept:
            one = {name: given[name][:1] for name in TOKENS if name in given}
            _, beside = self.frozen.outputs({**one, "attention_mask": torch.ones_like(one["input_ids"])})
            if len(kept) == LENGTHS:
                kept.pop(next(iter(kept)))
            kept[length if beside and any(part is not None for part in beside) else 0] = beside
        found = kept[0] if 0 in kept else kept[length]
        if settings.recorded:
            self._recorded[id(found)] = found
        return found

    def _leave(self, module: nn.Module, args: tuple, output: Any) -> None:
        if self._open is not None:
            self._open.close()
            self._open = None
            self._others[str(self.frozen.depth - 1)].known = None


def _without_cache(model: Any, given: dict[str, Any]) -> dict[str, bool]:
    """Return the input that keeps a decoder from collecting keys and values, of which those of some blocks would be missing."""
    takes = "use_cache" in inspect.signature(model.forward).parameters
    return {"use_cache": False} if takes and given.get("use_cache") is None else {}
