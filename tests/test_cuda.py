"""The engine on a CUDA GPU computes what it does on the CPU, what the hooks do, and what plain autocast does."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import FAMILIES, attach, logits, md5, parameters, same, values
from test_one_token import KEYS
from test_routing import KINDS, alone, batch
from test_shared_input import Attention, entries, net_with_delta
from torch import nn

from deltaexp import AutoDeltaModel, HashCheck, casting, frozen, gathered, low_rank, registry, route, shared_input, speed
from deltaexp.checksum import digests
from deltaexp.digest_cache import model_digests
from deltaexp.errors import DeltaExpError
from deltaexp.frozen import Shortcut
from deltaexp.lab.activations import Known, Texts, computed, key
from deltaexp.model import DeltaModel
from deltaexp.one_token import LastBlock, OneToken, find
from deltaexp.structure import backbone_tensors

DEVICE = torch.device("cuda")
pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU"),
    # The thread of the backward pass finds the context by itself, and tells of it once.
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS, but there was no current CUDA context"),
]

TYPES = [name for name in registry.known() if not registry.get(name).trains_nothing]
SMALL = low_rank.SMALL
ROUNDING = 1e-4
"""By how much numbers in float32 may differ, as a part of the largest: sums are added up in another order."""
LORA = {
    "modified_modules": ["attn.q", "attn.k", "attn.v", "attn.proj", "ff.w1", "ff.w2"],
    "common_structure": True,
    "lora_r": 2,
    "lora_alpha": 6,
}


@pytest.fixture(autouse=True)
def _plain_products() -> Iterator[None]:
    """Products in float32 are computed in float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def made(family: str, delta_type: str = "lora", **keys: Any) -> tuple[Any, DeltaModel, dict[str, torch.Tensor]]:
    """Return a backbone, a delta that has moved, and a batch, on the CPU."""
    backbone = FAMILIES[family].build()
    return backbone, attach(backbone, delta_type, **{**KEYS.get(delta_type, {}), **keys}), FAMILIES[family].inputs()


def there(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.to(DEVICE) for name, value in inputs.items()}


def outcome(backbone: Any, delta_model: DeltaModel, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Return logits, loss, and all gradients as one vector: some of them are what rounding leaves of zero."""
    backbone.zero_grad(set_to_none=True)
    output = backbone(**inputs)
    output.loss.backward()
    trained = delta_model.trainable_parameters().values()
    assert trained
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
    assert all(gradient.device == output.logits.device for gradient in gradients)
    return [output.logits.detach(), output.loss.detach(), torch.cat([gradient.flatten() for gradient in gradients])]


def close(found: Iterable[torch.Tensor], expected: Iterable[torch.Tensor], tolerance: float = ROUNDING) -> None:
    """Check tensors against others, up to a fraction of the largest element of each, wherever they are."""
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        one, other = one.detach().cpu(), other.detach().cpu()
        size = float(other.abs().max()) if other.numel() else 0.0
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance * size)


def distance(one: Iterable[torch.Tensor], other: Iterable[torch.Tensor]) -> float:
    first, second = (torch.cat([tensor.detach().flatten().float().cpu() for tensor in tensors]) for tensors in (one, other))
    return float((first - second).norm() / second.norm())


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
@pytest.mark.parametrize("delta_type", TYPES)
def test_a_step_is_that_of_the_cpu_and_of_the_hooks(delta_type: str, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, delta_model, inputs = made(family, delta_type)
    expected = outcome(backbone, delta_model, inputs)
    backbone.to(DEVICE)
    for small in (0, SMALL):
        monkeypatch.setattr(low_rank, "SMALL", small)
        found = outcome(backbone, delta_model, there(inputs))
        assert found[0].device.type == DEVICE.type
        close(found, expected)
        with speed.configured(fused=False):
            close(found, outcome(backbone, delta_model, there(inputs)))


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("delta_type", TYPES)
def test_training_with_a_fused_optimizer(delta_type: str, family: str) -> None:
    def losses(device: str | torch.device) -> list[float]:
        backbone, delta_model, inputs = made(family, delta_type)
        backbone.to(device)
        batch = {name: value.to(device) for name, value in inputs.items()}
        # What is no gradient but rounding is not to be divided by its own size.
        optimizer = torch.optim.AdamW(delta_model.trainable_parameters().values(), lr=1e-2, eps=1e-3, fused=True)
        found = []
        for _ in range(4):
            optimizer.zero_grad()
            loss = backbone(**batch).loss
            loss.backward()
            optimizer.step()
            found.append(float(loss.detach()))
        return found

    expected = losses("cpu")
    assert expected[-1] < expected[0]
    assert losses(DEVICE) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("keys", [{"lora_dora": True}, {"lora_init": "pissa", "lora_r": 3}, {"lora_dropout": 0.5}], ids=str)
def test_other_forms_of_lora(keys: dict[str, Any]) -> None:
    """What is dropped comes from the GPU's own random numbers."""
    backbone, delta_model, inputs = made("gpt2", **keys)
    backbone.to(DEVICE)
    for attachment in delta_model.attachments:
        attachment.layer.train()
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        found.append(outcome(backbone, delta_model, there(inputs)))
    close(found[0], found[1], 1e-5)
    if "lora_dropout" in keys:
        assert distance(outcome(backbone, delta_model, there(inputs)), found[0]) > 1e-3
        for attachment in delta_model.attachments:
            attachment.layer.eval()
        found[0] = outcome(backbone, delta_model, there(inputs))
    backbone.cpu()
    for attachment in delta_model.attachments:
        attachment.layer.eval()
    close(found[0], outcome(backbone, delta_model, inputs))


# Half precision


def in_half(backbone: Any, delta_model: DeltaModel, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    with torch.autocast(DEVICE.type, torch.bfloat16):
        backbone.zero_grad(set_to_none=True)
        output = backbone(**inputs)
    output.logits.float().square().mean().backward()
    found = delta_model.trainable_parameters().values()
    return [output.logits.detach(), *(torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in found)]


def no_further(found: list[torch.Tensor], plain: list[torch.Tensor], exact: list[torch.Tensor]) -> None:
    """Check that numbers are about as far from the exact ones as those of plain autocast.

    Of so few numbers that varies: of 40 draws on the CPU it was 0.15 to 3 times as far, in the middle 0.8.
    """
    assert [tensor.dtype for tensor in found] == [tensor.dtype for tensor in plain]
    for part in (slice(1), slice(1, None)):
        assert distance(found[part], exact[part]) <= 4 * distance(plain[part], exact[part]) <= 1.6


@pytest.mark.parametrize("small", [0, SMALL])
@pytest.mark.parametrize(("family", "together"), [("bert", 3), ("llama", 3), ("gpt2", 0)])
def test_gathered_under_autocast(family: str, together: int, small: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same as plain autocast to its rounding, also once an optimizer has changed the factors; and nothing is kept."""
    monkeypatch.setattr(low_rank, "SMALL", small)
    backbone, delta_model, inputs = made(family, **LORA)
    backbone.to(DEVICE)
    inputs = there(inputs)
    optimizer = torch.optim.AdamW(delta_model.trainable_parameters().values(), lr=0.05, fused=True)

    def exact() -> list[torch.Tensor]:
        with torch.autocast(DEVICE.type, enabled=False):
            backbone.zero_grad(set_to_none=True)
            found = backbone(**inputs).logits
        found.square().mean().backward()
        return [found.detach(), *(p.grad.clone() for p in delta_model.trainable_parameters().values())]

    def expected() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        with speed.configured(fused=False):
            return in_half(backbone, delta_model, inputs), exact()

    before, rounds = values(backbone_tensors(backbone)), []
    rounds.append(expected())
    with casting.kept(backbone), gathered.applied(backbone) as units:
        assert max((len(unit.modules) for unit in units), default=0) == together
        first = in_half(backbone, delta_model, inputs)
        optimizer.step()
        second = in_half(backbone, delta_model, inputs)
    rounds.append(expected())
    assert distance(rounds[0][0][:1], rounds[1][0][:1]) > 0.05
    for found, (plain, right) in zip((first, second), rounds, strict=True):
        no_further(found, plain, right)
    assert same(values(backbone_tensors(backbone)), before)
    assert not any(gathered.MEMBER in module.__dict__ for module in backbone.modules())


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_memory_does_not_grow(family: str) -> None:
    backbone, delta_model, inputs = made(family, **LORA)
    backbone.to(DEVICE)
    inputs = there(inputs)
    optimizer = torch.optim.AdamW(delta_model.trainable_parameters().values(), lr=1e-3, fused=True)
    used = []
    for context in (contextlib.nullcontext, lambda: torch.autocast(DEVICE.type, torch.bfloat16)):
        with casting.kept(backbone), gathered.applied(backbone):
            for number in range(1, 7):
                with context():
                    loss = backbone(**inputs).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                del loss
                if number in (3, 6):
                    used.append(torch.cuda.memory_allocated())
    assert used[1] <= used[0]
    assert used[3] <= used[2]
    assert not len(shared_input._entered)


@pytest.mark.parametrize("cast", [False, True])
@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_a_backbone_in_bfloat16(family: str, cast: bool) -> None:
    """With factors in float32, which are cast or not."""
    backbone, delta_model, inputs = made(family, **LORA)
    backbone.to(DEVICE)
    exact = outcome(backbone, delta_model, there(inputs))
    own = values(parameters(delta_model))
    backbone.to(torch.bfloat16)
    for attachment in delta_model.attachments:
        attachment.layer.float()
    with torch.no_grad():
        for name, value in parameters(delta_model).items():
            value.copy_(own[name])
    with speed.configured(fused=False):
        plain = outcome(backbone, delta_model, there(inputs))
    with speed.configured(delta_in_backbone_dtype=cast):
        found = outcome(backbone, delta_model, there(inputs))
    no_further([found[0], found[2]], [plain[0], plain[2]], [exact[0], exact[2]])


# Maps that share an input


def of_a_step(net: nn.Module, run: Callable[[Any, torch.Tensor], torch.Tensor], stream: Any) -> list[torch.Tensor]:
    """Return the gradients of a step whose backward pass is begun on a stream."""
    torch.manual_seed(1)
    x = torch.randn(3, 7, 8).to(DEVICE).requires_grad_()
    net.zero_grad(set_to_none=True)
    loss = run(net, x * 1).pow(2).sum()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        loss.backward()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    return [loss.detach(), x.grad, *(p.grad for p in net.parameters() if p.grad is not None)]  # type: ignore[list-item]


def on_two_streams(net: Any, x: torch.Tensor) -> torch.Tensor:
    """Compute one of the maps of an input on a stream of its own."""
    side = torch.cuda.Stream()
    q = net.q(x)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        k = net.k(x)
    torch.cuda.current_stream().wait_stream(side)
    return net.out(torch.tanh(q @ k.mT / 8) @ net.v(x)) + x


@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream")
@pytest.mark.parametrize("kind", ["default stream", "side stream", "map on a side stream"])
def test_a_shared_input_gradient(kind: str) -> None:
    """The sum of an input's gradients is one for each stream that maps take it on."""
    run: Any = on_two_streams if kind.startswith("map") else Attention.__call__
    torch.manual_seed(0)
    net, stream = net_with_delta().to(DEVICE), torch.cuda.current_stream()
    if kind == "side stream":
        stream = torch.cuda.Stream()
    with speed.configured(fused=False):
        expected = of_a_step(net, run, stream)
    for _ in range(3):
        close(of_a_step(net, run, stream), expected)
    found = entries(run(net, torch.randn(3, 7, 8, device=DEVICE, requires_grad=True) * 1))
    assert found == ([1, 1, 1] if kind.startswith("map") else [3])  # each change of the stream is a new beginning
    torch.cuda.synchronize()
    assert not len(shared_input._entered)


# Merging, routing, saving


@pytest.mark.parametrize("delta_type", ["lora", "loha", "ia3", "vera"])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_merged_and_taken_out_again(family: str, delta_type: str) -> None:
    backbone, delta_model, inputs = made(family, delta_type)
    backbone.to(DEVICE)
    inputs, before = there(inputs), md5(backbone)
    expected = logits(backbone, inputs)
    report = delta_model.merge(inputs)
    assert report.logits is not None
    assert report.logits.relative < ROUNDING
    assert md5(backbone) != before
    close([logits(backbone, inputs)], [expected])
    delta_model.unmerge()
    assert md5(backbone) == before
    assert torch.equal(logits(backbone, inputs), expected)


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_rows_with_deltas_of_their_own(family: str) -> None:
    backbone, inputs = FAMILIES[family].build().to(DEVICE), there(batch(FAMILIES[family], 8))
    deltas = [attach(backbone, kind, seed=None, **keys) for kind, keys in KINDS.values()]
    backbone.to(DEVICE)
    for number, delta_model in enumerate(deltas):
        _moved(delta_model, number)
    choices = [*deltas[:3], None, deltas[0], deltas[3], deltas[-1], None]
    expected = [alone(choice, deltas, inputs)[row] for row, choice in enumerate(choices)]
    for _ in range(2):
        with route(choices):
            close(logits(backbone, inputs), expected)


def _moved(delta_model: DeltaModel, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in parameters(delta_model).values():
            assert value.device.type == DEVICE.type
            value.add_((torch.randn(value.shape, generator=generator) * 0.3).to(value))


@pytest.mark.parametrize("same_rank", [True, False])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_several_loras_in_one_batch(family: str, same_rank: bool) -> None:
    """Every row is as with its delta alone, and so are the gradients of each delta."""
    backbone, inputs = FAMILIES[family].build(), batch(FAMILIES[family], 4)
    deltas = [attach(backbone, seed=number, lora_r=2 if same_rank else 1 + number) for number in range(3)]
    backbone.to(DEVICE)
    inputs, choices = there(inputs), [*deltas, None]
    with route(choices):
        routed = backbone(**inputs).logits
        found = [torch.autograd.grad(routed[row].square().sum(), list(parameters(d).values()), retain_graph=True)
                 for row, d in enumerate(deltas)]  # fmt: skip
    close(routed, [alone(choice, deltas, inputs)[row] for row, choice in enumerate(choices)])
    for row, delta_model in enumerate(deltas):
        for other in deltas:
            other.detach()
        delta_model.attach()
        own = backbone(**{name: value[row : row + 1] for name, value in inputs.items()}).logits
        expected = torch.autograd.grad(own.square().sum(), list(parameters(delta_model).values()))
        close([_flat(found[row])], [_flat(expected)])


def _flat(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


@pytest.mark.parametrize("delta_type", TYPES)
def test_saved_and_loaded(delta_type: str, tmp_path: Path) -> None:
    """From a GPU onto one and onto the CPU; digests are the same on both, and another backbone is refused."""
    backbone, delta_model, inputs = made("bert", delta_type)
    backbone.to(DEVICE)
    tensors = backbone_tensors(backbone)
    assert digests(tensors) == digests({name: tensor.cpu() for name, tensor in tensors.items()})
    assert model_digests(backbone, tensors) == digests(tensors)
    expected = logits(backbone, there(inputs))
    delta_model.save_finetuned(tmp_path / "delta")
    for device in (DEVICE, torch.device("cpu")):
        fresh: Any = FAMILIES["bert"].build().to(device)
        loaded = AutoDeltaModel.from_finetuned(tmp_path / "delta", backbone_model=fresh)
        assert loaded.hash_check is HashCheck.MATCH
        assert {tensor.device.type for tensor in loaded.delta_tensors().values()} == {device.type}
        close([logits(fresh, {name: value.to(device) for name, value in inputs.items()})], [expected])
        loaded.detach()
        assert md5(fresh) == md5(FAMILIES["bert"].build())
    with torch.no_grad():
        fresh.to(DEVICE).bert.embeddings.word_embeddings.weight[0, 0] += 1e-3
    with pytest.raises(DeltaExpError):
        AutoDeltaModel.from_finetuned(tmp_path / "delta", backbone_model=fresh)


# What is left out


@pytest.mark.parametrize("delta_type", ["lora", "adapter", "prefix", "ia3"])
def test_one_token_in_the_last_block(delta_type: str) -> None:
    backbone, delta_model, inputs = made("bert", delta_type)
    backbone.to(DEVICE)
    inputs = there(inputs)
    expected = outcome(backbone, delta_model, inputs)
    last = find(backbone, delta_model.attachments)
    assert isinstance(last, LastBlock), last
    seen: list[int] = []
    last.block.register_forward_hook(lambda module, args, output: seen.append(_states(output).shape[1]))
    one = OneToken(backbone, last)
    found = outcome(backbone, delta_model, inputs)
    one.remove()
    assert seen == [1]
    close(found, expected)


def _states(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_known_activations(family: str) -> None:
    """Found by their tokens, they are put together in memory of the host, from where they are copied."""
    backbone, delta_model, inputs = made(family, layers="last:1")
    backbone.to(DEVICE)
    part = frozen.find(backbone)
    assert not isinstance(part, str), part
    lengths = inputs["attention_mask"].sum(1).tolist()
    rows = [(ids[:n].numpy().astype("int32"),) for ids, n in zip(inputs["input_ids"], lengths, strict=True)]
    texts = Texts(rows, ("input_ids",), [key(row) for row in rows])
    with torch.no_grad():
        parts = list(computed(texts, lambda batch: part.block_inputs(batch), DEVICE))
    whole = torch.empty(texts.tokens, parts[0][1].shape[-1])
    for start, value in parts:
        assert value.device.type == "cpu"
        whole[start : start + len(value)] = value
    known = Known()
    known.add(texts, whole)
    inputs = there(inputs)
    expected = outcome(backbone, delta_model, inputs)
    shortcut = Shortcut(part, known.find, training=True)
    found = [outcome(backbone, delta_model, inputs) for _ in range(3)]
    shortcut.remove()
    assert shortcut.used == 3
    for one in found:
        close(one, expected)
