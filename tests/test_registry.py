"""The table of delta types, and what their configs accept."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import pytest

from deltaexp import registry
from deltaexp.errors import ConfigError
from deltaexp.registry import DeltaConfig, SavedWith

KNOWN = sorted(path.stem for path in (Path(registry.__file__).parent / "deltas").glob("*.py") if not path.stem.startswith("_"))


@pytest.fixture(autouse=True)
def _the_table_is_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    registry.known()
    monkeypatch.setattr(registry, "_types", dict(registry._types))
    monkeypatch.setattr(registry, "_discovered", True)


def test_known() -> None:
    assert registry.known() == KNOWN
    assert registry.get("lora").delta_type == "lora"


@pytest.mark.parametrize(("name", "hint"), [("lroa", "'lora'"), ("LoRA", "'lora'"), ("adaptor", "'adapter'")])
def test_an_unknown_type_names_the_nearest(name: str, hint: str) -> None:
    for ask in (lambda: registry.get(name), lambda: DeltaConfig.from_dict({"delta_type": name})):
        with pytest.raises(ConfigError) as caught:
            ask()
        assert f"There is no delta_type {name!r}. Did you mean {hint}?" in str(caught.value)
        assert "Known: adalora, adapter, bitfit" in str(caught.value)


def test_a_type_is_needed() -> None:
    with pytest.raises(ConfigError, match="names no delta_type"):
        DeltaConfig.from_dict({"lora_r": 3})
    with pytest.raises(ConfigError, match="needs a delta_type"):
        DeltaConfig()
    assert registry.get("lora").from_dict({"lora_r": 3}).lora_r == 3


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"lora_R": 3}, "Did you mean 'lora_r'?"),
        ({"lora_r": True}, "lora_r is True, which is not a whole number"),
        ({"lora_r": 2.0}, "lora_r is 2.0, which is not a whole number"),
        ({"lora_r": None}, "lora_r is None, which is not a whole number"),
        ({"lora_r": -1}, "lora_r is -1; it must be at least 1"),
        ({"lora_alpha": 0}, "lora_alpha is 0; it must be greater than 0"),
        ({"lora_dropout": "0.1"}, "lora_dropout is '0.1', which is not a number"),
        ({"lora_dropout": 1}, "lora_dropout is 1.0; it must be less than 1"),
        ({"lora_dropout": -0.1}, "it must be at least 0"),
        ({"modified_modules": "q"}, "modified_modules is 'q', which is not a list of texts or null"),
        ({"modified_modules": [3]}, "modified_modules"),
        ({"exclude_modules": None}, "exclude_modules is None, which is not a list of texts"),
        ({"common_structure": "yes"}, "common_structure is 'yes', which is not true or false or null"),
        ({"delta_type": "adapter", "non_linearity": "gleu"}, "Did you mean 'gelu'?"),
        ({"delta_type": "adapter", "bottleneck_dim": 0}, "bottleneck_dim is 0; it must be at least 1"),
        ({"delta_type": "adapter", "lora_r": 4}, "delta_type 'adapter' has no key 'lora_r'"),
    ],
)
def test_values_that_are_refused(values: dict, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        DeltaConfig.from_dict({"delta_type": "lora", **values})
    assert said in str(caught.value)


def test_values_that_are_taken() -> None:
    config = DeltaConfig.from_dict(
        {"delta_type": "lora", "lora_dropout": 0, "modified_modules": ("q", "v"), "common_structure": False}
    )
    assert config.lora_dropout == 0.0
    assert isinstance(config.lora_dropout, float)
    assert config.modified_modules == ["q", "v"]
    assert config.common_structure is False
    assert DeltaConfig.from_dict(config.to_dict()) == config
    assert set(config.to_dict()) == {field.name for field in dataclasses.fields(config)}


def test_what_a_file_records_travels_with_its_config() -> None:
    config = DeltaConfig.from_dict({"delta_type": "lora", "backbone_class": "Bert", "backbone_hash": None})
    assert config.saved_with == SavedWith(backbone_class="Bert")
    assert config.to_dict() == DeltaConfig.from_dict({"delta_type": "lora"}).to_dict()
    assert DeltaConfig.from_dict({"delta_type": "lora"}).saved_with == SavedWith()
    with pytest.raises(ConfigError, match="backbone_class"):
        DeltaConfig.from_dict({"delta_type": "lora", "backbone_class": 3})


def test_a_name_is_registered_once() -> None:
    @dataclass
    class Mine(DeltaConfig):
        delta_type: str = "mine"
        size: Optional[int] = None

    assert registry.register(Mine) is Mine
    assert registry.register(Mine) is Mine  # a cell that is run again
    assert "mine" in registry.known()
    assert DeltaConfig.from_dict({"delta_type": "mine", "size": None}).size is None

    @dataclass
    class Other(DeltaConfig):
        delta_type: str = "mine"

    with pytest.raises(ConfigError, match="'mine' is registered already, by .*Mine"):
        registry.register(Other)
    assert registry.get("mine") is Mine


def test_what_cannot_be_registered() -> None:
    @dataclass
    class Nameless(DeltaConfig):
        pass

    with pytest.raises(ConfigError, match="Nameless must be a dataclass with a default"):
        registry.register(Nameless)


def test_entry_points_of_installed_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "other_deltas-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other-deltas\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[deltaexp.deltas]\nother = other_deltas_module\n")
    (tmp_path / "other_deltas_module.py").write_text(
        "from dataclasses import dataclass\n"
        "from deltaexp.registry import DeltaConfig, register\n"
        "@register\n"
        "@dataclass\n"
        "class OtherConfig(DeltaConfig):\n"
        "    delta_type: str = 'other'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "_discovered", False)
    assert registry.known() == sorted([*KNOWN, "other"])
    monkeypatch.delitem(sys.modules, "other_deltas_module")
