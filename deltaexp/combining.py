"""One delta made of several of the same type.

What is combined are task vectors, the difference that training made:

- LoRA (other than DoRA) and AdaLoRA, of which a LoRA is made: the matrix that is added to the weight, ``scale * B A``. A
  weighted sum of such matrices is again a low-rank update, exactly: its A are all the A below one another, and its B all the B,
  scaled, side by side. What the other methods make of the matrices has full rank; the best approximation of a given rank is
  taken (truncated SVD), and how far it is off is recorded. (To prune A and B themselves, as PEFT does, is to prune something
  else than the update.)
- Parameters of the backbone that the delta trains: their difference from the backbone's.
- All other types: the parameters of their layers, less what those start at. A parameter that starts at random counts from zero.

Pruning works tensor by tensor, as in PEFT.

- ``linear``: the weighted sum, task arithmetic (Ilharco et al., 2023, https://arxiv.org/abs/2212.04089).
- ``ties``: of each task vector the largest elements are kept, and of these, element by element, the ones with the sign of
  their sum; the result is their weighted mean (Yadav et al., 2023, https://arxiv.org/abs/2306.01708).
- ``dare_linear``, ``dare_ties``: elements are dropped at random and the others scaled up, then as above (Yu et al., 2024,
  https://arxiv.org/abs/2311.03099).
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from deltaexp.checksum import compare, digests
from deltaexp.deltas.adalora import AdaloraLayer
from deltaexp.deltas.lora import DoraLayer, LoraLayer
from deltaexp.errors import ConfigError, DeltaExpError, listing, unknown
from deltaexp.model import DeltaModel, direct_class
from deltaexp.registry import DeltaConfig, SavedWith
from deltaexp.structure import Rows, backbone_parameters

METHODS = ("linear", "ties", "dare_linear", "dare_ties")
"""The ways to combine."""
Tensors = dict[str, torch.Tensor]
Place = tuple[str, Rows | None]
Factors = tuple[torch.Tensor, torch.Tensor, float]


@dataclass(frozen=True)
class Combination:
    """How a delta was combined of others."""

    method: str
    weights: tuple[float, ...]
    density: float
    seed: int
    truncation: dict[str, float] = field(default_factory=dict)
    """Where LoRA's matrices were cut to a rank: what was lost, by layer, as a fraction of the matrix's Frobenius norm."""


def combine(
    deltas: Sequence[DeltaModel],
    weights: Sequence[float],
    method: str = "linear",
    density: float = 0.5,
    seed: int = 0,
    rank: int | None = None,
) -> DeltaModel:
    """Make a new delta of several of one type, on the backbone of the first.

    The deltas given stay as they are, attached or not. The new one is detached; ``attach`` it after having detached the others.

    Args:
        deltas: The deltas, on the same backbone or on equal ones, with layers at the same places.
        weights: One number for each; they need not add up to one.
        method: "linear", "ties", "dare_linear" or "dare_ties" (see `deltaexp.combining`).
        density: The fraction of elements that "ties" and "dare" keep.
        seed: Seed of what "dare" drops.
        rank: For LoRA and AdaLoRA: the rank of the new delta. None means the sum of the ranks for "linear", which is exact,
            and the largest of them for the others.

    Returns:
        The new delta; its ``combination`` tells how it was made.

    Raises:
        ConfigError: If a method, weight or density is not allowed.
        DeltaExpError: If the deltas do not belong together.
    """
    _check_numbers(deltas, weights, method, density, rank)
    _check_alike(deltas)
    mixer = Mixer(method, tuple(float(weight) for weight in weights), density, torch.Generator().manual_seed(seed))
    first = deltas[0]
    with contextlib.ExitStack() as stack, torch.random.fork_rng(devices=[]), torch.no_grad():
        for delta in dict.fromkeys(deltas):
            stack.enter_context(delta.detached())  # the backbone's own values show, and nobody owns them
        truncation: dict[str, float] = {}
        if _low_rank(first):
            updates = _combined_updates(deltas, mixer, rank)
            common = rank or max(down.shape[0] for down, _, _ in updates.values())
            result = _made(first, _lora_config(first.config, common))
            values: Tensors = {}
            for attachment in result.attachments:
                down, up, lost = updates[attachment.site, attachment.rows]
                if method != "linear" or rank:
                    truncation[attachment.saved_prefix] = lost
                names = (f"{attachment.saved_prefix}.{factor}" for factor in ("lora_A", "lora_B"))
                values |= zip(names, _padded(down, up, common), strict=True)
        else:
            _check_keys(deltas)
            torch.manual_seed(0)
            result, other = _made(first, first.config), _made(first, first.config)
            values = _combined_parameters(deltas, mixer, _starts(result, other), _fixed(result))
        values |= _combined_owned(deltas, mixer)
        result.load_tensors(values, "the combination")
    result.combination = Combination(method, mixer.weights, density, seed, truncation)
    return result


# --- the methods, on tensors ------------------------------------------------------------------------------------------


@dataclass
class Mixer:
    """One method with its numbers: makes one tensor of the task vectors of several deltas."""

    method: str
    weights: tuple[float, ...]
    density: float
    generator: torch.Generator

    def __call__(self, tasks: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the combination of tensors of one shape."""
        if self.method.startswith("dare"):
            tasks = [dropped(task, self.density, self.generator) for task in tasks]
        elif self.method == "ties":
            tasks = [trimmed(task, self.density) for task in tasks]
        stacked = torch.stack(list(tasks))
        weights = torch.tensor(self.weights, dtype=stacked.dtype, device=stacked.device)
        weighted = stacked * weights.view(-1, *(1 for _ in tasks[0].shape))
        if not self.method.endswith("ties"):
            return weighted.sum(0)
        agree = agreeing(stacked)
        return (weighted * agree).sum(0) / agree.sum(0).clamp(min=1)


def trimmed(task: torch.Tensor, density: float) -> torch.Tensor:
    """Return a tensor with its largest elements by magnitude, ``density`` of all, and zeros."""
    if density >= 1:
        return task
    kept = task.abs().flatten().topk(int(density * task.numel())).indices
    mask = torch.zeros_like(task).flatten().index_fill(0, kept, 1)
    return task * mask.view_as(task)


def dropped(task: torch.Tensor, density: float, generator: torch.Generator) -> torch.Tensor:
    """Return a tensor of which each element is kept with probability ``density`` and divided by it, and zero otherwise."""
    if density >= 1:
        return task
    mask = torch.bernoulli(torch.full(task.shape, density, device="cpu"), generator=generator)
    return task * mask.to(task) / density


def agreeing(tasks: torch.Tensor) -> torch.Tensor:
    """Return where the elements of stacked tensors, shape ``(n, ...)``, have the sign of their sum over ``n``."""
    elected = torch.where(tasks.sum(0) >= 0, 1, -1)
    return tasks.sign() == elected


# --- LoRA: the update itself ------------------------------------------------------------------------------------------


def _low_rank(delta: DeltaModel) -> bool:
    """Say whether all layers of a delta add a product of two matrices, all of it trained, to a weight."""
    layers = [attachment.layer for attachment in delta.attachments]
    return bool(layers) and all(isinstance(x, (LoraLayer, AdaloraLayer)) and not isinstance(x, DoraLayer) for x in layers)


def _lora_config(config: DeltaConfig, rank: int) -> DeltaConfig:
    """Return the config of a LoRA of one rank, with a scale of one, for the modules of another config."""
    common = {f.name: getattr(config, f.name) for f in dataclasses.fields(DeltaConfig)}
    dropout = getattr(config, f"{config.delta_type}_dropout")
    own = {"delta_type": "lora", "lora_r": rank, "lora_alpha": rank, "lora_dropout": dropout}
    return DeltaConfig.from_dict({**common, **own})


def _combined_updates(deltas: Sequence[DeltaModel], mixer: Mixer, rank: int | None) -> dict[Place, Factors]:
    """Return A and B of the combination, and what was lost of their product, for every place of a layer."""
    layers: list[dict[Place, Any]] = [{(a.site, a.rows): a.layer for a in delta.attachments} for delta in deltas]
    result = {}
    for place in layers[0]:
        found = [_factors(own[place]) for own in layers]
        if mixer.method == "linear" and rank is None:
            scaled = [weight * up for weight, (_, up) in zip(mixer.weights, found, strict=True)]
            result[place] = torch.cat([down for down, _ in found]), torch.cat(scaled, dim=1), 0.0
        else:
            whole = mixer([up @ down for down, up in found])
            down, up = _truncated(whole, rank or max(own[place].lora_A.shape[0] for own in layers))
            size = float(torch.linalg.matrix_norm(whole))
            result[place] = down, up, float(torch.linalg.matrix_norm(whole - up @ down)) / size if size else 0.0
    return result


def _factors(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A and B in float64, the scale in B."""
    down, up = (factor.double() for factor in layer.factors())
    return down, layer.scale * up


def _padded(down: torch.Tensor, up: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A and B with zeros where their rank, which may differ from module to module, is lower."""
    missing = rank - down.shape[0]
    return nn.functional.pad(down, (0, 0, 0, missing)).float(), nn.functional.pad(up, (0, missing)).float()


def _truncated(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the A and B of the best approximation of a matrix by one of a rank."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    root = s[:rank].sqrt()
    return root[:, None] * vh[:rank], u[:, :rank] * root


# --- parameters -------------------------------------------------------------------------------------------------------


def _made(first: DeltaModel, config: DeltaConfig) -> DeltaModel:
    """Return a new delta on the backbone of ``first``, detached."""
    config = copy.deepcopy(config)
    config.saved_with = SavedWith()
    result = direct_class(type(config))(first.backbone_model, config)
    result.detach()
    return result


def _starts(one: DeltaModel, other: DeltaModel) -> Tensors:
    """Return what the layers' parameters start at, found from two new deltas: zero where it is random."""
    first, second = one.delta_tensors(), other.delta_tensors()
    return {n: v.detach().clone() if torch.equal(v, second[n]) else torch.zeros_like(v) for n, v in first.items()}


def _fixed(delta: DeltaModel) -> set[str]:
    """Return the names of the tensors of a delta that are not trained."""
    return {name for a in delta.attachments for name, _ in a.layer.named_buffers(prefix=a.saved_prefix)}


def _combined_parameters(deltas: Sequence[DeltaModel], mixer: Mixer, starts: Tensors, fixed: set[str]) -> Tensors:
    """Return the combined parameters of the layers, and their fixed tensors, in which the deltas must agree."""
    tensors, result = [delta.delta_tensors() for delta in deltas], {}
    owned = set(backbone_parameters(deltas[0].backbone_model))
    for name, start in starts.items():
        if name in owned:
            continue
        found = [own[name].detach() for own in tensors]
        if name not in fixed:
            result[name] = (start.double() + mixer([value.double() - start.double() for value in found])).to(start.dtype)
        elif all(torch.equal(value, found[0]) for value in found):
            result[name] = found[0]
        else:
            raise DeltaExpError(
                f"The deltas cannot be combined: {name!r}, which is not trained, differs between them, so their parameters do "
                "not mean the same. Give all of them the same seeds when they are made."
            )
    return result


def _combined_owned(deltas: Sequence[DeltaModel], mixer: Mixer) -> Tensors:
    """Return the combined values of the backbone's parameters that the deltas train, all of them being detached."""
    base = [backbone_parameters(delta.backbone_model) for delta in deltas]
    values = [delta.delta_tensors() for delta in deltas]
    result = {}
    for name in values[0].keys() & base[0].keys():
        start = base[0][name].detach()
        tasks = [own[name].double() - plain[name].double() for own, plain in zip(values, base, strict=True)]
        result[name] = (start.double() + mixer(tasks)).to(start.dtype)
    return result


# --- what belongs together --------------------------------------------------------------------------------------------


def _check_numbers(
    deltas: Sequence[DeltaModel], weights: Sequence[float], method: str, density: float, rank: int | None
) -> None:
    if method not in METHODS:
        raise ConfigError(unknown("method of combining", method, METHODS))
    if not 0 < density <= 1:
        raise ConfigError(f"density is {density!r}; it must be greater than 0 and at most 1.")
    if not deltas or len(weights) != len(deltas):
        raise ConfigError(f"{len(deltas)} deltas were given with {len(weights)} weights; give one weight for each delta.")
    if not all(math.isfinite(weight) for weight in weights):
        raise ConfigError(f"The weights are {list(weights)!r}; each must be a finite number.")
    if rank is not None and (rank < 1 or not _low_rank(deltas[0])):
        raise ConfigError(
            f"rank is {rank!r}; it must be at least 1, and only LoRA without DoRA, and AdaLoRA, have one to choose."
        )


def _check_alike(deltas: Sequence[DeltaModel]) -> None:
    first = deltas[0]
    for other in deltas[1:]:
        if other.config.delta_type != first.config.delta_type or _low_rank(other) != _low_rank(first):
            kinds = dict.fromkeys(
                " ".join([d.config.delta_type, *{type(a.layer).__name__ for a in d.attachments}]) for d in deltas
            )
            raise DeltaExpError(f"Only deltas of one type can be combined, and these are {listing(kinds)}.")
        places = [{attachment.saved_prefix for attachment in delta.attachments} for delta in (first, other)]
        names = [set(d.delta_tensors()) & set(backbone_parameters(d.backbone_model)) for d in (first, other)]
        differing = sorted((places[0] ^ places[1]) | (names[0] ^ names[1]))
        if differing:
            raise DeltaExpError(
                f"The deltas cannot be combined: only one of them has {listing(differing, 4)}. Combine deltas with the same "
                "modified_modules and unfrozen_modules."
            )
        if other.backbone_model is not first.backbone_model:
            difference = compare(digests(first.base_tensors()), digests(other.base_tensors()))
            if difference:
                raise DeltaExpError(
                    f"The deltas cannot be combined: their backbones differ in {listing(difference.names, 4)}. Combine deltas "
                    "that were trained on the same backbone."
                )


def _check_keys(deltas: Sequence[DeltaModel]) -> None:
    """Raise a `DeltaExpError` unless the parameters of the deltas mean the same."""
    base = {f.name for f in dataclasses.fields(DeltaConfig)}
    own: list[Mapping] = [
        {key: value for key, value in delta.config.to_dict().items() if key not in base and "dropout" not in key}
        for delta in deltas
    ]
    differing = sorted({key for values in own for key in values if values[key] != own[0][key]})
    if differing:
        raise DeltaExpError(
            f"The deltas cannot be combined: they differ in {listing(differing)}, so their parameters do not mean the same."
        )
