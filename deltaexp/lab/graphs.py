"""Training steps as CUDA graphs: forward and backward pass of a small model, begun by one call in the place of thousands.

A GPU computes the operations of a small model faster than a CPU can begin them one by one. So they are recorded once for every
shape of a batch, and replayed: the batch is copied to where the recorded operations read it, and the gradients are found where
they write them. Lengths are padded to multiples of `LENGTHS`, so that there are few shapes. Clipping, optimizer and schedule go
on as ever.

What is recorded knows nothing of Python: a number that a model's code has made of one batch would be the same for all. So the
first two batches of every shape are computed plainly as well, and what differs, draws random numbers on the CPU, cannot be
recorded or does not fit into memory is computed plainly from then on. Every step of a shape is a replay, the first one
included: unless that has ended on the way, a run that is resumed goes on with the same numbers.

Source: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.utils import import_utils

from deltaexp import speed
from deltaexp.lab.recorders import CudaRecorder, Recorder

Batch = Mapping[str, torch.Tensor]
LENGTHS = 16
"""Lengths of texts are padded to multiples of this."""
MOST = 128
"""The most shapes of batches that are recorded."""
CHECKS = 2
"""How many batches of a shape are computed plainly as well."""
TOLERANCE = 0.05
"""By how much gradients may differ from those computed plainly, as a part of their norm: more than rounding makes of them."""
KEPT = "kept activations"
"""The input that stands for what is known of the lower blocks (`deltaexp.frozen`)."""
DECODER = ("decoder_input_ids", "decoder_attention_mask")


@dataclass
class Padding:
    """How a batch of texts is padded to another length.

    Args:
        token: The token that padding is made of.
        ignored: The label that does not count.
        source: The length of the longest text, beyond which nothing is padded; 0 pads none.
        target: The same of what a decoder is given beside a text.
    """

    token: int
    ignored: int
    source: int
    target: int = 0

    def values(self, inputs: Batch) -> dict[str, float] | None:
        """Return what every input is padded with, but those that have no length; None where a batch cannot be padded."""
        # Where the answer is a place in the text, padding would be places, too.
        if not {"input_ids", "attention_mask"} <= inputs.keys() or "start_positions" in inputs or not self.source:
            return None
        known = {"input_ids": self.token, "decoder_input_ids": self.token, "labels": self.ignored}
        known |= dict.fromkeys(("attention_mask", "token_type_ids", "position_ids", "decoder_attention_mask", KEPT), 0)
        long = {name for name, tensor in inputs.items() if tensor.dim() > 1}
        return {name: known[name] for name in long} if long <= known.keys() else None

    def sizes(self, inputs: Batch) -> dict[str, torch.Size]:
        """Return the shapes that a batch is padded to: its own where it cannot be padded."""
        found = {name: tensor.shape for name, tensor in inputs.items()}
        values = self.values(inputs)
        if values is None:
            return found
        own, both = inputs["input_ids"].shape, "decoder_input_ids" in inputs
        lengths = {"source": (own[1], rounded(own[1], self.source))}
        if both:
            length = inputs["decoder_input_ids"].shape[1]
            lengths["target"] = length, rounded(length, self.target)
        padded = {}
        for name in values:
            of_decoder = both and (name in DECODER or name == "labels")
            before, after = lengths["target" if of_decoder else "source"]
            rows, length, *rest = inputs[name].shape
            if len(own) != 2 or (rows, length) != (own[0], before):
                return found
            padded[name] = torch.Size((rows, after, *rest))
        return {**found, **padded}

    def changes(self, inputs: Batch) -> bool:
        """Say whether a batch becomes longer."""
        return any(size != inputs[name].shape for name, size in self.sizes(inputs).items())

    def padded(self, inputs: Batch) -> dict[str, torch.Tensor]:
        """Return a batch with its padding."""
        made = _Graph.like(inputs, self)
        made.fill(inputs)
        return made.inputs


def rounded(length: int, longest: int) -> int:
    """Return the length that a text is padded to: rounded up, but not beyond the longest."""
    return max(length, min(-(-length // LENGTHS) * LENGTHS, longest))


class Unfit(Exception):
    """Steps cannot be replayed; why, in a clause."""


@dataclass
class _Graph:
    """The steps of one shape."""

    inputs: dict[str, torch.Tensor]
    values: dict[str, float] = field(default_factory=dict)
    loss: torch.Tensor | None = None
    replay: Callable[[], None] | None = None
    checked: int = 0

    @classmethod
    def like(cls, inputs: Batch, padding: Padding | None) -> _Graph:
        """Return what has room for a batch with its padding."""
        sizes = padding.sizes(inputs) if padding else {name: tensor.shape for name, tensor in inputs.items()}
        values = padding.values(inputs) if padding else None
        return cls({name: tensor.new_empty(sizes[name]) for name, tensor in inputs.items()}, values or {})

    def fill(self, inputs: Batch) -> None:
        """Copy a batch to where the recorded operations read it."""
        for name, tensor in inputs.items():
            own = self.inputs[name]
            if own.shape != tensor.shape:
                own.fill_(self.values[name])
                own = own[:, : tensor.shape[1]]
            own.copy_(tensor)


class StepGraphs:
    """Losses and gradients of batches, replayed where that can be.

    Args:
        compute: Returns the loss of a batch, a scalar, for which the batch is never the same tensors twice.
        parameters: What is trained.
        recorder: What records operations; that of the parameters' GPU by default.
        padding: How batches are padded; None pads none.
        state: What computing a loss may change, such as the statistics of a batch normalisation: once for each batch.
    """

    def __init__(
        self,
        compute: Callable[[dict[str, torch.Tensor]], torch.Tensor],
        parameters: Sequence[nn.Parameter],
        recorder: Recorder | None = None,
        padding: Padding | None = None,
        state: Sequence[torch.Tensor] = (),
    ) -> None:
        self.compute, self.parameters, self.padding, self.state = compute, list(parameters), padding, state
        self.recorder = recorder or CudaRecorder(self.parameters[0].device)
        self.refused: str | None = None
        """Why nothing is replayed any more, in a clause."""
        self.left: str | None = None
        """Why some batches were not replayed, in a clause."""
        self.replayed = 0
        """The number of steps that were replayed."""
        self.shapes = 0
        """The number of shapes that were recorded."""
        self._graphs: dict[Hashable, _Graph] = {}
        self._used: list[int] | None = None
        self._gradients = [torch.empty_like(parameter, requires_grad=False) for parameter in self.parameters]
        self._places: list[int] = []

    def step(self, inputs: Batch, key: Hashable = ()) -> torch.Tensor | None:
        """Return the loss of a batch, with its gradients added to those of the parameters; None where it cannot be replayed.

        Args:
            inputs: The batch, on the device.
            key: What else the loss depends on that is no tensor.
        """
        if self.refused is not None:
            return None
        if not all(isinstance(tensor, torch.Tensor) for tensor in inputs.values()):
            self.left = "not all that the model is given is tensors"
            return None
        places = [parameter.data_ptr() for parameter in self.parameters]
        if places != self._places:  # they were put elsewhere, where no graph would look for them
            self._graphs, self._places = {}, places
        sizes = self.padding.sizes(inputs) if self.padding else {name: tensor.shape for name, tensor in inputs.items()}
        name = key, tuple((name, sizes[name], tensor.dtype) for name, tensor in inputs.items())
        graph = self._graphs.get(name)
        if graph is None:
            if len(self._graphs) == MOST:
                self.left = f"batches have more than {MOST} shapes"
                return None
            graph = _Graph.like(inputs, self.padding)
        self._keep()
        graph.fill(inputs)
        if graph.checked < CHECKS:
            if not self._check(graph):
                return None
            self.shapes += name not in self._graphs
            self._graphs[name] = graph
        else:
            graph.replay()  # type: ignore[misc]
        self._give()
        self.replayed += 1
        return graph.loss.clone()  # type: ignore[union-attr]

    def _check(self, graph: _Graph) -> bool:
        """Record the steps of a shape, or replay them, and say whether they come to what is computed plainly."""
        drawn, own, before = self.recorder.random_state(), _random_state(), [tensor.clone() for tensor in self.state]
        try:
            with _as_recorded():
                with self.recorder.aside():
                    expected = self._computed(graph)
                if not _same_state(own, _random_state()):
                    raise Unfit("random numbers are drawn on the CPU")
                self._put_back(drawn, before)
                if graph.replay is None:
                    self._record(graph)
            graph.replay()  # type: ignore[misc]
            found = [graph.loss, *(self._gradients[number] for number in self._used or ())]
            if differ(found, expected):
                raise Unfit("what is replayed differs from what is computed")
        except Exception as error:  # whatever a model's code raises while it is recorded, it may well be computed
            self.refused = str(error) if isinstance(error, Unfit) else f"steps cannot be recorded ({_first_line(error)})"
            self._graphs.clear()
            self._gradients.clear()
            _set_random_state(own)
            self._put_back(drawn, before)
            return False
        graph.checked += 1
        return True

    def _put_back(self, drawn: torch.Tensor, before: Sequence[torch.Tensor]) -> None:
        """Have the device's random generator, and what a step changes, as they were before it."""
        self.recorder.set_random_state(drawn)
        for tensor, value in zip(self.state, before, strict=True):
            if not torch.equal(tensor, value):
                tensor.copy_(value)

    def _computed(self, graph: _Graph) -> list[torch.Tensor]:
        """Return loss and gradients of what a graph has been filled with.

        Raises:
            Unfit: If other parameters have gradients than before.
        """
        # Other tensors every time: what is remembered of one, such as its cast, is of what it was then.
        loss = self.compute({name: tensor.detach() for name, tensor in graph.inputs.items()})
        found = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        used = [number for number, gradient in enumerate(found) if gradient is not None]
        if self._used is None:
            self._used = used
        if self._used != used:
            raise Unfit("not the same parameters have gradients in every step")
        return [loss.detach(), *(gradient for gradient in found if gradient is not None)]

    def _record(self, graph: _Graph) -> None:
        targets = [self._gradients[number] for number in self._used or ()]

        def compute() -> None:
            graph.loss, *gradients = self._computed(graph)
            torch._foreach_copy_(targets, gradients)

        graph.replay = self.recorder.record(compute)

    def _keep(self) -> None:
        """Leave gradients that wait for the optimizer alone."""
        for parameter, gradient in zip(self.parameters, self._gradients, strict=True):
            if parameter.grad is gradient:
                parameter.grad = gradient.clone()

    def _give(self) -> None:
        """Give the parameters their gradients."""
        waiting = []
        for number in self._used or ():
            parameter, gradient = self.parameters[number], self._gradients[number]
            if parameter.grad is None:
                parameter.grad = gradient
            else:
                waiting.append((parameter.grad, gradient))
        if waiting:
            torch._foreach_add_([grad for grad, _ in waiting], [gradient for _, gradient in waiting])


@contextlib.contextmanager
def _as_recorded() -> Iterator[None]:
    """Within this context is computed as while a graph is recorded, where transformers makes masks in other ways."""
    own = import_utils.is_cuda_stream_capturing
    import_utils.is_cuda_stream_capturing = lambda: True
    try:
        with speed.configured(recorded=True):
            yield
    finally:
        import_utils.is_cuda_stream_capturing = own


def differ(found: Sequence[Any], expected: Sequence[Any], loss: float = TOLERANCE, gradients: float = TOLERANCE) -> bool:
    """Say whether a loss, or the gradients after it, differ by more than rounding; where they are no numbers, no one can say.

    Args:
        found: A loss and gradients.
        expected: What they are compared with.
        loss: By how much losses may differ, as a part of what is expected.
        gradients: By how much gradients may, as a part of their norm.
    """
    for one, other, tolerance in ((found[:1], expected[:1], loss), (found[1:], expected[1:], gradients)):
        if not one:
            continue
        size, difference = _norm(other), _norm(torch._foreach_sub(list(one), list(other)))
        if np.isfinite(size) and not difference <= tolerance * size:
            return True
    return False


def _norm(tensors: Sequence[torch.Tensor]) -> float:
    """Return the norm of several tensors as of one."""
    return float(torch.stack([norm.float() for norm in torch._foreach_norm(list(tensors))]).norm())


def _random_state() -> tuple[Any, ...]:
    return torch.get_rng_state(), random.getstate(), np.random.get_state()


def _same_state(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    same = bool(torch.equal(one[0], other[0])) and one[1] == other[1]
    return same and all(np.array_equal(a, b) for a, b in zip(one[2], other[2], strict=True))


def _set_random_state(state: tuple[Any, ...]) -> None:
    torch.set_rng_state(state[0])
    random.setstate(state[1])
    np.random.set_state(state[2])


def _first_line(error: BaseException) -> str:
    """Return the first line of what an error says; of one that comes of another, of that."""
    while error.__context__ is not None:
        error = error.__context__
    return (str(error) or type(error).__name__).splitlines()[0]
