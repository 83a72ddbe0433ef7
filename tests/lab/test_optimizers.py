"""Which parameters get which learning rate, and on which of them weight decay acts."""

import pytest
from models import FAMILIES, attach

from deltaexp.errors import ConfigError
from deltaexp.lab.optimizers import decays, groups, named_rates

KEYS: dict[str, dict] = {"soft_prompt": {"soft_token_num": 3}}
NOT_DECAYED = {
    "lora": [], "adapter": ["bias"], "parallel_adapter": ["bias"], "loha": [], "lokr": [], "adalora": ["lora_E"],
    "vera": ["vera_lambda_d", "vera_lambda_b"], "ia3": ["ia3_l"], "bitfit": ["bias"], "compacter": ["b"],
    "low_rank_adapter": ["b"], "ln_tuning": ["weight", "bias"], "reft": ["bias"], "prefix": ["bias"], "soft_prompt": [],
    "peft": [],
}  # fmt: skip


@pytest.mark.parametrize("family", ["t5", "bert"])
@pytest.mark.parametrize("delta_type", NOT_DECAYED)
def test_weight_decay_acts_on_matrices_only(delta_type: str, family: str) -> None:
    delta_model = attach(FAMILIES[family].build(), delta_type, **KEYS.get(delta_type, {}))
    trained = delta_model.trainable_parameters()
    decaying = decays(delta_model, set(trained))
    for name in trained:
        assert (name in decaying) == (name.rsplit(".", 1)[-1] not in NOT_DECAYED[delta_type]), name


def test_weight_decay_of_types_with_shapes_of_their_own() -> None:
    dora = attach(FAMILIES["bert"].build(), "lora", lora_dora=True)
    without = {name for name in dora.trainable_parameters() if name not in decays(dora, ())}
    assert without
    assert all("magnitude" in name for name in without)
    ia3 = attach(FAMILIES["bert"].build(), "peft", peft={"peft_type": "IA3"})
    assert {p.dim() for p in ia3.trainable_parameters().values()} == {2}  # rows and columns that multiply
    assert not decays(ia3, ())


def test_weight_decay_of_the_backbone_is_the_one_of_transformers_without_vectors() -> None:
    delta_model = attach(FAMILIES["t5"].build(), "full")
    trained = delta_model.trainable_parameters()
    decaying = decays(delta_model, set(trained))
    assert {name for name in trained if name not in decaying} == {name for name in trained if "layer_norm" in name}


def test_a_layer_on_a_normalisation_has_weight_decay_all_the_same() -> None:
    delta_model = attach(FAMILIES["bert"].build(), "adapter", modified_modules=["attention.output.LayerNorm"])
    decaying = decays(delta_model, ())
    assert {name.rsplit(".", 2)[-2] for name in decaying} == {"down_proj", "up_proj"}


def test_learning_rates_by_pattern() -> None:
    delta_model = attach(FAMILIES["bert"].build(), "lora", lora_plus_ratio=4.0, modified_modules=["query"])
    delta_model.freeze_module(exclude=["deltas", "classifier"])
    found = groups(delta_model, 1e-3, {"classifier": 1e-4, "layer.0": 2e-3}, 0.1, {"classifier.weight"})
    names = {id(p): name for name, p in delta_model.trainable_parameters().items()}
    got = {names[id(p)]: (group["lr"], group["weight_decay"]) for group in found for p in group["params"]}
    layer = "bert.encoder.layer.{}.attention.self.query.lora.lora_{}"
    assert got == {
        layer.format(0, "A"): (2e-3, 0.1),
        layer.format(0, "B"): (8e-3, 0.1),  # four times, as LoRA+ asks for
        layer.format(1, "A"): (1e-3, 0.1),
        layer.format(1, "B"): (4e-3, 0.1),
        "classifier.weight": (1e-4, 0.1),
        "classifier.bias": (1e-4, 0.0),
    }
    assert set(named_rates(delta_model, {"deltas": 1.0})) == {name for name in got if "lora" in name}
    assert groups(delta_model, 1e-3, {}, 0.1, ())[0]["lr"] == 1e-3


@pytest.mark.parametrize(
    ("rates", "what"),
    [
        ({"clasifier": 1.0}, r"'clasifier' in trainer\.learning_rates means no trained parameter\. The nearest.*'classifier'"),
        ({"key": 1.0}, r"'key' .* means no trained parameter"),  # which is frozen
        ({"layer.0": 1.0, "lora_A": 2.0}, r"'layer\.0' and 'lora_A' .* both mean"),
        ({"classifier": 1.0, "[r]^classifier": 2.0}, r"both mean"),
    ],
)
def test_patterns_that_mean_nothing_or_too_much(rates: dict[str, float], what: str) -> None:
    delta_model = attach(FAMILIES["bert"].build(), "lora", modified_modules=["query"])
    delta_model.freeze_module(exclude=["deltas", "classifier"])
    with pytest.raises(ConfigError, match=what):
        named_rates(delta_model, rates)
