"""PyTorch is imported when it is needed, and not before: the command line answers without it."""

from __future__ import annotations

import gc
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from deltaexp import Layer, LoraModel, low_rank
from deltaexp.deltas._linear import LinearMap
from deltaexp.deltas.adapter import AdapterLayer
from deltaexp.deltas.lora import LoraLayer
from deltaexp.lazy import imports


def python(code: str, *arguments: object) -> str:
    """Run code in a fresh interpreter that takes warnings for errors, and return what it prints."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_configs_are_checked_without_torch() -> None:
    code = """
import sys
def heavy():
    return sorted(name for name in ("torch", "transformers", "datasets", "huggingface_hub", "peft") if name in sys.modules)
import deltaexp
from deltaexp import DeltaConfig, Layer, registry, addressing, errors
assert {"adapter", "lora", "prefix", "peft"} < set(registry.known()), registry.known()
config = DeltaConfig.from_dict({"delta_type": "lora", "lora_r": 3})
assert config.lora_r == 3
try:
    DeltaConfig.from_dict({"delta_type": "lora", "lora_rank": 3})
except errors.ConfigError as error:
    assert "Did you mean" in str(error)
assert addressing.resolve(["q"], ["a.q"]) == {"q": ["a.q"]}
assert heavy() == [], heavy()
assert "torch" not in Layer.__mro__[1].__module__
layer = registry.get("adapter").build.__globals__["AdapterLayer"](4, 2, "relu")
import torch
assert isinstance(layer, torch.nn.Module)
print("done")
"""
    assert python(code) == "done"


def test_what_is_imported_is_no_matter_for_the_garbage_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    with imports():  # torch is there already, and what others have made may become garbage
        assert gc.isenabled()
    assert not gc.get_freeze_count()
    monkeypatch.delitem(sys.modules, "torch")
    try:
        with imports():
            assert not gc.isenabled()
        assert gc.isenabled()
        assert gc.get_freeze_count()
    finally:
        gc.unfreeze()


def test_layers_are_modules() -> None:
    layer = LoraLayer(LinearMap(3, 4), 2, 2.0, 0.0)
    assert isinstance(layer, nn.Module)
    assert isinstance(layer, Layer)
    assert Layer.__bases__ == (nn.Module,)
    assert issubclass(AdapterLayer, nn.Module)
    assert [name for name, _ in layer.named_parameters()] == ["lora_A", "lora_B"]
    with pytest.raises(TypeError):
        LoraLayer(3, 4)


def test_unpickling_in_a_fresh_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_rank, "SMALL", 1 << 18)  # what it is there
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    delta_model = LoraModel(backbone, modified_modules=["0", "2"])
    for attachment in delta_model.attachments:
        nn.init.normal_(attachment.layer.lora_B)
    x = torch.ones(2, 3)
    with torch.no_grad():
        expected = backbone(x)
    layer = delta_model.attachments[0].layer
    (tmp_path / "pickles").write_bytes(pickle.dumps((layer, backbone, delta_model, x, expected)))
    code = """
import pickle, sys
layer, backbone, delta_model, x, expected = pickle.load(open(sys.argv[1], "rb"))
import torch
torch.set_grad_enabled(False)
assert isinstance(layer, torch.nn.Module)
assert layer is backbone[0].lora is delta_model.attachments[0].layer
assert torch.equal(backbone(x), expected)
delta_model.detach()
assert not torch.equal(backbone(x), expected)
assert [name for name, _ in backbone.named_parameters()] == ["0.weight", "0.bias", "2.weight", "2.bias"]
delta_model.attach()
assert torch.equal(backbone(x), expected)
print(type(delta_model).__name__)
"""
    assert python(code, tmp_path / "pickles") == "LoraModel"
