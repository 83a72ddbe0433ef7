"""Mistakes in the section ``trainer``, answered before torch is imported."""

import subprocess
import sys

import pytest

from deltaexp.errors import ConfigError
from deltaexp.lab import schema
from deltaexp.lab.hyperparameters import OPTIMIZERS, SCHEDULES

OPTIONS = {
    "cosine_with_min_lr": ["trainer.scheduler_options.min_lr_rate=0.1"],
    "cosine_warmup_with_min_lr": ["trainer.scheduler_options={min_lr: 1e-5, warmup_lr_rate: 0.1}"],
    "polynomial": ["trainer.scheduler_options={power: 2, lr_end: 1e-6}"],
    "warmup_stable_decay": ["trainer.scheduler_options={decay_type: 1-sqrt}"],
}


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["trainer.lr_scheduler=cosin"], r"Did you mean 'cosine'"),
        (["trainer.optimizer=adam"], r"Did you mean 'adamw'"),
        (["trainer.optimizer=sgd", "task=sst2"], r"needs a trainer\.learning_rate"),
        (["trainer.lr_scheduler=cosine_with_min_lr"], r"min_lr_rate=0\.1, for example"),
        (["trainer.lr_scheduler=polynomial", "trainer.scheduler_options.pover=2"], r"Did you mean 'power'"),
        (["trainer.scheduler_options.power=2"], r"linear has no option 'power'; it belongs to polynomial"),
        (["trainer.lr_scheduler=polynomial", "trainer.scheduler_options.lr_end=1"], r"less than the learning rate, 0\.005"),
        (["trainer.lr_scheduler=inverse_sqrt", "trainer.scheduler_options.timescale=1.5"], r"a whole number from 1"),
        (["trainer.lr_scheduler=warmup_stable_decay", "trainer.scheduler_options.decay_type=round"], r"Known: 1-sqrt"),
        (["trainer.lr_scheduler=cosine", "trainer.scheduler_options.num_cycles=-1"], r"not negative"),
        (["trainer.lr_scheduler=constant", "trainer.warmup_steps=5"], r"has no warm-up"),
        (["trainer.warmup_steps=300"], r"would never be reached"),
        (["trainer.warmup_steps=-1"], r"at least 0"),
        (["trainer.label_smoothing=1"], r"less than 1"),
        (["trainer.learning_rates={classifier: -1}"], r"learning_rates\[classifier\] is -1.0; it must be greater than 0"),
        (["trainer.learning_rates.classifier=fast"], r"learning_rates"),
        (["trainer.learning_rats.classifier=1"], r"no key of trainer 'learning_rats'. Did you mean 'learning_rates'"),
    ],
)
def test_mistakes(words: list[str], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        schema.composed(words)


def test_they_are_told_before_torch_is_imported() -> None:
    code = (
        "import sys; from deltaexp.__main__ import main; code = main(['trainer.lr_scheduler=polynomial', "
        "'trainer.scheduler_options.pover=2']); sys.exit(code if 'torch' not in sys.modules else 99)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2, done
    assert "Did you mean 'power'" in done.stderr


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_composes(schedule: str) -> None:
    config, _ = schema.composed([f"trainer.lr_scheduler={schedule}", *OPTIONS.get(schedule, [])])
    assert config.trainer.lr_scheduler == schedule
    assert set(config.trainer.scheduler_options) <= set(SCHEDULES[schedule])


def test_an_optimizer_of_a_package_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    from deltaexp.lab import hyperparameters

    monkeypatch.setattr(hyperparameters, "find_spec", lambda name: None)
    for name in OPTIMIZERS:
        if "8bit" in name:
            with pytest.raises(ConfigError, match=r"pip install 'deltaexp\[bitsandbytes\]'"):
                schema.composed([f"trainer.optimizer={name}"])
        elif name != "sgd":
            schema.composed([f"trainer.optimizer={name}"])


def test_rates_by_pattern_may_be_written_either_way() -> None:
    config, _ = schema.composed(["trainer.learning_rates={classifier: 1e-4, layer.0: 2e-4}"])
    assert config.trainer.learning_rates == {"classifier": 1e-4, "layer.0": 2e-4}
    config, _ = schema.composed(["trainer.learning_rates.classifier=1e-4"])
    assert config.trainer.learning_rates == {"classifier": 1e-4}
