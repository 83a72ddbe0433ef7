"""Plain text: what is joined and cut, and that perplexity is the one of the whole text."""

from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from small import byte_tokenizer, table, trained
from torch.nn import functional
from transformers import BertConfig, GPT2Config, GPT2LMHeadModel, T5Config

from deltaexp.errors import ConfigError, TaskError
from deltaexp.lab.taskconfig import TaskConfig
from deltaexp.lab.tasks import cache
from deltaexp.lab.tasks.data import TaskData
from deltaexp.lab.tasks.kinds import choose, language
from deltaexp.lab.tasks.kinds.language import CausalLM

TOKENIZER = byte_tokenizer()
SETTINGS = GPT2Config(vocab_size=261, n_embd=16, n_layer=1, n_head=2, n_positions=64, eos_token_id=1, bos_token_id=1)
LINES = ["", " = A title = \n", "", "Some text, \n", "and more of it"]
JOINED = "\n = A title = \n\nSome text, \nand more of it"


def task(**changes: object) -> TaskConfig:
    values = {"name": "t", "kind": "causal_lm", "inputs": ["text"], "data": "d", "max_source_length": 8}
    return TaskConfig(**{**values, **changes})  # type: ignore[arg-type]


def data(lines: list[str] = LINES) -> TaskData:
    rows = Dataset.from_dict({"text": lines})
    return TaskData({"train": rows, "validation": rows}, "0" * 64)


def test_rows_are_joined_as_lines_or_as_texts_with_ends() -> None:
    assert CausalLM(task(), TOKENIZER, SETTINGS).text(LINES) == JOINED
    assert CausalLM(task(separator="{eos}"), TOKENIZER, SETTINGS).text(["a", "b"]) == "a</s>b"
    stream = CausalLM(task(separator="{eos}"), TOKENIZER, SETTINGS).stream(["a", "b"])
    assert stream.tolist() == [1, *TOKENIZER("a")["input_ids"], 1, *TOKENIZER("b")["input_ids"]]


def test_training_rows_alone_end_and_leave_empty_ones_out() -> None:
    _, _, notes = CausalLM.labelled(data().splits, task())
    assert notes == ["2 empty rows of the training split are left out; task.packing=true keeps them"]
    made = CausalLM(task(max_source_length=20), TOKENIZER, SETTINGS)._features(data())["train"]
    assert [TOKENIZER.decode(ids) for ids in made["input_ids"]] == [f"</s>{text}</s>" for text in LINES if text]
    assert made["labels"] == made["input_ids"]
    with pytest.raises(TaskError, match="All 2 rows of the split 'train' of task 't' are empty"):
        CausalLM.labelled(data(["", ""]).splits, task())


def test_packed_blocks_hold_the_text_without_padding() -> None:
    made = CausalLM(task(packing=True), TOKENIZER, SETTINGS)._features(data())["train"]
    lengths = {len(ids) for ids in made["input_ids"]}
    assert lengths == {8}
    text = "".join(TOKENIZER.decode(ids) for ids in made["input_ids"])
    assert f"</s>{JOINED}".startswith(text)
    assert len(made) == (len(JOINED) + 1) // 8
    with pytest.raises(TaskError, match="has 3 tokens, fewer than one block of 8"):
        CausalLM(task(packing=True), TOKENIZER, SETTINGS)._features(data(["ab"]))


@pytest.mark.parametrize("separator", ["\n", "{eos}"])
@pytest.mark.parametrize("large", [0, cache.LARGE])
def test_packing_many_rows_piece_by_piece_is_packing_them_at_once(
    separator: str, large: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DELTAEXP_CACHE", str(tmp_path))
    monkeypatch.setattr(cache, "LARGE", large)
    lines = [f"row {n}" + "\n" * (n % 3 == 0) for n in range(2345)]
    kind = CausalLM(task(packing=True, separator=separator), TOKENIZER, SETTINGS)
    made = kind._features(TaskData({"train": Dataset.from_dict({"text": lines})}, ""))["train"]
    stream = kind.stream(lines)  # of all rows, by a tokenizer whose tokens are bytes
    assert np.concatenate(made["input_ids"][:]).tolist() == stream[: len(stream) // 8 * 8].tolist()
    assert made["labels"][:] == made["input_ids"][:]


@pytest.mark.parametrize("rows_at_once", [1, 100])
def test_every_token_is_predicted_once(rows_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language, "LOGITS", rows_at_once * 8 * 261)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(SETTINGS).eval()
    kind = CausalLM(task(), TOKENIZER, SETTINGS)
    made = kind._features(data())["validation"]
    batch = kind.collator(model)(list(made))
    with torch.no_grad():
        loss, predictions = kind.predict(model, batch)
    assert loss is None
    stream = torch.tensor([1, *TOKENIZER(JOINED)["input_ids"]])
    total = 0.0
    for start in range(0, len(stream) - 1, 7):  # one window at a time, without padding
        window = stream[start : start + 8]
        with torch.no_grad():
            logits = model(window[None]).logits[0, :-1]
        total += functional.cross_entropy(logits, window[1:], reduction="sum").item()
    rows = data().splits["validation"]
    measured = kind.measure(kind.answers(predictions.numpy(), rows, np.arange(len(made))), rows)
    assert predictions[:, 1].sum() == len(JOINED)
    assert measured["loss"] == pytest.approx(total / len(JOINED), rel=1e-5)
    assert measured["perplexity"] == pytest.approx(np.exp(total / len(JOINED)), rel=1e-5)
    assert measured["bits_per_byte"] == pytest.approx(total / np.log(2) / len(JOINED), rel=1e-5)


def test_only_decoders_write_text_alone() -> None:
    assert choose(task(), SETTINGS) is CausalLM
    for settings in (BertConfig(), T5Config()):
        with pytest.raises(ConfigError, match="is of the kind 'causal_lm', which needs a decoder; the backbone"):
            choose(task(), settings)


@pytest.mark.parametrize("backbone", ["gpt2", "llama"])
def test_a_run(backbone: str, backbone_folders: dict[str, Path], tmp_path: Path) -> None:
    places = table(tmp_path / "data", [{"text": f"row {n} \n" if n % 3 else ""} for n in range(24)])
    words = ["task.kind=causal_lm", "task.inputs=[text]", f"task.packing={backbone == 'llama'}", "task.max_source_length=16"]
    results = trained(tmp_path / "run", backbone_folders[backbone], places, *words)
    after = results["metrics"]["after"]
    assert results["task_metric"] == "perplexity"
    assert not results["greater_is_better"]
    assert after["perplexity"] == pytest.approx(np.exp(after["loss"]))
    assert results["new_parameters"] == []
