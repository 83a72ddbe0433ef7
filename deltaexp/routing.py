"""A batch whose rows use different deltas of one backbone.

    with deltaexp.route([french, french, None, german]):
        backbone(**batch)

The backbone computes the whole batch once, and each layer only the rows that are its own.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from deltaexp.errors import DeltaExpError, listing
from deltaexp.indices import index
from deltaexp.lazy import Layer
from deltaexp.merging import merged_names
from deltaexp.model import DeltaModel
from deltaexp.ownership import originals
from deltaexp.structure import backbone_modules

Choice = DeltaModel | Sequence[DeltaModel] | None
"""What one row of a batch uses: one delta, several at once, or none."""
EXPERT = re.compile(r"(^|\.)(?!shared)[^.]*expert", re.IGNORECASE)
"""Names of modules that get tokens of the whole batch in an order of their own."""


class BatchRows:
    """The rows of a batch that a layer is for.

    Hidden states may have ``k`` times as many rows, each of the batch's standing for ``k`` that follow one another: beams,
    sequences to be sampled, or positions where a module is given them all in one dimension.

    Args:
        rows: The rows' numbers in the batch.
        size: How many rows the batch has.
    """

    def __init__(self, rows: Sequence[int], size: int) -> None:
        self.rows, self.size = tuple(rows), size

    def of(self, h: torch.Tensor) -> torch.Tensor:
        """Return the numbers of these rows in the first dimension of ``h``.

        Raises:
            DeltaExpError: If the first dimension of ``h`` is not the batch's.
        """
        rows = index(self.rows, h.device)
        if not self.rows:
            return rows
        many = self.repeats(h)
        return (rows[:, None] * many + torch.arange(many, device=h.device)).flatten()

    def every(self, h: torch.Tensor) -> set[int]:
        """Return the numbers of these rows in the first dimension of ``h``, as `of` does, as plain numbers.

        Raises:
            DeltaExpError: If the first dimension of ``h`` is not the batch's.
        """
        many = self.repeats(h) if self.rows else 0
        return {row * many + number for row in self.rows for number in range(many)}

    def repeats(self, h: torch.Tensor) -> int:
        """Return how many rows of ``h`` stand for one of the batch.

        Raises:
            DeltaExpError: If the first dimension of ``h`` is not the batch's.
        """
        many, rest = divmod(h.shape[0], self.size)
        sequence_first = h.dim() > 2 and h.shape[1] == self.size > 1 and many != 1
        if rest or sequence_first:
            raise DeltaExpError(
                f"route() was given deltas for {self.size} rows, and a module computes with hidden states of shape "
                f"{list(h.shape)}, whose first dimension is not made of these rows. Name a delta, or None, for each row of the "
                "batch; a backbone that puts positions before rows, or mixes rows, cannot be routed."
            )
        return many


@contextlib.contextmanager
def route(choices: Sequence[Choice], backbone_model: nn.Module | None = None) -> Iterator[None]:
    """Within this context every row of a batch is computed with the delta that is named for it, and with no other.

    The deltas named must be attached; those that are attached and not named are used for no row. What is merged into the
    backbone is part of it. Gradients reach the deltas that are used; where activations are checkpointed, ``backward`` belongs
    into the context too. The first dimension of hidden states must be the batch's (see `BatchRows`).

    Args:
        choices: For each row of the batch a delta, several of them, or None.
        backbone_model: The backbone; needed only where every row has None.

    Raises:
        DeltaExpError: If one of the deltas, or one that is attached beside them, cannot be limited to some rows.
    """
    named = [_deltas(choice) for choice in choices]
    deltas = list(dict.fromkeys(delta for row in named for delta in row))
    backbone = deltas[0].backbone_model if deltas and backbone_model is None else backbone_model
    if not choices or backbone is None:
        raise DeltaExpError(
            "route() needs a delta or None for each row of the batch, and the backbone_model where no row has a delta."
        )
    for delta in deltas:
        _check(delta, backbone)
    layers = _layers(backbone)
    wanted: dict[Layer, list[int]] = {layer: [] for layer in layers.values()}
    for number, row in enumerate(named):
        for layer in dict.fromkeys(attachment.layer for delta in row for attachment in delta.attachments):
            wanted[layer].append(number)
    _check_layers(backbone, layers, wanted)
    before = {layer: layer.batch_rows for layer in wanted}
    for layer, rows in wanted.items():
        layer.batch_rows = BatchRows(rows, len(named))
    try:
        yield
    finally:
        for layer, previous in before.items():
            layer.batch_rows = previous


def _deltas(choice: Choice) -> list[DeltaModel]:
    """Return the deltas that one row uses."""
    found = [] if choice is None else [choice] if isinstance(choice, DeltaModel) else list(choice)
    for delta in found:
        if not isinstance(delta, DeltaModel):
            raise DeltaExpError(f"route() takes deltas, lists of them, or None, and was given a {type(delta).__name__}.")
    return found


def _check(delta: DeltaModel, backbone: nn.Module) -> None:
    if delta.backbone_model is not backbone:
        raise DeltaExpError("The deltas of a batch must be attached to one backbone, and these belong to several.")
    if delta.merged or not delta.attached:
        advice = "merged: call its unmerge()" if delta.merged else "not attached: call its attach()"
        raise DeltaExpError(f"A delta of type {delta.config.delta_type!r} that route() was given is {advice} before.")


def _layers(backbone: nn.Module) -> dict[str, Layer]:
    """Return all layers of deltas that hang in a backbone, by name."""
    return {
        f"{name}.{child_name}" if name else child_name: child
        for name, module in backbone_modules(backbone)
        for child_name, child in module.named_children()
        if isinstance(child, Layer)
    }


def _check_layers(backbone: nn.Module, layers: Mapping[str, Layer], wanted: Mapping[Layer, Sequence[int]]) -> None:
    """Raise a `DeltaExpError` if something that is attached cannot be limited to rows of the batch."""
    owned = set(originals(backbone)) - merged_names(backbone)
    if owned:
        raise DeltaExpError(
            f"{listing(sorted(owned), 3)} of the backbone itself belongs to a delta that is attached, and so to every row. "
            "Detach that delta, or train one with layers only."
        )
    own_way = [name for name, layer in layers.items() if layer.connect is not None and not layer.keeps_rows]
    if own_way:
        raise DeltaExpError(
            f"{listing(own_way, 3)} cannot be limited to some rows of a batch, as a layer can that changes what one module "
            "takes or returns (LoRA, adapters, IA3), or a prefix that leaves the text's positions alone. Detach that delta."
        )
    experts = [name for name, layer in layers.items() if wanted[layer] and EXPERT.search(name)]
    if experts:
        raise DeltaExpError(
            f"{listing(experts, 3)} lies within a mixture of experts, which gives each expert tokens of all rows, so that no "
            "row has a place there. Leave the experts out with exclude_modules."
        )
