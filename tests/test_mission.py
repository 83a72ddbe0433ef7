"""The code that the mission asks for runs as it is written there, with the embedded T5 in place of the downloads."""

import re
from pathlib import Path

import pytest
import torch
from transformers import T5ForConditionalGeneration

from deltaexp import AutoDeltaConfig, AutoDeltaModel, HashCheck
from deltaexp.lab.backbones import location
from deltaexp.publishing import push

DOCUMENT = Path(__file__).resolve().parents[2] / "shared" / "mission" / "autodelta.md"
BLOCKS = [
    """
from deltaexp import AutoDeltaConfig, AutoDeltaModel
from transformers import T5ForConditionalGeneration
backbone_model = T5ForConditionalGeneration.from_pretrained("t5-base")
""",
    """
config_dict = {
"delta_type":"lora",
"modified_modules":[
"SelfAttention.q",
"SelfAttention.v",
"SelfAttention.o"
],
"lora_r":4}
delta_config = AutoDeltaConfig.from_dict(config_dict)
""",
    """
delta_model = AutoDeltaModel.from_config(delta_config, backbone_model=backbone_model)
from deltaexp import Visualization
Visualization(backbone_model).structure_graph()
""",
    """
delta_model = AutoDeltaModel.from_finetuned("DeltaHub/sst2-t5-base", backbone_model=backbone_model)
""",
]


def bare(code: str) -> list[str]:
    """Return the lines of some code without comments and blanks."""
    lines = [re.sub(r"\s*#.*", "", line).strip() for line in code.splitlines()]
    return [line for line in lines if line]


@pytest.fixture
def _t5_base(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``from_pretrained("t5-base")`` load the embedded backbone."""
    load = T5ForConditionalGeneration.from_pretrained
    place = location("embedded:tiny_t5")
    monkeypatch.setattr(T5ForConditionalGeneration, "from_pretrained", lambda name: load(place, dtype=torch.float32))


@pytest.mark.usefixtures("_t5_base", "hub_client")
def test_the_blocks_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Somebody has trained a delta and pushed it.
    theirs = AutoDeltaModel.from_config(
        AutoDeltaConfig.from_dict({"delta_type": "lora", "modified_modules": ["SelfAttention.q"], "lora_r": 4}),
        backbone_model=T5ForConditionalGeneration.from_pretrained("t5-base"),
    )
    theirs.freeze_module()
    with torch.no_grad():
        for tensor in theirs.delta_tensors().values():
            tensor.normal_()
    theirs.save_finetuned(tmp_path / "theirs")
    push(tmp_path / "theirs", "DeltaHub/sst2-t5-base")

    scope: dict = {}
    for block in BLOCKS[:3]:
        exec(block, scope)
    assert len(scope["delta_model"].attachments) == 12
    shown = capsys.readouterr().out
    for word in ("T5ForConditionalGeneration", "SelfAttention", "lora_A:[4,128]"):
        assert word in shown
    # On the same backbone the first delta would be in the way of the hash check, as it should not be.
    exec(BLOCKS[3], scope)
    assert scope["delta_model"].hash_check is HashCheck.MATCH
    assert len(scope["delta_model"].attachments) == 4


@pytest.mark.skipif(not DOCUMENT.exists(), reason="the mission's document is not part of the project")
def test_the_blocks_are_those_of_the_document() -> None:
    text = (
        DOCUMENT.read_text(encoding="utf-8")
        .replace("Visualizaiton", "Visualization")
        .replace("opendelta import", "deltaexp import")
    )
    found = [bare(block) for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL)]
    assert found == [bare(block) for block in BLOCKS]
