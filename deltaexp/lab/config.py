"""What a run is configured with, apart from its delta: the one place where the defaults of the lab live.

Every field is a key of the command line (``trainer.learning_rate=1e-3``). The YAML files in ``conf/`` hold only what
differs from the defaults here. Nothing in this module imports torch or Hydra.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Optional

from deltaexp.card import LANGUAGE, LICENSES
from deltaexp.errors import ConfigError, did_you_mean, unknown
from deltaexp.hubclient import check_push, is_repo_id
from deltaexp.lab import public, requirements, taskconfig
from deltaexp.lab.hyperparameters import check_trainer
from deltaexp.lab.taskconfig import TaskConfig
from deltaexp.redaction import is_secret
from deltaexp.registry import DeltaConfig, checked

WANDB_MODES = ("online", "offline", "disabled")
JOINT = ("off", "auto")


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
    """Precision in which the weights are held: ``float32``, ``bfloat16``, ``float16``, or ``auto`` for the checkpoint's own."""
    device_map: Optional[str] = None
    """Where the weights are loaded to: a device, such as ``cuda:0``, or ``auto``, ``balanced``, ``balanced_low_0`` or
    ``sequential`` to spread them over all GPUs; null loads to the CPU, and training moves them to its device."""
    attention: Optional[str] = None
    """How attention is computed: ``eager``, ``sdpa``, ``flex_attention``, ``flash_attention_2`` or ``flash_attention_3``; null
    leaves it to transformers."""
    quantization: Optional[str] = None
    """Quantise the linear maps of the base model while loading: ``bnb_8bit`` (LLM.int8()) or ``bnb_4bit`` (as in QLoRA) by
    bitsandbytes, ``torchao_int8`` or ``torchao_float8`` (weights only) by torchao."""
    bnb_4bit_type: str = "nf4"
    """For ``bnb_4bit``: the 4-bit numbers, ``nf4`` or ``fp4``."""
    bnb_4bit_double: bool = True
    """For ``bnb_4bit``: quantise the scales as well (QLoRA's double quantisation)."""
    bnb_4bit_compute_dtype: Optional[str] = None
    """For ``bnb_4bit``: the dtype in which is multiplied; null takes `dtype`."""
    trust_remote_code: bool = False
    """Run Python code that the checkpoint brings along; read that code first."""


@dataclass
class TrainerConfig:
    """How the delta is trained."""

    epochs: float = 3.0
    max_steps: int = -1
    """Number of optimizer steps; -1 goes by `epochs`."""
    batch_size: int = 32
    """Rows in a step, per device: with several processes each has one."""
    eval_batch_size: int = 128
    gradient_accumulation_steps: int = 1
    learning_rate: Optional[float] = None
    """The largest learning rate of the schedule; null takes the one that is recommended for the delta type."""
    learning_rates: dict[str, float] = field(default_factory=dict)
    """Learning rates of their own for some of the trained parameters, by pattern: ``{classifier: 1e-4}``; ``deltas`` stands for
    the delta's layers. What the delta type multiplies rates by (LoRA+) counts here, too."""
    optimizer: str = "adamw"
    """``adamw``, ``adamw_fused``, ``adafactor`` (whose steps are not scaled by the parameters), ``sgd``, or with bitsandbytes
    ``adamw_8bit`` and ``paged_adamw_8bit``."""
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    momentum: float = 0.9
    """SGD's momentum."""
    precision: str = "auto"
    """What is computed in while training and evaluating: ``fp32``; ``bf16`` or ``fp16``, mixed with float32 by autocast;
    ``auto``: bf16 on a GPU that has it, fp16 on one that has not, fp32 on the CPU. What the weights are held in is
    `backbone.dtype`."""
    speed: str = "off"
    """``auto`` takes the fastest safe setting for the device in the place of what is not set: on a CPU with instructions for
    bf16 that precision, with kept casts of frozen weights, low-rank updates computed together and a faster attention, on every
    CPU freed memory that the process keeps for the next step; on a GPU kept casts, low-rank updates computed together and the
    steps of small batches as CUDA graphs; and everywhere a fused AdamW. What is trained stays in float32. ``off`` computes as
    all else says, the same on every CPU."""
    lr_scheduler: str = "linear"
    """How the learning rate falls, by its name in transformers."""
    scheduler_options: dict[str, Any] = field(default_factory=dict)
    """The schedule's own numbers, such as ``{min_lr_rate: 0.1}`` for ``cosine_with_min_lr``. ``warmup_stable_decay`` falls over
    ``num_decay_steps``, by default a fifth of all steps (Hägele et al., 2024, https://arxiv.org/abs/2405.18392)."""
    warmup_ratio: float = 0.06
    """Part of the steps over which the learning rate rises from zero; there is no such part with ``constant``."""
    warmup_steps: Optional[int] = None
    """Number of these steps; null goes by `warmup_ratio`."""
    weight_decay: float = 0.0
    """Weight decay on matrices; biases, normalisations and vectors that scale, such as IA3's, have none."""
    label_smoothing: float = 0.0
    """Part of the target probability that is spread over all classes, or all tokens of the vocabulary, while training."""
    gradient_checkpointing: bool = False
    """Compute the activations of each block again in the backward pass instead of keeping them: less memory, more time."""
    compile: bool = False
    """Compile the model with torch.compile."""
    max_grad_norm: float = 1.0
    """Norm to which the gradient is clipped."""
    evaluate_before: bool = True
    """Evaluate the backbone as it is on the final split, too."""
    eval_every: Optional[int] = None
    """Evaluate on the validation split every so many steps while training; null: only if early stopping is on."""
    early_stopping_patience: Optional[int] = None
    """Stop after so many evaluations without improvement, and take the best checkpoint; null trains to the end."""
    metric: Optional[str] = None
    """The metric by which early stopping and `restore_best` compare, or ``loss``; null takes the task's first."""
    early_stopping_min_delta: float = 0.0
    """By how much the metric must be better to count as an improvement."""
    restore_best: bool = False
    """Take the best of the checkpoints that were evaluated in the end, as early stopping does, and train all steps."""
    group_by_length: bool = False
    """Put rows of similar length into a batch, which saves computing on padding where lengths vary."""
    shortcuts: str = "auto"
    """Leave out what would come to the same, to rounding: ``auto`` keeps what the blocks below the lowest delta make of each
    text over epochs, evaluations and runs, where nothing in them is random, and computes in the last block only the token that
    a head reads; ``off`` computes all in every step."""
    activation_cache: float = 8.0
    """The most GiB that kept activations may take on disk, those of all runs together; 0 keeps none. The longest unused make
    room for others, and a split that would take more is computed in every step."""
    log_every: int = 25
    """Steps between two entries of the training log."""
    save_every: Optional[int] = None
    """Steps between two checkpoints, from which `resume=true` goes on. Null goes by time: one a minute at most, or fewer where
    writing them would take more than a fiftieth of the time, and one when training ends. 0 writes none. With early stopping
    there is also one after every evaluation."""
    keep_checkpoints: bool = False
    """Keep the last checkpoint when the delta is complete."""
    sharding: Optional[str] = None
    """With several processes: ``fsdp`` parts the frozen backbone between them, so that each holds only its part and gathers a
    block while it computes; null gives each a whole one."""
    cpu: bool = False
    """Stay on the CPU where there is a GPU."""
    progress: bool = True
    """Show progress bars."""


@dataclass
class HubConfig:
    """Where the delta is pushed, and what its model card says."""

    push: bool = False
    repo_id: Optional[str] = None
    """The repository, such as ``DeltaHub/lora-t5-dates``; made if it does not exist. In it ``{delta_type}``, ``{backbone}``,
    ``{task}`` and ``{seed}`` stand for the run's."""
    private: Optional[bool] = None
    """Whether the repository is private; null takes the organisation's default for a new one."""
    revision: Optional[str] = None
    """Branch to push to, made if it does not exist; null is the main one."""
    tag: Optional[str] = None
    """A name for the commit, such as ``v1``."""
    create_pr: bool = False
    """Propose the commit in a pull request."""
    parent_commit: Optional[str] = None
    """Push only if this is the last commit there."""
    message: Optional[str] = None
    """The commit message."""
    license: Optional[str] = None
    """The delta's licence, by its name on the Hub, such as ``apache-2.0``; null leaves it out of the card."""


@dataclass
class TrackerConfig:
    """Where metrics are logged to, besides the run's folder. All but `names` is for Weights & Biases."""

    names: list[str] = field(default_factory=list)
    """``wandb``, ``tensorboard``, or both; TensorBoard's events lie in ``tensorboard`` in the run's folder."""
    project: str = "deltaexp"
    entity: Optional[str] = None
    group: Optional[str] = None
    """What the runs belong to; null takes the name of the sweep's folder for the runs of a sweep."""
    mode: Optional[str] = None
    """W&B's mode: ``online``, ``offline`` or ``disabled``; null leaves it to W&B's own settings."""
    tags: list[str] = field(default_factory=list)
    predictions: bool = False
    """Log a table of the answers in the final evaluation, which are then kept as by `task.save_predictions=true`."""


@dataclass
class SweepConfig:
    """A sweep (``-m``), of which this run is a job."""

    name: Optional[str] = None
    """What its folder below ``outputs/multirun`` begins with; null takes the experiment's name."""
    joint: str = "off"
    """``auto``: jobs that differ in nothing but their deltas, seeds and optimizers are trained in one, on the same backbone at
    once, where that measures faster; a step is then that of a separate run to rounding. ``off``: to the last bit."""


@dataclass
class RunConfig:
    """A whole run, apart from the keys of its delta type."""

    resume: bool = False
    """Continue the newest run of the same config that was interrupted; the result is the one of an uninterrupted run."""
    retry: bool = False
    """In a sweep: try jobs again that failed, from their last checkpoints."""
    fail_fast: bool = False
    """In a sweep: begin no further job once one has failed."""
    seed: int = 42
    """The seed that all seeds of `seeds` default to."""
    seeds: SeedsConfig = field(default_factory=SeedsConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    hub: HubConfig = field(default_factory=HubConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)

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
    check_secrets(values)
    flat = {key: value for key, value in values.items() if key not in PARTS}
    run = RunConfig(**checked(RunConfig, flat, "a run"))
    for name, section in PARTS.items():
        if name in values:
            schema = type(section())
            setattr(run, name, schema(**checked(schema, dict(values[name]), name)))
    check(run)
    return run


def completed(run: RunConfig, delta_config: DeltaConfig) -> RunConfig:
    """Return a run's config with what depends on the delta type filled in: the recommended learning rate where none is set.

    Raises:
        ConfigError: If another value contradicts it.
    """
    if run.trainer.learning_rate is not None:
        return run
    trainer = dataclasses.replace(run.trainer, learning_rate=delta_config.recommended_learning_rate())
    check_trainer(trainer)
    return dataclasses.replace(run, trainer=trainer)


def check(run: RunConfig) -> None:
    """Check the values of a run that types alone do not rule out.

    Raises:
        ConfigError: If one is out of range, or two contradict one another.
    """
    requirements.check(run.backbone)
    requirements.check_trackers(run.tracker.names)
    if not run.backbone.source:
        raise ConfigError("backbone.source is empty; name a repository of the Hub or a folder, e.g. backbone.source=t5-base.")
    at_least_one = {
        "trainer": ("batch_size", "eval_batch_size", "gradient_accumulation_steps", "eval_every", "log_every",
                    "early_stopping_patience"),
    }  # fmt: skip
    for section, keys in at_least_one.items():
        for key in keys:
            value = getattr(getattr(run, section), key)
            if value is not None and value < 1:
                raise ConfigError(f"{section}.{key} is {value}; it must be at least 1.")
    taskconfig.check(run.task)
    if run.trainer.group_by_length and run.task.kind == "image_classification":
        raise ConfigError("trainer.group_by_length=true puts texts of similar length into a batch, and images have none.")
    check_trainer(run.trainer)
    if run.sweep.joint not in JOINT:
        raise ConfigError(unknown("sweep.joint", run.sweep.joint, JOINT))
    if run.sweep.name is not None and not re.fullmatch(r"[\w.-]+", run.sweep.name):
        raise ConfigError(f"sweep.name is {run.sweep.name!r}; it becomes a folder's name: letters, digits and _ . - only.")
    if run.tracker.mode not in (None, *WANDB_MODES):
        raise ConfigError(unknown("tracker.mode", run.tracker.mode, WANDB_MODES))
    check_hub(run)
    if min(run.seed, *run.resolved_seeds().values()) < 0:
        raise ConfigError("A seed is negative; seeds are whole numbers from 0.")


def check_hub(run: RunConfig, delta_type: str = "lora") -> None:
    """Check what is asked of the Hub.

    Args:
        run: The config.
        delta_type: The type of delta, which may be a part of the repository's name.

    Raises:
        ConfigError: If a name is none, or two wishes contradict one another.
    """
    hub = run.hub
    if hub.push and not hub.repo_id:
        raise ConfigError("hub.push=true needs hub.repo_id, such as hub.repo_id=DeltaHub/lora-t5-dates.")
    if hub.repo_id:
        name = public.repository(hub.repo_id, delta_type, run.backbone.name or "backbone", run.task.name or "task", run.seed)
        check_push(name, revision=hub.revision, tag=hub.tag, create_pr=hub.create_pr, parent_commit=hub.parent_commit)
    if hub.license is not None and hub.license not in LICENSES:
        raise ConfigError(
            f"hub.license is {hub.license!r}, which the Hub does not know.{did_you_mean(hub.license, LICENSES)} Its list: "
            "https://huggingface.co/docs/hub/repositories-licenses; for any other take hub.license=other."
        )
    for name in filter(None, [run.task.language]):
        if not LANGUAGE.fullmatch(name):
            raise ConfigError(f"task.language is {name!r}; it must be a code of ISO 639, such as en.")
    if run.task.dataset is not None and not is_repo_id(run.task.dataset):
        raise ConfigError(f"task.dataset is {run.task.dataset!r}; it must be a dataset of the Hub, such as nyu-mll/glue.")


def check_secrets(values: Mapping[str, Any], prefix: str = "") -> None:
    """Check that no value is a secret: a config is written into files and sent to trackers.

    Raises:
        ConfigError: If one looks like an access token, or holds a password; the message does not repeat it.
    """
    for key, value in values.items():
        if isinstance(value, Mapping):
            check_secrets(value, f"{prefix}{key}.")
        elif is_secret(value):
            raise ConfigError(
                f"{prefix}{key} looks like an access token or holds a password. A config is kept in files, so secrets do not "
                "belong there: run `hf auth login` or `wandb login`, or set HF_TOKEN or WANDB_API_KEY."
            )
