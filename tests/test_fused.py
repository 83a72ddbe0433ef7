"""A linear map and the updates on it in one: the same as the hooks compute, and their work where anything else hangs there."""

from __future__ import annotations

import copy
import io
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import FAMILIES, attach, logits, snapshot
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from deltaexp import AdapterModel, DeltaModel, LohaModel, LokrModel, LoraModel, VeraModel, fused, low_rank, route, speed
from deltaexp.deltas._linear import LinearMap
from deltaexp.deltas.loha import LohaLayer
from deltaexp.deltas.lokr import LokrLayer
from deltaexp.deltas.lora import LoraLayer
from deltaexp.errors import ConfigError
from deltaexp.full_size import DirectedLinear, ShiftedLinear
from deltaexp.hadamard import HadamardProduct
from deltaexp.low_rank import LowRankLinear, Update, low_rank_linear, simply, updated

PARTS = [
    (Update(0.5, 0.0, None),),
    (Update(0.5, 0.3, None),),
    (Update(2.0, 0.0, (1, 12, 0, 4)), Update(0.5, 0.0, (1, 12, 8, 4))),
    (Update(2.0, 0.0, (3, 4, 1, 2)),),
    (Update(2.0, 0.0, None),),
    (Update(2.0, 0.0, (1, 12, 8, 4)),),
    (Update(2.0, 0.0, (3, 4, 1, 2)),),
]


@pytest.mark.parametrize("transposed", [False, True], ids=["Linear", "Conv1D"])
@pytest.mark.parametrize("rows", [3, 13], ids=["separately", "whole"])
@pytest.mark.parametrize(
    "number", range(7), ids=["plain", "dropout", "slices", "groups", "rows", "rows sliced", "rows grouped"]
)
def test_gradients(number: int, rows: int, transposed: bool) -> None:
    """First and second derivatives, by finite differences."""
    torch.manual_seed(0)
    updates, batch = PARTS[number], (2,) if number > 3 else ()  # a matrix for each row of the batch
    weight = torch.randn(5, 12).double().T if transposed else torch.randn(12, 5).double()
    bias, x = torch.randn(12).double(), torch.randn(2, rows, 5, dtype=torch.double, requires_grad=True)
    factors = []
    for update in updates:
        width = 12 if update.part is None else update.part[0] * update.part[3]
        factors += [
            torch.randn(*batch, 3, 5).double().requires_grad_(),
            torch.randn(*batch, width, 3).double().requires_grad_(),
        ]

    def function(x: torch.Tensor, *factors: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(1)  # the same elements are dropped every time
        return LowRankLinear.apply(x, weight, bias, None, updates, *factors)

    assert torch.autograd.gradcheck(function, (x, *factors), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, (x, *factors), fast_mode=True)
    if not updates[0].dropout:
        with torch.no_grad():
            torch.testing.assert_close(function(x, *factors), low_rank_linear(x, weight, bias, updates, *factors))
            if not batch and updates[0].part is None:
                torch.testing.assert_close(function(x, *factors), simply(x, weight, bias, updates, *factors))


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("setting", ["float32", "bfloat16", "autocast", "float32 on bfloat16", "dropout"])
def test_small_inputs(kind: str, setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are left to PyTorch's own operations, which come to the same; what these cannot compute is not."""
    torch.manual_seed(0)
    net = Net(kind)
    delta_on(net, lora_r=3, lora_dropout=0.3 if setting == "dropout" else 0.0)
    if setting.endswith("bfloat16"):
        net.map.to(torch.bfloat16)
        net.map.lora.to(torch.bfloat16 if setting == "bfloat16" else torch.float32)
    x = torch.randn(2, 5, 8, dtype=net.map.weight.dtype)

    def run(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=setting == "autocast"):
            return net(x)

    fused_once, expected = computed(net, x, by_hooks=False, run=run)
    monkeypatch.setattr(low_rank, "SMALL", 2 * 5 * (8 + 12) + 1)
    fused_again, found = computed(net, x, by_hooks=False, run=run)
    assert fused_once
    assert fused_again == (setting in ("float32 on bfloat16", "dropout"))
    tolerance = 1e-5 if setting in ("float32", "dropout") else 0.03
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * float(other.detach().abs().max()))
    monkeypatch.setattr(low_rank, "SMALL", 2 * 5 * (8 + 12))
    assert computed(net, x, by_hooks=False, run=run)[0], "too large"


@pytest.mark.parametrize("name", ["vera", "loha", "lokr"])
def test_small_inputs_of_other_kinds(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their own way makes nothing of the size of a weight, or makes it once only."""
    torch.manual_seed(0)
    net = Net()
    delta_on(net, {"vera": VeraModel, "loha": LohaModel, "lokr": LokrModel}[name])
    x = torch.randn(2, 5, 8)
    fused_once, expected = computed(net, x, by_hooks=False)
    monkeypatch.setattr(low_rank, "SMALL", 1 << 18)
    fused_again, found = computed(net, x, by_hooks=False)
    assert (fused_once, fused_again) == (True, False)
    torch.testing.assert_close(found, expected)
    monkeypatch.setattr(fused, "KEPT", 8 * 12)
    assert computed(net, x, by_hooks=False)[0] == (name != "vera"), "too much to keep"


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_gradients_of_a_full_size_update(kind: str) -> None:
    target = LinearMap(6, 4)
    layer = (LohaLayer if kind == "loha" else LokrLayer)(target, 2, 0.5, 0.0).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    weight, bias = torch.randn(4, 6).double(), torch.randn(4).double()
    x = torch.randn(2, 3, 6, dtype=torch.double, requires_grad=True)

    def function(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return ShiftedLinear.apply(x, weight, bias, None, layer, *parameters)

    assert torch.autograd.gradcheck(function, (x, *layer.parameters()))
    assert torch.autograd.gradgradcheck(function, (x, *layer.parameters()))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # PyTorch's own forward mode
def test_a_hadamard_product_goes_with_all_transforms() -> None:
    factors = [torch.randn(shape).double() for shape in ((4, 2), (2, 3), (4, 2), (2, 3))]

    def plain(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
        return (a @ b) * (c @ d) * 0.5

    def function(*factors: torch.Tensor) -> torch.Tensor:
        return HadamardProduct.apply(*factors, 0.5)

    several = [torch.randn(5, *factor.shape).double() for factor in factors]
    for one in (
        lambda f: f(*factors),
        lambda f: torch.func.jacrev(f, argnums=(0, 1, 2, 3))(*factors),
        lambda f: torch.vmap(f)(*several),
    ):
        torch.testing.assert_close(one(function), one(plain))
    given = [factor.requires_grad_() for factor in factors]
    assert torch.autograd.gradcheck(function, given, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, given)


@pytest.mark.parametrize("transposed", [False, True], ids=["Linear", "Conv1D"])
@pytest.mark.parametrize("biased", [False, True])
def test_gradients_of_a_directed_update(biased: bool, transposed: bool) -> None:
    torch.manual_seed(0)
    update = Update(0.5, 0.0, None)
    weight = torch.randn(5, 4).double().T if transposed else torch.randn(4, 5).double()
    bias = torch.randn(4).double() if biased else None
    shapes = {"x": (2, 3, 5), "down": (2, 5), "up": (4, 2), "ratio": (4,)}
    x, down, up, ratio = (torch.randn(shape, dtype=torch.double) for shape in shapes.values())
    ratio[1] = 0

    def function(x: torch.Tensor, down: torch.Tensor, up: torch.Tensor, ratio: torch.Tensor) -> torch.Tensor:
        directed = updated(weight, (update,), (down, up)).detach()
        return DirectedLinear.apply(x, weight, bias, None, directed, update, down, up, ratio)

    given = [tensor.requires_grad_() for tensor in (x, down, up, ratio)]
    expected = torch.nn.functional.linear(x, ratio[:, None] * (weight + 0.5 * up @ down), bias)
    torch.testing.assert_close(function(*given), expected)
    assert torch.autograd.gradcheck(function, given)
    assert torch.autograd.gradgradcheck(function, given)


class Net(nn.Module):
    """A linear map of either kind, in a module."""

    def __init__(self, kind: str = "linear", out_dim: int = 12) -> None:
        super().__init__()
        self.map = nn.Linear(8, out_dim) if kind == "linear" else Conv1D(out_dim, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.map(x)


def delta_on(net: nn.Module, model: type[DeltaModel] = LoraModel, **keys: Any) -> DeltaModel:
    """Return a delta with random values."""
    delta_model = model(net, modified_modules=["map"], **keys)
    delta_model.freeze_module(exclude=["deltas"])
    for attachment in delta_model.attachments:
        for parameter in attachment.layer.parameters():
            nn.init.normal_(parameter, std=0.5)
    return delta_model


def computed(net: nn.Module, x: torch.Tensor, by_hooks: bool, run: Callable | None = None) -> tuple[bool, list[torch.Tensor]]:
    """Return whether the map was computed in one, and output and gradients."""
    x = x.detach().clone().requires_grad_()
    net.zero_grad(set_to_none=True)
    torch.manual_seed(2)
    with speed.configured(fused=not by_hooks):
        out = net(x) if run is None else run(net, x)
        out.float().pow(2).sum().backward()
    found = [p.grad for p in net.parameters() if p.grad is not None]
    names = repr(_graph(out))
    return any(kind in names for kind in ("LowRankLinear", "ShiftedLinear", "DirectedLinear")), [out, x.grad, *found]


def _graph(out: torch.Tensor) -> list[str]:
    """Return the names of the functions that have made a tensor."""
    names, waiting = [], [out.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None:
            names.append(node.name())
            waiting += [following for following, _ in node.next_functions]
    return names


def close(found: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float = 1e-5) -> None:
    """Check tensors against others, up to a fraction of the largest element of each."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        size = float(other.detach().abs().max()) if other.numel() else 0.0
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance * size)


def check(net: nn.Module, x: torch.Tensor, in_one: bool, run: Callable | None = None, tolerance: float = 1e-5) -> None:
    """Check that the map is computed in one, or not, and that the result is the hooks'."""
    was, found = computed(net, x, False, run)
    assert was is in_one
    was, expected = computed(net, x, True, run)
    assert not was
    close(found, expected, tolerance)


@pytest.mark.parametrize("shape", [(8,), (5, 8), (2, 3, 8), (2, 40, 8), (0, 8)], ids=str)
@pytest.mark.parametrize("keys", [{}, {"lora_scaling": "rslora"}, {"lora_dropout": 0.5}], ids=str)
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_it_is_what_the_hooks_compute(kind: str, keys: dict, shape: tuple[int, ...]) -> None:
    net = Net(kind)
    delta_on(net, **keys)
    if len(shape) > 1 or kind == "linear":
        check(net, torch.randn(shape), in_one=True)
    net.eval()
    with torch.inference_mode():
        x = torch.randn(2, 40, 8)
        out = net(x)
        with speed.configured(fused=False):
            torch.testing.assert_close(out, net(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("delta_type", ["vera", "adalora", "loha", "lokr"])
@pytest.mark.parametrize("rows", [4, 64])
def test_other_types_that_add_to_the_weight(delta_type: str, rows: int) -> None:
    import deltaexp

    net = Net()
    model = {"vera": "VeraModel", "adalora": "AdaloraModel", "loha": "LohaModel", "lokr": "LokrModel"}[delta_type]
    delta_on(net, getattr(deltaexp, model))
    check(net, torch.randn(rows, 8), in_one=True)


@pytest.mark.parametrize("keys", [{"lora_dora": True}, {"lora_init": "pissa"}, {"lora_init": "olora"}], ids=str)
@pytest.mark.parametrize("rows", [4, 64])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_what_starts_from_the_weight(kind: str, rows: int, keys: dict) -> None:
    """It is computed in one as well, is the map alone at the start to the last bit, and what the hooks compute after that."""
    net, x = Net(kind), torch.randn(rows, 8)
    plain = net(x).detach()
    layer: Any = LoraModel(net, modified_modules=["map"], lora_r=3, **keys).attachments[0].layer
    assert torch.equal(net(x), plain)
    net.map.requires_grad_(False)
    with torch.no_grad():
        assert torch.equal(net(x), plain)
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3).requires_grad_()
    check(net, x, in_one=True)
    expected = computed(net, x, by_hooks=True)[1][0]
    with torch.no_grad():
        torch.testing.assert_close(net(x), expected)
    both = {"lora_dora": True, "lora_init": "pissa"}
    if keys == {"lora_dora": True}:  # two of which each scales what the other has made
        LoraModel(net, modified_modules=["map"], **both)
        check(net, x, in_one=False)


def test_starting_values_are_not_dropped() -> None:
    net = Net()
    delta_on(net, lora_init="pissa", lora_dropout=0.5, lora_r=3)
    check(net, torch.randn(64, 8), in_one=False)
    net.eval()
    check(net, torch.randn(64, 8), in_one=True)


def test_inputs_that_are_not_contiguous_and_outputs_changed_in_place() -> None:
    net = Net()
    delta_on(net)
    check(net, torch.randn(8, 3, 5).transpose(0, 2), in_one=True)
    check(net, torch.randn(64, 8), in_one=True, run=lambda net, x: net(x).add_(1).relu_())
    check(net, torch.randn(2, 64, 8), in_one=True, run=lambda net, x: net(x).add_(1).relu_())
    check(net, torch.randn(3, 8), in_one=True, run=lambda net, x: net(x).mul_(2))


def test_an_input_without_gradient() -> None:
    net = Net()
    layer = delta_on(net).attachments[0].layer
    out = net(x := torch.randn(50, 8))
    out.sum().backward()
    torch.testing.assert_close(layer.lora_B.grad, layer.scale * (x @ layer.lora_A.T).sum(0).expand(12, -1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [4, 64])
def test_a_backbone_in_half_precision(dtype: torch.dtype, rows: int) -> None:
    """The delta is float32 and computes so, as it does in the hook; in the backbone's dtype where that is asked for."""
    net = Net().to(dtype)
    delta_on(net)
    x = torch.randn(rows, 8).to(dtype)
    check(net, x, in_one=True, tolerance=0.02)
    expected = computed(net, x, by_hooks=True)[1]
    with speed.configured(delta_in_backbone_dtype=True):
        was, found = computed(net, x, by_hooks=False)
    assert was
    close(found, expected, 0.03)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_autocast(kind: str, dropout: float) -> None:
    net = Net(kind)
    delta_on(net, lora_dropout=dropout)

    def run(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return net(x)

    check(net, torch.randn(64, 8), in_one=True, run=run, tolerance=0.02)


class Operations(TorchDispatchMode):
    """Counts the operations within it that add a product to a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.added = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.added += func is torch.ops.aten.addmm_.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize(("sizes", "rows"), [((16, 64), 96), ((64, 16), 96), ((16, 16), 96), ((16, 64), 48)], ids=str)
def test_bfloat16_side_by_side(sizes: tuple[int, int], rows: int, dropout: float) -> None:
    """A wide product in bfloat16 is one with that of the factor; it is at least as exact as the sum of both."""
    (width, out), rank, update = sizes, 3, Update(0.5, dropout, None)
    wide_forward, wide_backward = 2 * width <= out <= rows, 2 * out <= width <= rows and not dropout
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (2, rows // 2, width), "weight": (out, width), "bias": (out,), "down": (rank, width), "up": (out, rank)}
    tensors = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}
    g = torch.randn(2, rows // 2, out, generator=generator).bfloat16()

    def computed(kind: torch.dtype, apart: bool) -> list[torch.Tensor]:
        x, weight, bias, down, up = (tensor.to(kind) for tensor in tensors.values())
        given = [tensor.clone().requires_grad_() for tensor in (x, down, up)]
        torch.manual_seed(1)
        with Operations() as operations, pytest.MonkeyPatch.context() as patch:
            if apart:
                patch.setattr(low_rank, "_side_by_side", lambda *_: False)
            result = LowRankLinear.apply(given[0], weight, bias, None, (update,), *given[1:])
            result.backward(g.to(kind))
        if kind == torch.bfloat16 and not apart:
            assert operations.added == 2 - wide_forward - wide_backward - bool(dropout)
        return [result.detach().double(), *(tensor.grad.double() for tensor in given)]

    exact, apart, found = computed(torch.double, True), computed(torch.bfloat16, True), computed(torch.bfloat16, False)
    for one, other, best in zip(found, apart, exact, strict=True):
        assert (one - best).norm() <= 1.02 * (other - best).norm()
        assert (one - best).norm() <= 0.01 * best.norm()


def test_reduced_precision_of_products_keeps_small_updates() -> None:
    """Where products are computed in TF32 or bfloat16, an update that would vanish beside the weight is added apart."""
    net = Net()
    nn.init.ones_(net.map.weight)
    layer = delta_on(net, lora_alpha=8).attachments[0].layer
    nn.init.constant_(layer.lora_A, 1e-2)
    nn.init.constant_(layer.lora_B, 1e-2)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.no_grad():
            update = net(torch.ones(256, 8)) - torch.nn.functional.linear(torch.ones(256, 8), net.map.weight, net.map.bias)
    finally:
        torch.set_float32_matmul_precision(before)
    torch.testing.assert_close(update, torch.full((256, 12), 8 * 8e-4), rtol=1e-2, atol=0)


@pytest.mark.parametrize("keys", [{"lora_dropout": 0.5}, {"lora_dora": True}], ids=str)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_activations(reentrant: bool, keys: dict) -> None:
    net = Net()
    delta_on(net, **keys)
    check(net, torch.randn(64, 8), True, lambda net, x: checkpoint(net, x, use_reentrant=reentrant)) if not reentrant else None
    outs = []
    for wrapped in (False, True):
        x = torch.ones(64, 8, requires_grad=True)
        net.zero_grad(set_to_none=True)
        torch.manual_seed(0)
        out = checkpoint(net, x, use_reentrant=reentrant) if wrapped else net(x)
        out.pow(2).sum().backward()
        outs.append([out, x.grad, *(p.grad for p in net.parameters() if p.grad is not None)])
    assert len(outs[0]) == (5 if keys.get("lora_dora") else 4)
    close(outs[1], outs[0])


@pytest.mark.parametrize("count", [2, 3])
def test_several_deltas_on_one_map(count: int) -> None:
    net = Net()
    for number in range(count):
        delta_on(net, lora_r=2 + number)
    check(net, torch.randn(5, 8), in_one=True)
    check(net, torch.randn(64, 8), in_one=True)


@pytest.mark.parametrize("shape", [(6, 8), (6, 3, 8), (12, 3, 8)], ids=["rows", "tokens", "beams"])
def test_rows_with_different_deltas(shape: tuple[int, ...]) -> None:
    net = Net()
    first, second, unused = (delta_on(net, lora_r=rank) for rank in (2, 3, 4))

    def run(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        with route([first, second, None, second, [first, second], first]):
            return net(x)

    check(net, torch.randn(shape), in_one=True, run=run)
    # A row that a delta overflows on does not spoil the others.
    big = second.attachments[0].layer
    with torch.no_grad():
        big.lora_A.fill_(torch.finfo(torch.float32).max)
        x = torch.ones(2, 8)
        with route([first, second]):
            assert torch.isfinite(net(x)[0]).all()
    assert unused.attachments[0].layer.lora_A.grad is None


def test_slices_of_a_fused_projection() -> None:
    family = FAMILIES["gpt2"]
    backbone = family.build()
    attach(backbone).freeze_module()
    inputs = family.inputs()
    with torch.no_grad():
        found = logits(backbone, inputs)
        with speed.configured(fused=False):
            torch.testing.assert_close(found, logits(backbone, inputs), rtol=1e-5, atol=1e-5)
    projections = [module for module in backbone.modules() if type(module) is fused.Conv1D]
    assert len(projections) == 2
    assert all(len(module._forward_hooks) == 2 for module in projections)  # queries and values


# What else may hang on a map: each puts something there and returns how to take it away, or None.


def _hook(net: Any) -> Any:
    return net.map.register_forward_hook(lambda module, args, out: out * 2)


def _early_hook(net: Any) -> Any:
    return net.map.register_forward_hook(lambda module, args, out: out * 2, prepend=True)


def _pre_hook(net: Any) -> Any:
    return net.map.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def _backward_hook(net: Any) -> Any:
    return net.map.register_full_backward_hook(lambda module, grad_input, grad_output: (grad_input[0] * 2,))


def _global_hook(net: Any) -> Any:
    return nn.modules.module.register_module_forward_hook(
        lambda module, args, out: out * 2 if isinstance(module, nn.Linear) else None
    )


def _hook_on_the_layer(net: Any) -> Any:
    return net.map.lora.register_forward_hook(lambda module, args, out: out * 2)


def _forward(net: Any) -> None:
    """What accelerate does."""
    inner = net.map.forward
    net.map.forward = lambda x: inner(x) * 2


class _Twice(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * 2


def _parametrization(net: Any) -> None:
    parametrize.register_parametrization(net.map, "weight", _Twice())


def _trained_weight(net: Any) -> None:
    net.map.weight.requires_grad_()


def _trained_bias(net: Any) -> None:
    net.map.bias.requires_grad_()


def _adapter(net: Any) -> None:
    delta_on(net, AdapterModel)


def _subclass(net: Any) -> None:
    class Mine(LoraLayer):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 2

    net.map.lora.__class__ = Mine


OTHERS = [
    _hook, _early_hook, _pre_hook, _backward_hook, _global_hook, _hook_on_the_layer, _forward, _parametrization,
    _trained_weight, _trained_bias, _adapter, _subclass,
]  # fmt: skip


@pytest.mark.parametrize("other", OTHERS, ids=lambda other: other.__name__)
@pytest.mark.parametrize("early", [True, False], ids=["before", "after"])
def test_where_something_else_hangs_the_hooks_do_it(other: Callable, early: bool) -> None:
    if early and other in (_hook_on_the_layer, _subclass, _trained_weight, _trained_bias):
        pytest.skip("needs the layer, or is undone by the delta")
    net = Net()
    handle = other(net) if early else None
    delta_on(net)
    handle = handle if early else other(net)
    try:
        check(net, torch.randn(64, 8), in_one=False)
    finally:
        if handle is not None:
            handle.remove()
    if handle is not None and other is not _hook_on_the_layer:
        check(net, torch.randn(64, 8), in_one=True)


def test_a_hook_that_comes_first_sees_the_map_alone() -> None:
    net, seen = Net(), []
    net.map.register_forward_hook(lambda module, args, out: seen.append(out.clone()))
    plain = net(x := torch.randn(64, 8))
    delta_on(net)
    assert not torch.allclose(net(x), plain)
    assert torch.equal(seen[0], seen[1])


def test_arguments_by_name_go_to_the_hooks() -> None:
    net = Net()
    delta_on(net)
    check(net, torch.randn(64, 8), in_one=False, run=lambda net, x: net.map(input=x))


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_function_transforms() -> None:
    net = Net()
    delta_on(net)
    x = torch.randn(3, 8)
    expected = net(x)
    torch.testing.assert_close(torch.func.vmap(net)(x), expected)
    _, tangent = torch.func.jvp(net, (x,), (torch.ones_like(x),))
    with forward_ad.dual_level():
        other = forward_ad.unpack_dual(net(forward_ad.make_dual(x, torch.ones_like(x)))).tangent
    torch.testing.assert_close(tangent, other)
    jacobian = torch.func.jacrev(net)(x[0])
    torch.testing.assert_close(jacobian @ torch.ones(8), tangent[0])
    with torch.no_grad():
        traced = torch.jit.trace(net, (x,), check_trace=False)
        torch.testing.assert_close(traced(x), expected)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_the_class_comes_back(order: tuple[int, ...]) -> None:
    """Whatever the order in which deltas are taken out, the last one leaves the backbone as it was."""
    backbone = FAMILIES["bert"].build().requires_grad_(False)
    kinds, before = [type(module) for module in backbone.modules()], snapshot(backbone)
    deltas = [attach(backbone, kind) for kind in ("lora", "adapter", "loha")]
    assert fused.Linear in [type(module) for module in backbone.modules()]
    for number in order:
        deltas[number].detach()
    assert [type(module) for module in backbone.modules()] == kinds
    assert snapshot(backbone) == before
    for delta in deltas:
        delta.attach()
    deltas[0].detach()
    deltas[2].merge()
    deltas[1].detach()
    deltas[2].detach()
    assert [type(module) for module in backbone.modules()] == kinds


def test_copies_compute_with_their_own_layers() -> None:
    net = Net()
    delta_model = delta_on(net)
    x = torch.randn(64, 8)
    expected = net(x)
    twin = copy.deepcopy(net)
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for other in (twin, loaded):
        assert type(other.map) is fused.Linear
        assert torch.equal(other(x), expected)
        nn.init.zeros_(other.map.lora.lora_B)
        assert not torch.equal(other(x), expected)
    assert torch.equal(net(x), expected)
    delta_model.detach()
    assert type(net.map) is nn.Linear
    assert repr(net.map).startswith("Linear(")


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # the compiler's own doing
@pytest.mark.parametrize("keys", [{}, {"lora_dora": True}, {"lora_init": "pissa"}], ids=str)
@pytest.mark.slow
def test_compiled_without_a_break(keys: dict) -> None:
    net = Net()
    delta_on(net, lora_r=3, **keys)
    for run in (None, lambda net, x: torch.compile(net, backend="aot_eager", fullgraph=True)(x)):
        torch.compiler.reset()
        found = computed(net, torch.ones(64, 8), by_hooks=False, run=run)[1]
        expected = computed(net, torch.ones(64, 8), by_hooks=True)[1]
        close(found, expected)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # the compiler's own doing
@pytest.mark.slow
def test_compiled_under_autocast() -> None:
    net = Net()
    delta_on(net, lora_r=3)

    def compiled(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return torch.compile(net, backend="eager", fullgraph=True)(x)

    torch.compiler.reset()
    found = computed(net, torch.ones(64, 8), by_hooks=False, run=compiled)[1]
    close([part.float() for part in found], [part.float() for part in computed(net, torch.ones(64, 8), True)[1]], 0.05)


def test_less_is_kept_for_the_backward_pass() -> None:
    net = Net().bfloat16()
    delta_on(net, lora_r=2)

    def kept() -> int:
        sizes: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            net(torch.randn(1024, 8).bfloat16())
        return sum(sizes.values())

    found = kept()
    with speed.configured(fused=False):
        assert found < 0.65 * kept()


def test_switches() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'fused'"):
        speed.configure(fused=False, fuse=False)
    with pytest.raises(ConfigError, match="The switch fused .* is set to 'off'; it is True or False"):
        speed.configure(recorded=True, fused="off")
    assert speed.settings == speed.Speed()
    with speed.configured(fused=False):
        assert not speed.settings.fused
    assert speed.settings.fused
