"""A step of several runs gives each the logits and gradients of its own."""

from dataclasses import dataclass

import pytest
import torch
from models import FAMILIES, attach, slow_but
from torch import nn

from deltaexp import registry
from deltaexp.lab import joint_step
from deltaexp.model import DeltaModel
from deltaexp.routing import route


@dataclass(eq=False)
class Run:
    delta_model: DeltaModel

    def trained(self) -> list[nn.Parameter]:
        layers = [attachment.layer for attachment in self.delta_model.attachments]
        return [parameter for layer in layers for parameter in layer.parameters() if parameter.requires_grad]


def without_dropout(backbone: nn.Module) -> nn.Module:
    for module in backbone.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0  # type: ignore[assignment]
    return backbone


def types(backbone: nn.Module) -> list[str]:
    """Return the types that can be limited to rows of a batch."""
    found = []
    for delta_type in registry.known():
        try:
            delta_model = attach(backbone, delta_type)
        except Exception:  # it wants more than a name
            continue
        if delta_model.attachments and not delta_model._owned_names():
            try:
                with route([delta_model]):
                    found.append(delta_type)
            except Exception:
                pass
        delta_model.detach()
    return found


def batches(name: str, runs: list[Run]) -> dict[Run, joint_step.Batch]:
    """Return a batch of another size and length, with padding, for each run."""
    generator, found = torch.Generator().manual_seed(1), {}
    for number, run in enumerate(runs):
        rows, length = 1 + number % 3, 5 + number % 2
        ids = torch.randint(1, 30, (rows, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, 4:] = 0
        found[run] = {"input_ids": ids, "attention_mask": mask}
        if name == "t5":
            found[run]["decoder_input_ids"] = torch.randint(1, 30, (rows, 3 + number % 2), generator=generator)
    return found


@pytest.mark.parametrize("name", slow_but(["t5", "gpt2", "llama"], ["t5"]))
def test_logits_and_gradients_are_each_runs_own(name: str) -> None:
    backbone = without_dropout(FAMILIES[name].build().train())
    runs = []
    for number, delta_type in enumerate(types(backbone)):
        delta_model = attach(backbone, delta_type, seed=number + 1)
        runs.append(Run(delta_model))
    assert {"lora", "adapter", "ia3"} <= {run.delta_model.config.delta_type for run in runs}
    given = batches(name, runs)
    expected = {}
    for run in runs:
        with joint_step.only(run, runs):
            logits = backbone(**given[run])["logits"]
            gradient = torch.linspace(-1, 1, logits.numel()).view_as(logits)
            if name != "t5":  # what is computed for padding is nobody's
                gradient = gradient * given[run]["attention_mask"][..., None]
            found = torch.autograd.grad(logits, run.trained(), gradient, allow_unused=True)
            expected[run] = logits.detach(), gradient, found
    step = joint_step.forward(backbone, given)
    found = joint_step.backward(step, {run: gradient for run, (_, gradient, _) in expected.items()})
    for run, (logits, _, gradients) in expected.items():
        mask = torch.ones(logits.shape[:2], dtype=torch.bool) if name == "t5" else given[run]["attention_mask"].bool()
        torch.testing.assert_close(step.logits[step.places[run]][mask], logits[mask], rtol=1e-4, atol=1e-5)
        for one, other in zip(found[run], gradients, strict=True):
            assert (one is None or not one.any()) == (other is None or not other.any())
            if one is not None and other is not None:
                torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    share = joint_step.tried(backbone, given)
    assert isinstance(share, float), share
    assert all(parameter.grad is None for run in runs for parameter in run.trained())


def test_why_there_can_be_no_joint_step(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = FAMILIES["gpt2"].build().train()
    runs = [Run(attach(backbone, "lora", seed=seed)) for seed in (1, 2)]
    given = batches("gpt2", runs)
    assert any(isinstance(module, nn.Dropout) and module.p for module in backbone.modules())
    assert "random" in str(joint_step.tried(backbone, given))
    without_dropout(backbone)
    assert isinstance(joint_step.tried(backbone, given), float)
    unmasked = {run: {"input_ids": batch["input_ids"]} for run, batch in given.items()}
    assert joint_step.tried(backbone, unmasked) == "there is no attention_mask"
    with monkeypatch.context() as patched:
        patched.setattr(joint_step, "_free", lambda backbone: 1000)
        assert "GiB that are free" in str(joint_step.tried(backbone, given))
    handle = backbone.register_forward_pre_hook(  # the whole batch moves with its size
        lambda _, args, kwargs: (args, {**kwargs, "input_ids": (kwargs["input_ids"] + len(kwargs["input_ids"])) % 30}),
        with_kwargs=True,
    )
    assert joint_step.tried(backbone, given) == "a step of all computes something else"
    handle.remove()


@pytest.mark.parametrize("name", ["t5", "gpt2", "llama"])
def test_the_loss_is_the_models(name: str) -> None:
    backbone = FAMILIES[name].build()
    (run,) = [Run(attach(backbone, "lora"))]
    inputs = dict(batches(name, [run])[run])
    labels = inputs.get("decoder_input_ids", inputs["input_ids"]).clone()
    labels[0, -1] = -100
    backbone.eval()
    outputs = backbone(**inputs, labels=labels)
    found = joint_step.loss(outputs["logits"], labels, name != "t5", 0.0)
    torch.testing.assert_close(found, outputs["loss"])
