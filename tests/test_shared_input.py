"""Maps that share the gradient of their input: the same as apart, in unusual backward passes as well, and nothing is held."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import FAMILIES, perturb
from test_fused import close
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from deltaexp import LoraModel, casting, shared_input, speed


class Attention(nn.Module):
    """Maps of the same input, the outputs of which meet."""

    def __init__(self, kind: type = nn.Linear) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, n) if kind is nn.Linear else Conv1D(n, 8) for n in (6, 6, 5))
        self.out = nn.Linear(5, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        return self.out(torch.tanh(q @ k.mT / 8) @ v) + x


def net_with_delta(kind: type = nn.Linear, names: str = "qkv", **keys: Any) -> Attention:
    net = Attention(kind)
    delta_model = LoraModel(net, modified_modules=list(names), **keys)
    delta_model.freeze_module(exclude=["deltas"])
    for attachment in delta_model.attachments:
        for parameter in attachment.layer.parameters():
            nn.init.normal_(parameter, std=0.3)
    return net


def entries(out: torch.Tensor) -> list[int]:
    """Return for each input that maps share in the graph of a tensor how many do."""
    seen, waiting, counts = set(), [out.grad_fn], {}
    while waiting:
        node = waiting.pop()
        for following, _ in node.next_functions:
            if following is None:
                continue
            if following.name() == "_EntryBackward":
                counts[following] = counts.get(following, 0) + 1
            if following not in seen:
                seen.add(following)
                waiting.append(following)
    return sorted(counts.values())


def step(net: nn.Module, x: torch.Tensor, run: Callable | None = None) -> tuple[list[int], list[torch.Tensor]]:
    """Return how many maps share each input, and output and gradients."""
    x = x.detach().clone().requires_grad_()
    net.zero_grad(set_to_none=True)
    torch.manual_seed(2)
    inner = x * 1
    out = net(inner) if run is None else run(net, inner)
    found = entries(out)
    out.float().pow(2).sum().backward()
    return found, [out, x.grad, *(p.grad for p in net.parameters() if p.grad is not None)]


def check(net: nn.Module, sharing: list[int], run: Callable | None = None, x: Any = None, tolerance: float = 1e-5) -> None:
    """Check how many maps share each input, and that the result is the hooks', and the same to the last bit each time."""
    x = torch.randn(3, 7, 8) if x is None else x
    with speed.configured(fused=False):
        found, expected = step(net, x, run)
        assert found == []
    first = step(net, x, run)
    assert first[0] == sharing
    close(first[1], expected, tolerance)
    for one, other in zip(step(net, x, run)[1], first[1], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@pytest.mark.parametrize("shape", [(3, 7, 8), (40, 8), (0, 8)], ids=str)
def test_it_is_what_the_hooks_compute(shape: tuple[int, ...], kind: type) -> None:
    check(net_with_delta(kind), [3], x=torch.randn(shape))


@pytest.mark.parametrize(
    "keys",
    [
        {"names": "qv"}, {"lora_dropout": 0.5}, {"lora_dora": True}, {"lora_init": "pissa", "lora_r": 3},
        {"lora_r": 2, "lora_r_pattern": {"k": 3}},
    ],
    ids=str,
)  # fmt: skip
def test_other_deltas(keys: dict) -> None:
    check(net_with_delta(**keys), [len(keys.get("names", "qkv"))])


def test_a_map_that_shares_nothing() -> None:
    check(net_with_delta(names="q"), [1])


def test_half_precision() -> None:
    net, x = net_with_delta().bfloat16(), torch.randn(3, 7, 8).bfloat16()
    check(net, [3], x=x, tolerance=0.05)


def test_autocast() -> None:
    """Every map has a cast of its own, unless these are kept (`deltaexp.casting`)."""

    def run(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return net(x)

    net = net_with_delta()
    check(net, [1, 1, 1], run=run, tolerance=0.05)
    with casting.kept(net):
        check(net, [3], run=run, tolerance=0.05)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_activations(reentrant: bool) -> None:
    net, x = net_with_delta(), torch.randn(3, 7, 8)
    expected = step(net, x)[1]
    close(step(net, x, lambda net, x: checkpoint(net, x, use_reentrant=reentrant))[1], expected)


def test_gradients_of_gradients() -> None:
    net, x = net_with_delta().double(), torch.randn(2, 3, 8).double().requires_grad_()

    def function(x: torch.Tensor) -> torch.Tensor:
        return net(x * 1)

    assert torch.autograd.gradcheck(function, (x,), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, (x,), fast_mode=True)


def test_several_forward_and_backward_passes() -> None:
    """Each backward pass has a sum of its own, whether it needs the input's gradient or not."""
    net, leaf = net_with_delta(), torch.randn(4, 8, requires_grad=True)
    factors = [net.q.lora.lora_A, net.k.lora.lora_B]

    def run() -> list[torch.Tensor]:
        x = leaf * 1
        one, two = net(x).sum(), net(x).pow(2).sum()
        found = [*torch.autograd.grad(one, factors, retain_graph=True)]  # the input's gradient is left behind
        found += torch.autograd.grad(net.v(x).sum() + one, [leaf, *factors], retain_graph=True)
        found += torch.autograd.grad(two, [leaf], retain_graph=True)
        (one + two).backward()
        found += [p.grad.clone() for p in (leaf, *factors)]
        leaf.grad = None
        net.zero_grad()
        return found

    found = run()
    with speed.configured(fused=False):
        close(found, run())


def test_outputs_with_backward_passes_of_their_own() -> None:
    net, leaf = net_with_delta(), torch.randn(4, 8, requires_grad=True)

    def run() -> list[torch.Tensor]:
        leaf.grad = None
        x = leaf + 1
        for out in [net.q(x), net.v(x), net.k(x)]:
            out.sum().backward()
        return [leaf.grad.clone()]

    found = run()
    with speed.configured(fused=False):
        close(found, run())


def test_a_hook_sees_the_whole_gradient() -> None:
    net, seen = net_with_delta(), []

    def run(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        x.register_hook(lambda g: seen.append(g.clone()))
        return net(x)

    check(net, [3], run)
    assert len(seen) == 3
    close(seen[1:], [seen[0]] * 2)


def test_an_input_changed_in_place_is_another() -> None:
    def run(net: Any, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            plain = net.q(x)
        first = net.q(x).detach()
        assert torch.allclose(first, plain, atol=1e-5)
        return net.k(x.mul_(2)).sum() + net.v(x).sum() + first.sum()

    check(net_with_delta(), [2], run)
    net, x = net_with_delta(), torch.randn(4, 8, requires_grad=True) * 1
    out = net.q(x)
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_an_error_in_a_backward_pass_spoils_no_other() -> None:
    net, leaf = net_with_delta(), torch.randn(4, 8, requires_grad=True)
    x = leaf * 1
    q, k = net.q(x), net.k(x)

    def fail(g: torch.Tensor) -> None:
        raise KeyError("once")

    handle = q.register_hook(fail)
    with pytest.raises(KeyError):
        (q.sum() + k.sum()).backward(retain_graph=True)
    handle.remove()
    leaf.grad = None
    (q.sum() + k.sum()).backward()
    found = leaf.grad
    with speed.configured(fused=False):
        expected = torch.autograd.grad(net.q(leaf).sum() + net.k(leaf).sum(), leaf)
    close([found], [*expected])


def test_frozen_deltas_have_no_gradient() -> None:
    net = net_with_delta()
    net.q.requires_grad_(False)
    net.v.lora.lora_A.requires_grad_(False)
    check(net, [3])
    assert net.q.lora.lora_B.grad is None


def test_nothing_is_held_after_a_step() -> None:
    net, kept = net_with_delta(), []

    def run(net: Any, x: torch.Tensor) -> torch.Tensor:
        h = x * 2
        q, k, v = net.q(h), net.k(h), net.v(h)
        kept.extend(weakref.ref(one) for one in (h, shared_input.shared(h)[0], q, k, v))
        return (q @ k.mT).sum() + v.sum()

    gc.disable()
    try:
        for _ in range(2):
            step(net, torch.randn(4, 8), run)
            run(net, torch.randn(4, 8, requires_grad=True))  # no backward pass follows
        leaf = torch.randn(4, 8, requires_grad=True)
        net(leaf).sum().backward()
        kept.append(weakref.ref(leaf))
        del leaf
        assert not any(one() is not None for one in kept)
        assert not len(shared_input._entered)
    finally:
        gc.enable()


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_architectures(family: str) -> None:
    one = FAMILIES[family]
    backbone, inputs = one.build(), one.inputs()
    delta_model = LoraModel(backbone, common_structure=True, modified_modules=["attn.q", "attn.k", "attn.v", "ff.w1"])
    delta_model.freeze_module(exclude=["deltas"])
    perturb(delta_model)
    backbone.eval()
    found = []
    for fused in (False, True):
        backbone.zero_grad()
        with speed.configured(fused=fused):
            out = backbone(**inputs).logits
            assert (3 in entries(out)) is fused
            out.square().mean().backward()
        found.append([out, *(p.grad for p in backbone.parameters() if p.grad is not None)])
    close(found[1], found[0], 1e-4)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # the compiler's own doing
@pytest.mark.slow
def test_compiled_without_a_break() -> None:
    net, leaf = net_with_delta(), torch.randn(64, 8, requires_grad=True)
    compiled = torch.compile(lambda x: net(x * 1), backend="aot_eager", fullgraph=True)
    found = []
    for run in (lambda x: net(x * 1), compiled):
        net.zero_grad()
        leaf.grad = None
        out = run(leaf)
        out.square().sum().backward()
        found.append([out, leaf.grad, *(p.grad for p in net.parameters() if p.grad is not None)])
    close(found[1], found[0], 1e-4)
