"""Soft prompts: against real tokens in front of the input, against PEFT, in generation, and what they refuse."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from models import FAMILIES, VOCABULARY, Family, attach, logits, md5
from torch import nn
from transformers import (
    BertForMaskedLM,
    BertForQuestionAnswering,
    GPT2ForSequenceClassification,
    LlamaForSequenceClassification,
    MambaConfig,
    MambaForCausalLM,
    PegasusConfig,
    PegasusForConditionalGeneration,
    T5EncoderModel,
    ViTConfig,
    ViTForImageClassification,
)

from deltaexp import AutoDeltaConfig, AutoDeltaModel, DeltaModel
from deltaexp.errors import AddressingError, ConfigError, DeltaExpError

TOKENS = 3


def soft(backbone: nn.Module, seed: int | None = None, **keys: object) -> DeltaModel:
    return attach(backbone, "soft_prompt", seed=seed, **{"soft_token_num": TOKENS, **keys})


def in_front(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return inputs that begin with the vocabulary's first tokens, which a new prompt is a copy of."""
    ids = inputs["input_ids"]
    first = torch.arange(TOKENS).expand(len(ids), -1)
    longer = {"input_ids": torch.cat([first, ids], dim=1)}
    longer["attention_mask"] = torch.cat([torch.ones_like(first), inputs["attention_mask"]], dim=1)
    return {**inputs, **longer}


@pytest.fixture(params=FAMILIES.values(), ids=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


def test_a_new_prompt_is_the_first_tokens(family: Family) -> None:
    backbone, inputs = family.build(), family.inputs()
    whole = in_front(inputs)
    if family.name in ("gpt2", "llama"):
        whole["labels"] = torch.cat([torch.full((2, TOKENS), -100), inputs["labels"]], dim=1)
    with torch.no_grad():
        expected = backbone(**whole)
    before = {key: value.clone() for key, value in inputs.items()}
    soft(backbone)
    with torch.no_grad():
        found = backbone(**inputs)
    torch.testing.assert_close(found.logits, expected.logits)
    torch.testing.assert_close(found.loss, expected.loss)
    assert all(torch.equal(inputs[key], before[key]) for key in inputs)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT's use of transformers
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
def test_equals_peft(name: str) -> None:
    family = FAMILIES[name]
    inputs = family.inputs()
    task = {"bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}.get(name, "CAUSAL_LM")
    config = peft.PromptTuningConfig(task_type=task, num_virtual_tokens=TOKENS, num_transformer_submodules=1)
    theirs = peft.get_peft_model(family.build(), config).eval()
    backbone = family.build()
    delta_model = soft(backbone, seed=7)
    (ours,) = delta_model.delta_tensors().values()
    weight = theirs.prompt_encoder.default.embedding.weight
    with torch.no_grad():
        weight.copy_(ours)
    if name == "t5":  # PEFT lengthens the decoder's mask by what is no integer
        inputs["attention_mask"] = inputs["attention_mask"].float()
    expected, found = theirs(**inputs), backbone(**family.inputs())
    torch.testing.assert_close(found.logits, expected.logits)
    torch.testing.assert_close(found.loss, expected.loss)
    expected.loss.backward()
    found.loss.backward()
    assert weight.grad.abs().max() > 0
    torch.testing.assert_close(ours.grad, weight.grad)


def test_names_of_the_parameter(family: Family) -> None:
    delta_model = soft(family.build())
    where = "encoder." if family.name == "t5" else ""
    assert list(delta_model.delta_tensors()) == [f"{where}soft_prompt_layer.soft_embeds"]


def test_where_the_vectors_start() -> None:
    backbone = FAMILIES["llama"].build()
    embeddings = backbone.get_input_embeddings().weight
    values = soft(backbone, soft_token_num=20).attachments[0].layer.soft_embeds
    assert torch.equal(values, embeddings[:20])
    small = FAMILIES["t5"].build()
    values = soft(small, soft_token_num=VOCABULARY + 5).attachments[0].layer.soft_embeds
    assert torch.equal(values[-5:], small.shared.weight[:5])
    values = soft(backbone, soft_token_num=20, token_init=False, init_range=0.25).attachments[0].layer.soft_embeds
    assert 0.2 < values.abs().max() <= 0.25
    assert values.min() < -0.1


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_generation_by_a_causal_model(name: str) -> None:
    family = FAMILIES[name]
    backbone, ids = family.build(), family.inputs()["input_ids"]
    delta_model = soft(backbone, seed=7)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0

    def generate(ids: torch.Tensor, mask: torch.Tensor, **options: object) -> torch.Tensor:
        return backbone.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False, **options)[:, -6:]

    found, kept = generate(ids, mask), mask.clone()
    assert torch.equal(mask, kept)
    assert torch.equal(generate(ids, mask, use_cache=False), found)
    # Padding on the left changes nothing, and each token is the likeliest after all before it.
    assert torch.equal(generate(ids[1:, 3:], mask[1:, 3:]), found[1:])
    whole = torch.cat([ids[:1], found[:1, :-1]], dim=1)
    chosen = logits(backbone, {"input_ids": whole})[:, TOKENS + ids.shape[1] - 1 :].argmax(-1)
    assert torch.equal(chosen, found[:1])
    beams = generate(ids, mask, num_beams=3)
    assert torch.equal(generate(ids, mask, num_beams=3, use_cache=False), beams)
    assert torch.equal(generate(ids[1:, 3:], mask[1:, 3:], num_beams=3), beams[1:])
    with delta_model.detached():
        assert not torch.equal(generate(ids, mask), found)


def test_generation_by_an_encoder_decoder() -> None:
    backbone, inputs = FAMILIES["t5"].build(), FAMILIES["t5"].inputs()
    soft(backbone, seed=7)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    for beams in (1, 3):
        options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "num_beams": beams}
        found = backbone.generate(input_ids=ids, attention_mask=mask, **options)
        assert torch.equal(backbone.generate(input_ids=ids, attention_mask=mask, use_cache=False, **options), found)
        assert torch.equal(backbone.generate(input_ids=ids[1:, :5], attention_mask=mask[1:, :5], **options), found[1:])


def test_generation_by_a_state_space_model() -> None:
    torch.manual_seed(0)
    backbone = MambaForCausalLM(MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, state_size=4)).eval()
    soft(backbone, seed=7)
    ids = FAMILIES["llama"].inputs()["input_ids"]
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    found = backbone.generate(input_ids=ids, **options)
    assert torch.equal(backbone.generate(input_ids=ids, use_cache=False, **options), found)


def test_embeddings_that_the_encoder_scales() -> None:
    sizes = {f"{part}_{what}": 2 for part in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    config = PegasusConfig(
        vocab_size=VOCABULARY, d_model=16, encoder_ffn_dim=24, decoder_ffn_dim=24, scale_embedding=True, **sizes
    )
    torch.manual_seed(0)
    backbone, inputs = PegasusForConditionalGeneration(config).eval(), FAMILIES["t5"].inputs()
    expected = logits(backbone, in_front(inputs))
    assert list(soft(backbone).delta_tensors()) == ["model.encoder.soft_prompt_layer.soft_embeds"]
    torch.testing.assert_close(logits(backbone, inputs), expected)


@pytest.mark.parametrize("kind", [LlamaForSequenceClassification, GPT2ForSequenceClassification])
def test_classification_by_the_last_token(kind: type, tmp_path) -> None:
    family = FAMILIES["llama" if kind is LlamaForSequenceClassification else "gpt2"]
    torch.manual_seed(0)
    backbone = kind(family.build().config).eval()
    ids = family.inputs()["input_ids"]
    padded = torch.cat([ids, torch.zeros(2, 3, dtype=torch.long)], dim=1)
    mask = (padded != 0).long()
    digest, plain = md5(backbone), logits(backbone, {"input_ids": ids})
    expected = logits(backbone, {"input_ids": torch.cat([torch.ones(2, TOKENS, dtype=torch.long), ids], dim=1)})
    delta_model = soft(backbone)
    (vectors,) = delta_model.delta_tensors().values()
    with torch.no_grad():
        vectors.copy_(backbone.get_input_embeddings()(torch.ones(TOKENS, dtype=torch.long)))
    torch.testing.assert_close(logits(backbone, {"input_ids": ids}), expected)
    torch.testing.assert_close(logits(backbone, {"input_ids": padded, "attention_mask": mask}), expected)
    backbone(input_ids=padded, attention_mask=mask, labels=torch.tensor([0, 1])).loss.backward()
    assert vectors.grad.abs().max() > 0
    delta_model.detach()
    assert md5(backbone) == digest
    assert torch.equal(logits(backbone, {"input_ids": ids}), plain)


def test_labels_and_positions_of_tokens() -> None:
    config = copy.deepcopy(FAMILIES["bert"].build().config)
    config.num_labels = 2
    inputs = FAMILIES["bert"].inputs()
    del inputs["labels"]
    torch.manual_seed(0)
    answers = BertForQuestionAnswering(config).eval()
    targets = {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 2])}
    expected = answers(**in_front(inputs), **{key: value + TOKENS for key, value in targets.items()}).loss
    soft(answers)
    torch.testing.assert_close(answers(**inputs, **targets).loss, expected)

    words = BertForMaskedLM(config).eval()
    labels = inputs["input_ids"]
    ignored = torch.full((2, TOKENS), -100)
    expected = words(**in_front(inputs), labels=torch.cat([ignored, labels], dim=1)).loss
    soft(words)
    torch.testing.assert_close(words(**inputs, labels=labels).loss, expected)
    types = torch.ones_like(labels)
    longer = torch.cat([torch.zeros_like(ignored), types], dim=1)
    typed = BertForMaskedLM(config).eval()
    expected = logits(typed, {**in_front(inputs), "token_type_ids": longer})
    soft(typed)
    torch.testing.assert_close(logits(typed, {**inputs, "token_type_ids": types}), expected)


def test_positions_and_embeddings_that_the_caller_gives() -> None:
    backbone, inputs = FAMILIES["llama"].build(), FAMILIES["llama"].inputs()
    ids = inputs["input_ids"]
    soft(backbone, seed=7)
    expected = logits(backbone, {"input_ids": ids})
    positions = torch.arange(ids.shape[1]).unsqueeze(0)
    torch.testing.assert_close(logits(backbone, {"input_ids": ids, "position_ids": positions}), expected)
    torch.testing.assert_close(logits(backbone, {"inputs_embeds": backbone.get_input_embeddings()(ids)}), expected)
    with torch.no_grad():
        torch.testing.assert_close(backbone(ids).logits, expected)
    with pytest.raises(DeltaExpError, match=r"shape \(batch, length\)"):
        backbone(input_ids=ids, attention_mask=torch.ones(2, 1, 7, 7))
    with pytest.raises(DeltaExpError, match="neither was passed"):
        backbone()


def test_a_padding_id_stands_for_a_mask() -> None:
    family = FAMILIES["bert"]
    ids = family.inputs()["input_ids"].clone()
    ids[1, 5:] = 0
    backbone = family.build()
    delta_model = soft(backbone, seed=7)
    everything = logits(backbone, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    masked = logits(backbone, {"input_ids": ids, "attention_mask": (ids != 0).long()})
    torch.testing.assert_close(logits(backbone, {"input_ids": ids}), everything)
    delta_model.detach()
    soft(backbone, seed=7, pad_id=0)
    torch.testing.assert_close(logits(backbone, {"input_ids": ids}), masked)
    assert not torch.allclose(masked, everything)


def test_of_two_prompts_the_later_one_comes_first(family: Family) -> None:
    backbone, inputs = family.build(), family.inputs()
    plain = logits(backbone, inputs)
    first, second = soft(backbone, seed=1), soft(backbone, seed=2)
    both = logits(backbone, inputs)
    vectors = [next(iter(delta.delta_tensors().values())).detach() for delta in (second, first)]
    other = family.build()
    one = soft(other, soft_token_num=2 * TOKENS)
    one.attachments[0].layer.soft_embeds.data = torch.cat(vectors)
    torch.testing.assert_close(logits(other, inputs), both)
    first.detach()
    second.detach()
    assert torch.equal(logits(backbone, inputs), plain)
    second.attach()
    first.attach()
    assert torch.equal(logits(backbone, inputs), both)


def test_inside_a_wrapper() -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plm = FAMILIES["t5"].build()

        def forward(self, **inputs: torch.Tensor) -> object:
            return self.plm(**inputs)

    inputs, expected = FAMILIES["t5"].inputs(), FAMILIES["t5"].build()
    soft(expected, seed=7)
    for keys in ({}, {"modified_modules": ["plm"]}, {"modified_modules": ["plm.encoder"]}):
        wrapper = Wrapper()
        assert list(soft(wrapper, seed=7, **keys).delta_tensors()) == ["plm.encoder.soft_prompt_layer.soft_embeds"]
        assert torch.equal(logits(wrapper, inputs), logits(expected, inputs))


def test_an_encoder_alone() -> None:
    torch.manual_seed(0)
    backbone, inputs = T5EncoderModel(FAMILIES["t5"].build().config).eval(), FAMILIES["t5"].inputs()
    del inputs["labels"]
    with torch.no_grad():
        expected = backbone(**in_front(inputs)).last_hidden_state
        soft(backbone)
        torch.testing.assert_close(backbone(**inputs).last_hidden_state, expected)


def test_gradient_checkpointing_and_half_precision(family: Family) -> None:
    backbone, inputs = family.build(), family.inputs()
    (vectors,) = soft(backbone, seed=7).delta_tensors().values()
    half = copy.deepcopy(backbone).bfloat16()
    backbone.train()
    gradients = []
    enable = getattr(backbone, "activation_checkpointing_enable", None) or backbone.gradient_checkpointing_enable
    for checkpointed in (False, True):
        if checkpointed:
            enable()
        torch.manual_seed(3)
        backbone.zero_grad()
        backbone(**inputs).loss.backward()
        gradients.append(vectors.grad.clone())
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[1], gradients[0])
    assert logits(half, inputs).dtype == torch.bfloat16


def test_what_is_refused() -> None:
    vision = ViTForImageClassification(
        ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, image_size=8, patch_size=4)
    )
    with pytest.raises(AddressingError, match="has no token embeddings"):
        soft(vision)
    assert not vision._forward_pre_hooks
    with pytest.raises(AddressingError, match="contains no model of transformers"):
        soft(nn.Linear(2, 2))
    with pytest.raises(AddressingError, match="has 16 positions"):
        soft(FAMILIES["bert"].build(), soft_token_num=16)
    for keys, message in (({"soft_token_num": 0}, "at least 1"), ({"init_range": 0.0}, "greater than 0")):
        with pytest.raises(ConfigError, match=message):
            AutoDeltaModel.from_config(AutoDeltaConfig.from_dict({"delta_type": "soft_prompt", **keys}), nn.Linear(2, 2))


def test_a_prompt_is_in_no_block() -> None:
    with pytest.raises(ConfigError, match="in front of the first block"):
        AutoDeltaConfig.from_dict({"delta_type": "soft_prompt", "layers": "last:1"})
