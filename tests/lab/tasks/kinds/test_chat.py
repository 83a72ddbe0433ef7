"""Conversations: what is learnt of them, what a chat template may do, and what is generated."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from small import byte_tokenizer, table, trained
from transformers import GPT2Config, GPT2LMHeadModel

from deltaexp.errors import TaskError
from deltaexp.lab.taskconfig import TaskConfig
from deltaexp.lab.tasks.data import TaskData
from deltaexp.lab.tasks.kinds.base import IGNORED
from deltaexp.lab.tasks.kinds.chat import Instruction, conversation

SETTINGS = GPT2Config(vocab_size=261, n_embd=16, n_layer=1, n_head=2, n_positions=512, eos_token_id=1, bos_token_id=1)
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Two."},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "Three."},
]
THINKS = (
    "{% for m in messages %}<|{{ m.role }}|>{% if loop.last and m.role == 'assistant' %}<think></think>{% endif %}"
    "{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def task(**changes: object) -> TaskConfig:
    values = {"name": "t", "kind": "instruction", "target": "messages", "data": "d", "max_source_length": 200}
    return TaskConfig(**{**values, "max_target_length": 60, **changes})  # type: ignore[arg-type]


def learnt(kind: Instruction, row: dict) -> tuple[str, str, str]:
    """Return the whole text, what is learnt of it, and the prompt of the last answer."""
    found = kind.features({name: [value] for name, value in row.items()}, training=False)
    ids, labels = found["input_ids"][0], found["labels"][0]
    assert all(label in (IGNORED, token) for label, token in zip(labels, ids, strict=True))
    decode = kind.processor.decode
    return decode(ids), "|".join(decode([n for n in labels if n != IGNORED]).split("</s>")), decode(found["prompt_ids"][0])


def test_the_loss_is_on_what_the_assistant_says() -> None:
    kind = Instruction(task(), byte_tokenizer(chat=True), SETTINGS)
    whole, answers, prompt = learnt(kind, {"messages": TURNS})
    before = "<|system|>Be brief.</s><|user|>One?</s><|assistant|>Two.</s><|user|>And?</s><|assistant|>"
    assert (whole, answers, prompt) == (before + "Three.</s>", "Two.|Three.|", before)


def test_without_a_chat_template_there_is_one_like_alpacas() -> None:
    kind = Instruction(task(inputs=["instruction", "input"], target="output"), byte_tokenizer(), SETTINGS)
    whole, answers, prompt = learnt(kind, {"text": "Add.", "text_pair": "1 2", "target": "3"})
    assert whole == "### Instruction:\nAdd.\n\n1 2\n\n### Response:\n3</s>"
    assert (answers, prompt) == ("3|", whole[: -len("3</s>")])
    assert learnt(kind, {"text": "Add.", "text_pair": "", "target": "3"})[0].startswith("### Instruction:\nAdd.\n\n###")
    whole, answers, _ = learnt(kind, {"messages": TURNS})
    assert whole.startswith("Be brief.\n\n### Instruction:\nOne?\n\n### Response:\nTwo.</s>\n\n### Instruction:\nAnd?")
    assert answers == "Two.|Three.|"


def test_a_template_may_write_the_last_answer_otherwise() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = THINKS
    _, answers, _ = learnt(Instruction(task(), tokenizer, SETTINGS), {"messages": TURNS})
    assert answers == "Two.|<think></think>Three.|"


def test_a_template_that_does_not_tell_where_answers_are_is_refused() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ messages|length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(TaskError, match="does not tell where an answer begins and ends"):
        Instruction(task(), tokenizer, SETTINGS).features({"messages": [TURNS]}, training=True)
    tokenizer.chat_template = "{{ raise_exception('no system turns') }}"
    with pytest.raises(TaskError, match="refuses a conversation with the turns system, user, assistant.*no system turns"):
        Instruction(task(), tokenizer, SETTINGS).features({"messages": [TURNS[:3]]}, training=True)


def test_of_a_long_conversation_the_beginning_is_cut() -> None:
    kind = Instruction(task(max_source_length=10, max_target_length=4), byte_tokenizer(chat=True), SETTINGS)
    found = kind.features({"messages": [TURNS, TURNS[1:3]]}, training=False)
    assert found["truncated"] == [True, True]
    assert len(found["input_ids"][0]) == 14
    assert kind.processor.decode(found["prompt_ids"][0]).endswith("<|user|>And?</s><|assistant|>")


def test_packed_blocks_have_no_padding_and_something_to_learn() -> None:
    rows = Dataset.from_dict({"messages": [TURNS] * 5})
    kind = Instruction(task(packing=True, max_source_length=16), byte_tokenizer(chat=True), SETTINGS)
    made = kind._features(TaskData({"train": rows, "validation": rows}, "0" * 64))
    assert {len(ids) for ids in made["train"]["input_ids"]} == {16}
    assert all(any(label != IGNORED for label in labels) for labels in made["train"]["labels"])
    assert len(made["validation"]) == 5


def test_rows_are_checked_and_read_in_several_forms() -> None:
    shared = [{"from": "human", "value": "One?"}, {"from": "gpt", "value": "Two."}]
    assert conversation({"messages": shared}) == TURNS[1:3]
    columns = {"role": ["user", "assistant"], "content": ["One?", "Two."]}
    assert conversation({"messages": columns}) == TURNS[1:3]
    rows = {"train": Dataset.from_dict({"messages": [TURNS[:4], TURNS]})}
    splits, _, notes = Instruction.labelled(rows, task())
    assert notes == ["1 rows of train go on after the last answer, which is left out"]
    assert splits["train"]["messages"] == [TURNS[:3], TURNS]
    kind = Instruction(task(), byte_tokenizer(chat=True), SETTINGS)
    assert kind.references(splits["train"]) == ["Two.", "Three."]
    for messages, fault in (
        (TURNS[:2], "has nothing that the assistant says"),
        ([{"role": "usr", "content": "a"}], "Did you mean 'user'"),
        ([], "no list of messages"),
    ):
        with pytest.raises(TaskError, match=fault):
            Instruction.labelled({"test": Dataset.from_list([{"messages": TURNS}, {"messages": messages}])}, task())


def test_a_row_without_an_answer_is_answered() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(SETTINGS).eval()
    kind = Instruction(task(max_target_length=5), byte_tokenizer(chat=True), SETTINGS)
    found = kind.unlabelled(Dataset.from_dict({"messages": [TURNS[:2], TURNS[:4]]}))
    assert "labels" not in found.features.column_names
    batch = kind.collator(model)(list(found.features))
    with torch.no_grad():
        loss, tokens = kind.predict(model, batch)
        assert loss is None
        alone = torch.tensor([found.features[0]["prompt_ids"]])
        expected = model.generate(alone, max_new_tokens=5, do_sample=False, pad_token_id=0)[0, alone.shape[1] :]
    assert tokens[0, : len(expected)].tolist() == expected.tolist()
    assert kind.ends(model.generation_config) == [1]


@pytest.mark.parametrize("backbone", ["gpt2", "llama", "t5"])
def test_a_run(backbone: str, backbone_folders: dict[str, Path], tmp_path: Path) -> None:
    if backbone == "llama":
        rows = [
            {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": str(n)}]} for n in range(12)
        ]
        words = ["task.inputs=[]", "task.target=messages", "task.packing=true", "task.max_source_length=16"]
    else:
        rows = [{"instruction": f"{n}?", "input": "", "output": str(n)} for n in range(12)]
        words = ["task.inputs=[instruction,input]", "task.target=output", "task.metrics=[exact_match]"]
    data = table(tmp_path / "data", rows)
    results = trained(tmp_path / "run", backbone_folders[backbone], data, "task.kind=instruction", *words)
    assert results["task_metric"] == ("loss" if backbone == "llama" else "exact_match")
