"""Norms and activations in few operations: the same numbers as transformers', fewer tensors kept, and nothing left behind."""

import copy
import gc
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, activations
from transformers.models.bloom.modeling_bloom import BloomGelu
from transformers.models.clip.configuration_clip import CLIPTextConfig
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama4.modeling_llama4 import Llama4TextL2Norm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.mt5.modeling_mt5 import MT5LayerNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from deltaexp import norms_and_gelus
from deltaexp.norms_and_gelus import InFew, _RootMeanSquare

NORMS = [MistralRMSNorm, Qwen3RMSNorm, Olmo2RMSNorm, T5LayerNorm, MT5LayerNorm, GemmaRMSNorm]
GELUS = ["gelu_new", "gelu_fast", "gelu_python", "gelu_python_tanh", "gelu_accurate", "quick_gelu"]
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 60}
MODELS = {
    "llama": SMALL | {"num_key_value_heads": 2},
    "gemma": SMALL | {"num_key_value_heads": 1, "head_dim": 8, "hidden_activation": "gelu_pytorch_tanh"},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 60, "bos_token_id": 0, "eos_token_id": 1},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 60},
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 60,
           "feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0},
    "albert": SMALL | {"embedding_size": 16},
}  # fmt: skip


def norm(kind: type, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    module: Any = kind(24).to(dtype).requires_grad_(False)
    module.weight.normal_()
    return module


def passed(module: nn.Module, x: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what a module makes of an input, and the gradient of the input for an outer gradient."""
    x = x.clone().requires_grad_()
    out = module(x)
    (gradient,) = torch.autograd.grad(out, x, weights)
    return out.detach(), gradient


def kept(module: nn.Module, x: torch.Tensor) -> int:
    """Return the bytes that are kept for the backward pass beside the module's weights and its input."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (x, *module.parameters())}
    found: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        alive = module(x.clone().requires_grad_() * 1.0)
    del alive
    return sum(found.values())


def of_input(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    first, second = (torch.randn(3, 5, 24, generator=generator).to(dtype) for _ in range(2))
    return 3 * first, second


@pytest.mark.parametrize("kind", NORMS, ids=lambda kind: kind.__name__)
def test_a_frozen_norm_is_the_same_to_rounding_and_keeps_no_more(kind: type) -> None:
    module, (x, weights) = norm(kind), of_input()
    before, bytes_before = passed(module, x, weights), kept(module, x)
    with InFew(module):
        after, bytes_after = passed(module, x, weights), kept(module, x)
        assert type(module(x.clone().requires_grad_()).grad_fn).__name__ == "_RootMeanSquareBackward"
        assert type(module).__name__ == kind.__name__
        assert isinstance(module, kind)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    assert bytes_after <= bytes_before
    assert type(module) is kind


@pytest.mark.parametrize("kind", NORMS, ids=lambda kind: kind.__name__)
def test_in_half_precision_a_norm_is_as_near_to_the_formula_and_keeps_less(kind: type) -> None:
    module, (x, weights) = norm(kind, torch.bfloat16), of_input(torch.bfloat16)
    exact = passed(copy.deepcopy(module).float(), x.float(), weights.float())
    before, bytes_before = passed(module, x, weights), kept(module, x)
    with InFew(module):
        after, bytes_after = passed(module, x, weights), kept(module, x)
    assert bytes_after < bytes_before
    for ours, theirs, true in zip(after, before, exact, strict=True):
        assert ours.dtype == theirs.dtype == torch.bfloat16
        assert (ours - true).abs().max() <= 1.01 * (theirs - true).abs().max()


def test_the_gradient_of_a_norm_is_that_of_its_formula() -> None:
    x = torch.randn(2, 3, 8, requires_grad=True, generator=torch.Generator().manual_seed(0))
    scale = torch.linspace(0.5, 2, 8)
    outer = torch.linspace(-1, 1, 48).view(2, 3, 8)
    (ours,) = torch.autograd.grad(_RootMeanSquare.apply(x, scale, 1e-3), x, outer)
    wide = x.detach().double().requires_grad_()
    formula = scale * wide / (wide.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    (exact,) = torch.autograd.grad(formula, wide, outer.double())
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-6)


def test_a_norm_of_zeros_is_zero_and_has_a_gradient() -> None:
    module = norm(MistralRMSNorm)
    weights = torch.ones(1, 24)
    before = passed(module, torch.zeros(1, 24), weights)
    with InFew(module):
        torch.testing.assert_close(passed(module, torch.zeros(1, 24), weights), before)


def test_a_norm_that_is_trained_is_left_alone_and_has_its_gradient_if_it_is_trained_later() -> None:
    module, (x, weights) = norm(MistralRMSNorm), of_input()
    module.weight.requires_grad_()
    (module(x) * weights).sum().backward()
    before, module.weight.grad = module.weight.grad, None
    with InFew(module) as few:
        assert not few.kinds
    module.weight.requires_grad_(False)
    with InFew(module) as few:
        assert few.kinds
        module.weight.requires_grad_()
        (module(x) * weights).sum().backward()
    assert torch.equal(module.weight.grad, before)


def test_activations_without_norms_and_what_has_a_forward_of_its_own() -> None:
    model = made("t5")
    assert InFew(model, norms=False).kinds == {"NewGELUActivation": 4}
    moved = norm(MistralRMSNorm)
    moved.forward = moved.forward  # as accelerate's hooks do
    assert not InFew(moved).kinds


def test_a_module_that_has_no_weight_to_tell_is_left_alone() -> None:
    class Wrapped(nn.Module):
        @property
        def weight(self) -> torch.Tensor:
            raise RecursionError

    assert not InFew(Wrapped()).kinds


def test_copies_compute_as_transformers_does() -> None:
    model = made("gpt2")
    kinds = [type(module) for module in model.modules()]
    with InFew(model):
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert [type(module) for module in other.modules()] == kinds
            assert all(map(torch.equal, other.state_dict().values(), model.state_dict().values()))


def test_in_float16_a_large_value_stays_finite() -> None:
    module = activations.ACT2FN["quick_gelu"]
    x = torch.tensor([-6e4, -4e4, 4e4, 6e4], dtype=torch.float16)
    before = module(x)
    with InFew(module):
        assert torch.equal(module(x), before)


@pytest.mark.parametrize("dtypes", [(torch.float64, torch.float64), (torch.float32, torch.bfloat16)], ids=str)
def test_other_dtypes_are_left_to_transformers(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    module, (x, weights) = norm(MistralRMSNorm, dtypes[1]), of_input(dtypes[0])
    before = passed(module, x, weights.to(module(x).dtype))
    with InFew(module):
        after = passed(module, x, weights.to(before[0].dtype))
    assert all(map(torch.equal, before, after))
    assert before[0].dtype == after[0].dtype


def test_a_norm_of_another_kind_is_left_alone() -> None:
    class Own(MistralRMSNorm):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return super().forward(hidden_states) + 1

    modules = nn.ModuleList([Own(8), Llama4TextL2Norm(), nn.LayerNorm(8), nn.RMSNorm(8), nn.GELU()])
    kinds = [type(module) for module in modules]
    with InFew(modules):
        assert [type(module) for module in modules] == kinds


@pytest.mark.parametrize("name", GELUS)
def test_an_activation_is_the_same_to_rounding_and_keeps_less(name: str) -> None:
    module, (x, weights) = activations.ACT2FN[name], of_input()
    kind, before, bytes_before = type(module), passed(module, x, weights), kept(module, x)
    with InFew(module):
        assert type(module) is not kind
        assert isinstance(module, kind)
        after, bytes_after = passed(module, x, weights), kept(module, x)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    assert bytes_after < bytes_before
    assert type(module) is kind


def test_blooms_own_gelu_is_the_same() -> None:
    module, (x, weights) = BloomGelu().train(), of_input()
    before = passed(module, x, weights)
    with InFew(module):
        assert type(module) is not BloomGelu
        torch.testing.assert_close(passed(module, x, weights), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["gelu", "gelu_pytorch_tanh", "silu", "relu", "tanh"])
def test_an_activation_of_one_operation_is_left_alone(name: str) -> None:
    module = activations.ACT2FN[name]
    kind = type(module)
    with InFew(module):
        assert type(module) is kind


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return AutoModel.from_config(AutoConfig.for_model(name, **MODELS[name])).eval().requires_grad_(False)


def computed(model: Any) -> Iterator[torch.Tensor]:
    """Yield what a model makes of embedded texts, and the gradient of the embeddings."""
    texts = torch.arange(12).view(2, 6) + 3
    embedded = model.get_input_embeddings()(texts).detach().requires_grad_()
    more = {"decoder_input_ids": texts} if model.config.is_encoder_decoder else {}
    out = model(inputs_embeds=embedded, **more)[0]
    yield out.detach()
    # A norm at the end makes a sum of squares nearly the same whatever is below it.
    yield from torch.autograd.grad(out, embedded, torch.linspace(-1, 1, out.numel()).view_as(out))


@pytest.mark.parametrize("name", MODELS)
def test_models_compute_the_same_and_are_what_they_were_afterwards(name: str) -> None:
    model = made(name)
    kinds, before = [type(module) for module in model.modules()], list(computed(model))
    with InFew(model):
        changed = sum(a is not type(b) for a, b in zip(kinds, model.modules(), strict=True))
        after = list(computed(model))
    assert changed >= 1
    for ours, theirs in zip(after, before, strict=True):
        assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()
    assert [type(module) for module in model.modules()] == kinds


def test_clip_has_its_own_activation_in_fewer_operations() -> None:
    model = AutoModel.from_config(CLIPTextConfig(**SMALL, hidden_act="quick_gelu")).eval()
    texts = torch.arange(12).view(2, 6) + 3
    before = model(texts)[0]
    with InFew(model):
        assert {"QuickGELUActivation"} == {
            type(module).__name__ for module in model.modules() if norms_and_gelus.MARK in vars(type(module))
        }
        torch.testing.assert_close(model(texts)[0], before, rtol=1e-4, atol=1e-5)


def test_it_is_put_aside_and_taken_up_and_leaves_what_others_have_changed() -> None:
    model = made("llama")
    model.other = activations.ACT2FN["gelu_python"]
    kind, kinds = type(model.norm), [type(module) for module in model.modules()]
    outer = InFew(model)
    assert outer.kinds == {"LlamaRMSNorm": 5, "GELUActivation": 1}
    with InFew(model) as inner:
        assert not inner.kinds
    assert type(model.norm) is not kind
    for _ in range(2):
        outer.remove()
        outer.remove()
        assert type(model.norm) is kind
        outer.put()
        outer.put()
        assert type(model.norm) is not kind
    outer.remove()
    assert [type(module) for module in model.modules()] == kinds


def test_a_compiled_norm_is_left_to_the_compiler() -> None:
    module, (x, weights) = norm(MistralRMSNorm), of_input()
    before = passed(module, x, weights)
    with InFew(module):
        compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
        assert all(map(torch.equal, passed(compiled, x, weights), before))
    torch.compiler.reset()


def test_nothing_of_a_step_stays_alive() -> None:
    module, (x, weights) = norm(MistralRMSNorm), of_input()
    with InFew(module):
        passed(module, x, weights)
        gc.collect()
        assert not [found for found in gc.get_objects() if type(found).__name__ == "_RootMeanSquareBackward"]
