"""What a backbone's config asks of the machine is checked before anything is loaded, and without PyTorch."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from deltaexp.errors import ConfigError
from deltaexp.lab import requirements, schema
from deltaexp.lab.config import BackboneConfig

PACKAGES = ("bitsandbytes", "torchao", "flash_attn", "flash_attn_interface")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Which of the optional packages are there, whatever is installed: none, until a test adds to it."""
    names: set[str] = set()
    find = importlib.util.find_spec

    def found(name: str, package: str | None = None) -> object:
        if name in PACKAGES:
            return SimpleNamespace(name=name) if name in names else None
        return find(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", found)
    return names


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["backbone.dtype=float23"], "Did you mean 'float32'"),
        (["backbone.device_map=automatic"], "Did you mean 'auto'.*name of a device"),
        (["backbone.device_map=cuda:x"], "There is no backbone.device_map 'cuda:x'"),
        (["backbone.attention=spda"], "Did you mean 'sdpa'"),
        (["backbone.attention=flash_attention_2"], "pip install flash-attn`, or take backbone.attention=sdpa"),
        (["backbone.quantization=bnb_4bits"], "Did you mean 'bnb_4bit'"),
        (["backbone.quantization=bnb_4bit"], r'needs the package .bitsandbytes.*pip install "deltaexp\[bitsandbytes\]"'),
        (["backbone.quantization=torchao_int8"], r'needs the package .torchao.*pip install "deltaexp\[torchao\]"'),
        (["backbone.quantization=torchao_int4"], "not offered.*take bnb_4bit"),
        (["backbone.quantization=torchao_int8_dynamic"], "not offered.*take torchao_int8"),
        (["backbone.bnb_4bit_type=nf5"], "Did you mean 'nf4'"),
        (["backbone.bnb_4bit_compute_dtype=int8"], "There is no backbone.bnb_4bit_compute_dtype 'int8'"),
    ],
)
def test_mistakes(overrides: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        schema.composed(overrides)


def test_what_is_installed_may_be_asked_for(installed: set[str]) -> None:
    installed |= set(PACKAGES)
    for way in requirements.QUANTIZATION:
        assert schema.composed([f"backbone.quantization={way}"])[0].backbone.quantization == way
    with pytest.raises(ConfigError, match="name one, such as backbone.dtype=bfloat16"):
        requirements.check(BackboneConfig(quantization="bnb_4bit", dtype="auto"))
    with pytest.raises(ConfigError, match="bfloat16 or float16 only"):
        requirements.check(BackboneConfig(attention="flash_attention_2"))
    requirements.check(BackboneConfig(attention="flash_attention_2", dtype="bfloat16"))


@pytest.mark.parametrize("place", ["auto", "balanced", "sequential", "cpu", "cuda", "cuda:1", "mps", "xpu:0"])
def test_places(place: str) -> None:
    requirements.check(BackboneConfig(device_map=place))


def test_it_needs_no_torch() -> None:
    code = (
        "import sys; from deltaexp.lab import requirements; from deltaexp.lab.config import BackboneConfig\n"
        "requirements.check(BackboneConfig())\n"
        "assert not {'torch', 'transformers', 'bitsandbytes', 'torchao'} & set(sys.modules)"
    )
    root = str(Path(__file__).resolve().parents[2])
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)
