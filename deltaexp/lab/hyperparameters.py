"""What the keys of ``trainer`` may be, checked without torch: precisions, schedules, optimizers and the numbers in them."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from deltaexp.errors import ConfigError, listing, unknown

if TYPE_CHECKING:
    from deltaexp.lab.config import TrainerConfig

SHORTCUTS = ("auto", "off")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
SPEEDS = ("off", "auto")
NO_FP16 = (
    "trainer.precision=fp16 needs a GPU: its small numbers vanish without scaling of the loss, which there is not for the CPU. "
    "Take trainer.precision=bf16 or fp32 there."
)
SHAPES = ("linear", "cosine", "1-sqrt")
"""How the learning rate of ``warmup_stable_decay`` may rise and fall."""
SCHEDULES: dict[str, dict[str, Any]] = {
    "linear": {},
    "cosine": {"num_cycles": float},
    "cosine_with_restarts": {"num_cycles": int},
    "cosine_with_min_lr": {"num_cycles": float, "min_lr": float, "min_lr_rate": float},
    "cosine_warmup_with_min_lr": {"num_cycles": float, "min_lr": float, "min_lr_rate": float, "warmup_lr_rate": float},
    "polynomial": {"lr_end": float, "power": float},
    "inverse_sqrt": {"timescale": int},
    "warmup_stable_decay": {
        "num_decay_steps": int, "warmup_type": SHAPES, "decay_type": SHAPES, "min_lr_ratio": float, "num_cycles": float,
    },
    "constant": {},
    "constant_with_warmup": {},
}  # fmt: skip
"""The schedules of transformers that go by the number of the step alone, with the options that each of them has."""
SHARDINGS = ("fsdp",)
"""Ways of parting a backbone between processes."""
OPTIMIZERS = {
    "adamw": "adamw_torch",
    "adamw_fused": "adamw_torch_fused",
    "adamw_8bit": "adamw_bnb_8bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
    "adafactor": "adafactor",
    "sgd": "sgd",
}
"""The optimizers, and their names in transformers."""


def check_trainer(trainer: TrainerConfig) -> None:
    """Check the values of the section ``trainer`` that types alone do not rule out.

    Raises:
        ConfigError: If one is out of range, or two contradict one another.
    """
    if trainer.sharding is not None and trainer.sharding not in SHARDINGS:
        raise ConfigError(unknown("trainer.sharding", trainer.sharding, SHARDINGS))
    choices = {"lr_scheduler": SCHEDULES, "precision": PRECISIONS, "speed": SPEEDS, "shortcuts": SHORTCUTS}
    for key, allowed in {**choices, "optimizer": OPTIMIZERS}.items():
        value = getattr(trainer, key)
        if value not in allowed:
            raise ConfigError(unknown(f"trainer.{key}", value, allowed))
    if trainer.max_steps < 1 and trainer.max_steps != -1:
        raise ConfigError(f"trainer.max_steps is {trainer.max_steps}; it must be at least 1, or -1 to go by trainer.epochs.")
    rates = {f"learning_rates[{pattern}]": rate for pattern, rate in trainer.learning_rates.items()}
    above = {key: getattr(trainer, key) for key in ("epochs", "learning_rate", "max_grad_norm", "adam_epsilon")}
    for name, number in {**above, **rates}.items():
        if number is not None and number <= 0:
            raise ConfigError(f"trainer.{name} is {number}; it must be greater than 0.")
    for key in ("weight_decay", "save_every", "warmup_steps", "early_stopping_min_delta", "activation_cache"):
        if (getattr(trainer, key) or 0) < 0:
            raise ConfigError(f"trainer.{key} is {getattr(trainer, key)}; it must be at least 0.")
    for key in ("warmup_ratio", "label_smoothing", "adam_beta1", "adam_beta2", "momentum"):
        if not 0 <= getattr(trainer, key) < 1:
            raise ConfigError(f"trainer.{key} is {getattr(trainer, key)}; it must be at least 0 and less than 1.")
    if trainer.precision == "fp16" and trainer.cpu:
        raise ConfigError(NO_FP16)
    if trainer.warmup_steps is not None and 0 < trainer.max_steps <= trainer.warmup_steps:
        raise ConfigError(
            f"trainer.warmup_steps is {trainer.warmup_steps}, and trainer.max_steps is {trainer.max_steps}: the learning rate "
            "would never be reached. Take fewer of the former."
        )
    if trainer.warmup_steps and trainer.lr_scheduler == "constant":
        raise ConfigError("trainer.lr_scheduler=constant has no warm-up. Take constant_with_warmup, or leave out warmup_steps.")
    if trainer.optimizer == "sgd" and trainer.learning_rate is None:
        raise ConfigError("trainer.optimizer=sgd needs a trainer.learning_rate: those that are recommended are for AdamW.")
    if "8bit" in trainer.optimizer and find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"trainer.optimizer={trainer.optimizer} comes with bitsandbytes, which is not installed. "
            "Run `pip install 'deltaexp[bitsandbytes]'`."
        )
    _check_schedule(trainer)


def _check_schedule(trainer: TrainerConfig) -> None:
    name, options = trainer.lr_scheduler, trainer.scheduler_options
    known = SCHEDULES[name]
    for key, value in options.items():
        if key not in known:
            owners = [schedule for schedule, keys in SCHEDULES.items() if key in keys]
            if owners:
                raise ConfigError(f"trainer.lr_scheduler={name} has no option {key!r}; it belongs to {listing(owners)}.")
            raise ConfigError(unknown(f"option of trainer.lr_scheduler={name}", key, known or ["none at all"]))
        if isinstance(known[key], tuple):
            if value not in known[key]:
                raise ConfigError(unknown(f"trainer.scheduler_options.{key}", str(value), known[key]))
            continue
        whole = isinstance(value, int) and not isinstance(value, bool)
        number = whole or (known[key] is float and isinstance(value, float) and abs(value) < float("inf"))
        if not number or value < 0 or (known[key] is int and value < 1):
            wanted = "a whole number from 1" if known[key] is int else "a number that is not negative"
            raise ConfigError(f"trainer.scheduler_options.{key} is {value!r}; it must be {wanted}.")
        if key in ("min_lr_rate", "min_lr_ratio", "warmup_lr_rate") and value >= 1:
            raise ConfigError(f"trainer.scheduler_options.{key} is {value}; it is a part of the learning rate, less than 1.")
        if key in ("min_lr", "lr_end") and trainer.learning_rate is not None and value >= trainer.learning_rate:
            raise ConfigError(
                f"trainer.scheduler_options.{key} is {value}; it must be less than the learning rate, {trainer.learning_rate}."
            )
    if "min_lr" in known and len({"min_lr", "min_lr_rate"} & options.keys()) != 1:
        raise ConfigError(
            f"trainer.lr_scheduler={name} needs either scheduler_options.min_lr, a learning rate, or min_lr_rate, a part of "
            "the largest one: trainer.scheduler_options.min_lr_rate=0.1, for example."
        )
