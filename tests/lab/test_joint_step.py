"""A step of several runs gives each the logits and gradients of its own."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from models import FAMILIES, attach, slow_but
from torch import nn

from deltaexp import registry
from deltaexp.lab import joint_step
from deltaexp.model import DeltaModel
from deltaexp.routing import route
from deltaexp.structure import backbone_parameters


@dataclass(eq=False)
class Run:
    """A run of which nothing but a step is done."""

    delta_model: DeltaModel
    runs: list["Run"] = field(default_factory=list)

    def __post_init__(self) -> None:
        names, every = self.delta_model._owned_names(), backbone_parameters(self.delta_model.backbone_model)
        self.of_backbone = {name: parameter for name, parameter in every.items() if name in names}
        self.runs.append(self)
        self.exchange()

    def exchange(self) -> None:
        self.delta_model._ownership.exchange(self.of_backbone)

    def trained(self) -> list[nn.Parameter]:
        layers = [attachment.layer for attachment in self.delta_model.attachments]
        found = [parameter for layer in layers for parameter in layer.parameters() if parameter.requires_grad]
        return [*found, *self.of_backbone.values()]

    def owned(self) -> dict[str, torch.Tensor]:
        return self.delta_model._ownership.trained

    def loss_of(self, logits: torch.Tensor, batch: joint_step.Batch) -> torch.Tensor:
        settings = self.delta_model.backbone_model.config
        return joint_step.loss(logits, batch["labels"], logits.dim() == 3 and not settings.is_encoder_decoder, 0.0)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        for parameter in self.trained():
            parameter.requires_grad_(True)
        with joint_step.only(self, self.runs):
            self.exchange()
            yield
            self.exchange()


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
        read = found[run].get("decoder_input_ids", ids)
        # What is padding has no label.
        found[run]["labels"] = read.clone() if name == "t5" else ids.masked_fill(mask == 0, -100)
        if name == "bert":
            found[run]["labels"] = torch.randint(3, (rows,), generator=generator)
    return found


@pytest.mark.parametrize("name", slow_but(["t5", "gpt2", "llama"], ["t5"]))
def test_logits_and_gradients_are_each_runs_own(name: str) -> None:
    backbone = without_dropout(FAMILIES[name].build().train())
    runs: list[Run] = []
    for number, delta_type in enumerate(types(backbone)):
        Run(attach(backbone, delta_type, seed=number + 1), runs)
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


def with_heads() -> tuple[nn.Module, list[Run]]:
    """Return a classifier with the deltas of two runs, which have heads of their own, and one without a delta."""
    backbone, runs = without_dropout(FAMILIES["bert"].build().train()), list[Run]()
    for seed, (delta_type, unfrozen) in enumerate([("lora", "classifier"), ("adapter", "LayerNorm"), ("none", "classifier")]):
        Run(attach(backbone, delta_type, seed=seed + 1, unfrozen_modules=["deltas", unfrozen]), runs)
    return backbone, runs


def test_each_run_has_a_head_of_its_own() -> None:
    backbone, runs = with_heads()
    given = batches("bert", runs)
    values = [run.owned() for run in runs]
    assert values[0].keys() == values[2].keys() == {"classifier.weight", "classifier.bias"}
    assert not torch.equal(values[0]["classifier.weight"], values[2]["classifier.weight"])
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    step = joint_step.forward(backbone, given)
    gradients = {run: torch.ones_like(step.logits[place]) for run, place in step.places.items()}
    found = joint_step.backward(step, gradients)
    for run in runs:
        with run.alone():
            logits = backbone(**given[run])["logits"]
            expected = torch.autograd.grad(logits, run.trained(), gradients[run], allow_unused=True)
        torch.testing.assert_close(step.logits[step.places[run]], logits, rtol=1e-4, atol=1e-5)
        for one, other in zip(found[run], expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    # Nothing is left of it in the backbone.
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    assert "forward" not in backbone.classifier.__dict__
    assert isinstance(joint_step.tried(backbone, given), float)


def test_a_head_that_cannot_be_each_runs_own() -> None:
    backbone, runs = with_heads()
    given = batches("bert", runs[:1] + runs[2:])
    given = {run: {name: value[:1] for name, value in batch.items()} for run, batch in given.items()}
    assert isinstance(joint_step.tried(backbone, given), float)
    pooler, classifier = backbone.bert.pooler, backbone.classifier
    for hook in (
        lambda _, args: (args[0].mean(1, keepdim=True),),  # it reads padding, though these batches have none
        lambda _, args: (args[0] * classifier.bias.mean(),),  # its parameters are used by another module
    ):
        handle = pooler.register_forward_pre_hook(hook)
        assert joint_step.tried(backbone, given) == "a step of all computes something else"
        handle.remove()
    handle = classifier.register_forward_pre_hook(lambda _, args: (args[0][:1],))
    assert "is not made of these rows" in str(joint_step.tried(backbone, given))
    handle.remove()
    backbone.config.max_position_embeddings = given[runs[0]]["input_ids"].shape[1]
    assert "reads padding" in str(joint_step.tried(backbone, given))


def test_why_there_can_be_no_joint_step(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = FAMILIES["gpt2"].build().train()
    runs: list[Run] = []
    for seed in (1, 2):
        Run(attach(backbone, "lora", seed=seed), runs)
    given = batches("gpt2", runs)
    assert any(isinstance(module, nn.Dropout) and module.p for module in backbone.modules())
    assert "random" in str(joint_step.tried(backbone, given))
    without_dropout(backbone)
    assert isinstance(joint_step.tried(backbone, given), float)
    unmasked = {run: {name: batch[name] for name in ("input_ids", "labels")} for run, batch in given.items()}
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


@pytest.mark.parametrize("name", ["t5", "gpt2", "llama", "bert", "regression"])
def test_the_loss_is_the_models(name: str) -> None:
    family = "bert" if name == "regression" else name
    backbone: Any = FAMILIES[family].build()
    (run,) = [Run(attach(backbone, "lora"))]
    inputs = dict(batches(family, [run])[run])
    labels = inputs.pop("labels")
    if name == "regression":
        backbone.num_labels, backbone.config.problem_type = 1, "regression"
        backbone.classifier = nn.Linear(16, 1)
        labels = labels.float() + 0.5
    if labels.dim() == 2:
        labels[0, -1] = -100
    backbone.eval()
    outputs = backbone(**inputs, labels=labels)
    found = joint_step.loss(outputs["logits"], labels, name in ("gpt2", "llama"), 0.0)
    torch.testing.assert_close(found, outputs["loss"])
