"""What a run would train and take, told before a weight is loaded: targets, parameters, memory, FLOPs."""

from __future__ import annotations

import dataclasses
import json
import re
import time
from collections import Counter
from dataclasses import dataclass, field

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from deltaexp.addressing import covers
from deltaexp.auto import AutoDeltaModel
from deltaexp.errors import AddressingError, ConfigError, DeltaExpError, listing
from deltaexp.lab import blueprint, costs, estimate, optimizers, shortcuts
from deltaexp.lab.blueprint import Blueprint, Checkpoint
from deltaexp.lab.config import RunConfig
from deltaexp.lab.costs import Memory, Sizes
from deltaexp.model import DeltaModel
from deltaexp.quantised import INSTEAD
from deltaexp.registry import DeltaConfig
from deltaexp.structure import backbone_parameters, blocks, common_names, linear_dims

INDEX = re.compile(r"(?<=\.)\d+(?=\.|$)")
"""The number of a block in a name."""
DEVICES = {"cpu": "CPU", "gpu": "GPU"}
COUNTED = ("total", "trainable", "saved")


@dataclass
class Alike:
    """Modules that a pattern means and that differ by the numbers of their blocks only."""

    name: str
    """With stars for the numbers."""
    count: int
    shape: str
    """Of a linear map ``in -> out``, else the class."""


@dataclass
class Plan:
    """What `make` finds out."""

    delta_type: str
    backbone: str
    """The name of the backbone."""
    backbone_class: str
    checkpoint: Checkpoint
    patterns: dict[str, list[Alike]]
    """For every pattern of ``modified_modules`` the modules that it means."""
    blocks: dict[str, dict[str, str]]
    """For every pattern and every stack of blocks, in how many of the blocks there are such modules: ``6 of 6``."""
    new: list[str]
    """Patterns of what the checkpoint lacks, such as a classifier; it is trained and saved with the delta."""
    parts: dict[str, dict[str, int]]
    """Parameters: of each part in all (``total``), ``trainable`` and ``saved``."""
    batch: dict[str, int]
    """Rows of a training batch, and tokens of each."""
    steps: int | None
    """Optimizer steps; None where only the data tell."""
    price: str
    """What it costs a run to find out about a typo."""
    memory: dict[str, Memory] = field(default_factory=dict)
    """By device, ``cpu`` and ``gpu``; empty where it cannot be told."""
    flops: dict[str, int] = field(default_factory=dict)
    """Of a step's ``forward`` and ``backward`` pass, of the ``step``, and of the ``run`` where its steps are known."""
    left_out: list[str] = field(default_factory=list)
    """Sentences on what is computed once, or not at all, because it would come to the same."""
    remarks: list[str] = field(default_factory=list)
    """What is odd, assumed or not known."""
    seconds: float = 0.0
    """What finding it out took."""

    def parameters(self, which: str) -> int:
        """Return the number of all (``total``), the ``trainable`` or the ``saved`` parameters."""
        return sum(part[which] for part in self.parts.values())

    def dump(self) -> str:
        """Return all of it as JSON."""
        result = dataclasses.asdict(self)
        result["parameters"] = {which: self.parameters(which) for which in COUNTED}
        for device, memory in self.memory.items():
            result["memory"][device]["peak"] = memory.peak
        return json.dumps(result, indent=2)


def make(config: RunConfig, delta_config: DeltaConfig, sizes: Sizes | None = None) -> Plan:
    """Find out what a run would train and take; no weights are read.

    Args:
        config: The run.
        delta_config: Its delta.
        sizes: What is known of the data.

    Raises:
        ConfigError: If the backbone cannot do what is asked for.
        AddressingError: If a pattern matches nothing; the message says what it would have cost to find out by a run.
        DeltaExpError: If the backbone's config cannot be read, or the delta cannot be built without weights.
    """
    started, sizes = time.perf_counter(), sizes or Sizes()
    drawn = blueprint.make(config.backbone, config.task)
    weights = blueprint.checkpoint(config.backbone, drawn)
    told = price(weights, drawn.model)
    try:
        delta_model = attach(config, delta_config, drawn)
    except (AddressingError, ConfigError) as error:
        raise type(error)(f"{error} {told} Nothing was loaded here.") from error
    batch, stacks = costs.batch_sizes(config, delta_config, drawn, sizes), blocks(drawn.model)
    plan = Plan(
        delta_type=delta_config.delta_type,
        backbone=config.backbone.name,
        backbone_class=type(drawn.model).__name__,
        checkpoint=weights,
        patterns={pattern: _alike(names, drawn.model) for pattern, names in delta_model.targets.items()},
        blocks={pattern: _in_blocks(names, stacks) for pattern, names in delta_model.targets.items()},
        new=drawn.new,
        parts=parts(delta_model, drawn),
        batch=batch,
        steps=_steps(config, sizes),
        price=told,
        remarks=[*drawn.assumed, *odd(delta_model, drawn.model)],
    )
    if batch.get("choices") and len(config.task.choices) < 2:
        plan.remarks.append(f"How many answers a row has to choose from is read from the data: {costs.CHOICES} are assumed.")
    plan.left_out = shortcuts.planned(config, delta_model)
    found = costs.find(config, delta_model, drawn, batch)
    plan.memory, plan.flops = found.memory, found.flops
    if plan.flops and plan.steps:
        plan.flops["run"] = plan.flops["step"] * plan.steps
    plan.remarks += found.remarks
    plan.seconds = time.perf_counter() - started
    return plan


def attach(config: RunConfig, delta_config: DeltaConfig, drawn: Blueprint) -> DeltaModel:
    """Put a delta into a backbone without weights, as a run would, and freeze what it does not train.

    Args:
        config: The run.
        delta_config: Its delta.
        drawn: The backbone; where the delta cannot be put on it, it is left without one.

    Raises:
        AddressingError: If a pattern matches nothing, or what cannot carry the delta.
        DeltaExpError: If the delta cannot be built without weights.
    """
    delta_model = None
    try:
        delta_model = AutoDeltaModel.from_config(delta_config, backbone_model=drawn.model)
        delta_model.freeze_module(exclude=[*delta_config.unfrozen_modules, *drawn.new])
        _check_packed(delta_model, drawn)
        optimizers.named_rates(delta_model, config.trainer.learning_rates)
    except Exception as error:
        if delta_model is not None:
            delta_model.detach()
        # The layers of another library may want values, which the weights do not have here.
        if delta_config.builds_on_meta or "meta" not in f"{error} {error.__cause__}":
            raise
        reason = str(error.__cause__ or error).splitlines()[0]
        raise DeltaExpError(
            f"What delta_type={delta_config.delta_type} puts into the backbone cannot be told without its weights: its "
            f"layers are computed from them ({reason})."
        ) from error
    return delta_model


def _check_packed(delta_model: DeltaModel, drawn: Blueprint) -> None:
    """Check that nothing is trained in place that would be held quantised.

    Raises:
        AddressingError: If something is.
    """
    wrong = sorted(drawn.packed.keys() & delta_model.trainable_parameters().keys())
    if wrong:
        raise AddressingError(f"{listing(wrong, 3)} would be held quantised and cannot be trained. {INSTEAD}.")


def price(weights: Checkpoint, model: nn.Module) -> str:
    """Return what it costs a run to find out what is found out here without weights."""
    held = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    how = "reading" if weights.here else "downloading"
    return (
        f"A run would say so after loading its data, {how} {size(weights.bytes)} of weights and holding {size(held)} of them."
    )


def _alike(names: list[str], model: nn.Module) -> list[Alike]:
    modules, found = dict(model.named_modules()), Counter[tuple[str, str]]()
    for name in names:
        dims = linear_dims(modules[name])
        shape = f"{dims[0]} -> {dims[1]}" if dims else type(modules[name]).__name__
        found[INDEX.sub("*", name) or "the backbone", shape] += 1
    return [Alike(name, count, shape) for (name, shape), count in found.items()]


def _in_blocks(names: list[str], stacks: list[list[str]]) -> dict[str, str]:
    result = {}
    for stack in stacks:
        hit = sum(any(f"{name}.".startswith(f"{block}.") for name in names) for block in stack)
        if hit:
            result[stack[0].rpartition(".")[0]] = f"{hit} of {len(stack)}"
    return result


def parts(delta_model: DeltaModel, drawn: Blueprint) -> dict[str, dict[str, int]]:
    """Return the numbers of parameters by part: of each in all (``total``), ``trainable`` and ``saved``."""
    own, saved = backbone_parameters(drawn.model), delta_model.delta_tensors()
    fresh = {name for name in own if any(covers(pattern, name) for pattern in drawn.new)}
    groups: dict[str, dict[str, torch.Tensor]] = {
        "layers of the delta": {name: tensor for name, tensor in saved.items() if name not in own},
        "new in the backbone": {name: own[name] for name in own if name in fresh},
        "the backbone's own": {name: own[name] for name in own if name not in fresh},
    }
    trained = {id(parameter) for parameter in delta_model.trainable_parameters().values()}
    return {
        part: {
            "total": sum(tensor.numel() for tensor in tensors.values()),
            "trainable": sum(tensor.numel() for tensor in tensors.values() if id(tensor) in trained),
            "saved": sum(tensor.numel() for name, tensor in tensors.items() if name in saved),
        }
        for part, tensors in groups.items()
        if tensors
    }


def odd(delta_model: DeltaModel, model: nn.Module) -> list[str]:
    """Return sentences on what may not be what was meant."""
    found, delta_config = [], delta_model.config
    stacks = blocks(model) if delta_config.layers is None else []
    for pattern, names in delta_model.targets.items():
        for stack, hit in _in_blocks(names, stacks).items():
            if len(set(hit.split(" of "))) == 2:
                found.append(
                    f"The pattern {pattern!r} matches in {hit} blocks of {stack}. If that is not what you mean, `deltaexp "
                    "structure` shows the names; layers=... chooses blocks by number."
                )
    common, names = common_names(model), [name for name, _ in model.named_modules()]
    for pattern in delta_config.exclude_modules:
        if pattern != "lm_head" and not any(covers(pattern, name, common.get(name, ())) for name in names):
            found.append(f"{pattern!r} in exclude_modules matches no module of this backbone: it leaves nothing out.")
    if not delta_model.trainable_parameters():
        found.append("Nothing is trainable: a run would measure the backbone as it is.")
    return found


def _steps(config: RunConfig, sizes: Sizes) -> int | None:
    """Return the number of optimizer steps; None where the number of rows is not known."""
    trainer, rows = config.trainer, sizes.rows or config.task.train_rows
    if trainer.max_steps > 0 or rows is None:
        return trainer.max_steps if trainer.max_steps > 0 else None
    per_epoch = -(-rows // (trainer.batch_size * trainer.gradient_accumulation_steps))
    return max(1, round(per_epoch * trainer.epochs))


def show(plan: Plan, console: Console | None = None) -> None:
    """Print a plan.

    Args:
        plan: What `make` found out.
        console: Where to print; standard output where none is given.
    """
    console = console or Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console = Console(file=console.file, highlight=False, width=160)  # a file is as wide as the tables need
    where = "on this machine" if plan.checkpoint.here else "to be downloaded"
    console.print(
        f"{plan.delta_type} on {plan.backbone}, a {plan.backbone_class}; weights of {size(plan.checkpoint.bytes)}, {where}",
        markup=False,
    )
    for table in filter(None, (_targets(plan), _counts(plan), _memory(plan))):
        console.print(table)
    if plan.new:
        console.print(f"new, trained and saved with the delta: {listing(plan.new)}", markup=False)
    for line in [*_sentences(plan), *plan.left_out, *plan.remarks]:
        console.print(line, markup=False)
    console.print(
        f"Found out in {plan.seconds:.1f} s, without weights. {plan.price.replace('say so', 'notice a typo in the names')}",
        markup=False,
    )


def _targets(plan: Plan) -> Table | None:
    if not plan.patterns:
        return None
    table = Table("pattern", title="what the patterns match")
    table.add_column("modules", overflow="fold")
    table.add_column("how many", justify="right")
    table.add_column("in -> out, or class")
    table.add_column("blocks")
    for pattern, found in plan.patterns.items():
        stacks = ", ".join(f"{hit} of {stack}" for stack, hit in plan.blocks[pattern].items())
        for number, alike in enumerate(found):
            first = number == 0
            table.add_row(
                (pattern or "(all)") if first else "", alike.name, str(alike.count), alike.shape, stacks if first else ""
            )
    return table


def _counts(plan: Plan) -> Table:
    table = Table("parameters", title="what is trained and saved")
    for which in COUNTED:
        table.add_column(which, justify="right")
    for part, numbers in plan.parts.items():
        table.add_row(part, *(f"{numbers[which]:,}" for which in COUNTED))
    table.add_section()
    table.add_row("all", *(f"{plan.parameters(which):,}" for which in COUNTED))
    return table


def _memory(plan: Plan) -> Table | None:
    if not plan.memory:
        return None
    tokens = " x ".join(map(str, plan.batch.values()))
    table = Table("memory", title=f"the most that is held, batches of {tokens}")
    for device, memory in plan.memory.items():
        table.add_column(f"{DEVICES[device]}, {memory.precision}", justify="right")
    memories = list(plan.memory.values())
    kinds = [kind for kind in estimate.KINDS if any(kind in memory.training for memory in memories)]
    for kind in kinds:
        table.add_row(kind, *(size(memory.training.get(kind, 0)) for memory in memories))
    table.add_section()
    table.add_row("a training step", *(size(sum(memory.training.values())) for memory in memories))
    table.add_row("an evaluation's forward pass", *(size(memory.evaluation) for memory in memories))
    table.add_row("the saved delta on a second backbone", *(size(memory.verification) for memory in memories))
    table.add_row("the most of a run", *(size(memory.peak) for memory in memories))
    return table


def _sentences(plan: Plan) -> list[str]:
    """Return what the tables leave out."""
    result = []
    if plan.memory:
        peaks = {memory.during for memory in plan.memory.values()}
        when = peaks.pop() if len(peaks) == 1 else listing(f"{DEVICES[d]}: {m.during}" for d, m in plan.memory.items())
        result.append(f"A step's peak is in its {when}; all its gradients are {size(plan.memory['cpu'].gradients)}.")
        result.append(
            "On the CPU the process with its libraries comes on top, and freed memory that the C library cannot use again: "
            "with glibc a quarter to four fifths of the activations, or none of it, but more slowly, with "
            "MALLOC_MMAP_THRESHOLD_=131072 in the environment. On a GPU the CUDA context comes on top."
        )
        if any(memory.evaluation > sum(memory.training.values()) for memory in plan.memory.values()):
            result.append(
                "An evaluation holds more than training does; trainer.eval_batch_size may be smaller without another result. "
                "What it takes to generate text is not counted."
            )
    if plan.flops:
        forward, backward, step = (amount(plan.flops[name]) for name in ("forward", "backward", "step"))
        line = f"A step computes {step}FLOP: {forward}FLOP forward and {backward}FLOP backward."
        if plan.steps:
            line += f" The run's {plan.steps:,} steps: {amount(plan.flops['run'])}FLOP."
        else:
            line += " How many steps there are, only the data tell: give rows=N for the whole."
        result.append(line)
    return result


def size(count: float) -> str:
    """Return a number of bytes for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def amount(count: float) -> str:
    """Return a number with the prefix of a unit, such as ``1.2 T``."""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if count < 1000:
            return f"{count:.3g} {prefix}"
        count /= 1000
    return f"{count:.3g} E"
