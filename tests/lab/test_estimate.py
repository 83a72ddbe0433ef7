"""What a step takes is counted on tensors without values: compared with arithmetic by hand and with PyTorch's own record."""

import itertools
from typing import Any

import pytest
import torch
from models import FAMILIES, attach
from torch import nn
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

from deltaexp import casting, speed
from deltaexp.lab import estimate
from deltaexp.lab.estimate import ACTIVATIONS, CASTS, CUBLAS, GRADIENTS, STATES, TEMPORARY, WEIGHTS, Dry, Execution

ROWS, DIMS = 64, (8, 32, 16, 4)


def stack(trained: tuple[int, ...]) -> nn.Sequential:
    """Make three linear maps on the meta device, of which some are trained."""
    with torch.device("meta"):
        layers = [nn.Linear(a, b, bias=False) for a, b in itertools.pairwise(DIMS)]
    for number, layer in enumerate(layers):
        layer.requires_grad_(number in trained)
    return nn.Sequential(*layers)


def cost(model: nn.Module, shape: tuple[int, ...] = (ROWS, DIMS[0]), **how: Any) -> estimate.Cost:
    dry = Dry(model)
    batch = {"x": dry.empty(shape, torch.float32)}
    return dry.train_step(lambda x: (model(x).sum(), None), batch, Execution(**how))


def products(*numbers: int) -> int:
    """Return the FLOPs of the products with these maps' matrices."""
    return sum(2 * ROWS * DIMS[n] * DIMS[n + 1] for n in numbers)


@pytest.mark.parametrize(
    ("trained", "backward"),
    [
        ((2,), (2,)),  # the gradient of the last weight, and none on the way to what is frozen
        ((0,), (2, 1, 0)),  # through two frozen maps to their inputs, then the weight's
        ((0, 1, 2), (2, 2, 1, 1, 0)),  # of weight and input each; the batch has no gradient
    ],
)
def test_flops_of_a_linear_stack(trained: tuple[int, ...], backward: tuple[int, ...]) -> None:
    found = cost(stack(trained), accumulation=3)
    assert found.flops == {"forward": 3 * products(0, 1, 2), "backward": 3 * products(*backward)}


def test_bytes_of_a_linear_stack() -> None:
    weights = 4 * sum(a * b for a, b in itertools.pairwise(DIMS))
    last = 4 * DIMS[2] * DIMS[3]
    found = cost(stack((2,)))
    assert found.peak[WEIGHTS] == weights
    assert found.peak[STATES] == 2 * last + 4  # two moments, and the number of the step
    assert found.gradients == last
    # Frozen maps keep nothing; the trained one keeps its input. The loss is a number.
    assert found.saved == 4 * ROWS * DIMS[2] + 4
    assert cost(stack((0, 1, 2))).saved == 4 * ROWS * (DIMS[1] + DIMS[2]) + 4


def test_gradients_are_held_while_others_add_up() -> None:
    one, several = cost(stack((0, 1, 2))), cost(stack((0, 1, 2)), accumulation=8)
    assert several.total == cost(stack((0, 1, 2)), accumulation=2).total
    assert several.peak.get(GRADIENTS, 0) >= one.peak.get(GRADIENTS, 0)
    assert several.total > one.total


def test_half_precision_keeps_half() -> None:
    model = stack((0, 1, 2))
    assert cost(stack((0, 1, 2)), (4096, DIMS[0]), autocast=torch.bfloat16).saved < 0.7 * cost(model, (4096, DIMS[0])).saved


def test_kept_casts_are_told_apart() -> None:
    model = stack((2,))
    dry, how = Dry(model), Execution(autocast=torch.bfloat16)
    batch = {"x": dry.empty((ROWS, DIMS[0]), torch.float32)}
    with casting.kept(model):
        dry.evaluation(lambda x: (None, model(x)), batch, how)
        found = dry.train_step(lambda x: (model(x).sum(), None), batch, how)
    assert found.peak[CASTS] == 2 * sum(p.numel() for p in model.parameters() if not p.requires_grad)
    assert not hasattr(model[0].weight, casting.CAST)


class Attending(nn.Module):
    """An attention with dropout, as models have it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(32, 96)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (12, 8)).transpose(1, 2).chunk(3, dim=1)
        return functional.dropout(functional.scaled_dot_product_attention(q, k, v, dropout_p=0.1), 0.1)


def test_a_gpu_attends_without_a_matrix_of_scores() -> None:
    with torch.device("meta"):
        models = Attending(), Attending()
    cpu, gpu = cost(models[0], (2, 512, 32)), cost(models[1], (2, 512, 32), device="gpu")
    scores = 4 * 2 * 4 * 512 * 512
    assert cpu.saved > scores > gpu.saved
    assert gpu.peak[TEMPORARY] >= CUBLAS


def test_adam_of_8_bits() -> None:
    model = stack((0,))
    dry = Dry(model)
    batch = {"x": dry.empty((ROWS, DIMS[0]), torch.float32)}
    found = dry.train_step(lambda x: (model(x).sum(), None), batch, Execution(), optimizer=None)
    assert found.peak[STATES] == 2 * (8 * 32 + 4)


def test_nothing_to_train_and_evaluation() -> None:
    model = stack(())
    dry = Dry(model)
    batch = {"x": dry.empty((ROWS, DIMS[0]), torch.float32)}
    found = dry.train_step(lambda x: (model(x).sum(), None), batch, Execution())
    assert (found.gradients, found.flops["backward"], STATES in found.peak) == (0, 0, False)
    # A layer's input and output at a time.
    held = dry.evaluation(lambda x: (None, model(x)), batch, Execution())
    assert held == dry.weights() + 4 * ROWS * (DIMS[0] + DIMS[1] + DIMS[2])


def test_tied_weights_are_counted_once() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    model[1].weight = model[0].weight
    assert Dry(model).weights() == 4 * 8 * 8


@pytest.mark.parametrize("activation", [nn.GELU, nn.SiLU, nn.Mish])
def test_the_peak_is_that_of_a_real_step(activation: type[nn.Module]) -> None:
    def network() -> nn.Module:
        layers = [nn.Linear(128, 512), activation(), nn.LayerNorm(512), nn.Linear(512, 512), activation(), nn.Linear(512, 128)]
        model = nn.Sequential(*layers)
        model[0].requires_grad_(False)
        return model

    with torch.device("meta"):
        drawn = network()
    found = cost(drawn, (2048, 128))
    model, x = network(), torch.randn(2048, 128)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        for _ in range(2):
            model(x).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    planned = found.total - found.peak[WEIGHTS] - 4 * x.numel()
    assert planned == pytest.approx(most, rel=0.1)
    assert found.peak[ACTIVATIONS] > 0.5 * most


def test_maps_with_low_rank_updates_keep_what_they_keep_in_a_run() -> None:
    def step(fused: bool) -> estimate.Cost:
        model = FAMILIES["llama"].build().bfloat16().train()
        attach(model, modified_modules=["self_attn.q_proj", "mlp.up_proj"])
        dry = Dry(model)
        batch = {"input_ids": dry.empty((4, 32), torch.long)}
        with speed.configured(fused=fused):
            return dry.train_step(lambda input_ids: (model(input_ids).logits.sum(), None), batch, Execution())

    together, by_hooks = step(True), step(False)
    # Hooks keep the inputs once more, in the delta's float32; that FLOPs are counted does not make hooks of it.
    assert together.saved < by_hooks.saved
    assert together.flops["forward"] == by_hooks.flops["forward"] > 0
