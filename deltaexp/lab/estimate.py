"""What a training step would take in memory and arithmetic, found out by running it on tensors that hold nothing.

The model is computed with PyTorch's `FakeTensorMode`: every operation of the forward pass, of autograd's backward pass and of
the optimizer happens, on tensors that have shapes and dtypes and no values. Each storage that comes into being is counted
until it is freed, so that the peak is the one of these very operations, whatever the architecture: what autograd keeps for
the backward pass, what a frozen weight saves, what gradient checkpointing computes anew. FLOPs are counted on the same
way by PyTorch's `FlopCounterMode`: those of matrix products, convolutions and attention, a multiplication and an addition
being two.
"""

from __future__ import annotations

import contextlib
import gc
import sys
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from deltaexp import casting, gathered
from deltaexp.lab.as_on_gpu import as_on_gpu, widened
from deltaexp.model import DeltaModel

aten = torch.ops.aten

DEVICES = ("cpu", "gpu")
WEIGHTS, ORIGINALS, INPUTS = "weights", "original values of what is trained in place", "batch"
CASTS, GRADIENTS, STATES = "kept casts of frozen weights", "gradients", "optimizer states"
ACTIVATIONS, LOGITS, TEMPORARY = "activations saved for backward", "logits", "temporary"
KINDS = (WEIGHTS, CASTS, ORIGINALS, STATES, GRADIENTS, ACTIVATIONS, LOGITS, TEMPORARY, INPUTS)
CUBLAS = 32 << 20
"""Bytes that cuBLAS takes for itself through PyTorch's allocator: 4096 KiB twice and 16 KiB eight times (":4096:2:16:8") before
Hopper, 32 MiB from it on (PyTorch, "CUBLAS_WORKSPACE_CONFIG"). The larger is counted."""

Forward = Callable[..., tuple[Any, torch.Tensor | None]]
"""What is called with a batch by keywords, and returns the loss and the logits."""
MakeOptimizer = Callable[[list[nn.Parameter], bool], torch.optim.Optimizer]
"""Makes an optimizer of the trained parameters, told whether it works on a GPU."""


def adamw(parameters: list[nn.Parameter], gpu: bool) -> torch.optim.Optimizer:
    """Make AdamW: on a GPU it updates all parameters at once, with temporary copies of all, on the CPU one after another."""
    return torch.optim.AdamW(parameters, foreach=gpu)


@dataclass(frozen=True)
class Execution:
    """How a step is computed, as far as it matters to memory."""

    device: str = "cpu"
    """``cpu`` or ``gpu``."""
    autocast: torch.dtype | None = None
    """The dtype of mixed precision; None computes in the dtypes of the weights."""
    accumulation: int = 1
    """Batches whose gradients add up before the optimizer's step."""
    max_grad_norm: float = 1.0


@dataclass
class Cost:
    """What one training step takes."""

    peak: dict[str, int]
    """The bytes that are held at the moment at which most are, by what they hold."""
    during: str
    """When that is: in the ``forward pass``, the ``backward pass`` or the ``optimizer's step``."""
    saved: int
    """Bytes that the forward pass leaves for the backward pass, without logits."""
    gradients: int
    """Bytes of all gradients, of which there may be fewer at the peak."""
    flops: dict[str, int] = field(default_factory=dict)
    """Floating-point operations: of the forward and the backward pass, over all batches of a step."""

    @property
    def total(self) -> int:
        """The bytes at the peak."""
        return sum(self.peak.values())


class Held(TorchDispatchMode):
    """Counts the bytes of all storages that are alive, by what they hold."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        """What is held now, by kind."""
        self.peak: dict[str, int] = {}
        self.kind, self.phase, self.during = ACTIVATIONS, "forward pass", "forward pass"
        self._known: dict[int, list[Any]] = {}
        self._now = self._most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do what is asked, and note the storages of the result that are new."""
        out = func(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if isinstance(value, torch.Tensor):
                self.note(value)
        return out

    def note(self, tensor: torch.Tensor, kind: str | None = None, size: int | None = None) -> None:
        """Count a tensor's storage, once, as so many bytes; with a ``kind``, as that from now on."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self._known.get(key)
        if known is not None:
            if kind is not None and known[0] != kind:
                self.bytes[known[0]] -= known[1]
                self.bytes[kind] += known[1]
                known[0] = kind
            return
        kind, size = kind or self.kind, storage.nbytes() if size is None else size
        self._known[key] = [kind, size, weakref.ref(storage, lambda _: self._freed(key))]
        self.bytes[kind] += size
        self._now += size
        if self._now > self._most:
            self._most, self.during, self.peak = self._now, self.phase, dict(self.bytes)

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Within this context nothing makes a new peak."""
        before, self._most = self._most, sys.maxsize
        try:
            yield
        finally:
            self._most = before

    def _freed(self, key: int) -> None:
        kind, size, _ = self._known.pop(key)
        self.bytes[kind] -= size
        self._now -= size


def _flash_flops(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _flash_backward_flops(grad_out: Any, query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return sdpa_backward_flop_count(grad_out, query, key, value)


def _no_flops(*_: Any, **__: Any) -> int:
    return 0


FORMULAS = {
    aten._scaled_dot_product_flash_attention_for_cpu: _flash_flops,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _flash_backward_flops,
    # Not to be taken apart, as the counter else does with what it does not know: a kernel computes each in one.
    aten.silu_backward.default: _no_flops,
    aten.mish_backward.default: _no_flops,
}
"""The FLOPs of the CPU's attention, which PyTorch counts for the GPU's kernels only, and of what has none."""


class Dry:
    """A model whose tensors hold nothing from here on: it can be computed, in any size, and no more be used.

    Args:
        model: The model, on the meta device or any other; its parameters and buffers are replaced in place.
        extra: Other tensors that are held as long as the model is.
        packed: Bytes of parameters that are held quantised, by their names; they are unpacked one at a time to compute.
    """

    def __init__(
        self,
        model: nn.Module,
        extra: Mapping[str, torch.Tensor] | None = None,
        packed: Mapping[str, int] | None = None,
    ) -> None:
        self.model, self.mode = model, FakeTensorMode(allow_non_fake_inputs=True)
        known: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for module in model.modules():
            stores: list[dict[str, Any]] = [module._parameters, module._buffers, module.__dict__]
            for store in stores:
                for name, value in list(store.items()):
                    if isinstance(value, torch.Tensor):
                        store[name] = self._emptied(value, known)
        self.kept: list[torch.Tensor] = []
        own = dict(model.named_parameters(remove_duplicate=False))
        self.packed = {id(own[name]): size for name, size in (packed or {}).items()}
        """The bytes of a parameter that is held quantised, by its id."""
        self.unpacked = max((own[name].untyped_storage().nbytes() for name in packed or ()), default=0)
        self.extra = [self._emptied(tensor, known) for tensor in (extra or {}).values()]

    def _emptied(self, tensor: torch.Tensor, known: dict[int, tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        if id(tensor) not in known:  # what is tied stays tied; the original is kept, so that its id is not used again
            with self.mode:
                empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
            if isinstance(tensor, nn.Parameter):
                empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
            known[id(tensor)] = (empty, tensor)
        return known[id(tensor)][0]

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Make an input of the model."""
        with self.mode:
            return torch.zeros(shape, dtype=dtype)

    def weights(self) -> int:
        """Return the bytes of the model's parameters and buffers and of what else is held with them."""
        tensors = (*self.model.parameters(), *self.model.buffers(), *self.extra)
        sizes = {t.untyped_storage()._cdata: self.packed.get(id(t), t.untyped_storage().nbytes()) for t in tensors}
        return sum(sizes.values())

    def train_step(
        self,
        forward: Forward,
        batch: Mapping[str, torch.Tensor],
        how: Execution,
        optimizer: MakeOptimizer | None = adamw,
        flops: bool = True,
    ) -> Cost:
        """Return what a training step takes once the optimizer has its states.

        Args:
            forward: What is called with the batch by keywords; returns the loss and, where there are some, the logits.
            batch: What one forward pass computes with, from `empty`.
            how: How it is computed.
            optimizer: Makes it of the trained parameters, told whether for a GPU. None is AdamW with states of 8 bits.
            flops: Count them, too.
        """
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        held, counts = Held(), {"forward": 0, "backward": 0}
        saved = gradients = 0
        with self.mode, self._counted(held, batch, how), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the model, on data that are none
            stepping = self._stepping(optimizer, trained, held, how)
            hooks = [p.register_post_accumulate_grad_hook(lambda p: held.note(p.grad, GRADIENTS)) for p in trained]
            try:
                for number in range(min(how.accumulation, 2)):  # the gradients of the first are there in all others
                    held.kind, held.phase = ACTIVATIONS, "forward pass"
                    with _counting(counts, "forward", flops and number == 0):
                        loss = self._loss(forward, batch, held, how)
                    saved = held.bytes[ACTIVATIONS]
                    held.kind, held.phase = TEMPORARY, "backward pass"
                    if trained:
                        with _counting(counts, "backward", flops and number == 0):
                            loss.backward()
                    del loss
                held.phase, gradients = "optimizer's step", held.bytes[GRADIENTS]
                if trained:
                    nn.utils.clip_grad_norm_(trained, how.max_grad_norm)
                if stepping is not None:
                    stepping.step()
            finally:
                self.kept = []
                for hook in hooks:
                    hook.remove()
                for parameter in trained:
                    parameter.grad = None
        peak = {kind: size for kind, size in held.peak.items() if size}
        peak[TEMPORARY] = peak.get(TEMPORARY, 0) + self._beside(how)
        return Cost(peak, held.during, saved, gradients, {name: count * how.accumulation for name, count in counts.items()})

    def _stepping(
        self, make: MakeOptimizer | None, trained: list[nn.Parameter], held: Held, how: Execution
    ) -> torch.optim.Optimizer | None:
        """Return the optimizer with the states that it has from the first step on."""
        if not trained:
            return None
        if make is None:
            # Two states of a byte, and a scale of float32 for every 256 (Dettmers et al., 2022, https://arxiv.org/abs/2110.02861).
            for parameter in trained:
                blocks = -(-parameter.numel() // 256)
                self.kept = [*self.kept, torch.empty(2 * (parameter.numel() + 4 * blocks), dtype=torch.uint8)]
                held.note(self.kept[-1], STATES)
            return None
        optimizer = make(trained, how.device == "gpu")
        with held.aside():
            for parameter in trained:
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            optimizer.zero_grad()
        for value in (value for state in optimizer.state.values() for value in state.values()):
            if isinstance(value, torch.Tensor):
                held.note(value, STATES)
        return optimizer

    def evaluation(self, forward: Forward, batch: Mapping[str, torch.Tensor], how: Execution) -> int:
        """Return the bytes at the peak of a forward pass without gradients."""
        held, training = Held(), self.model.training
        held.kind = TEMPORARY
        with self.mode, torch.no_grad(), self._counted(held, batch, how), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.model.eval()
            self._loss(forward, batch, held, how)
        self.model.train(training)
        return sum(held.peak.values()) + self._beside(how)

    def _beside(self, how: Execution) -> int:
        """Return the bytes that operations take beside their results."""
        return self.unpacked + (CUBLAS if how.device == "gpu" else 0)

    @contextlib.contextmanager
    def _counted(self, held: Held, batch: Mapping[str, torch.Tensor], how: Execution) -> Iterator[None]:
        """Count what is held within this context, computed as it would be on the device; the model is held already."""
        gc.collect()
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            held.note(tensor, WEIGHTS, self.packed.get(id(tensor)))
            if (cast := casting.kept_cast(tensor)) is not None:
                held.note(cast, CASTS)
        for tensor in gathered.kept(self.model):
            held.note(tensor, CASTS)
        for tensor in self.extra:
            held.note(tensor, ORIGINALS)
        for tensor in batch.values():
            held.note(tensor, INPUTS)
        as_there = as_on_gpu(how.autocast is not None) if how.device == "gpu" else contextlib.nullcontext()
        with held, as_there:
            yield

    def _loss(self, forward: Forward, batch: Mapping[str, torch.Tensor], held: Held, how: Execution) -> Any:
        mixed = torch.autocast("cpu", dtype=how.autocast) if how.autocast else contextlib.nullcontext()
        with mixed:
            loss, logits = forward(**batch)
        if logits is not None:
            held.note(logits, LOGITS)
            if how.autocast:  # accelerate hands on what is computed in half precision as float32
                widened(logits)
        return loss


class _Everywhere(contextlib.nullcontext[None]):
    """Stands for the modules by which PyTorch tells FLOPs apart.

    To know where it is, it would put hooks on all modules, for which `deltaexp.fused` steps aside: other operations would be
    counted, and other tensors held, than in a run.
    """

    parents = ("Global",)


@contextlib.contextmanager
def _counting(flops: dict[str, int], name: str, wanted: bool) -> Iterator[None]:
    """Write the FLOPs of what happens within this context under a name, if they are wanted."""
    if not wanted:
        yield
        return
    counter: Any = FlopCounterMode(display=False, custom_mapping=FORMULAS)
    counter.mod_tracker = _Everywhere()
    with counter:
        yield
    flops[name] = counter.get_total_flops()


def inference_flops(delta_model: DeltaModel, batch: Mapping[str, Any]) -> dict[str, int]:
    """Return the FLOPs of a forward pass as it is computed: of the ``backbone`` as it is, and ``with_delta``."""
    model, found = delta_model.backbone_model, {"rows": len(next(iter(batch.values())))}
    with torch.no_grad():
        with _counting(found, "with_delta", True):
            model(**batch)
        with delta_model.detached(), _counting(found, "backbone", True):
            model(**batch)
    return found
