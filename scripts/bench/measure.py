"""Times of steps that are taken in turns, and the bytes that a step saves for its backward pass."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
"""The dtypes of the products of a precision, by which `peaks` knows them."""


def seconds(step: Callable[[], Any], device: str, times: int = 1) -> float:
    """Return how long a step takes: on a GPU between two of its events, and on the CPU by the clock.

    With one thread that is the thread's own clock, which stands still while another process has the core.

    Args:
        step: The step.
        device: Where.
        times: How many steps a GPU takes one after the other, of which this is the mean.
    """
    if device == "cpu":
        clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
        start = clock()
        step()
        return clock() - start
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    before.record()
    for _ in range(times):
        step()
    after.record()
    torch.cuda.synchronize()
    return before.elapsed_time(after) / 1000 / times


def often(step: Callable[[], Any], device: str) -> int:
    """Return how many steps are timed at once: on a GPU several, as in a training, where none waits for the one before."""
    return 1 if device == "cpu" else max(2, min(20, math.ceil(0.01 / seconds(step, device))))


def in_turns(
    steps: Mapping[str, Callable[[], Any]], device: str, limit: float, rounds: int, progress: Callable[[], None]
) -> dict[str, list[float]]:
    """Take every step once in each round and return their times, one a round.

    The order is turned around from round to round (ABC, CBA, ...), so that what one leaves in the caches, and what slows the
    machine for a while, falls on all.

    Args:
        steps: What is measured; each has been taken before.
        device: Where.
        limit: Seconds after which no round is begun, once there were three.
        rounds: The most rounds.
        progress: Called after every round.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    begun = time.monotonic()
    at_once = {name: often(step, device) for name, step in steps.items()}
    for number in range(rounds):
        if number >= 3 and time.monotonic() - begun > limit:
            break
        gc.collect()  # what it is off for: that it comes within a step
        for name in list(steps)[:: 1 if number % 2 == 0 else -1]:
            times[name].append(seconds(steps[name], device, at_once[name]))
        progress()
    return times


def summary(values: Sequence[float]) -> dict[str, float]:
    """Return median, quartiles and minimum."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"median": middle, "q1": low, "q3": high, "min": min(values)}


def ratio(one: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """Return the summary of the ratios of two steps' times, round by round."""
    return summary([a / b for a, b in zip(one, other, strict=True)])


def saved_bytes(model: nn.Module, forward: Callable[[], Any]) -> int:
    """Return the bytes that a forward pass keeps for the backward pass: each storage once, no parameters and buffers."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.layout is torch.strided:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage  # holding it keeps its address from being given to another
        return tensor.detach()  # an operation's own output would lead back to it, in a circle that nothing frees

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    del output
    return sum(storage.nbytes() for storage in kept.values())


class Counted(TorchDispatchMode):
    """Counts the floating-point operations of matrix products, by the formulas of `torch.utils.flop_counter`.

    Its own counter puts hooks on all modules, with which some compute otherwise, and knows no products that are added in place.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self.formulas: dict[Any, Callable[..., int]] = {
            **flop_registry, aten.addmm_: flop_registry[aten.addmm], aten.baddbmm_: flop_registry[aten.baddbmm],
        }  # fmt: skip

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        formula = self.formulas.get(func._overloadpacket)
        if formula is None and func is not torch.ops.prim.device.default:
            with self:
                parts = func.decompose(*args, **kwargs)
                if parts is not NotImplemented:
                    return parts
        out = func(*args, **kwargs)
        if formula is not None:
            self.total += formula(*args, **kwargs, out_val=out)
        return out


def flops(step: Callable[[], Any]) -> int:
    """Return the floating-point operations of a step's matrix products and attention; masked products are counted, too."""
    # By plain products: there are no formulas for the CPU's attention, nor for that of grouped queries.
    with sdpa_kernel(SDPBackend.MATH), Counted() as counted:
        step()
    return counted.total


def peaks(device: str, dtypes: Sequence[torch.dtype]) -> dict[str, float]:
    """Measure what the machine can do: FLOP/s of a large matrix product per dtype, and bytes/s of a copy."""
    size, turns = (1024, 8) if device == "cpu" else (8192, 20)
    result = {}
    for dtype in dtypes:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        best = min(seconds(lambda a=a, b=b: a @ b, device) for _ in range(turns))
        result[str(dtype).removeprefix("torch.")] = 2 * size**3 / best
    source = torch.empty(2**26 if device == "cpu" else 2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = min(seconds(lambda: target.copy_(source), device) for _ in range(8))
    return {**result, "copy": 2 * source.numel() / best}


def geometric_mean(values: Sequence[float]) -> float:
    """Return the geometric mean."""
    return math.exp(statistics.fmean(math.log(value) for value in values))
