"""One step of several runs: their batches as one, with the delta of its run in every row; and whether that is worth it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import psutil
import torch
from torch import nn

from deltaexp.errors import DeltaExpError
from deltaexp.lab.shortcuts import TOLERANCE
from deltaexp.lab.tasks.kinds.base import IGNORED
from deltaexp.model import DeltaModel
from deltaexp.routing import route

FASTER = 0.9
"""What part of the time of separate steps a joint one may take, to be worth what differs in rounding, and the trial."""
ROUNDS = 3
"""How often both are timed."""
Batch = dict[str, torch.Tensor]


class Run(Protocol):
    """A run as far as it is needed here."""

    @property
    def delta_model(self) -> DeltaModel:
        """Its delta."""

    def trained(self) -> list[nn.Parameter]:
        """Return the parameters that it trains."""

    def __hash__(self) -> int:
        """Return what tells it from others."""


@dataclass
class Step:
    """A forward pass of several runs: what its backward pass needs."""

    logits: torch.Tensor
    places: dict[Any, tuple[slice, slice]]
    """Which rows and positions of the logits are a run's."""


@contextlib.contextmanager
def only(run: Any, runs: Any) -> Iterator[None]:
    """Within this context one run's delta is in the backbone, and the others' are not."""
    with contextlib.ExitStack() as stack:
        for other in runs:
            if other is not run and other.delta_model.attached:
                stack.enter_context(other.delta_model.detached())
        yield


def joined(batches: Mapping[Any, Batch], padding: int) -> tuple[Batch, dict[Any, tuple[slice, slice]]]:
    """Return several batches as one, and which rows and positions of its logits are whose.

    What is shorter is padded at its end, where nothing before sees it: in a decoder what comes later is not seen, and an
    encoder does not look at what its mask leaves out.

    Raises:
        ValueError: If they are not made of the same things, or cannot be padded.
    """
    first = next(iter(batches.values()))
    result: Batch = {}
    for name in first:
        parts = [batch[name] for batch in batches.values()]
        most = max(part.shape[1] for part in parts)
        if any(part.dim() != 2 for part in parts):
            raise ValueError(f"{name} is no table of tokens")
        if any(part.shape[1] != most for part in parts) and "attention_mask" not in first:
            raise ValueError("there is no attention_mask")
        fill = padding if name.endswith("input_ids") else 0
        result[name] = torch.cat([nn.functional.pad(part, (0, most - part.shape[1]), value=fill) for part in parts])
    places, start = {}, 0
    for run, batch in batches.items():
        read = batch.get("decoder_input_ids", batch["input_ids"])
        places[run] = slice(start, start + len(read)), slice(0, read.shape[1])
        start += len(read)
    return result, places


def forward(backbone: Any, batches: Mapping[Any, Batch]) -> Step:
    """Compute several runs' batches as one, every row with its run's delta."""
    batch, places = joined(batches, getattr(backbone.config, "pad_token_id", None) or 0)
    deltas = [run.delta_model for run, (rows, _) in places.items() for _ in range(rows.start, rows.stop)]
    with route(deltas):
        return Step(backbone(**batch)["logits"], places)


def backward(step: Step, gradients: Mapping[Any, torch.Tensor]) -> dict[Any, list[torch.Tensor | None]]:
    """Return for every run the gradients of its parameters, from those of its logits."""
    whole = torch.zeros_like(step.logits)
    for run, gradient in gradients.items():
        whole[step.places[run]] = gradient
    parameters = {run: run.trained() for run in gradients}
    every = [parameter for own in parameters.values() for parameter in own]
    found = iter(torch.autograd.grad(step.logits, every, whole, allow_unused=True))
    return {run: [next(found) for _ in own] for run, own in parameters.items()}


def tried(backbone: Any, batches: Mapping[Any, Batch]) -> float | str:
    """Find out whether a step of several runs is right, and faster than one of each.

    Args:
        backbone: The backbone, with all deltas in it.
        batches: The first batch of every run.

    Returns:
        How long a joint step takes, as a part of what separate ones take; or a clause why there can be none.
    """
    try:
        return _measured(backbone, batches)
    except (ValueError, RuntimeError, DeltaExpError) as error:  # a backbone that does not take this, or too little memory
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
    _, together = _jointly(backbone, batches)
    for run, logits in separate.items():
        mask = batches[run].get("attention_mask") if "decoder_input_ids" not in batches[run] else None
        one, other = (part if mask is None else part[mask.bool()] for part in (logits, together[run]))
        if not torch.allclose(one, other, rtol=0, atol=TOLERANCE[_coarsest(backbone)] * float(one.abs().max())):
            return "a step of all computes something else"
    rounds = [
        ([_separately(backbone, run, batches)[0] for run in batches], _jointly(backbone, batches)[0]) for _ in range(ROUNDS)
    ]
    # The least of each: what else the machine does only adds to it.
    return min(joint for _, joint in rounds) / sum(map(min, zip(*(single for single, _ in rounds), strict=True)))


def _separately(backbone: Any, run: Any, batches: Mapping[Any, Batch]) -> tuple[float, torch.Tensor]:
    """Return the seconds of one run's step, and its logits."""
    with only(run, batches):
        start = _now(backbone)
        logits = backbone(**batches[run])["logits"]
        torch.autograd.grad(logits, run.trained(), torch.ones_like(logits), allow_unused=True)
        return _now(backbone) - start, logits.detach().float()


def _jointly(backbone: Any, batches: Mapping[Any, Batch]) -> tuple[float, dict[Any, torch.Tensor]]:
    """Return the seconds of a joint step, and every run's logits."""
    start = _now(backbone)
    step = forward(backbone, batches)
    backward(step, {run: torch.ones_like(step.logits[place]) for run, place in step.places.items()})
    took = _now(backbone) - start
    return took, {run: step.logits[place].detach().float() for run, place in step.places.items()}


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
    """Return the mean loss of the tokens that labels name, as the model would make it of them itself.

    Args:
        logits: Shape ``(rows, length, tokens)``.
        labels: Shape ``(rows, length)``.
        shifted: Whether the logits at a position are those of the token after it.
        smoothing: What part of a label's probability is spread over all tokens.
    """
    if shifted:
        logits, labels = logits[:, :-1], labels[:, 1:]
    flat = logits.reshape(-1, logits.shape[-1]).float()
    return nn.functional.cross_entropy(flat, labels.reshape(-1), ignore_index=IGNORED, label_smoothing=smoothing)
