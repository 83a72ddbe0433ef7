"""Text to text, and labels as words: what is trained on, what is generated, and that the likeliest label is the likeliest."""

from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from models import attach
from torch.nn import functional
from transformers import (
    ByT5Tokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from deltaexp import registry
from deltaexp.errors import ConfigError
from deltaexp.lab.taskconfig import TaskConfig
from deltaexp.lab.tasks.kinds import choose
from deltaexp.lab.tasks.kinds.base import IGNORED, Kind
from deltaexp.lab.tasks.kinds.text import DecoderLabels, DecoderText, Labels, Text

TOKENIZER = ByT5Tokenizer()
TYPES = sorted(set(registry.known()) - {"peft"})
T5 = T5Config(vocab_size=384, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0)
GPT2 = GPT2Config(
    vocab_size=384, n_embd=16, n_layer=1, n_head=2, n_positions=64, eos_token_id=1, bos_token_id=1, pad_token_id=0
)


def task(**changes: object) -> TaskConfig:
    values = {"name": "t", "kind": "seq2seq", "inputs": ["text"], "target": "target", "data": "d"}
    return TaskConfig(**{**values, "max_source_length": 6, "max_target_length": 8, **changes})  # type: ignore[arg-type]


def batch(kind: Kind, rows: dict[str, list], training: bool, model: torch.nn.Module | None = None) -> dict:
    features = kind.features(rows, training)
    features.pop("truncated")
    return kind.collator(model)([{key: value[n] for key, value in features.items()} for n in range(len(rows["text"]))])


def test_the_form_goes_by_the_architecture() -> None:
    labelled = task(kind="classification", labels=["a", "b"])
    assert choose(task(), T5) is Text
    assert choose(task(), GPT2) is DecoderText
    assert choose(labelled, T5) is Labels
    assert choose(labelled, GPT2) is DecoderLabels
    assert choose(task(kind="classification", labels=["a", "b"], answer="head"), GPT2).__name__ == "Classification"


def test_padding_of_targets_is_ignored_by_the_loss() -> None:
    kind = Text(task(), TOKENIZER, T5)
    rows = {"text": ["abc", "a long source"], "target": ["x", "yyy"]}
    features = kind.features(rows, training=True)
    assert [len(ids) for ids in features["input_ids"]] == [4, 6]  # three bytes and the end; cut to the maximum
    assert features["truncated"] == [False, True]
    assert (batch(kind, rows, training=True)["labels"][0] == IGNORED).sum() == 2


def test_a_decoder_learns_the_answer_only_and_is_asked_with_the_source_only() -> None:
    kind = DecoderText(task(max_source_length=20), TOKENIZER, GPT2)
    rows = {"text": ["ab", "abcd"], "target": ["xyz", "x"]}
    made = batch(kind, rows, training=False)
    for n, (source, target) in enumerate(zip(rows["text"], rows["target"], strict=True)):
        learnt = made["labels"][n][made["labels"][n] != IGNORED]
        assert TOKENIZER.decode(learnt) == f"{target}</s>"
        prompt = made["prompt_ids"][n][made["prompt_mask"][n].bool()]
        assert TOKENIZER.decode(prompt) == f"{source}\n"
        whole = made["input_ids"][n][made["attention_mask"][n].bool()]
        assert TOKENIZER.decode(whole) == f"{source}\n{target}</s>"
    assert made["prompt_mask"][0].tolist() == [0, 0, 1, 1, 1]  # padded at the beginning
    assert set(kind.inputs(made)) == {"input_ids", "attention_mask", "labels"}


def test_what_a_decoder_generates_goes_on_from_the_source() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2).eval()
    kind = DecoderText(task(max_source_length=20, max_target_length=5), TOKENIZER, GPT2)
    with torch.no_grad():
        loss, tokens = kind.predict(model, batch(kind, {"text": ["ab", "abcd"], "target": ["xyz", "x"]}, training=False))
        alone = TOKENIZER("ab\n", add_special_tokens=False, return_tensors="pt")["input_ids"]
        for _ in range(5):
            alone = torch.cat([alone, model(alone).logits[:, -1:].argmax(-1)], dim=1)
    assert loss.isfinite()
    expected = alone[0, 3:].tolist()
    end = expected.index(1) + 1 if 1 in expected else 5
    assert tokens[0, :end].tolist() == expected[:end]


def test_a_source_too_long_for_the_backbone_is_cut_before_the_separator() -> None:
    kind = DecoderText(task(max_source_length=100, max_target_length=30), TOKENIZER, GPT2)
    assert kind.source_length == 34
    features = kind.features({"text": ["a" * 80], "target": ["b" * 80]}, training=False)
    assert features["truncated"] == [True]
    assert TOKENIZER.decode(features["prompt_ids"][0]) == "a" * 33 + "\n"
    assert len(features["input_ids"][0]) == 64
    with pytest.raises(ConfigError, match=r"max_target_length=64 uses up"):
        DecoderText(task(max_target_length=64), TOKENIZER, GPT2)


@pytest.mark.parametrize(("form", "model_class", "settings"), [(Labels, T5ForConditionalGeneration, T5),
                                                              (DecoderLabels, GPT2LMHeadModel, GPT2)])  # fmt: skip
def test_the_likeliest_label_is_the_likeliest(form: type[Kind], model_class: type, settings: object) -> None:
    torch.manual_seed(0)
    model = model_class(settings).eval()
    words = ["no", "maybe", "yes"]
    asked = task(kind="classification", labels=["a", "b", "c"], verbalizer=words, max_source_length=20)
    kind = form(asked, TOKENIZER, settings)
    rows = {"text": ["abc", "what a source", "q"], "target": [0, 2, 1]}
    made = batch(kind, rows, training=False, model=model)
    with torch.no_grad():
        loss, chosen = kind.predict(model, made)
        scores = []
        for source in rows["text"]:  # one at a time, without padding
            for word in words:
                target = torch.tensor([TOKENIZER(word)["input_ids"]])
                if form is Labels:
                    logits = model(input_ids=torch.tensor([TOKENIZER(source)["input_ids"]]), labels=target).logits
                else:
                    ids = torch.tensor([TOKENIZER(source + "\n", add_special_tokens=False)["input_ids"]])
                    logits = model(torch.cat([ids, target], 1)).logits[:, ids.shape[1] - 1 : -1]
                scores.append(functional.cross_entropy(logits[0], target[0], reduction="sum"))
    table = torch.stack(scores).reshape(3, 3)
    assert chosen.tolist() == table.argmin(-1).tolist()
    assert kind.answers(chosen.numpy(), Dataset.from_dict(rows), np.arange(3)) == chosen.tolist()
    tokens = sum(len(word) + 1 for word in ("no", "yes", "maybe"))
    torch.testing.assert_close(loss, table[torch.arange(3), torch.tensor([0, 2, 1])].sum() / tokens)
    learnt = batch(kind, rows, training=True, model=model)["labels"]
    assert [TOKENIZER.decode(row[row != IGNORED]) for row in learnt] == ["no</s>", "yes</s>", "maybe</s>"]


def test_the_prompt_names_task_and_columns() -> None:
    asked = task(kind="classification", inputs=["premise", "hypothesis"], labels=["a", "b"])
    assert Labels.columns(asked)["text"] == "t premise: {premise} hypothesis: {hypothesis}"
    assert Labels.columns(task(kind="classification", prompt="{premise}?"))["text"] == "{premise}?"
    assert Text.columns(task())["text"] == "text"


@pytest.mark.parametrize("form", [Text, DecoderText, Labels, DecoderLabels])
def test_rows_without_targets_get_the_same_answers(form: type[Kind]) -> None:
    torch.manual_seed(0)
    decoder = issubclass(form, DecoderText)
    settings = GPT2 if decoder else T5
    model = (GPT2LMHeadModel(GPT2) if decoder else T5ForConditionalGeneration(T5)).eval()
    labels = issubclass(form, Labels)
    asked = task(kind="classification", labels=["a", "b"], max_source_length=20) if labels else task(max_source_length=20)
    assert "target" not in form.asked(asked)
    kind = form(asked, TOKENIZER, settings)
    rows = {"text": ["abc", "what a source"]}
    split = kind.unlabelled(Dataset.from_dict(rows))
    made = kind.collator(model)(list(split.features))
    assert made["row"].tolist() == [0, 1]
    with torch.no_grad():
        loss, found = kind.predict(model, made)
        expected = kind.predict(model, batch(kind, {**rows, "target": [0, 1] if labels else ["x", "y"]}, False, model))[1]
    assert loss is None
    assert torch.equal(found, expected)


def generated_twice(model: torch.nn.Module, kind: Text) -> tuple[list[torch.Tensor], list[Any]]:
    """Return what the encoder says when answers are generated alone and beside the loss, and what `generate` was given then."""
    made = batch(kind, {"text": ["abc", "what a source"], "target": ["x", "y"]}, False, model)
    said: list[torch.Tensor] = []
    given: list[Any] = []
    model.encoder.register_forward_hook(lambda *passed: said.append(passed[-1][0]))
    generate = model.generate

    def noted(**options: Any) -> Any:
        there = options.get("encoder_outputs")
        given.append(None if there is None else there.last_hidden_state)  # of which each beam gets one
        return generate(**options)

    model.generate = noted
    with torch.no_grad():
        alone = kind.generate(model, {name: made[name] for name in ("input_ids", "attention_mask")})
        assert len(said) == 1
        loss, found = kind.predict(model, made)
        assert torch.equal(found, alone)
        torch.testing.assert_close(loss, model(**kind.inputs(made)).loss)
    del said[-1]  # the last is of the loss by itself
    return said, given


@pytest.mark.parametrize("delta_type", TYPES)
@pytest.mark.parametrize("beams", [1, 2])
def test_what_is_generated_beside_the_loss_goes_on_from_what_the_encoder_has_said(delta_type: str, beams: int) -> None:
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5).eval()
    delta_model = attach(model, delta_type)
    kind = Text(task(max_source_length=20, num_beams=beams), TOKENIZER, T5, delta_model.config.positions())
    (first, second), (none, given) = generated_twice(model, kind)
    assert none is None
    assert torch.equal(first, second)
    assert torch.equal(given, second)


def test_a_decoder_that_asks_for_the_experts_of_the_encoder_has_it_computed_again() -> None:
    settings = SwitchTransformersConfig(
        vocab_size=384, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_decoder_layers=2, num_heads=2, num_experts=2,
        encoder_sparse_step=2, decoder_sparse_step=2, decoder_start_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = SwitchTransformersForConditionalGeneration(settings).eval()
    said, given = generated_twice(model, Text(task(max_source_length=20), TOKENIZER, settings))
    assert len(said) == 3
    assert given == [None, None]
