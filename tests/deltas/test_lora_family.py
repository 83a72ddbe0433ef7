"""What the deltas that add to a linear map's weight do beyond what PEFT's do, by plain formulas."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models import FAMILIES, attach, logits, md5, perturb, slow_but
from peft.tuners.lokr.layer import factorization
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from deltaexp import AutoDeltaModel, DeltaConfig
from deltaexp.deltas.lokr import factors
from deltaexp.errors import AddressingError, ConfigError

OPTIONS: dict[str, dict[str, Any]] = {
    "lora": {"delta_type": "lora", "lora_r": 3},
    "gaussian": {"delta_type": "lora", "lora_r": 3, "lora_init": "gaussian", "lora_scaling": "rslora"},
    "dora": {"delta_type": "lora", "lora_r": 3, "lora_dora": True},
    "pissa": {"delta_type": "lora", "lora_r": 3, "lora_init": "pissa"},
    "pissa-dora": {"delta_type": "lora", "lora_r": 3, "lora_init": "pissa", "lora_dora": True},
    "olora": {"delta_type": "lora", "lora_r": 3, "lora_init": "olora"},
    "adalora": {"delta_type": "adalora", "adalora_init_r": 4, "adalora_target_r": 2},
    "vera": {"delta_type": "vera", "vera_r": 5},
    "loha": {"delta_type": "loha", "loha_r": 2},
    "lokr": {"delta_type": "lokr", "lokr_r": 1},
    "lokr-both": {"delta_type": "lokr", "lokr_r": 1, "lokr_decompose_both": True},
}
MAPS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 10), (2, 5, 6)),
    "no-bias": (lambda: nn.Linear(6, 10, bias=False), (2, 5, 6)),
    "conv1d-of-gpt2": (lambda: Conv1D(10, 6), (2, 5, 6)),
    "conv1d": (lambda: nn.Conv1d(6, 10, 3, stride=2, padding=1), (2, 6, 9)),
    "conv2d": (lambda: nn.Conv2d(6, 10, (3, 2), stride=(1, 2), padding=1, dilation=(2, 1)), (2, 6, 9, 8)),
    "grouped": (lambda: nn.Conv2d(6, 10, 3, padding="same", groups=2, bias=False), (2, 6, 5, 5)),
    "depthwise": (lambda: nn.Conv1d(6, 6, 3, groups=6), (2, 6, 9)),
}
every_option = pytest.mark.parametrize("keys", OPTIONS.values(), ids=OPTIONS)


def alone(kind: str, keys: dict[str, Any], dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Any]:
    """Return a backbone that is one linear map, and the delta on it, moved, in float64."""
    torch.manual_seed(0)
    backbone = nn.Sequential(MAPS[kind][0]()).to(dtype)
    if backbone[0].bias is not None:
        nn.init.normal_(backbone[0].bias)
    if kind == "depthwise" and keys["delta_type"] == "lora":
        keys = {**keys, "lora_r": 2}
    return backbone, attach(backbone, seed=None, modified_modules=["0"], **keys)


@every_option
@pytest.mark.parametrize("kind", MAPS)
def test_merged_equals_the_forward_pass(kind: str, keys: dict[str, Any]) -> None:
    backbone, delta_model = alone(kind, keys)
    x = torch.randn(MAPS[kind][1], dtype=torch.float64)
    plain = backbone(x).detach()
    assert torch.equal(backbone(x), plain)
    perturb(delta_model)
    with_delta = backbone(x)
    assert not torch.allclose(with_delta, plain, atol=1e-3)
    layer, module = delta_model.attachments[0].layer, backbone[0]
    own = module.weight.T if kind == "conv1d-of-gpt2" else module.weight
    weight, bias = layer.merged(own, module.bias)
    assert weight.shape == own.shape
    delta_model.detach()
    with torch.no_grad():
        module.weight.copy_(weight.T if kind == "conv1d-of-gpt2" else weight)
        if bias is not None:
            module.bias.copy_(bias)
    torch.testing.assert_close(backbone(x), with_delta, rtol=1e-10, atol=1e-10)


@every_option
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", slow_but(FAMILIES, ("gpt2",)))
def test_the_start_is_the_backbone(name: str, dtype: torch.dtype, keys: dict[str, Any]) -> None:
    family = FAMILIES[name]
    backbone, inputs = family.build().to(dtype), family.inputs()
    plain, digest = logits(backbone, inputs), md5(backbone)
    delta_model = attach(backbone, seed=None, **keys)
    assert torch.equal(logits(backbone, inputs), plain)
    assert md5(backbone) == digest
    assert {tensor.dtype for tensor in delta_model.delta_tensors().values()} == {torch.float32}
    perturb(delta_model)
    assert not torch.equal(logits(backbone, inputs), plain)


@every_option
def test_on_the_meta_device(keys: dict[str, Any]) -> None:
    with torch.device("meta"):
        backbone = FAMILIES["llama"].make()
    delta_model = attach(backbone, seed=None, **keys)
    real = attach(FAMILIES["llama"].build(), seed=None, **keys)
    shapes = {name: tensor.shape for name, tensor in real.delta_tensors().items()}
    assert {name: tensor.shape for name, tensor in delta_model.delta_tensors().items()} == shapes
    assert all(tensor.is_meta for tensor in delta_model.delta_tensors().values())


@every_option
def test_every_dtype_and_seed_of_a_saved_delta_comes_back(keys: dict[str, Any], tmp_path: Path) -> None:
    family = FAMILIES["bert"]
    backbone, inputs = family.build(), family.inputs()
    attach(backbone, **keys).save_finetuned(tmp_path)
    fresh = family.build()
    torch.manual_seed(99)  # what is drawn while the delta is built does not matter
    loaded = AutoDeltaModel.from_finetuned(tmp_path, fresh)
    assert torch.equal(logits(fresh, inputs), logits(backbone, inputs))
    assert len(load_file(tmp_path / "delta_model.safetensors")) == len(loaded.delta_tensors())


# LoRA's options


def test_pissa_is_the_principal_part() -> None:
    backbone, delta_model = alone("linear", {**OPTIONS["pissa"], "lora_scaling": "rslora"})
    layer = delta_model.attachments[0].layer
    u, s, vh = torch.linalg.svd(backbone[0].weight.detach(), full_matrices=False)
    best = u[:, :3] @ torch.diag(s[:3]) @ vh[:3]
    assert layer.scale == pytest.approx(16 / 3**0.5)
    torch.testing.assert_close(layer.scale * layer.lora_B0 @ layer.lora_A0, best)
    torch.testing.assert_close(layer.lora_A0 @ layer.lora_A0.T, torch.diag(s[:3]) / layer.scale)
    assert torch.equal(layer.lora_A, layer.lora_A0)
    assert torch.equal(layer.lora_B, layer.lora_B0)


def test_olora_is_the_qr_decomposition() -> None:
    backbone, delta_model = alone("linear", OPTIONS["olora"])
    layer = delta_model.attachments[0].layer
    torch.testing.assert_close(layer.lora_B0.T @ layer.lora_B0, torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(layer.lora_B0 @ layer.lora_A0[:, :3], backbone[0].weight.detach()[:, :3])
    assert torch.equal(layer.lora_A0.tril(-1), torch.zeros(3, 6, dtype=torch.float64))


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_random_starts(init: str) -> None:
    backbone = nn.Sequential(nn.Linear(400, 3))
    layer = attach(backbone, seed=None, modified_modules=["0"], lora_r=50, lora_init=init).attachments[0].layer
    assert not layer.lora_B.any()
    if init == "gaussian":
        assert layer.lora_A.std().item() == pytest.approx(1 / 50, rel=0.05)
    else:
        assert layer.lora_A.abs().max().item() == pytest.approx(400**-0.5, rel=0.01)
    assert layer.lora_A0 is None


def test_dora_computes_what_the_paper_says() -> None:
    backbone, delta_model = alone("linear", {**OPTIONS["dora"], "lora_alpha": 5})
    perturb(delta_model)
    layer, linear = delta_model.attachments[0].layer, backbone[0]
    whole = linear.weight + layer.lora_B @ layer.lora_A * 5 / 3
    direction = whole / whole.pow(2).sum(1, keepdim=True).sqrt().detach()
    x = torch.randn(4, 6, dtype=torch.float64)
    expected = x @ (layer.magnitude[:, None] * direction).T + linear.bias
    torch.testing.assert_close(backbone(x), expected)
    # The norm is a constant to the gradient.
    mine = torch.autograd.grad(backbone(x).pow(2).sum(), list(layer.parameters()))
    theirs = torch.autograd.grad(expected.pow(2).sum(), list(layer.parameters()))
    torch.testing.assert_close(mine, theirs)


def test_dora_on_a_row_of_zeros() -> None:
    backbone = nn.Sequential(nn.Linear(6, 10))
    with torch.no_grad():
        backbone[0].weight[4] = 0
    attach(backbone, seed=None, modified_modules=["0"], lora_dora=True)
    x = torch.randn(4, 6)
    backbone(x).sum().backward()
    assert torch.isfinite(backbone(x)).all()
    assert all(torch.isfinite(p.grad).all() for p in backbone.parameters() if p.requires_grad)


def test_lora_plus() -> None:
    delta_model = attach(FAMILIES["t5"].build(), lora_plus_ratio=16.0)
    named = delta_model.trainable_parameters()
    assert delta_model.learning_rate_factors() == {p: 16.0 for name, p in named.items() if name.endswith("lora_B")}
    assert attach(FAMILIES["t5"].build()).learning_rate_factors() == {}


def test_ranks_by_pattern() -> None:
    keys = {"modified_modules": ["q", "v", "wo"], "lora_r": 4, "lora_alpha": 8, "lora_scaling": "rslora"}
    patterns = {
        "lora_r_pattern": {"attn.q": 2, "[r]block\\.1\\..*": 3, "wo": 5},
        "lora_alpha_pattern": {"encoder.block.0.layer.1.DenseReluDense.wo": 1},
    }
    delta_model = attach(FAMILIES["t5"].build(), **keys, **patterns)
    for attachment in delta_model.attachments:
        layer, site = attachment.layer, attachment.site
        own = site.endswith("SelfAttention.q")
        rank = 2 if own else 3 if "block.1." in site else 5 if site.endswith("wo") else 4
        alpha = 1 if site == "encoder.block.0.layer.1.DenseReluDense.wo" else 8
        assert (layer.lora_A.shape[0], layer.lora_B.shape[1]) == (rank, rank), site
        assert layer.scale == pytest.approx(alpha / rank**0.5)


@pytest.mark.parametrize(
    ("keys", "error", "text"),
    [
        ({"lora_r_pattern": {"attn.qq": 2}}, AddressingError, r"'attn.qq' in lora_r_pattern .* mean 'attn.q'\? They are"),
        ({"lora_alpha_pattern": {"wo": 2}}, AddressingError, "'wo' in lora_alpha_pattern matches none"),
        ({"lora_r_pattern": {"q": 0}}, ConfigError, "lora_r_pattern gives 0 for 'q'; it must be at least 1"),
        ({"lora_r_pattern": {"q": 1.5}}, ConfigError, "lora_r_pattern|1.5"),
        ({"lora_scaling": "rs"}, ConfigError, "There is no lora_scaling 'rs'. Did you mean 'rslora'"),
        ({"lora_init": "pisa"}, ConfigError, "Did you mean 'pissa'"),
        ({"lora_plus_ratio": 0.0}, ConfigError, "lora_plus_ratio is 0.0; it must be greater than 0"),
        ({"lora_init": "olora", "lora_r": 13}, ConfigError, "has a rank of at most 12, and lora_r there is 13. Lower lora_r"),
    ],
)  # fmt: skip
def test_errors_of_lora(keys: dict[str, Any], error: type[Exception], text: str) -> None:
    backbone = FAMILIES["t5"].build()
    before = [name for name, _ in backbone.named_modules()]
    with pytest.raises(error, match=text):
        attach(backbone, **keys)
    assert [name for name, _ in backbone.named_modules()] == before


def test_lora_on_convolutions_equals_pefts() -> None:
    ours, theirs = (nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1)) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    delta_model = attach(ours, modified_modules=["0", "2"], lora_r=2, lora_alpha=3)
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["0", "2"], r=2, lora_alpha=3), theirs)
    x, pairs = torch.randn(2, 3, 9, 9), []
    for attachment in delta_model.attachments:
        for name in ("lora_A", "lora_B"):
            other = getattr(theirs.get_submodule(attachment.site), name)["default"].weight
            own = getattr(attachment.layer, name)
            with torch.no_grad():
                other.copy_(own.view_as(other))
            pairs.append((own, other))
    results = [model(x) for model in (ours, theirs)]
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)
    for result in results:
        result.pow(2).sum().backward()
    for own, other in pairs:
        torch.testing.assert_close(own.grad, other.grad.view_as(own), rtol=1e-4, atol=1e-4)


def test_a_convolution_with_a_forward_of_its_own_is_refused() -> None:
    class Scaled(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(nn.functional.pad(x, (1, 1, 1, 1)))

    with pytest.raises(AddressingError, match="goes on Linear or Conv1D modules, and '0' is a Scaled"):
        attach(nn.Sequential(Scaled(3, 4, 3)), modified_modules=["0"])
    with pytest.raises(AddressingError, match="'0' is a Conv2d"):
        attach(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")), modified_modules=["0"])


# VeRA


def test_the_projection_is_held_and_saved_once(tmp_path: Path) -> None:
    family = FAMILIES["t5"]
    backbone, inputs = family.build(), family.inputs()
    delta_model = attach(backbone, "vera", vera_r=5, modified_modules=["q", "wo", "wi"])
    expected = logits(backbone, inputs)
    state = backbone.state_dict()
    assert not [name for name in state if "vera_A" in name or "vera_B" in name]
    twin, twin_model = copy.deepcopy(backbone), pickle.loads(pickle.dumps(delta_model))
    for layers in (
        [attachment.layer for attachment in delta_model.attachments],
        [attachment.layer for attachment in twin_model.attachments],
        [module.vera for module in twin.modules() if hasattr(module, "vera")],
    ):
        assert len(layers) == len(delta_model.attachments)
        assert len({id(layer.projection) for layer in layers}) == 1
        assert layers[0].projection.vera_A.shape == (5, 24)
        assert layers[0].projection.vera_B.shape == (24, 5)
    assert torch.equal(logits(twin_model.backbone_model, inputs), expected)

    delta_model.save_finetuned(tmp_path)
    saved = load_file(tmp_path / "delta_model.safetensors")
    assert len([name for name in saved if name.endswith(("vera_A", "vera_B"))]) == 2
    assert len(saved) == 2 * len(delta_model.attachments) + 2
    fresh = family.build()
    loaded = AutoDeltaModel.from_finetuned(tmp_path, fresh)
    assert len({id(attachment.layer.projection.vera_A) for attachment in loaded.attachments}) == 1
    assert torch.equal(logits(fresh, inputs), expected)


def test_the_projection_depends_on_its_seed_alone() -> None:
    def projection(seed: int, **keys: object) -> torch.Tensor:
        torch.manual_seed(seed)
        delta_model = attach(FAMILIES["bert"].build(), "vera", seed=None, vera_r=5, **keys)
        assert not any(parameter.requires_grad for parameter in delta_model.attachments[0].layer.projection.parameters())
        return delta_model.attachments[0].layer.projection.vera_A

    assert torch.equal(projection(1), projection(2))
    assert not torch.equal(projection(1), projection(1, vera_seed=1))


# LoKr


@pytest.mark.parametrize("bound", [-1, 1, 2, 3, 4, 7, 8, 16, 1000])
def test_factors_are_pefts(bound: int) -> None:
    for dim in [*range(1, 200), 768, 1023, 1024, 3072, 4096, 11008]:
        assert factors(dim, bound) == factorization(dim, bound), dim


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({"delta_type": "lokr", "lokr_decompose_factor": 0}, "lokr_decompose_factor is 0; it must be at least 1, or -1"),
        ({"delta_type": "loha", "loha_r": 0}, "loha_r is 0; it must be at least 1"),
        ({"delta_type": "vera", "vera_dropout": 1.0}, "vera_dropout is 1.0; it must be less than 1"),
        ({"delta_type": "adalora", "adalora_target_r": 13}, "adalora_target_r is 13 and adalora_init_r is 12"),
        ({"delta_type": "adalora", "adalora_tinit": 0.6, "adalora_tfinal": 0.4}, "together they must be less than 1"),
        ({"delta_type": "adalora", "adalora_beta1": 1.0}, "adalora_beta1 is 1.0; it must be less than 1"),
    ],
)
def test_errors_of_the_others(keys: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        DeltaConfig.from_dict(keys)


@pytest.mark.parametrize("name", ["lora", "adalora", "vera", "loha", "lokr"])
def test_dropout_falls_on_the_input(name: str) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(6, 4, bias=False)
    nn.init.zeros_(linear.weight)
    backbone = nn.Sequential(linear)
    layer = attach(backbone, name, modified_modules=["0"], **{f"{name}_dropout": 0.5}).attachments[0].layer
    x = torch.randn(3, 6)
    backbone.train()
    torch.manual_seed(3)
    result = backbone(x)
    torch.manual_seed(3)
    torch.testing.assert_close(result, nn.functional.dropout(x, 0.5) @ layer.delta().T)
    torch.testing.assert_close(backbone.eval()(x), x @ layer.delta().T)
