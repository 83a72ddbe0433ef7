"""transformers' Trainer is imported without libraries that are not called, and knows what is theirs once they are there."""

import sys
from decimal import Decimal
from importlib.util import find_spec

import pytest
from test_lazy import python

from deltaexp.lab.trainer import _Later, _StandIn


def test_names_look_themselves_up_when_they_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    later = _Later("decimal", "Decimal")
    assert later("1.5") == Decimal("1.5")
    assert isinstance(Decimal(1), later)  # type: ignore[arg-type]
    assert not isinstance(1, (later, str))  # type: ignore[arg-type]
    assert not isinstance(1, _Later("no_such_module", "Name"))  # type: ignore[arg-type]
    one = _StandIn("decimal")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "decimal", one)
        assert one.Decimal("2") == 2
        assert sys.modules["decimal"] is not one


@pytest.mark.slow
def test_a_run_imports_what_it_needs() -> None:
    code = """
import sys
import deltaexp.lab.run
heavy = ("peft", "bitsandbytes", "scipy", "sklearn", "tensorboard", "wandb", "torch._inductor.compile_fx", "plotly")
print(*[name for name in heavy if name in sys.modules])
"""
    assert python(code) == ""


@pytest.mark.slow
@pytest.mark.skipif(find_spec("peft") is None, reason="PEFT is not installed")
def test_models_of_peft_are_recognised() -> None:
    code = """
import sys
from deltaexp.lab.trainer import Trainer
from transformers import trainer_utils
from torch import nn
model = nn.Sequential(nn.Linear(2, 2))
assert "peft" not in sys.modules and not trainer_utils._is_peft_model(model)
import warnings
warnings.simplefilter("ignore")
import peft
assert not trainer_utils._is_peft_model(model)
wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"]))
print(trainer_utils._is_peft_model(wrapped), trainer_utils.unwrap_peft_model(wrapped) is model)
"""
    assert python(code) == "True True"
