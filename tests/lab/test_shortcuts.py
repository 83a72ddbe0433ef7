"""What a run leaves out: the same weights as where all is computed, however batches are made."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small
import torch
from models import values
from safetensors.torch import load_file
from transformers import TrainerCallback

from deltaexp import AutoDeltaModel
from deltaexp.checksum import model_sha256
from deltaexp.digest_cache import model_digests
from deltaexp.errors import ConfigError
from deltaexp.lab import backbones, blueprint, plan, schema, shortcuts, training
from deltaexp.lab.checkpoints import Checkpoints
from deltaexp.lab.shortcuts import Shortcuts
from deltaexp.lab.tasks import data as task_data
from deltaexp.lab.tasks.kinds import choose

LENGTHS = (1, 4, 2, 9, 3, 6, 12, 5)
Train = Callable[..., tuple[dict[str, torch.Tensor], Shortcuts]]


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts of different lengths, in which one word tells the label."""
    words = small.WORDS
    made = [
        {"sentence": " ".join([words[1 + n % 2 * 3], *(words[6 + (n + i) % 5] for i in range(LENGTHS[n % 8]))]), "label": n % 2}
        for n in range(48)
    ]
    return small.table(tmp_path_factory.mktemp("rows") / "rows", made)


@pytest.fixture(scope="session")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT encoder without dropout."""
    folder = small.bert(tmp_path_factory.mktemp("calm") / "bert")
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def words(backbone: Path, rows: Path, *more: str) -> list[str]:
    found = ["delta_type=lora", "layers=last:1", "lora_dropout=0", "backbone=local", f"backbone.source={backbone}", "task=sst2"]
    found += [f"task.data={rows}", "trainer.batch_size=8", "trainer.cpu=true", "trainer.progress=false", "trainer.max_steps=8"]
    return [*found, "trainer.learning_rate=1e-2", *more]


class Aside(TrainerCallback):
    """Keeps a copy of the first checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.place: Path | None = None

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        name = f"checkpoint-{state.global_step}"
        if self.place is None:
            self.place = shutil.copytree(self.folder / name, self.folder.parent / f"aside-{self.folder.name}" / name)


@pytest.fixture
def train(tmp_path: Path, calm: Path, rows: Path) -> Train:
    """Train by a run's own trainer, and return what was trained."""

    def make(*more: str, backbone: Path = calm, resumed: bool = False) -> tuple[dict[str, torch.Tensor], Shortcuts]:
        config, delta_config = schema.composed(words(backbone, rows, *more))
        kind_class = choose(config.task, backbones.settings_of(config.backbone), "small")
        data = task_data.load(config.task, kind_class, progress=False)
        folder = tmp_path / f"checkpoints{len(list(tmp_path.iterdir()))}"

        aside = Aside(folder)

        def session(checkpoint: Path | None) -> tuple[dict[str, torch.Tensor], Shortcuts]:
            torch.manual_seed(0)
            backbone = backbones.load(config.backbone, config.task)
            delta_model = AutoDeltaModel.from_config(delta_config, backbone_model=backbone.model)
            delta_model.freeze_module(exclude=["deltas", *backbone.new])
            kind = backbone.kind(config.task, backbone.processor, backbone.model.config, 0)
            saved = Checkpoints(folder, config.trainer.save_every)
            seeds = {"init": 1, "data": 1, "dropout": 1}
            trainer = training.build(config.trainer, delta_model, kind, kind.splits(data), saved, seeds, [aside])
            base = model_sha256(model_digests(backbone.model, delta_model.base_tensors()))
            with Shortcuts(config, trainer, ["train", "validation"], base) as short:
                short.begin()
                trainer.train_from(checkpoint)
            return values(delta_model.trainable_parameters()), short

        result = session(None)
        if resumed:
            newest = aside.place
            assert newest is not None
            again = session(newest)
            assert all(torch.equal(result[0][name], value) for name, value in again[0].items())
        return result

    return make


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in other.items():
        # Adam's first steps go by the sign of a gradient, however small.
        torch.testing.assert_close(one[name], value, rtol=1e-4, atol=2e-5, msg=name)


ACCUMULATED = ("trainer.gradient_accumulation_steps=3", "trainer.batch_size=4")


@pytest.mark.parametrize(
    "more",
    [
        (),
        pytest.param(ACCUMULATED, marks=pytest.mark.slow),
        pytest.param(("trainer.group_by_length=true",), marks=pytest.mark.slow),
    ],
    ids=["plain", "accumulated", "grouped"],
)
def test_the_same_weights(train: Train, more: tuple[str, ...]) -> None:
    measured, short = train(*more)
    assert short.shortcut is not None
    assert short.shortcut.training
    assert short.one_token is not None
    assert short.shortcut.used >= 8
    expected, none = train(*more, "trainer.shortcuts=off")
    assert none.facts()["told"] == ["all is computed in every step: trainer.shortcuts=off"]
    same(measured, expected)


@pytest.mark.slow
def test_the_same_bytes_after_an_interruption(train: Train) -> None:
    _, short = train("trainer.save_every=5", resumed=True)
    assert short.shortcut is not None


@pytest.mark.slow
def test_a_language_model(train: Train, tmp_path: Path) -> None:
    llama = small.llama(tmp_path / "llama")
    more = ("trainer.max_steps=6", "task.max_source_length=64")
    measured, short = train(*more, backbone=llama)
    assert short.facts()["frozen_blocks"] == 1
    assert set(short.kept) == {"train", "validation"}
    same(measured, train(*more, "trainer.shortcuts=off", backbone=llama)[0])


@pytest.mark.slow
def test_an_encoder_without_deltas(train: Train, tmp_path: Path) -> None:
    t5 = small.t5(tmp_path / "t5")
    settings = json.loads((t5 / "config.json").read_text())
    (t5 / "config.json").write_text(json.dumps({**settings, "dropout_rate": 0.0}))
    decoder = r"modified_modules=['[r]decoder\..*SelfAttention\.q$']"
    more = ("trainer.max_steps=6", "layers=null", decoder, "task.max_source_length=64")
    measured, short = train(*more, backbone=t5)
    assert short.facts()["frozen_blocks"] == 2
    assert set(short.kept) == {"train", "validation"}
    assert "what all 2 encoder blocks make of train is kept" in " ".join(short.told)
    same(measured, train(*more, "trainer.shortcuts=off", backbone=t5)[0])


@pytest.mark.slow
@pytest.mark.parametrize("make", [small.llama, small.gpt2])
def test_a_classifier_that_reads_the_last_token(train: Train, tmp_path: Path, make: Callable[[Path], Path]) -> None:
    more = ("trainer.max_steps=6", "task.answer=head")
    measured, short = train(*more, backbone=make(tmp_path / "decoder"))
    dropout = "; while training there is dropout of 0.1 in transformer.h.1.attn.attn_dropout"
    told = f"the last block computes no other{' in evaluations' + dropout if make is small.gpt2 else ''}"
    assert f"the head reads the last token only, and {told}" in short.told
    assert short.facts()["last_block"] == "last token"
    same(measured, train(*more, "trainer.shortcuts=off", backbone=tmp_path / "decoder")[0])


def test_norms_and_activations_in_few_operations(train: Train, tmp_path: Path, rows: Path) -> None:
    llama = small.llama(tmp_path.parent / f"{tmp_path.name}-llama")
    more = ("layers=null", "trainer.max_steps=3")
    measured, short = train(*more, backbone=llama)
    norms = next(count for name, count in short.facts()["in_few_operations"].items() if name == "LlamaRMSNorm")
    assert f"computed in few operations: {norms} LlamaRMSNorm" in short.told
    assert short.in_few is not None
    assert not short.in_few.modules  # all are what they were
    expected, none = train(*more, "trainer.shortcuts=off", backbone=llama)
    assert none.facts()["in_few_operations"] == {}
    same(measured, expected)

    def told(*more: str) -> str:
        config, delta_config = schema.composed(words(llama, rows, *more))
        delta_model = plan.attach(config, delta_config, blueprint.make(config.backbone, config.task))
        return " ".join(shortcuts.planned(config, delta_model))

    assert f"Computed in few operations, norms on a CPU only: {norms} LlamaRMSNorm." in told("trainer.activation_cache=0")
    assert "few operations" not in told("trainer.shortcuts=off")
    assert "few operations" not in told("trainer.compile=true")


def test_where_something_is_random_only_evaluations_are_cut_short(train: Train, small_bert: Path) -> None:
    measured, short = train("trainer.max_steps=6", backbone=small_bert)
    assert set(short.kept) == {"validation"}
    assert short.facts()["while_training"] is False
    assert "no activations are kept for training: dropout of 0.1 in bert.embeddings.dropout changes it" in short.told
    expected, _ = train("trainer.max_steps=6", "trainer.shortcuts=off", backbone=small_bert)
    assert all(torch.equal(measured[name], value) for name, value in expected.items())


@pytest.mark.slow
def test_bounds(train: Train) -> None:
    _, short = train("trainer.activation_cache=0.00002", "trainer.max_steps=6")
    assert "would take" in " ".join(short.told)
    _, short = train("trainer.activation_cache=0", "trainer.max_steps=1")
    assert short.told[-1] == "no activations are kept: trainer.activation_cache=0"
    _, short = train("trainer.max_steps=5")
    assert "no activations are kept for training: it does not get through all rows" in short.told
    _, short = train("layers=null", "trainer.max_steps=1")
    assert short.told[-1] == "no activations are kept: a delta is in the first block"


def test_config() -> None:
    with pytest.raises(ConfigError, match=r"auto"):
        schema.composed(["delta_type=lora", "trainer.shortcuts=aut"])
    with pytest.raises(ConfigError, match=r"trainer.activation_cache is -1"):
        schema.composed(["delta_type=lora", "trainer.activation_cache=-1"])


def test_plan(calm: Path, small_bert: Path, rows: Path) -> None:
    def told(backbone: Path, *more: str) -> str:
        config, delta_config = schema.composed(words(backbone, rows, *more))
        drawn = blueprint.make(config.backbone, config.task)
        return " ".join(shortcuts.planned(config, plan.attach(config, delta_config, drawn)))

    assert "What the lowest 1 of 2 blocks make of a text is computed once" in told(calm)
    assert "If the head reads the first token of a text only, the last block computes no other." in told(calm)
    assert "for evaluations only, as there is dropout of 0.1 in bert.embeddings.dropout" in told(small_bert)
    assert "no other, in evaluations only, as there is dropout of 0.1 in bert.encoder.layer.1" in told(small_bert)
    assert "If the head" not in told(calm, "trainer.gradient_checkpointing=true")
    assert "a delta is in the first block" in told(calm, "layers=null")
    assert "trainer.shortcuts=off" in told(calm, "trainer.shortcuts=off")


@pytest.mark.slow
def test_a_run_and_the_next(tmp_path: Path, calm: Path, rows: Path) -> None:
    def run(name: str, *more: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        assert small.main([*words(calm, rows, *more), f"hydra.run.dir={tmp_path / name}"]) == 0
        delta = tmp_path / name / "delta"
        return load_file(delta / "delta_model.safetensors"), small.read_results(delta)

    first, results = run("first")
    second, _ = run("second")
    assert all(torch.equal(first[name], value) for name, value in second.items())
    assert results["shortcuts"]["kept_activations"].keys() == {"train", "validation"}
    assert results["shortcuts"]["last_block"] == "first token"
    plain, _ = run("plain", "trainer.shortcuts=off")
    same(first, plain)
    small.used_again(tmp_path / "first" / "delta", rows, results)
