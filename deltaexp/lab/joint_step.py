"""One step of several runs: their batches as one, with the delta of its run in every row; and whether that is worth it.

Where runs train parameters of the backbone itself, such as those of a new head, each run has values of its own for them. A
module that has such parameters computes each run's rows with the run's own: once for every run, as it would by itself.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import psutil
import torch
from torch import nn

from deltaexp import surgery
from deltaexp.errors import DeltaExpError
from deltaexp.lab.shortcuts import NOT_COMPUTED, TOLERANCE
from deltaexp.lab.tasks.kinds.base import IGNORED, position_limit
from deltaexp.model import DeltaModel
from deltaexp.routing import BatchRows, route
from deltaexp.tree import leaf, parent

FASTER = 0.9
"""What part of the time of separate steps a joint one may take, to be worth what differs in rounding, and the trial."""
ROUNDS = 3
"""How often both are timed."""
LABELS = "labels"
"""What of a batch is for the loss alone."""
Batch = dict[str, torch.Tensor]


class Run(Protocol):
    """A run as far as it is needed here."""

    @property
    def delta_model(self) -> DeltaModel:
        """Its delta."""

    def trained(self) -> list[nn.Parameter]:
        """Return the parameters that it trains: those of the delta's layers, then those of the backbone."""

    def owned(self) -> dict[str, torch.Tensor]:
        """Return its values of those parameters of the backbone, by their names, while another's, or none's, are in it."""

    def loss_of(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Return the mean loss of a batch."""

    def alone(self) -> contextlib.AbstractContextManager:
        """Make a context in which the backbone is as the run alone would have it."""

    def __hash__(self) -> int:
        """Return what tells it from others."""


@dataclass
class Step:
    """A forward pass of several runs: what its backward pass needs."""

    logits: torch.Tensor
    places: dict[Any, tuple[slice, ...]]
    """Which rows, and positions where there are some, of the logits are a run's."""
    parameters: dict[Any, list[torch.Tensor]]
    """What the gradients are of, in the order of `Run.trained`."""


@dataclass
class Found:
    """What one run's step came to."""

    loss: torch.Tensor
    logits: torch.Tensor
    gradients: Sequence[torch.Tensor | None]


@contextlib.contextmanager
def only(run: Any, runs: Any) -> Iterator[None]:
    """Within this context the layers of one run's delta are in the backbone, and the others' are not."""
    others = [other.delta_model.attachments for other in runs if other is not run and other.delta_model.attached]
    for attachments in others:
        surgery.remove(attachments)
    try:
        yield
    finally:
        for attachments in others:
            surgery.insert(attachments)


def joined(batches: Mapping[Any, Batch], padding: int, more: int = 0) -> Batch:
    """Return several batches as one, without labels.

    What is shorter is padded at its end, where nothing before sees it: in a decoder what comes later is not seen, and an
    encoder does not look at what its mask leaves out. Whether a head does is tried out.

    Args:
        batches: The batch of every run.
        padding: What tokens are padded with.
        more: By how many positions the longest is padded.

    Raises:
        ValueError: If they are not made of the same things, or cannot be padded.
    """
    first = next(iter(batches.values()))
    result: Batch = {}
    for name in first:
        if name == LABELS:
            continue
        parts = [batch[name] for batch in batches.values()]
        most = max(part.shape[-1] for part in parts) + more
        if any(part.dim() not in (2, 3) or part.is_floating_point() for part in parts):
            raise ValueError(f"{name} is no table of tokens")
        if any(part.shape[-1] != most for part in parts) and "attention_mask" not in first:
            raise ValueError("there is no attention_mask")
        fill = padding if name.endswith("input_ids") else 0
        result[name] = torch.cat([nn.functional.pad(part, (0, most - part.shape[-1]), value=fill) for part in parts])
    return result


def _places(batches: Mapping[Any, Batch], logits: torch.Tensor) -> dict[Any, tuple[slice, ...]]:
    places: dict[Any, tuple[slice, ...]] = {}
    start = 0
    for run, batch in batches.items():
        read = batch.get("decoder_input_ids", batch["input_ids"])
        rows = slice(start, start + len(read))
        places[run] = (rows, slice(0, read.shape[-1])) if logits.dim() > 2 else (rows,)
        start += len(read)
    return places


def forward(backbone: Any, batches: Mapping[Any, Batch], more: int = 0) -> Step:
    """Compute several runs' batches as one, every row with its run's delta."""
    batch = joined(batches, getattr(backbone.config, "pad_token_id", None) or 0, more)
    # A row of multiple choice is several sequences.
    counts = {run: own["input_ids"][..., 0].numel() for run, own in batches.items()}
    deltas = [run.delta_model for run, count in counts.items() for _ in range(count)]
    owned = {run: {name: value.detach().requires_grad_() for name, value in run.owned().items()} for run in batches}
    with route(deltas), _divided(backbone, [(counts[run], owned[run]) for run in batches]):
        logits = backbone(**batch)["logits"]
    parameters = {run: [*run.trained()[: -len(own) or None], *own.values()] for run, own in owned.items()}
    return Step(logits, _places(batches, logits), parameters)


@contextlib.contextmanager
def _divided(backbone: nn.Module, owned: Sequence[tuple[int, Mapping[str, torch.Tensor]]]) -> Iterator[None]:
    """Within this context some of the backbone's modules compute each run's rows with the run's own parameters.

    Args:
        backbone: The backbone.
        owned: How many rows every run has, and its parameters of the backbone.
    """
    before: dict[nn.Module, Any] = {}
    for place in dict.fromkeys(parent(name) for _, own in owned for name in own):
        module = backbone.get_submodule(place)
        parts = [(count, {leaf(name): own[name] for name in own if parent(name) == place}) for count, own in owned]
        before[module] = module.__dict__.get("forward")
        # Only the computation itself: hooks, and layers of deltas on the module, are called as ever.
        module.__dict__["forward"] = partial(_by_parts, module, module.forward, parts)
    try:
        yield
    finally:
        for module, compute in before.items():
            del module.__dict__["forward"]
            if compute is not None:
                module.__dict__["forward"] = compute


def _by_parts(
    module: nn.Module,
    compute: Callable[..., torch.Tensor],
    parts: Sequence[tuple[int, dict[str, torch.Tensor]]],
    x: torch.Tensor,
    *arguments: Any,
    **options: Any,
) -> torch.Tensor:
    """Return what a module makes of ``x``, of every run's rows with its own parameters."""
    many = BatchRows((), sum(count for count, _ in parts)).repeats(x)
    place: dict[str, Any] = module._parameters
    own, results = dict(place), []
    try:
        for (_, parameters), rows in zip(parts, x.split([count * many for count, _ in parts]), strict=True):
            place.update({**own, **parameters})
            results.append(compute(rows, *arguments, **options))
    finally:
        place.update(own)
    return torch.cat(results)


def backward(step: Step, gradients: Mapping[Any, torch.Tensor]) -> dict[Any, list[torch.Tensor | None]]:
    """Return for every run the gradients of its parameters, from those of its logits."""
    whole = torch.zeros_like(step.logits)
    for run, gradient in gradients.items():
        whole[step.places[run]] = gradient
    every = [parameter for run in gradients for parameter in step.parameters[run]]
    found = iter(torch.autograd.grad(step.logits, every, whole, allow_unused=True))
    return {run: [next(found) for _ in step.parameters[run]] for run in gradients}


def tried(backbone: Any, batches: Mapping[Any, Batch]) -> float | str:
    """Find out whether a step of several runs is right, and faster than one of each.

    Args:
        backbone: The backbone, with the layers of all deltas in it.
        batches: The first batch of every run.

    Returns:
        How long a joint step takes, as a part of what separate ones take; or a clause why there can be none.
    """
    try:
        return _measured(backbone, batches)
    except (DeltaExpError, *NOT_COMPUTED) as error:  # a backbone that does not take this, or too little memory
        return (str(error) or type(error).__name__).splitlines()[0]


def _measured(backbone: Any, batches: Mapping[Any, Batch]) -> float | str:
    before = _random(backbone)
    with _counted() as saved:
        separate = {run: _separately(backbone, run, batches)[1] for run in batches}
    if before != _random(backbone):
        return "there is dropout, or something else random, in it"
    needed, free = sum(saved.values()), _free(backbone)
    if needed > free / 2:
        return f"the activations of all would take {needed / 2**30:.3g} GiB, of {free / 2**30:.3g} GiB that are free"
    more = _room(backbone, batches)
    if not more and any(found.logits.dim() == 2 for found in separate.values()):
        return "whether the head reads padding cannot be tried out: texts have no mask, or are as long as the backbone takes"
    _, together = _jointly(backbone, batches, more)
    tolerance = TOLERANCE[_coarsest(backbone)]
    if not all(_same(run, separate[run], together[run], batches[run], tolerance) for run in batches):
        return "a step of all computes something else"
    rounds = [
        ([_separately(backbone, run, batches)[0] for run in batches], _jointly(backbone, batches)[0]) for _ in range(ROUNDS)
    ]
    # The least of each: what else the machine does only adds to it.
    return min(joint for _, joint in rounds) / sum(map(min, zip(*(single for single, _ in rounds), strict=True)))


def _room(backbone: Any, batches: Mapping[Any, Batch]) -> int:
    """Return 1 if batches can be padded by one position more, else 0."""
    limit = position_limit(backbone.config)
    lengths = [batch[name].shape[-1] for batch in batches.values() for name in batch if name.endswith("input_ids")]
    return int(all("attention_mask" in batch for batch in batches.values()) and (limit is None or max(lengths) < limit))


def _same(run: Any, one: Found, other: Found, batch: Batch, tolerance: float) -> bool:
    """Say whether two steps of a run came to the same, to rounding, but for the logits of padding."""
    # What one of the two does not reach at all is no small difference.
    for gradients in zip(one.gradients, other.gradients, strict=True):
        there = [gradient for gradient in gradients if gradient is not None]
        if len(there) == 1 and there[0].any():
            return False

    def vector(found: Found) -> torch.Tensor:
        parts = zip(run.trained(), found.gradients, strict=True)
        return torch.cat([(torch.zeros_like(p) if g is None else g).flatten().float() for p, g in parts])

    def close(first: torch.Tensor, second: torch.Tensor) -> bool:
        return torch.allclose(first, second, rtol=0, atol=tolerance * float(first.abs().max()), equal_nan=True)

    mask = None if "decoder_input_ids" in batch or one.logits.dim() == 2 else batch.get("attention_mask")
    logits = [found.logits if mask is None else found.logits[mask.bool()] for found in (one, other)]
    return close(one.loss, other.loss) and close(*logits) and close(vector(one), vector(other))


def _separately(backbone: Any, run: Any, batches: Mapping[Any, Batch]) -> tuple[float, Found]:
    """Return the seconds of one run's step, and what it came to."""
    with run.alone():
        start = _now(backbone)
        outputs = backbone(**batches[run])
        gradients = torch.autograd.grad(outputs["loss"], run.trained(), allow_unused=True)
        return _now(backbone) - start, Found(outputs["loss"].detach().float(), outputs["logits"].detach().float(), gradients)


def _jointly(backbone: Any, batches: Mapping[Any, Batch], more: int = 0) -> tuple[float, dict[Any, Found]]:
    """Return the seconds of a joint step, and what it came to for every run."""
    start = _now(backbone)
    step = forward(backbone, batches, more)
    logits = {run: step.logits[place].detach().requires_grad_() for run, place in step.places.items()}
    losses = {run: run.loss_of(logits[run], batches[run]) for run in batches}
    gradients = backward(step, {run: torch.autograd.grad(losses[run], logits[run])[0] for run in batches})
    took = _now(backbone) - start
    return took, {run: Found(losses[run].detach().float(), logits[run].detach().float(), gradients[run]) for run in batches}


def _coarsest(backbone: Any) -> torch.dtype:
    """Return the least precise dtype that a backbone computes in."""
    mixed = "forward" in backbone.__dict__  # accelerate's autocast
    return torch.bfloat16 if mixed else max((p.dtype for p in backbone.parameters()), key=TOLERANCE.__getitem__)


def _now(backbone: Any) -> float:
    if backbone.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _random(backbone: Any) -> list[bytes]:
    """Return the state of the random numbers that a backbone would draw."""
    states = [torch.get_rng_state()]
    if backbone.device.type == "cuda":
        states.append(torch.cuda.get_rng_state(backbone.device))
    return [state.numpy().tobytes() for state in states]


def _free(backbone: Any) -> int:
    """Return how many bytes of memory are free."""
    if backbone.device.type == "cuda":
        return torch.cuda.mem_get_info(backbone.device)[0]
    return psutil.virtual_memory().available


@contextlib.contextmanager
def _counted() -> Iterator[dict[int, int]]:
    """Yield the bytes of what waits for a backward pass, by its place in memory."""
    found: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield found


def loss(logits: torch.Tensor, labels: torch.Tensor, shifted: bool, smoothing: float) -> torch.Tensor:
    """Return the mean loss of what labels name, as the model would make it of them itself.

    Args:
        logits: Shape ``(rows, length, tokens)`` or ``(rows, classes)``; of numbers, ``(rows, 1)``.
        labels: Shape ``(rows, length)`` or ``(rows,)``; numbers with a point have the mean squared error as loss, and classes
            the cross-entropy.
        shifted: Whether the logits at a position are those of the token after it.
        smoothing: What part of a label's probability is spread over all tokens, or classes.
    """
    if labels.is_floating_point():
        return nn.functional.mse_loss(logits.flatten().float(), labels.flatten().float())
    if shifted:
        logits, labels = logits[:, :-1], labels[:, 1:]
    flat = logits.reshape(-1, logits.shape[-1]).float()
    return nn.functional.cross_entropy(flat, labels.reshape(-1), ignore_index=IGNORED, label_smoothing=smoothing)
