"""What a run is configured with, apart from its delta: the one place where the defaults of the lab live.

Every field is a key of the command line (``trainer.learning_rate=1e-3``). The YAML files in ``conf/`` hold only what
differs from the defaults here. Nothing in this module imports torch or Hydra.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Optional

from deltaexp.errors import ConfigError, unknown
from deltaexp.registry import checked

DTYPES = ("float32", "bfloat16", "float16")
KINDS = ("seq2seq", "classification")
SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup")
TRACKERS = ("none", "wandb")
WANDB_MODES = ("online", "offline", "disabled")


@dataclass
class SeedsConfig:
    """The seeds of a run; one that is null takes the value of ``seed``."""

    init: Optional[int] = None
    """Initialises new layers: the delta's and new heads."""
    data: Optional[int] = None
    """Orders the training data."""
    dropout: Optional[int] = None
    """Drives what is random while training."""


@dataclass
class BackboneConfig:
    """The pretrained model that the delta is attached to."""

    name: str = ""
    """Short name, used in folders and tables."""
    source: str = ""
    """A repository of the Hub, a folder, ``embedded:NAME`` or ``package:MODULE/FOLDER`` of an installed package."""
    revision: Optional[str] = None
    """Branch, tag or commit of a repository."""
    tokenizer: Optional[str] = None
    """Where the tokenizer comes from, if not from `source`; ``byt5`` is the byte-level one, which needs no files."""
    dtype: str = "float32"
    """Precision in which the weights are held."""


@dataclass
class TaskConfig:
    """The data, what is to be learnt from them and how it is measured."""

    name: str = ""
    """Short name, used in folders and tables."""
    kind: str = ""
    """``seq2seq``: text to text; ``classification``: one of the labels for a text or a pair of texts."""
    data: str = ""
    """A dataset of the Hub, a local folder or file, or ``generated:NAME`` for one that deltaexp makes itself."""
    subset: Optional[str] = None
    """Configuration of a dataset of the Hub that has several."""
    train_split: str = "train"
    validation_split: str = "validation"
    test_split: Optional[str] = "test"
    """Split of the final evaluation; null where its labels are not public, then the validation split is taken."""
    inputs: list[str] = field(default_factory=list)
    """Columns that hold the text, or the two texts of a pair."""
    target: str = ""
    """Column that holds the target text or the label."""
    labels: list[str] = field(default_factory=list)
    """Names of the classes, in the order of their numbers."""
    train_rows: Optional[int] = None
    """Take only so many rows of the training split, drawn with `data_seed`; null takes all."""
    validation_rows: Optional[int] = None
    test_rows: Optional[int] = None
    max_source_length: int = 128
    """Longest input in tokens; what is longer is cut, and counted."""
    max_target_length: int = 64
    """Longest target in tokens, and longest generated answer."""
    data_seed: int = 0
    """Seed of generated data and of the choice of rows; the same for all seeds of a study."""


@dataclass
class TrainerConfig:
    """How the delta is trained."""

    epochs: float = 3.0
    max_steps: int = -1
    """Number of optimizer steps; -1 goes by `epochs`."""
    batch_size: int = 32
    """Rows in a step, per device."""
    eval_batch_size: int = 128
    gradient_accumulation_steps: int = 1
    learning_rate: float = 1e-3
    lr_scheduler: str = "linear"
    warmup_ratio: float = 0.06
    """Part of the steps over which the learning rate rises from zero."""
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    """Norm to which the gradient is clipped."""
    eval_every: Optional[int] = None
    """Evaluate on the validation split every so many steps while training; null: only if early stopping is on."""
    early_stopping_patience: Optional[int] = None
    """Stop after so many evaluations without improvement, and take the best checkpoint; null trains to the end."""
    group_by_length: bool = False
    """Put rows of similar length into a batch, which saves computing on padding where lengths vary."""
    log_every: int = 25
    """Steps between two entries of the training log."""
    save_every: Optional[int] = None
    """Steps between two checkpoints, from which `resume=true` goes on. Null goes by time: one a minute at most, or fewer where
    writing them would take more than a fiftieth of the time, and one when training ends. 0 writes none. With early stopping
    there is also one after every evaluation."""
    keep_checkpoints: bool = False
    """Keep the last checkpoint when the delta is complete."""
    cpu: bool = False
    """Stay on the CPU where there is a GPU."""
    progress: bool = True
    """Show progress bars."""


@dataclass
class HubConfig:
    """Where the delta is pushed."""

    push: bool = False
    repo_id: Optional[str] = None
    """The repository, such as ``DeltaHub/lora-t5-dates``; made if it does not exist."""
    private: Optional[bool] = None
    """Whether a new repository is private; null takes the organisation's default."""
    revision: Optional[str] = None
    """Branch to push to; null is the main one."""


@dataclass
class TrackerConfig:
    """Where metrics are logged to, besides the run's folder."""

    name: str = "none"
    project: str = "deltaexp"
    entity: Optional[str] = None
    group: Optional[str] = None
    mode: Optional[str] = None
    """W&B's mode: ``online``, ``offline`` or ``disabled``; null leaves it to W&B's own settings."""
    tags: list[str] = field(default_factory=list)


@dataclass
class RunConfig:
    """A whole run, apart from the keys of its delta type."""

    resume: bool = False
    """Continue the newest run of the same config that was interrupted; the result is the one of an uninterrupted run."""
    seed: int = 42
    """The seed that all seeds of `seeds` default to."""
    seeds: SeedsConfig = field(default_factory=SeedsConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    hub: HubConfig = field(default_factory=HubConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)

    def resolved_seeds(self) -> dict[str, int]:
        """Return the seed of every purpose."""
        own = dataclasses.asdict(self.seeds)
        return {purpose: self.seed if value is None else value for purpose, value in own.items()}


PARTS = {f.name: f.default_factory for f in dataclasses.fields(RunConfig) if callable(f.default_factory)}
"""The sections of a run's config, by name."""


def from_dict(values: Mapping[str, Any]) -> RunConfig:
    """Build a checked `RunConfig` from nested dicts.

    Raises:
        ConfigError: If a key is unknown, or a value has the wrong type or is out of range.
    """
    flat = {key: value for key, value in values.items() if key not in PARTS}
    run = RunConfig(**checked(RunConfig, flat, "a run"))
    for name, section in PARTS.items():
        if name in values:
            schema = type(section())
            setattr(run, name, schema(**checked(schema, dict(values[name]), name)))
    check(run)
    return run


def check(run: RunConfig) -> None:
    """Check the values of a run that types alone do not rule out.

    Raises:
        ConfigError: If one is out of range, or two contradict one another.
    """
    for section, key, allowed in (
        ("backbone", "dtype", DTYPES),
        ("task", "kind", KINDS),
        ("trainer", "lr_scheduler", SCHEDULES),
        ("tracker", "name", TRACKERS),
    ):
        value = getattr(getattr(run, section), key)
        if value not in allowed:
            raise ConfigError(unknown(f"{section}.{key}", value, allowed))
    if not run.backbone.source:
        raise ConfigError("backbone.source is empty; name a repository of the Hub or a folder, e.g. backbone.source=t5-base.")
    if not run.task.data:
        raise ConfigError("task.data is empty; name a dataset of the Hub or a folder, e.g. task.data=../data/sst2.")
    at_least_one = {
        "trainer": ("batch_size", "eval_batch_size", "gradient_accumulation_steps", "eval_every", "log_every",
                    "early_stopping_patience"),
        "task": ("train_rows", "validation_rows", "test_rows", "max_source_length", "max_target_length"),
    }  # fmt: skip
    for section, keys in at_least_one.items():
        for key in keys:
            value = getattr(getattr(run, section), key)
            if value is not None and value < 1:
                raise ConfigError(f"{section}.{key} is {value}; it must be at least 1.")
    trainer = run.trainer
    if trainer.max_steps < 1 and trainer.max_steps != -1:
        raise ConfigError(f"trainer.max_steps is {trainer.max_steps}; it must be at least 1, or -1 to go by trainer.epochs.")
    for key in ("epochs", "learning_rate", "max_grad_norm"):
        if getattr(trainer, key) <= 0:
            raise ConfigError(f"trainer.{key} is {getattr(trainer, key)}; it must be greater than 0.")
    for key in ("weight_decay", "save_every"):
        if (getattr(trainer, key) or 0) < 0:
            raise ConfigError(f"trainer.{key} is {getattr(trainer, key)}; it must be at least 0.")
    if not 0 <= trainer.warmup_ratio < 1:
        raise ConfigError(f"trainer.warmup_ratio is {trainer.warmup_ratio}; it must be at least 0 and less than 1.")
    if run.task.kind == "classification" and len(run.task.labels) < 2:
        raise ConfigError("A classification task needs at least two names in task.labels, in the order of their numbers.")
    if len(run.task.inputs) not in (1, 2) or not run.task.target:
        raise ConfigError("A task needs one or two columns in task.inputs and one in task.target.")
    if run.tracker.mode not in (None, *WANDB_MODES):
        raise ConfigError(unknown("tracker.mode", run.tracker.mode, WANDB_MODES))
    if run.hub.push and not run.hub.repo_id:
        raise ConfigError("hub.push=true needs hub.repo_id, such as hub.repo_id=DeltaHub/lora-t5-dates.")
    if min(run.seed, *run.resolved_seeds().values()) < 0:
        raise ConfigError("A seed is negative; seeds are whole numbers from 0.")
