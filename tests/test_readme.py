"""What the README tells users to write works."""

import re
from pathlib import Path

import pytest
import torch
from models import FAMILIES, logits

from deltaexp import AutoDeltaConfig, AutoDeltaModel, HashCheck, registry
from deltaexp.lab import schema

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def block(section: str) -> str:
    """Return the first Python code in a section."""
    return re.findall(r"```python\n(.*?)```", README.split(f"## {section}\n")[1], re.DOTALL)[0]


def test_the_library_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    exec(block("The library"), {})
    assert "HashCheck.MATCH" in capsys.readouterr().out


def test_the_delta_type_of_one_file_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_types", dict(registry._types))
    exec(block("Add your own"), {"__name__": "their_package"})
    _, config = schema.composed(["delta_type=scale"])
    assert config.delta_type == "scale"
    family = FAMILIES["t5"]
    backbone = family.build()
    plain = logits(backbone, family.inputs())
    delta = AutoDeltaModel.from_config(AutoDeltaConfig.from_dict({"delta_type": "scale"}), backbone_model=backbone)
    assert torch.equal(logits(backbone, family.inputs()), plain)
    with torch.no_grad():
        for tensor in delta.delta_tensors().values():
            tensor.mul_(2)
    changed = logits(backbone, family.inputs())
    assert not torch.allclose(changed, plain)
    delta.freeze_module()
    delta.save_finetuned(tmp_path / "scale")
    fresh = family.build()
    assert AutoDeltaModel.from_finetuned(tmp_path / "scale", backbone_model=fresh).hash_check is HashCheck.MATCH
    assert torch.equal(logits(fresh, family.inputs()), changed)


def test_every_delta_type_has_its_row() -> None:
    for name in registry.known():
        assert f"| `{name}` |" in README


def test_every_module_is_in_the_layout() -> None:
    layout = README.split("## How the code is laid out")[1]
    for path in (ROOT / "deltaexp").glob("*.py"):
        assert path.name in layout or path.name == "__init__.py"


def test_the_commands_compose() -> None:
    for line in re.findall(r"python -m deltaexp ([^`\n]*)", README):
        words = [word.strip("'") for word in line.split("|")[0].split() if "=" in word]
        if "lora_rank=4" in words or "push" in line.split():
            continue
        if "-m" in line.split():
            assert schema.check_sweep(words) > 1
        else:
            schema.composed(words)
