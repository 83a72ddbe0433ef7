"""LN-tuning against PEFT's, and what counts as a normalisation."""

from __future__ import annotations

import peft
import pytest
import torch
from models import FAMILIES, attach, logits, md5

from deltaexp.errors import AddressingError


@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")  # PEFT's, for a width that it does not need
@pytest.mark.parametrize("name", FAMILIES)
def test_outputs_and_gradients_equal_pefts(name: str) -> None:
    family, inputs = FAMILIES[name], FAMILIES[name].inputs()
    ours, theirs = family.build().double(), family.build().double()
    delta_model = attach(ours, "ln_tuning")
    assert not delta_model.attachments
    norms = [n for n, m in theirs.named_modules() if "Norm" in type(m).__name__]
    peft.inject_adapter_in_model(peft.LNTuningConfig(target_modules=norms), theirs)
    pairs = {
        n: theirs.get_parameter(n.rsplit(".", 1)[0] + ".ln_tuning_layers.default." + n.rsplit(".", 1)[1])
        for n in delta_model.delta_tensors()
    }
    assert {id(p) for p in pairs.values()} == {id(p) for p in theirs.parameters() if p.requires_grad}
    with torch.no_grad():
        for own, other in pairs.items():
            other.copy_(ours.get_parameter(own))
    outputs = []
    for model in (ours, theirs):
        outputs.append(model(**inputs))
        outputs[-1].loss.backward()
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits)
    for own, other in pairs.items():
        gradient = ours.get_parameter(own).grad
        assert gradient.abs().max() > 0, own
        torch.testing.assert_close(gradient, other.grad, msg=own)


def test_norms_inside_the_chosen_modules() -> None:
    backbone, inputs = FAMILIES["bert"].build(), FAMILIES["bert"].inputs()
    plain, digest = logits(backbone, inputs), md5(backbone)
    delta_model = attach(backbone, "ln_tuning", modified_modules=["layer.0"])
    parts = [f"bert.encoder.layer.0.{part}output.LayerNorm" for part in ("attention.", "")]
    assert list(delta_model.delta_tensors()) == [f"{part}.{name}" for part in parts for name in ("weight", "bias")]
    assert not torch.equal(logits(backbone, inputs), plain)
    delta_model.detach()
    assert md5(backbone) == digest
    with pytest.raises(AddressingError, match=r"'bert\.encoder\.layer\.0\.attention\.self\.query' is a Linear"):
        attach(backbone, "ln_tuning", modified_modules=["query"])
