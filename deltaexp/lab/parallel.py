"""Training with the same result in any number of processes: who gets which rows, and what each one's loss counts.

Step k sees the same rows as one process with a batch as large as all processes' together: each global batch is cut into equal
parts. The loss is the mean over all that is learnt in the step (tokens, or rows where those have one label), also where
processes, or accumulated batches, have more or less of it; transformers leaves that to each model, and not all do it.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.data_loader import BatchSamplerShard
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Sampler

from deltaexp.lab import processes
from deltaexp.lab.tasks.kinds.base import IGNORED
from deltaexp.lab.trainer import Trainer, find_batch_size

PREPARED = ("_is_accelerate_prepared", "forward", "_original_forward")
"""What accelerate puts on a model that it has prepared."""


class Share(Sampler):
    """One process's part of the rows of another sampler.

    A global batch that has fewer rows than there are processes gives some of them none; these get one as a stand-in, which does
    not count.

    Args:
        sampler: The order of all rows, the same in every process.
        size: Rows of one process in a batch.
        rank: The number of this process.
        count: The number of processes.
    """

    def __init__(self, sampler: Any, size: int, rank: int, count: int) -> None:
        self.sampler, self.size, self.rank, self.count = sampler, size, rank, count

    @property
    def batches(self) -> int:
        """The number of global batches."""
        return -(-len(self.sampler) // (self.size * self.count))

    def sizes(self, batch: int) -> list[int]:
        """Return how many rows every process has of a global batch, stand-ins not counted."""
        whole = self.size * self.count
        rows = max(0, min(whole, len(self.sampler) - batch * whole))
        return [rows // self.count + (rank < rows % self.count) for rank in range(self.count)]

    def __iter__(self) -> Iterator[int]:
        order, start = array("q", self.sampler), 0  # eight bytes a row, where a list has forty
        for batch in range(self.batches):
            sizes = self.sizes(batch)
            mine = start + sum(sizes[: self.rank])
            start += sum(sizes)
            yield from order[mine : mine + sizes[self.rank]] or order[start - 1 : start]

    def __len__(self) -> int:
        return sum(max(1, self.sizes(batch)[self.rank]) for batch in range(self.batches))


class ParallelTrainer(Trainer):
    """transformers' Trainer, whose result does not depend on how many processes share the work."""

    shifted = False
    """Whether the labels of a batch are its input, the first of which is not predicted."""
    sharded = False
    """Whether the backbone is parted between the processes, as `deltaexp.lab.sharding` does it."""

    _train_share: Share | None = None

    def __init__(self, **options: Any) -> None:
        self._weights: list[torch.Tensor] = []
        self._weight: torch.Tensor | None = None
        super().__init__(**options)
        # Models are not told how many items there are in all processes: each returns the mean over its own.
        self.model_accepts_loss_kwargs = False
        if self.sharded:
            prepare = self.accelerator.prepare_model
            # What is sharded is where it belongs, and its gradients are averaged below.
            self.accelerator.prepare_model = lambda model, **_: prepare(model, device_placement=False, evaluation_mode=True)

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if not self.sharded:
            super()._move_model_to_device(model, device)

    def train(self, *arguments: Any, **options: Any) -> Any:
        """Train, also after an evaluation, for which accelerate has prepared the model as one that is not trained."""
        if processes.count() > 1 and not self.sharded:
            for name in PREPARED:
                self.model.__dict__.pop(name, None)
            self.model_wrapped = self.model
        return super().train(*arguments, **options)

    def get_train_dataloader(self) -> DataLoader:
        """Return the batches of this process."""
        return _parted(super().get_train_dataloader())

    def get_eval_dataloader(self, *arguments: Any, **options: Any) -> DataLoader:
        """Return the batches of this process."""
        return _parted(super().get_eval_dataloader(*arguments, **options))

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """Return the batches of this process."""
        return _parted(super().get_test_dataloader(test_dataset))

    @property
    def global_batch_size(self) -> int:
        """Rows of one optimizer step, in all processes."""
        return self.args.train_batch_size * self.args.gradient_accumulation_steps * processes.count()

    def share(self, sampler: Sampler, size: int) -> Share:
        """Return this process's part of the rows of a sampler, for batches of a size."""
        return Share(sampler, size, processes.rank(), processes.count())

    def train_share(self, sampler: Sampler) -> Share:
        """Return this process's part of the rows to train on."""
        self._train_share = self.share(sampler, self.args.train_batch_size)
        return self._train_share

    def get_batch_samples(self, *arguments: Any) -> tuple[list, None]:
        """Return the batches of one step, and find what the loss of each counts in the mean over all processes."""
        batches, _ = super().get_batch_samples(*arguments)
        if not batches:
            return batches, None
        counts = torch.stack([self._items(batch) for batch in batches])
        if self._train_share is not None and processes.count() > 1:
            updates = -(-self._train_share.batches // self.args.gradient_accumulation_steps)
            first = self.state.global_step % updates * self.args.gradient_accumulation_steps
            real = [self._train_share.sizes(first + number)[processes.rank()] > 0 for number in range(len(batches))]
            counts = counts * torch.tensor(real, device=counts.device)
        total = self.accelerator.reduce(counts.sum(), "sum") if processes.count() > 1 else counts.sum()
        # Gradients are averaged over the processes, and the Trainer divides by the number of batches.
        self._weights = list(counts * (len(batches) * processes.count()) / total.clamp(min=1))
        return batches, None

    def _items(self, batch: dict[str, Any]) -> torch.Tensor:
        """Return how many labels of a batch count in the mean that is its loss."""
        labels = batch.get("labels")
        if labels is None or labels.is_floating_point():
            return torch.full((), find_batch_size(batch), device=self.args.device)
        return (labels[..., 1:] if self.shifted else labels).ne(IGNORED).sum().to(self.args.device)

    def weighted(self, loss: torch.Tensor) -> torch.Tensor:
        """Return the loss of a batch as it counts in the mean over all batches of the step, in all processes."""
        if self._weight is None:
            return loss
        weight = self._weight.to(loss)
        return torch.where(weight > 0, loss, torch.zeros_like(loss)) * weight

    def training_step(self, *arguments: Any, **options: Any) -> torch.Tensor:
        """Add the gradients of one batch; with the last of a step, average them over the processes."""
        self._weight = self._weights.pop(0) if self._weights else None
        model = arguments[0]
        if (
            processes.count() > 1
            and not self.sharded
            and not any(isinstance(m, DistributedDataParallel) for m in model.modules())
        ):
            raise RuntimeError("The gradients of the processes would not be averaged; please report this.")
        loss = self.computed(*arguments, **options)
        self._weight = None
        if self.sharded and self.accelerator.sync_gradients:
            average_gradients([p for p in self.model.parameters() if p.requires_grad])
        return loss

    def computed(self, *arguments: Any, **options: Any) -> torch.Tensor:
        """Return the loss of one batch, with its gradients added to those of the parameters."""
        return super().training_step(*arguments, **options)

    def gathered(self, value: Any) -> Any:
        """Return tensors of all processes as one, joined along the first dimension, which may differ in length."""
        if processes.count() == 1:
            return value
        if isinstance(value, (list, tuple)):
            return type(value)(self.gathered(part) for part in value)
        value = value[None] if value.dim() == 0 else value
        sizes = self.accelerator.gather(torch.tensor([len(value)], device=value.device)).tolist()
        padded = self.accelerator.pad_across_processes(value, dim=0).contiguous()
        parts = self.accelerator.gather(padded).split(len(padded))
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def _parted(loader: DataLoader) -> DataLoader:
    """Keep accelerate from parting once more what a `Share` has parted."""
    sampler = loader.batch_sampler
    if isinstance(sampler, BatchSamplerShard):
        sampler.num_processes, sampler.process_index, sampler.even_batches = 1, 0, False
    return loader


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """Average the gradients over the processes; one that there is in no process stays None.

    Args:
        parameters: The same, in the same order, in every process.
    """
    if not parameters:
        return
    there = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=parameters[0].device)
    distributed.all_reduce(there)
    used = [p for p, number in zip(parameters, there.tolist(), strict=True) if number]
    for dtype in dict.fromkeys(p.dtype for p in used):
        mine = [p for p in used if p.dtype == dtype]
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in mine]
        flat = torch.cat([grad.reshape(-1) for grad in grads])
        distributed.all_reduce(flat)
        flat /= distributed.get_world_size()
        for parameter, part in zip(mine, flat.split([p.numel() for p in mine]), strict=True):
            parameter.grad = part.view_as(parameter).clone()
