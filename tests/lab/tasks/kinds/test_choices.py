"""Multiple choice: answers put together with the question, ranked, and what is refused."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from small import byte_tokenizer, table, trained
from transformers import BertConfig, BertForMultipleChoice, BertTokenizerFast, GPT2Config, GPT2LMHeadModel

from deltaexp.errors import TaskError
from deltaexp.lab.taskconfig import TaskConfig
from deltaexp.lab.tasks.columns import view
from deltaexp.lab.tasks.kinds.choices import Choices, DecoderChoices

ROWS = {"text": ["the film was", "was the plot"], "choices": [["good", "bad plot"], ["a great film", "poor"]], "target": [1, 0]}


def task(**changes: object) -> TaskConfig:
    values = {"name": "t", "kind": "multiple_choice", "inputs": ["question"], "target": "answer", "choices": ["a", "b"]}
    return TaskConfig(**{**values, "data": "d", "max_source_length": 32, "max_target_length": 16, **changes})  # type: ignore[arg-type]


def made(kind: Choices | DecoderChoices, training: bool = False) -> dict:
    features = kind.features(ROWS, training)
    assert features.pop("truncated") == [False, False]
    return kind.collator(torch.nn.Module())([{key: value[n] for key, value in features.items()} for n in range(2)])


def test_choices_are_columns_templates_or_a_list() -> None:
    source = Dataset.from_list([{"question": "q", "a": "x", "b": "y", "answer": 0, "all": ["x", "y", "z"]}])
    row = view(source, Choices.columns(task(choices=["a", "{question} {b}"])), task())[0]
    assert row == {"text": "q", "choices": ["x", "q y"], "target": 0}
    assert view(source, Choices.columns(task(choices=["all"])), task())[0]["choices"] == ["x", "y", "z"]


@pytest.mark.parametrize(
    ("target", "labels", "place"),
    [(1, [], 1), ("1", [], 1), ("B", [], 1), ("no", [], 1), ("2", ["1", "2"], 1), ("second", ["first", "second"], 1)],
)
def test_a_target_is_a_place_a_label_a_letter_or_the_answer(target: object, labels: list[str], place: int) -> None:
    rows = {"train": Dataset.from_dict({"text": ["q"], "choices": [["yes", "no"]], "target": [target]})}
    for form in (Choices, DecoderChoices):
        assert form.labelled(rows, task(labels=labels))[0]["train"]["target"] == [place]


def test_what_cannot_be_chosen_is_refused() -> None:
    def rows(**changes: list) -> dict[str, Dataset]:
        return {
            "test": Dataset.from_dict({"text": ["q", "r"], "choices": [["a", "b"], ["a", "b"]], "target": [0, 1], **changes})
        }

    with pytest.raises(
        TaskError, match="Row 1 of the split 'test' of task 't' has the target 2, which is none of its 2 answers"
    ):
        Choices.labelled(rows(target=[0, 2]), task())
    uneven = rows(choices=[["a", "b"], ["a", "b", "c"]])
    with pytest.raises(TaskError, match="has 3 answers to choose from, and others have 2. An encoder needs the same number"):
        Choices.labelled(uneven, task())
    assert DecoderChoices.labelled(uneven, task())[0]["test"]["target"] == [0, 1]
    with pytest.raises(TaskError, match="at least two texts to choose from: 'ab'"):
        Choices.labelled(rows(choices=["ab", "ab"]), task())


def test_an_encoder_scores_each_answer_with_the_question(small_bert: Path) -> None:
    tokenizer = BertTokenizerFast.from_pretrained(small_bert)
    settings = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    torch.manual_seed(0)
    model = BertForMultipleChoice(settings).eval()
    kind = Choices(task(), tokenizer, settings)
    batch = made(kind)
    assert batch["input_ids"].shape == (2, 2, 9)
    with torch.no_grad():
        loss, scores = kind.predict(model, batch)
        for row in range(2):
            for n, choice in enumerate(ROWS["choices"][row]):  # one pair at a time, without padding
                alone = tokenizer(ROWS["text"][row], choice, return_tensors="pt")
                score = model(**{name: value[None] for name, value in alone.items()}).logits
                torch.testing.assert_close(score[0, 0], scores[row, n])
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(scores, torch.tensor([1, 0])))


def test_a_decoder_ranks_by_the_likelihood_per_token() -> None:
    tokenizer = byte_tokenizer()
    settings = GPT2Config(
        vocab_size=261, n_embd=16, n_layer=1, n_head=2, n_positions=64, eos_token_id=1, bos_token_id=1, initializer_range=0.5
    )
    torch.manual_seed(0)
    model = GPT2LMHeadModel(settings).eval()
    kind = DecoderChoices(task(), tokenizer, settings)
    with torch.no_grad():
        _, chosen = kind.predict(model, made(kind))
        for row in range(2):
            means = []
            for choice in ROWS["choices"][row]:
                prompt, answer = tokenizer(ROWS["text"][row] + "\n")["input_ids"], [*tokenizer(choice)["input_ids"], 1]
                logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
                means.append(torch.nn.functional.cross_entropy(logits, torch.tensor(answer)).item())
            assert chosen[row] == means.index(min(means))


@pytest.mark.parametrize("backbone", ["bert", "gpt2", "t5"])
def test_a_run(backbone: str, backbone_folders: dict[str, Path], tmp_path: Path) -> None:
    rows = [{"question": "the film was", "endings": ["good", "bad"], "answer": n % 2} for n in range(12)]
    data = table(tmp_path / "data", rows)
    words = ["task.kind=multiple_choice", "task.inputs=[question]", "task.target=answer", "task.choices=[endings]"]
    results = trained(tmp_path / "run", backbone_folders[backbone], data, *words)
    assert results["task_metric"] == "accuracy"
    assert results["metrics"]["after"]["accuracy"] in (0.5, 1.0)
    assert bool(results["new_parameters"]) == (backbone == "bert")
