"""Backbones with deltas under what runs them: torch.compile, DataParallel, DDP, checkpointed activations."""

from __future__ import annotations

import gc
import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from models import FAMILIES, attach, logits, values
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers.utils import import_utils

from deltaexp import registry
from deltaexp.routing import route

KEYS = {"soft_prompt": {"soft_token_num": 2}, "vera": {"vera_r": 4}}
TRAINED = [name for name in registry.known() if not registry.get(name).trains_nothing]
compiling = pytest.mark.filterwarnings(
    # the compiler's own doings
    "ignore:The .grad attribute of a Tensor that is not a leaf",
    "ignore:.*should not be instantiated:DeprecationWarning",
)
COMPILED = ("lora", "adapter", "parallel_adapter", "ia3", "reft", "prefix", "soft_prompt")
"""The types that join the forward pass each in another way; compiling takes seconds."""
every_type = pytest.mark.parametrize("delta_type", TRAINED)


def gradients(model: nn.Module, backbone: nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the gradients of the loss that ``model``, a form of ``backbone``, computes."""
    backbone.zero_grad(set_to_none=True)
    model(**inputs).loss.backward()
    return values({name: p.grad for name, p in backbone.named_parameters() if p.grad is not None})


def close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=tolerance, msg=name)


@every_type
def test_a_step_waits_for_no_value(delta_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The meta device has none: on a GPU the host would wait for the value, and the step could be no CUDA graph."""
    monkeypatch.setattr(import_utils, "is_cuda_stream_capturing", lambda: True)  # else transformers looks into masks
    backbone = FAMILIES["llama"].build()
    delta_model = attach(backbone, delta_type, **KEYS.get(delta_type, {}))
    inputs = {name: value.to("meta") for name, value in FAMILIES["llama"].inputs().items()}
    backbone.to("meta")
    loss, penalty = backbone(**inputs).loss, delta_model.penalty()
    (loss if penalty is None else loss + penalty).backward()
    found = [parameter.grad for parameter in delta_model.trainable_parameters().values()]
    assert all(gradient is None or gradient.is_meta for gradient in found)
    assert any(gradient is not None for gradient in found)


@compiling
@pytest.mark.slow
@pytest.mark.parametrize("delta_type", COMPILED)
def test_compiled(delta_type: str) -> None:
    family = FAMILIES["llama"]
    backbone, inputs = family.build(), family.inputs()
    attach(backbone, delta_type, **KEYS.get(delta_type, {}))
    expected, expected_gradients = logits(backbone, inputs), gradients(backbone, backbone, inputs)
    torch.compiler.reset()
    compiled = torch.compile(backbone, backend="eager")
    torch.testing.assert_close(logits(compiled, inputs), expected, rtol=1e-5, atol=1e-6)
    close(gradients(compiled, backbone, inputs), expected_gradients)


@compiling
@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert", "t5"])
def test_a_compiled_backbone_sees_what_is_attached(name: str) -> None:
    """Attaching, merging and detaching make torch.compile compile anew: by itself it does not look for new hooks."""
    family = FAMILIES[name]
    backbone, inputs = family.build(), family.inputs()
    plain = logits(backbone, inputs)
    compiled = torch.compile(backbone, backend="eager")

    def check() -> torch.Tensor:
        expected = logits(backbone, inputs)
        torch.testing.assert_close(logits(compiled, inputs), expected, rtol=1e-5, atol=1e-6)
        return expected

    assert torch.equal(check(), plain)
    delta_model, adapter = attach(backbone), attach(backbone, "adapter", seed=2)
    both = check()
    with route([delta_model, adapter]):
        routed = check()
    adapter.detach()
    alone = check()
    assert not torch.allclose(alone, both, atol=1e-3)
    torch.testing.assert_close(routed[0], alone[0], rtol=1e-5, atol=1e-5)
    delta_model.merge()
    torch.testing.assert_close(check(), alone, rtol=1e-4, atol=1e-5)
    delta_model.detach()
    assert torch.equal(check(), plain)


@compiling
@pytest.mark.slow
def test_compiled_with_the_autograd_of_the_compiler() -> None:
    family = FAMILIES["llama"]
    backbone, inputs = family.build(), family.inputs()
    attach(backbone)
    expected = gradients(backbone, backbone, inputs)
    torch.compiler.reset()
    close(gradients(torch.compile(backbone, backend="aot_eager"), backbone, inputs), expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_checkpointed_activations_of_two_deltas(name: str) -> None:
    """What `test_matrix` checks for each type, here for several on one backbone, one of them on whole blocks, and routed."""
    family = FAMILIES[name]
    backbone, inputs = family.build(), family.inputs()
    first, second = attach(backbone), attach(backbone, "adapter", seed=2)
    attach(backbone, "reft", seed=3).freeze_module()
    backbone.train()

    def both() -> list[dict[str, torch.Tensor]]:
        torch.manual_seed(1)
        found = [gradients(backbone, backbone, inputs)]
        with route([first, second]):
            torch.manual_seed(1)
            found.append(gradients(backbone, backbone, inputs))
        return found

    expected = both()
    enable = getattr(backbone, "activation_checkpointing_enable", None) or backbone.gradient_checkpointing_enable
    enable()
    for found, wanted in zip(both(), expected, strict=True):
        close(found, wanted)
    assert not any("reft" in parameter for parameter in expected[1])


@every_type
def test_data_parallel(delta_type: str) -> None:
    """Each replica computes with its own part of the batch; the delta's gradients come together on the first device."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs: without, DataParallel calls the module as it is")
    family = FAMILIES["bert"]
    backbone, inputs = family.build().cuda(), {name: tensor.cuda() for name, tensor in family.inputs().items()}
    attach(backbone, delta_type, **KEYS.get(delta_type, {}))
    expected = logits(backbone, inputs)
    parallel = nn.DataParallel(backbone)
    torch.testing.assert_close(logits(parallel, inputs), expected, rtol=1e-4, atol=1e-5)
    backbone.zero_grad(set_to_none=True)
    backbone(**inputs).logits.pow(2).sum().backward()
    wanted = values({name: p.grad for name, p in backbone.named_parameters() if p.grad is not None})
    backbone.zero_grad(set_to_none=True)
    parallel(**inputs).logits.pow(2).sum().backward()
    close({name: p.grad for name, p in backbone.named_parameters() if p.grad is not None}, wanted, 1e-4)


@pytest.mark.parametrize("delta_type", ["lora", "prefix"])
def test_data_parallel_with_one_device(delta_type: str) -> None:
    family = FAMILIES["bert"]
    backbone, inputs = family.build(), family.inputs()
    attach(backbone, delta_type)
    if torch.cuda.is_available():
        pytest.skip("the other test does it")
    parallel = nn.DataParallel(backbone)
    assert torch.equal(logits(parallel, inputs), logits(backbone, inputs))
    close(gradients(parallel, backbone, inputs), gradients(backbone, backbone, inputs))


# --- DistributedDataParallel ------------------------------------------------------------------------------------------


def _batch(rank: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 32, (2, 6), generator=torch.Generator().manual_seed(rank))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def _prepared(types: list[str]) -> nn.Module:
    backbone = FAMILIES["llama"].build()
    for seed, delta_type in enumerate(types, 1):
        attach(backbone, delta_type, seed=seed, **KEYS.get(delta_type, {}))
    return backbone


def _worker(rank: int, types: list[str], port: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    backbone = _prepared(types)
    parallel = DistributedDataParallel(backbone)
    found = gradients(parallel, backbone, _batch(rank))
    torch.save(found, Path(folder) / f"{rank}.pt")
    del parallel  # see `deltaexp.lab.processes.finish`
    gc.collect()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("types", [["lora", "adapter"], ["ia3", "prefix"]], ids="+".join)
def test_distributed_data_parallel(types: list[str], tmp_path: Path) -> None:
    """Two processes with a batch each get the gradients that one process has on average over both batches."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_worker, (types, port, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    close(first, second, 0)
    backbone = _prepared(types)
    alone = [gradients(backbone, backbone, _batch(rank)) for rank in (0, 1)]
    close(first, {name: (alone[0][name] + alone[1][name]) / 2 for name in alone[0]})  # other threads, another order of sums
    assert any(not torch.allclose(alone[0][name], alone[1][name], atol=1e-4) for name in alone[0])
