"""Deltas on backbones with quantised weights: trained, saved, loaded and refused on others; what cannot be is said."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import attach, logits, md5
from tiny import AUTO_CLASSES, quiet, tiny_inputs, tiny_model
from torch import nn

from deltaexp import AutoDeltaModel, HashCheck, quantised
from deltaexp.errors import AddressingError, BackboneMismatchError, BackboneSettingsError, DeltaExpError
from deltaexp.structure import backbone_tensors, common_names

HEADS = ["score", "classifier", "lm_head", "shared"]


def bnb(bits: int, **keys: Any) -> Any:
    return transformers.BitsAndBytesConfig(**{f"load_in_{bits}bit": True, "llm_int8_skip_modules": HEADS, **keys})


def nf4(compute: torch.dtype = torch.float32) -> Any:
    return bnb(4, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute)


def torchao(name: str) -> Any:
    from torchao import quantization

    return transformers.TorchAoConfig(getattr(quantization, name)(), modules_to_not_convert=HEADS)


WAYS: dict[str, tuple[str, Callable[[], Any]]] = {
    "bnb_8bit": ("bitsandbytes", lambda: bnb(8)),
    "bnb_4bit": ("bitsandbytes", nf4),
    "torchao_int8": ("torchao", lambda: torchao("Int8WeightOnlyConfig")),
    "torchao_float8": ("torchao", lambda: torchao("Float8WeightOnlyConfig")),
}


def ways(*names: str) -> list[Any]:
    """Return parameters for a test, which is skipped where the library is not installed."""
    return [
        pytest.param(
            name,
            marks=pytest.mark.skipif(
                importlib.util.find_spec(WAYS[name][0]) is None, reason=f"{WAYS[name][0]} is not installed"
            ),
        )
        for name in names or WAYS
    ]


def stored(folder: Path, kind: str, model_type: str) -> Path:
    """Write a small random backbone."""
    with quiet():
        tiny_model(kind, model_type).save_pretrained(folder)
    return folder


def load(folder: Path, kind: str, how: Any = None) -> Any:
    auto_class = getattr(transformers, AUTO_CLASSES[kind][0])
    options = {} if how is None else {"quantization_config": how}
    with quiet():
        backbone = auto_class.from_pretrained(folder, dtype=torch.float32, **options).eval()
    quantised.settle(backbone)
    return backbone


def test_a_plain_backbone_has_none() -> None:
    backbone = tiny_model("causal", "llama")
    assert quantised.names(backbone) == []
    quantised.settle(backbone)
    assert not any(module._forward_hooks for module in backbone.modules())


@pytest.mark.parametrize("way", ways())
@pytest.mark.parametrize(
    ("kind", "model_type"),
    [("causal", "llama"), pytest.param("causal", "opt", marks=pytest.mark.slow), ("classification", "bert")]
    + [pytest.param(*pair, marks=pytest.mark.slow) for pair in (("seq2seq", "t5"), ("seq2seq", "bart"), ("image", "vit"))],
)
def test_lora_trains_is_saved_and_found_again(kind: str, model_type: str, way: str, tmp_path: Path) -> None:
    folder, how = stored(tmp_path / "backbone", kind, model_type), WAYS[way][1]
    backbone = load(folder, kind, how())
    inputs = tiny_inputs(kind, backbone.config)
    names = quantised.names(backbone)
    assert len(names) >= 12
    before, plain = md5(backbone), logits(backbone, inputs)
    assert md5(backbone) == before  # computing changes nothing of it
    delta_model = attach(backbone)
    assert {f"{attachment.site}.weight" for attachment in delta_model.attachments} <= set(names)
    trained = delta_model.trainable_parameters()
    optimizer = torch.optim.Adam(trained.values(), lr=0.01)
    losses = []
    for _ in range(6):
        loss = backbone(**inputs).loss
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trained.values())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    after = logits(backbone, inputs)
    manifest = delta_model.save_finetuned(tmp_path / "delta")
    assert any(name.startswith(names[0]) or name.endswith("SCB") for name in manifest.base)

    fresh = load(folder, kind, how())
    loaded = AutoDeltaModel.from_finetuned(tmp_path / "delta", backbone_model=fresh)
    assert loaded.hash_check is HashCheck.MATCH
    assert torch.equal(logits(fresh, inputs), after)
    delta_model.detach()
    assert md5(backbone) == before
    assert torch.equal(logits(backbone, inputs), plain)

    with pytest.raises(BackboneMismatchError, match="trained on a quantised backbone.*Load it as it was then"):
        AutoDeltaModel.from_finetuned(tmp_path / "delta", backbone_model=load(folder, kind))


@pytest.mark.parametrize("way", ways())
def test_every_scale_belongs_to_what_identifies_a_backbone(way: str, tmp_path: Path) -> None:
    folder = stored(tmp_path / "backbone", "causal", "llama")
    backbone = load(folder, "causal", WAYS[way][1]())
    before, names = md5(backbone), quantised.names(backbone)
    tensors = backbone_tensors(backbone)
    assert all(type(tensor) in (torch.Tensor, nn.Parameter) for tensor in tensors.values())
    place = names[0].removesuffix(".weight")
    own = [name for name in tensors if name.startswith(f"{place}.") and tensors[name].numel() > 1]
    assert len(own) >= 2
    scale = next(name for name in own if name.rpartition(".")[2] in ("SCB", "absmax", "scale"))
    with torch.no_grad():
        tensors[scale][0] += 1
    assert md5(backbone) != before


@pytest.mark.parametrize("way", ways())
def test_a_gradient_is_that_of_the_weight_it_stands_for(way: str, tmp_path: Path) -> None:
    backbone = load(stored(tmp_path / "backbone", "causal", "llama"), "causal", WAYS[way][1]())
    module = backbone.get_submodule("model.layers.0.mlp.up_proj")
    weight = quantised.dequantised(module)
    assert weight.shape == (module.out_features, module.in_features)
    x = torch.randn(2, 3, module.in_features, generator=torch.Generator().manual_seed(0)).requires_grad_()
    output = module(x)
    exact = nn.functional.linear(x, weight)
    # bitsandbytes rounds the input to 8 bits as well.
    torch.testing.assert_close(
        output, exact, rtol=0.05 if way == "bnb_8bit" else 1e-4, atol=0.05 if way == "bnb_8bit" else 1e-5
    )
    pull = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    found, wanted = (torch.autograd.grad(y, x, pull)[0] for y in (output, exact))
    torch.testing.assert_close(
        found, wanted, rtol=0.02 if way == "bnb_8bit" else 1e-4, atol=0.02 if way == "bnb_8bit" else 1e-5
    )


@pytest.mark.parametrize("way", ways())
@pytest.mark.parametrize("keys", [{"lora_dora": True}, {"lora_init": "pissa"}])
def test_what_starts_from_the_weight_starts_from_what_it_stands_for(keys: dict, way: str, tmp_path: Path) -> None:
    backbone = load(stored(tmp_path / "backbone", "causal", "llama"), "causal", WAYS[way][1]())
    inputs = tiny_inputs("causal", backbone.config)
    plain = logits(backbone, inputs)
    attach(backbone, seed=None, **keys)
    torch.testing.assert_close(logits(backbone, inputs), plain, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("way", ways("bnb_4bit", "torchao_int8"))
@pytest.mark.parametrize(
    ("delta_type", "keys"),
    [("adapter", {}), ("bitfit", {}), ("prefix", {"embed_dim": 8, "mid_dim": 8}), ("ia3", {})]
    + [pytest.param(name, keys, marks=pytest.mark.slow) for name, keys in (
        ("adalora", {}), ("compacter", {"reduction_factor": 4}), ("ln_tuning", {}), ("loha", {}), ("lokr", {}), ("reft", {}),
        ("low_rank_adapter", {"reduction_factor": 4}), ("parallel_adapter", {}), ("vera", {"vera_r": 8}),
        ("peft", {"peft": {"peft_type": "LORA", "target_modules": "all-linear"}}),
    )],
)  # fmt: skip
def test_the_other_types(delta_type: str, keys: dict, way: str, tmp_path: Path) -> None:
    folder = stored(tmp_path / "backbone", "causal", "llama")
    backbone = load(folder, "causal", WAYS[way][1]())
    inputs = tiny_inputs("causal", backbone.config)
    delta_model = attach(backbone, delta_type, **keys)
    backbone(**inputs).loss.backward()
    assert all(p.grad is not None for p in delta_model.trainable_parameters().values())
    after = logits(backbone, inputs)
    delta_model.save_finetuned(tmp_path / "delta")
    fresh = load(folder, "causal", WAYS[way][1]())
    assert AutoDeltaModel.from_finetuned(tmp_path / "delta", backbone_model=fresh).hash_check is HashCheck.MATCH
    assert torch.equal(logits(fresh, inputs), after)


@pytest.mark.parametrize("way", ways())
def test_what_would_have_to_change_a_quantised_weight_is_refused(way: str, tmp_path: Path) -> None:
    backbone = load(stored(tmp_path / "backbone", "causal", "llama"), "causal", WAYS[way][1]())
    before = md5(backbone)
    with pytest.raises(AddressingError, match="are quantised and cannot be trained in place"):
        attach(backbone, "full")
    with pytest.raises(AddressingError, match="q_proj.weight is quantised"):
        attach(backbone, unfrozen_modules=["deltas", "layers.0.self_attn.q_proj"])
    delta_model = attach(backbone)
    with pytest.raises(DeltaExpError, match="is quantised by (bitsandbytes|torchao).*without merging it"):
        delta_model.merge()
    delta_model.detach()
    assert md5(backbone) == before


@pytest.mark.parametrize("way", ways("bnb_4bit"))
def test_another_quantisation_is_refused(way: str, tmp_path: Path) -> None:
    folder = stored(tmp_path / "backbone", "causal", "llama")
    attach(load(folder, "causal", nf4())).save_finetuned(tmp_path / "delta")
    for other in (bnb(8), bnb(4, bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=True)):
        with pytest.raises(BackboneMismatchError, match="tensors differ"):
            AutoDeltaModel.from_finetuned(tmp_path / "delta", backbone_model=load(folder, "causal", other))
    with pytest.raises(BackboneSettingsError, match="bnb_4bit_compute_dtype is 'bfloat16' and was 'float32'"):
        AutoDeltaModel.from_finetuned(tmp_path / "delta", backbone_model=load(folder, "causal", nf4(torch.bfloat16)))
    attach(load(folder, "causal")).save_finetuned(tmp_path / "plain")
    with pytest.raises(BackboneMismatchError, match="was not quantised.*and this one is"):
        AutoDeltaModel.from_finetuned(tmp_path / "plain", backbone_model=load(folder, "causal", nf4()))


@pytest.mark.parametrize("way", ways("bnb_8bit", "bnb_4bit"))
def test_a_bias_stays_in_its_dtype(way: str, tmp_path: Path) -> None:
    backbone = load(stored(tmp_path / "backbone", "causal", "opt"), "causal", WAYS[way][1]())
    before = md5(backbone)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits(backbone, tiny_inputs("causal", backbone.config))
    module = backbone.get_submodule("model.decoder.layers.0.fc1")
    with torch.no_grad():
        module(torch.zeros(1, module.in_features, dtype=torch.bfloat16))
    assert module.bias.dtype == torch.float32
    assert md5(backbone) == before


@pytest.mark.parametrize("way", ways("bnb_4bit"))
def test_parameters_are_counted_as_what_they_stand_for(way: str, tmp_path: Path) -> None:
    folder = stored(tmp_path / "backbone", "causal", "llama")
    plain = attach(load(folder, "causal"))
    assert attach(load(folder, "causal", WAYS[way][1]())).counts() == plain.counts()


@pytest.mark.parametrize("way", ways("bnb_8bit", "bnb_4bit"))
def test_the_roles_of_a_fused_projection_are_found(way: str, tmp_path: Path) -> None:
    folder = stored(tmp_path / "backbone", "causal", "gpt2")
    assert common_names(load(folder, "causal", WAYS[way][1]())) == common_names(load(folder, "causal"))
