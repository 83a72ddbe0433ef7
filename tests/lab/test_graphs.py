"""Steps that are replayed. On the CPU what is recorded is computed again, so that all but the GPU's own part is tried here."""

import contextlib
import copy
import dataclasses
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small
import torch
from test_joint import QUIET, with_head
from test_recovery import SMALL, go, losses
from torch import nn
from torch.nn import functional

from deltaexp.lab import graphs, replaying, speeding
from deltaexp.lab.graphs import Padding, StepGraphs


class Again:
    """Records nothing: a replay computes again, of the same tensors."""

    def __init__(self, *_: Any) -> None:
        self.recorded = 0

    def record(self, compute: Callable[[], None]) -> Callable[[], None]:
        self.recorded += 1
        return compute

    def aside(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def random_state(self) -> torch.Tensor:
        return torch.get_rng_state()

    def set_random_state(self, state: torch.Tensor) -> None:
        torch.set_rng_state(state)


class Frozen(Again):
    """Records what the first batch came to, as a graph does of a number that Python has made of it."""

    def record(self, compute: Callable[[], None]) -> Callable[[], None]:
        compute()
        return lambda: None


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))


def made(model: nn.Module, recorder: Any = None, compute: Any = None, padding: Padding | None = None) -> StepGraphs:
    def loss(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return functional.cross_entropy(model(inputs["x"]), inputs["labels"])

    return StepGraphs(compute or loss, list(model.parameters()), recorder or Again(), padding)


def batch(rows: int = 5, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(rows, 4, generator=generator), "labels": torch.randint(2, (rows,), generator=generator)}


def gradients(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def plainly(model: nn.Module, *batches: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    model.zero_grad()
    for one in batches:
        functional.cross_entropy(model(one["x"]), one["labels"]).backward()
    return gradients(model)


def test_replays_are_what_is_computed(model: nn.Module) -> None:
    steps, recorder = made(model, recorder := Again()), recorder
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for seed in range(6):
        one = batch(rows=5 + seed % 2, seed=seed)
        expected = plainly(model, one)
        model.zero_grad()
        loss = steps.step(one)
        assert loss is not None
        torch.testing.assert_close(loss, functional.cross_entropy(model(one["x"]), one["labels"]).detach())
        torch.testing.assert_close(gradients(model), expected)
        optimizer.step()
    assert (steps.shapes, steps.replayed, recorder.recorded, steps.refused) == (2, 6, 2, None)


def test_gradients_of_several_batches_add_up(model: nn.Module) -> None:
    steps, several = made(model), [batch(seed=seed) for seed in range(3)]
    for _ in range(2):
        expected = plainly(model, *several)
        model.zero_grad()
        for one in several:
            assert steps.step(one) is not None
        torch.testing.assert_close(gradients(model), expected)
    # What waits for the optimizer stays what it is.
    model.zero_grad()
    steps.step(several[0])
    kept = [parameter.grad for parameter in model.parameters()]
    before = gradients(model)
    torch._foreach_add_(kept, 1.0)
    steps.step(several[1])
    torch.testing.assert_close(gradients(model), [a + b + 1 for a, b in zip(before, plainly(model, several[1]), strict=True)])


def test_what_else_the_loss_depends_on_has_graphs_of_its_own(model: nn.Module) -> None:
    steps = made(model)
    steps.step(batch(), key=1)
    steps.step(batch(), key=2)
    steps.step({**batch(), "x": batch()["x"].requires_grad_()}, key=1)
    assert (steps.shapes, steps.refused) == (2, None)


def test_what_cannot_be_computed_is_left_to_who_tells_it_better(model: nn.Module) -> None:
    steps = made(model)
    steps.step(batch())
    assert steps.step({**batch(), "x": torch.zeros(5, 3)}) is None
    assert "steps cannot be recorded (mat1 and mat2 shapes" in str(steps.refused)


def test_numbers_of_the_first_batch_are_noticed(model: nn.Module) -> None:
    steps = made(model, Frozen())
    assert steps.step(batch(seed=0)) is not None
    model.zero_grad()
    assert steps.step(batch(seed=1)) is None
    assert steps.refused == "what is replayed differs from what is computed"
    assert (steps.replayed, steps.shapes) == (1, 1)
    assert steps.step(batch(seed=2)) is None
    assert not gradients(model)


def test_random_numbers_of_the_cpu_are_noticed(model: nn.Module) -> None:
    def loss(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return model(inputs["x"]).sum() * (1 + random.random())

    steps, state = made(model, compute=loss), random.getstate()
    assert steps.step(batch()) is None
    assert steps.refused == "random numbers are drawn on the CPU"
    assert random.getstate() == state  # the step that is computed instead draws what it would have drawn


def test_other_gradients_than_before_are_noticed(model: nn.Module) -> None:
    def loss(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return model(inputs["x"]).sum() if len(inputs["x"]) == 5 else model[0](inputs["x"]).sum()

    steps = made(model, compute=loss)
    assert steps.step(batch()) is not None
    assert steps.step(batch(rows=4)) is None
    assert "not the same parameters" in str(steps.refused)


@pytest.mark.parametrize("recorder", [Again, Frozen])
def test_what_a_step_changes_is_changed_once(recorder: type) -> None:
    """Whether it is replayed, or computed since the second batch differs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    plain = copy.deepcopy(model)

    def loss(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return functional.cross_entropy(model(inputs["x"]), inputs["labels"])

    steps = StepGraphs(loss, list(model.parameters()), recorder(), state=list(model.buffers()))
    replayed = []
    for seed in range(4):
        found = steps.step(batch(seed=seed))
        replayed.append(found is not None)
        if found is None:
            loss(batch(seed=seed))
        plain(batch(seed=seed)["x"])
        torch.testing.assert_close(dict(model.named_buffers()), dict(plain.named_buffers()))
    assert replayed == ([True] * 4 if recorder is Again else [True, False, False, False])


def test_why_a_batch_is_not_replayed_is_told(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MOST", 1)
    steps = made(model)
    assert steps.step({**batch(), "names": ["a"]}) is None  # type: ignore[dict-item]
    assert steps.left == "not all that the model is given is tensors"
    assert steps.step(batch()) is not None
    assert steps.step(batch(rows=3)) is None
    assert steps.left == "batches have more than 1 shapes"
    assert steps.refused is None


def test_parameters_that_were_put_elsewhere_are_recorded_anew(model: nn.Module) -> None:
    steps, recorder = made(model, recorder := Again()), recorder
    steps.step(batch())
    model[0].weight.data = model[0].weight.data.clone()
    expected = plainly(model, batch())
    model.zero_grad()
    steps.step(batch())
    torch.testing.assert_close(gradients(model), expected)
    assert recorder.recorded == 2


def test_a_loss_that_is_no_number_is_left_to_the_training(model: nn.Module) -> None:
    steps = made(model)
    broken = batch()
    broken["x"][0, 0] = float("nan")
    loss = steps.step(broken)
    assert loss is not None
    assert torch.isnan(loss)


PADDING = Padding(token=9, ignored=-100, source=40, target=20)


def texts(length: int, rows: int = 2, **extra: torch.Tensor) -> dict[str, torch.Tensor]:
    ids = torch.arange(rows * length).view(rows, length)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **extra}


@pytest.mark.parametrize(("length", "padded"), [(1, 16), (16, 16), (17, 32), (33, 40), (40, 40), (48, 48)])
def test_texts_are_padded_to_few_lengths(length: int, padded: int) -> None:
    given = texts(length, labels=torch.full((2, length), 3))
    found = PADDING.padded(given)
    assert {tensor.shape for tensor in found.values()} == {(2, padded)}
    for name, value in (("input_ids", 9), ("attention_mask", 0), ("labels", -100)):
        assert torch.equal(found[name][:, :length], given[name])
        assert (found[name][:, length:] == value).all()
    assert PADDING.changes(given) == (length != padded)


def test_a_decoder_has_lengths_of_its_own() -> None:
    ids = torch.ones(2, 5, dtype=torch.long)
    found = PADDING.padded(texts(17, labels=ids, decoder_input_ids=ids))
    assert [found[name].shape[1] for name in ("input_ids", "labels", "decoder_input_ids")] == [32, 16, 16]


@pytest.mark.parametrize(
    "given",
    [
        {"pixel_values": torch.zeros(2, 3, 8, 8)},
        {"input_ids": torch.ones(2, 5)},
        texts(5, pixel_values=torch.zeros(2, 3, 8, 8)),
        texts(5, labels=torch.zeros(2, 3)),
        {name: tensor[:, None] for name, tensor in texts(5).items()},
    ],
)
def test_what_has_no_known_length_is_left_as_it_is(given: dict[str, torch.Tensor]) -> None:
    assert not PADDING.changes(given)


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs replay their steps as on a GPU, by computing them again."""

    def chosen(config: Any, model: Any) -> speeding.Choice:
        trainer = dataclasses.replace(config.trainer, precision=config.trainer.precision.replace("auto", "fp32"))
        auto = trainer.speed == "auto"
        return speeding.Choice(trainer, casts=auto and trainer.precision == "bf16", graphs=auto)

    monkeypatch.setattr(speeding, "choose", chosen)
    monkeypatch.setattr(graphs, "CudaRecorder", Again)


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        [],
        ["trainer.gradient_accumulation_steps=2", "trainer.eval_every=2", "trainer.label_smoothing=0.1"],
        ["layers=last:1", "trainer.epochs=3"],
        ["delta_type=prefix"],
        ["delta_type=reft", "reft_positions=l2", "trainer.learning_rate=0.02"],
    ],
)
def test_a_run_whose_steps_are_replayed(on_cpu: None, tmp_path: Path, words: list[str]) -> None:
    words = [*SMALL, *words]
    plain, found = go(tmp_path / "plain", *words), go(tmp_path / "replayed", *words, "trainer.speed=auto")
    facts = found.results["speed"]["replays"]
    assert facts["told"] is None
    assert facts["replayed"] > 0
    assert facts["shapes"] < facts["replayed"]
    logged = [[entry["loss"] for entry in losses(outcome) if "loss" in entry] for outcome in (found, plain)]
    assert len(logged[0]) > 1
    assert logged[0] == pytest.approx(logged[1], rel=1e-3)
    assert found.results["shortcuts"]["told"] == plain.results["shortcuts"]["told"]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "precision"), [("classification", "fp32"), ("choices", "fp32"), ("classification", "bf16")])
def test_kept_activations_are_part_of_the_batch(on_cpu: None, tmp_path: Path, kind: str, precision: str) -> None:
    source = small.bert(tmp_path / "bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    words = ["backbone=local", f"backbone.source={source}", *with_head(kind, tmp_path), "layers=last:1", "delta_type=lora"]
    words += [*QUIET, "trainer=smoke", "trainer.max_steps=9", "lora_dropout=0", "trainer.cpu=true"]
    words += [f"trainer.precision={precision}"]
    plain, found = go(tmp_path / "plain", *words), go(tmp_path / "replayed", *words, "trainer.speed=auto")
    assert found.results["speed"]["kept_casts"] == (precision == "bf16")
    assert found.results["shortcuts"]["while_training"]
    assert found.results["speed"]["replays"]["replayed"] == 9
    logged = [[entry["loss"] for entry in losses(outcome) if "loss" in entry] for outcome in (found, plain)]
    assert logged[0] == pytest.approx(logged[1], rel=1e-3 if precision == "fp32" else 0.02)


@pytest.mark.slow
def test_a_delta_that_changes_while_training_is_computed(on_cpu: None, tmp_path: Path) -> None:
    facts = go(tmp_path, *SMALL, "delta_type=adalora", "trainer.speed=auto").results["speed"]["replays"]
    assert facts == {"shapes": 0, "replayed": 0, "told": "adalora changes its layers while training"}


@pytest.mark.slow
def test_large_batches_are_computed(on_cpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replaying, "WORK", 10)
    facts = go(tmp_path, *SMALL, "trainer.speed=auto").results["speed"]["replays"]
    assert facts == {"shapes": 0, "replayed": 0, "told": "large batches keep the GPU busy by themselves"}


@pytest.mark.slow
def test_nothing_is_replayed_where_nothing_is_trained(on_cpu: None, tmp_path: Path) -> None:
    facts = go(tmp_path, *SMALL, "delta_type=none", "trainer.speed=auto").results["speed"]["replays"]
    assert facts == {"shapes": 0, "replayed": 0, "told": "nothing is trained"}


def test_places_in_a_text_are_not_padded() -> None:
    assert not PADDING.changes(texts(5, start_positions=torch.zeros(2, dtype=torch.long)))


@pytest.mark.slow
def test_padding_leaves_the_positions_of_a_prompt(on_cpu: None, tmp_path: Path) -> None:
    """The longest text has 12 tokens, the prompt 20, and the backbone takes 32: there are none for padding."""
    source = small.bert(tmp_path / "bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    words = ["backbone=local", f"backbone.source={source}", *with_head("classification", tmp_path), *QUIET]
    words += ["trainer=smoke", "trainer.max_steps=5", "trainer.cpu=true", "trainer.speed=auto"]
    facts = go(tmp_path / "run", *words, "delta_type=soft_prompt", "soft_token_num=20").results["speed"]["replays"]
    assert (facts["replayed"], facts["told"]) == (5, None)


@pytest.mark.parametrize(("length", "room", "longest"), [(10, 32, 16), (10, 12, 12), (16, 512, 16), (17, 0, 17), (30, -20, 30)])
def test_texts_are_padded_as_far_as_there_are_positions(length: int, room: int, longest: int) -> None:
    assert graphs.rounded(length, room) == longest
