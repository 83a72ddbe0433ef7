"""Remembered digests are those that hashing everything gives, whatever was done to the model or its files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForSequenceClassification, BertModel, PreTrainedModel

from deltaexp import AutoDeltaConfig, AutoDeltaModel, checksum, digest_cache
from deltaexp.checksum import TensorDigest, digests
from deltaexp.digest_cache import digesting, model_digests
from deltaexp.errors import BackboneMismatchError
from deltaexp.structure import backbone_tensors


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint large enough for anything to be remembered of it, in several runs of tensors."""
    monkeypatch.setenv("DELTAEXP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(digest_cache, "RUN", 1 << 17)
    config = BertConfig(
        vocab_size=9000, hidden_size=128, num_hidden_layers=1, num_attention_heads=2, intermediate_size=128, num_labels=3
    )
    torch.manual_seed(0)
    BertForSequenceClassification(config).save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The shapes of the tensors of which a digest was computed."""
    found: list[list[int]] = []

    def counting(tensors: Sequence[torch.Tensor], algorithm: str) -> list[TensorDigest]:
        found.extend(list(tensor.shape) for tensor in tensors)
        return checksum.tensor_digests(tensors, algorithm)

    monkeypatch.setattr(digest_cache, "tensor_digests", counting)
    return found


def checked(model: PreTrainedModel) -> None:
    tensors = backbone_tensors(model)
    assert model_digests(model, tensors) == digests(tensors)


def test_digests_are_of_the_moment_at_which_they_were_asked_for(folder: Path) -> None:
    model = BertForSequenceClassification.from_pretrained(folder)
    tensors = backbone_tensors(model)
    before = digests(tensors)
    with digesting(model, tensors) as digested:
        for parameter in model.parameters():
            parameter.data = torch.zeros_like(parameter)
        assert digested() == before == digested()
    checked(model)


def test_either_algorithm_is_remembered(folder: Path, hashed: list[list[int]]) -> None:
    model = BertForSequenceClassification.from_pretrained(folder)
    tensors = backbone_tensors(model)
    for algorithm in (*checksum.ALGORITHMS, *checksum.ALGORITHMS):
        assert model_digests(model, tensors, algorithm) == digests(tensors, algorithm)
    assert len(hashed) == 2 * len(tensors)


def test_tensors_that_lie_anyhow(folder: Path, hashed: list[list[int]]) -> None:
    model = BertForSequenceClassification.from_pretrained(folder)
    whole = torch.arange(3_000_000)
    tensors = {
        "b": whole[1_000_000:2_000_000],
        "a": whole[:1_000_000],
        "empty": torch.zeros(0, 3),
        "every second": whole[2_000_000::2],
        "none": torch.zeros(3, 0),
        "turned": whole[:6].reshape(2, 3).T,
        "the same": whole[:1_000_000],
        "another dtype": whole[2_000_000:2_000_010].view(torch.float64),
    }
    assert model_digests(model, tensors) == digests(tensors)
    assert hashed
    hashed.clear()
    assert model_digests(model, tensors) == digests(tensors)
    assert not hashed


def test_the_second_time_nothing_is_hashed(folder: Path, hashed: list[list[int]]) -> None:
    checked(BertForSequenceClassification.from_pretrained(folder))
    assert hashed
    hashed.clear()
    checked(BertForSequenceClassification.from_pretrained(folder))
    assert not hashed
    checked(BertModel.from_pretrained(folder))  # the same tensors under other names, and no classifier
    assert 0 < len(hashed) < 8


@pytest.mark.skipif(not Path("/proc/self/pagemap").exists(), reason="only Linux tells what of a mapped file was written to")
def test_what_is_mapped_from_the_file_is_not_even_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked(BertForSequenceClassification.from_pretrained(folder))
    read: list[list[int]] = []
    joined = digest_cache._joined
    monkeypatch.setattr(digest_cache, "_joined", lambda run: read.extend(list(t.shape) for t in run) or joined(run))
    model = BertForSequenceClassification.from_pretrained(folder)
    checked(model)
    assert not read
    model.bert.pooler.dense.bias.data[3] += 1
    checked(model)
    assert [128] in read
    assert [9000, 128] not in read, "another run, and another page"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_another_dtype(folder: Path, dtype: torch.dtype, hashed: list[list[int]]) -> None:
    checked(BertForSequenceClassification.from_pretrained(folder))
    hashed.clear()
    checked(BertForSequenceClassification.from_pretrained(folder, dtype=dtype))
    assert hashed


def test_a_weight_changed_in_memory(folder: Path, hashed: list[list[int]]) -> None:
    checked(BertForSequenceClassification.from_pretrained(folder))
    model = BertForSequenceClassification.from_pretrained(folder)
    weight = model.bert.embeddings.word_embeddings.weight.data
    weight[7, 7] = torch.nextafter(weight[7, 7], torch.tensor(9.0))
    hashed.clear()
    checked(model)
    assert [9000, 128] in hashed
    assert len(hashed) < 4
    weight[7, 7] = -0.0
    checked(model)
    weight[7, 7] = 0.0  # equal as a number, and another value
    hashed.clear()
    checked(model)
    assert [9000, 128] in hashed
    assert len(hashed) < 4


def test_a_file_that_was_written_to_is_another(folder: Path, hashed: list[list[int]]) -> None:
    checked(BertForSequenceClassification.from_pretrained(folder))
    path = folder / "model.safetensors"
    times = path.stat()
    tensors = load_file(path)
    tensors["bert.pooler.dense.bias"] = tensors["bert.pooler.dense.bias"] + 1
    save_file(tensors, path, metadata={"format": "pt"})
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # as if nothing had happened
    hashed.clear()
    checked(BertForSequenceClassification.from_pretrained(folder))
    assert len(hashed) > 10


def test_shards(folder: Path, tmp_path: Path, hashed: list[list[int]]) -> None:
    BertForSequenceClassification.from_pretrained(folder).save_pretrained(tmp_path / "shards", max_shard_size="500KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    for _ in range(2):
        hashed.clear()
        checked(BertForSequenceClassification.from_pretrained(tmp_path / "shards"))
    assert not hashed


def test_a_spoilt_record_is_none(folder: Path, tmp_path: Path, hashed: list[list[int]]) -> None:
    checked(BertForSequenceClassification.from_pretrained(folder))
    (record,) = (tmp_path / "cache" / "digests").iterdir()
    for text in ("", "[]", '{"x": 1}', '{"x": {"dtype": "float32"}}', "\0", record.read_text().replace('", "', '", "x", "', 1)):
        record.write_text(text)
        hashed.clear()
        checked(BertForSequenceClassification.from_pretrained(folder))
        assert hashed


def test_a_folder_that_cannot_be_written_to(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("DELTAEXP_CACHE", str(tmp_path / "file" / "cache"))
    checked(BertForSequenceClassification.from_pretrained(folder))


def test_a_changed_backbone_is_refused_though_its_digests_are_remembered(folder: Path, tmp_path: Path) -> None:
    model = BertForSequenceClassification.from_pretrained(folder)
    delta_model = AutoDeltaModel.from_config(AutoDeltaConfig.from_dict({"delta_type": "lora"}), model)
    delta_model.freeze_module()
    delta_model.save_finetuned(tmp_path / "delta")
    AutoDeltaModel.from_finetuned(tmp_path / "delta", BertForSequenceClassification.from_pretrained(folder))
    other = BertForSequenceClassification.from_pretrained(folder)
    other.bert.pooler.dense.bias.data[0] += 1
    with pytest.raises(BackboneMismatchError, match=r"1 of \d+ tensors differ: bert\.pooler\.dense\.bias"):
        AutoDeltaModel.from_finetuned(tmp_path / "delta", other)
