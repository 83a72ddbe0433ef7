"""The methods of the PEFT library as delta types: against PEFT itself, and by what holds for every delta."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import peft
import pytest
import torch
from models import FAMILIES, attach, logits, md5, same, slow_but, snapshot, values
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft_adapters import KEYS, KNOWN, settings
from safetensors.torch import load_file
from torch import nn

from deltaexp import AutoDeltaConfig, AutoDeltaModel, DeltaModel, HashCheck
from deltaexp.deltas.peft import METHODS_ELSEWHERE
from deltaexp.errors import AddressingError, ConfigError

quiet = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing:FutureWarning", "ignore:.past_key_values:FutureWarning", "ignore::UserWarning:peft"
)


def hung(backbone: nn.Module, seed: int | None = None, **keys: object) -> DeltaModel:
    return attach(backbone, "peft", seed=seed, peft=keys)


def theirs(backbone: nn.Module, keys: dict) -> nn.Module:
    """Put PEFT's own model around a backbone, with the same random numbers as `models.attach`."""
    keys = copy.deepcopy(keys)
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(keys.pop("peft_type"))]
    if "num_virtual_tokens" in keys:
        keys["task_type"] = "SEQ_CLS" if type(backbone).__name__.startswith("Bert") else "CAUSAL_LM"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return peft.get_peft_model(backbone, config_class(**keys)).eval()


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if p.requires_grad and "modules_to_save" not in name]


@quiet
@pytest.mark.parametrize("name", slow_but(["llama", "bert"], ["llama"]))
@pytest.mark.parametrize("method", slow_but([m for m in KEYS if m in KNOWN], ["BOFT", "IA3", "OFT", "VERA", "P_TUNING"]))
def test_a_method(method: str, name: str, tmp_path: Path) -> None:
    family, keys = FAMILIES[name], settings(method, name)
    backbone, inputs = family.build(), family.inputs()
    plain, digest, modules = logits(backbone, inputs), md5(backbone), list(backbone.named_modules())
    delta_model = hung(backbone, **keys)
    reference = theirs(family.build(), keys)

    # The parameters that PEFT trains, and no others, start as they do in PEFT ...
    ours, wanted = trained(backbone), trained(reference)
    assert sorted((list(p.shape) for p in ours), key=str) == sorted((list(p.shape) for p in wanted), key=str)
    pairs = matched(backbone, reference)
    assert len(pairs) == len(ours)
    generator = torch.Generator().manual_seed(3)
    for own, other in pairs:
        assert torch.equal(own, other)
        with torch.no_grad():
            own.add_(torch.randn(own.shape, generator=generator) * 0.1)
            other.copy_(own)
    # ... and compute the same.
    expected, found = reference(**inputs), backbone(**inputs)
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-6, rtol=1e-5)
    assert found.logits.shape != plain.shape or (found.logits - plain).abs().max() > 1e-4
    expected.loss.backward()
    found.loss.backward()
    for own, other in pairs:
        torch.testing.assert_close(own.grad, other.grad, atol=1e-6, rtol=1e-5)
    assert any(own.grad.abs().max() > 0 for own, _ in pairs)

    torch.optim.SGD(ours, lr=0.1).step()
    backbone.zero_grad()
    result = logits(backbone, inputs)
    assert not torch.equal(result, found.logits)
    delta_model.save_finetuned(tmp_path)
    fresh = family.build()
    loaded = AutoDeltaModel.from_finetuned(tmp_path, fresh)
    assert loaded.hash_check is HashCheck.MATCH
    assert loaded.config == delta_model.config
    assert same(load_file(tmp_path / "delta_model.safetensors"), loaded.delta_tensors())
    assert torch.equal(logits(fresh, inputs), result)
    for twin in (copy.deepcopy(delta_model), pickle.loads(pickle.dumps(delta_model))):
        assert torch.equal(logits(twin.backbone_model, inputs), result)
        twin.detach()
        assert md5(twin.backbone_model) == digest
    delta_model.detach()
    assert torch.equal(logits(backbone, inputs), plain)
    assert list(backbone.named_modules()) == modules
    assert md5(backbone) == digest
    delta_model.attach()
    assert torch.equal(logits(backbone, inputs), result)


def matched(backbone: nn.Module, reference: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """Return the trained parameters of two models in pairs, by their modules and their names in PEFT."""

    def place(name: str) -> str:
        for part in ("base_model.model.", ".base_layer", ".peft.tuner", "peft.encoder.", "prompt_encoder.default."):
            name = name.replace(part, "")
        return name

    own = {place(name): p for name, p in backbone.named_parameters() if p.requires_grad}
    other = {place(n): p for n, p in reference.named_parameters() if p.requires_grad and "modules_to_save" not in n}
    assert own.keys() == other.keys()
    return [(own[name], other[name]) for name in own]


def test_methods_that_are_more_than_layers_are_refused() -> None:
    assert set(METHODS_ELSEWHERE) - KNOWN <= {"CARTRIDGE", "SHADOW"}  # newer than the oldest PEFT that is taken
    assert not set(METHODS_ELSEWHERE) & set(KEYS)
    for method, advice in METHODS_ELSEWHERE.items():
        with pytest.raises(ConfigError, match=f"{method} cannot be attached.*delta_type="):
            AutoDeltaConfig.from_dict({"delta_type": "peft", "peft": {"peft_type": method.lower()}})
        assert advice[0].islower()


def test_what_layers_share_is_one_thing_and_saved_once() -> None:
    delta_model = hung(FAMILIES["llama"].build(), **settings("VERA", "llama"))
    names = list(delta_model.delta_tensors())
    assert len([name for name in names if ".vera_A." in name]) == 1
    layers = [attachment.layer for attachment in delta_model.attachments]
    assert len({id(layer.tuner.vera_A) for layer in layers}) == 1


def test_default_modules_are_recorded() -> None:
    delta_model = hung(FAMILIES["t5"].build(), peft_type="lora")
    assert delta_model.config.peft == {"peft_type": "LORA", "target_modules": ["q", "v"]}
    assert len(delta_model.attachments) == 12
    converted = hung(FAMILIES["gpt2"].build(), peft_type="LORA")  # a Conv1D, whose weight is transposed
    assert converted.config.peft["target_modules"] == ["c_attn"]


@pytest.mark.parametrize("name", FAMILIES)
def test_modules_chosen_as_for_every_delta_type(name: str) -> None:
    family = FAMILIES[name]
    keys: dict = {"modified_modules": ["ff.w2"], "layers": [1], "peft": {"peft_type": "LORA"}}
    sites = [attachment.site for attachment in attach(family.build(), "peft", **keys).attachments]
    expected = attach(family.build(), "lora", modified_modules=["ff.w2"], layers=[1])
    assert sites == [attachment.site for attachment in expected.attachments]


def test_another_delta_on_the_same_module() -> None:
    family = FAMILIES["llama"]
    backbone, inputs = family.build(), family.inputs()
    plain, digest = logits(backbone, inputs), md5(backbone)
    where = ["layers.0.self_attn.q_proj"]
    target = backbone.model.layers[0].self_attn.q_proj
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    base = target(x)
    ours = attach(backbone, "lora", modified_modules=where, seed=1)
    with_ours = target(x)
    rotation = {"peft_type": "OFT", "oft_block_size": 4}
    second = attach(backbone, "peft", modified_modules=where, peft=rotation, seed=None)
    with torch.no_grad():
        next(second.attachments[0].layer.parameters()).normal_(generator=torch.Generator().manual_seed(2))
    both, all_logits = target(x), logits(backbone, inputs)
    with ours.detached():
        alone = target(x)
    assert not torch.allclose(alone, base)
    torch.testing.assert_close(both, alone + (with_ours - base))
    third = attach(backbone, "lora", modified_modules=where, seed=3)
    third.detach()
    assert torch.equal(logits(backbone, inputs), all_logits)
    second.detach()
    ours.detach()
    assert torch.equal(logits(backbone, inputs), plain)
    second.attach()
    ours.attach()
    assert torch.equal(logits(backbone, inputs), all_logits)
    assert md5(backbone) == digest


def test_nothing_inside_another_delta_is_modified() -> None:
    backbone = FAMILIES["t5"].build()
    adapter = attach(backbone, "adapter")
    before = values(adapter.delta_tensors())
    with pytest.raises(AddressingError, match="cannot put LORA into this T5"):
        hung(backbone, peft_type="LORA", target_modules=["down_proj"])
    delta_model = hung(backbone, peft_type="LORA", target_modules="all-linear", r=2)
    assert not [a.site for a in delta_model.attachments if "adapter" in a.site]
    assert same(adapter.delta_tensors(), before)
    assert [name for name in adapter.trainable_parameters() if "modulelist" in name]


REFUSED = [
    ({}, ConfigError, "must name a method"),
    ({"peft_type": "LORAX"}, ConfigError, "'LORAX'.*LORA"),
    ({"peft_type": "LORA", "rank": 4}, ConfigError, "has no key 'rank'.*rank_pattern"),
    ({"peft_type": "LORA", "r": 0}, AddressingError, "r"),
    ({"peft_type": "LORA", "modules_to_save": ["lm_head"]}, ConfigError, "unfrozen_modules"),
    ({"peft_type": "LORA", "bias": "all"}, ConfigError, "unfrozen_modules"),
    ({"peft_type": "LORA", "target_modules": ["nothing"]}, AddressingError, "nothing"),
    ({"peft_type": "LORA", "init_lora_weights": "pissa"}, AddressingError, "changes the backbone's own weights"),
    ({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 40}, AddressingError, "has 32 positions"),
]


@pytest.mark.parametrize(("keys", "kind", "message"), REFUSED, ids=[str(keys) for keys, _, _ in REFUSED])
def test_what_is_refused(keys: dict, kind: type[Exception], message: str) -> None:
    backbone = FAMILIES["llama"].build()
    before = snapshot(backbone)
    with pytest.raises(kind, match=message):
        hung(backbone, **keys)
    assert snapshot(backbone) == before
    assert "peft_config" not in vars(backbone)


def test_the_ways_to_choose_modules_do_not_mix() -> None:
    for keys in (
        {"modified_modules": ["q_proj"], "peft": {"peft_type": "LORA", "target_modules": ["q_proj"]}},
        {"layers": [0]},
        {"exclude_modules": ["mlp"]},
    ):
        with pytest.raises(ConfigError, match="modified_modules"):
            AutoDeltaConfig.from_dict({"delta_type": "peft", **keys})


def test_attention_in_one_module_is_refused() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2)

    backbone = Model()
    modules = list(backbone.named_modules())
    with pytest.raises(AddressingError, match="cannot hang on it"):
        hung(backbone, peft_type="LORA", target_modules=["attention"])
    assert list(backbone.named_modules()) == modules


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ConfigError, match=r"pip install 'deltaexp\[peft\]'"):
        hung(FAMILIES["llama"].build(), peft_type="LORA")
