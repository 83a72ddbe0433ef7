"""The command ``eval``: the numbers of a run again, several deltas on one backbone, and what it says of what does not fit."""

import json
import shutil
from pathlib import Path

import pytest
from small import bert, read_results, reviews

from deltaexp.__main__ import main
from deltaexp.lab import backbones, evaluating, schema, speeding
from deltaexp.lab.run import run

QUIET = "trainer.progress=false"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a backbone, data, and three runs on them."""
    home = tmp_path_factory.mktemp("evaluating")
    bert(home / "bert")
    reviews(home / "reviews")
    for name, words in {
        "lora": [
            "delta_type=lora",
            "seed=1",
            "task.save_predictions=true",
            "trainer.learning_rate=0.02",
            "trainer.max_steps=8",
        ],
        "adapter": ["delta_type=adapter", "seed=2", "trainer.eval_batch_size=5"],
    }.items():
        config, delta = schema.composed(
            [
                "task=sst2", f"task.data={home / 'reviews'}", "backbone=local", "backbone.name=small",
                f"backbone.source={home / 'bert'}", "trainer=smoke", QUIET, *words,
            ]
        )  # fmt: skip
        run(config, delta, home / "runs" / name)
    return home


def moved(delta: Path, to: Path) -> Path:
    """Return a copy of a delta without the rest of its run, as others would get it."""
    return Path(shutil.copytree(delta, to))


def test_the_numbers_are_those_of_the_runs(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = []
    load = backbones.load
    monkeypatch.setattr(backbones, "load", lambda *words: loads.append(words) or load(*words))
    out, runs = tmp_path / "out", home / "runs"
    assert (
        main(["eval", f"delta={runs}/*/delta", "baseline=true", "predictions=true", f"out={out}", f"json={tmp_path}/m.json"])
        == 0
    )
    assert len(loads) == 1
    found = json.loads((out / "metrics.json").read_text())
    assert found == json.loads((tmp_path / "m.json").read_text())
    assert [one["name"] for one in found["deltas"]] == ["adapter", "lora"]
    for one in found["deltas"]:
        results = read_results(runs / one["name"] / "delta")
        assert one["metrics"] == results["metrics"]["after"]  # to the last bit, each in batches of its own size
        assert one["hash_check"] == "match"
    assert found["baseline"] == read_results(runs / "adapter/delta")["metrics"]["before"]
    assert (found["split"], found["rows"]) == ("validation", 32)
    kept = (out / "predictions/lora.jsonl").read_bytes()
    assert kept == (runs / "lora/predictions.jsonl").read_bytes()
    assert not (runs / "adapter/predictions.jsonl").exists()
    lines = [json.loads(line) for line in kept.splitlines()]
    assert [line["row"] for line in lines] == list(range(32))
    assert set(lines[0]) == {"row", "inputs", "prediction", "prediction_number", "reference", "reference_number"}
    right = [line["prediction"] == line["reference"] for line in lines]
    assert sum(right) / 32 == read_results(runs / "lora/delta")["metrics"]["after"]["accuracy"]
    said = capsys.readouterr().out
    assert "the backbone as it is" in said


@pytest.mark.slow
def test_what_was_computed_fast_is_measured_so(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run under trainer.speed=auto in bf16 is evaluated to the last bit, and answered, with kept casts as it was."""
    monkeypatch.setattr(speeding, "multiplies_bf16", lambda: True)
    config, delta = schema.composed(
        [
            "task=sst2", f"task.data={home / 'reviews'}", "backbone=local", "backbone.name=small",
            f"backbone.source={home / 'bert'}", "trainer=smoke", QUIET, "trainer.max_steps=3", "trainer.speed=auto",
            "trainer.cpu=true",
        ]
    )  # fmt: skip
    results = run(config, delta, tmp_path / "run").results
    assert results["speed"]["kept_casts"]
    entered = []
    kept = speeding.casting.kept
    monkeypatch.setattr(speeding.casting, "kept", lambda model: entered.append(model) or kept(model))
    words = [f"delta={tmp_path}/run/delta", "trainer.cpu=true"]
    assert main(["eval", *words, f"json={tmp_path}/m.json"]) == 0
    assert json.loads((tmp_path / "m.json").read_text())["deltas"][0]["metrics"] == results["metrics"]["after"]
    (tmp_path / "rows.jsonl").write_text('{"sentence": "all good"}')
    assert main(["predict", *words, f"input={tmp_path}/rows.jsonl", f"out={tmp_path}/answers.jsonl"]) == 0
    assert len(entered) == 2


def test_any_split_of_the_data(home: Path, tmp_path: Path) -> None:
    found = {}
    for split in ("validation", "test", "train"):
        out = tmp_path / split
        assert main(["eval", str(home / "runs/lora/delta"), f"split={split}", f"out={out}", QUIET]) == 0
        found[split] = json.loads((out / "metrics.json").read_text())
    assert {split: one["rows"] for split, one in found.items()} == {"validation": 32, "test": 16, "train": 64}
    results = read_results(home / "runs/lora/delta")
    assert found["validation"]["deltas"][0]["metrics"] == results["metrics"]["after"]


def test_a_delta_from_elsewhere_needs_its_folders(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    delta = moved(home / "runs/lora/delta", tmp_path / "mine")
    assert main(["eval", f"delta={delta}"]) == 2
    said = capsys.readouterr().err
    assert "the backbone 'small' lay in a folder 'bert'" in said
    assert "(a copy of nyu-mll/glue) lay in a folder 'reviews'" in said
    assert said.rstrip().endswith("Give it to eval: backbone.source=FOLDER task.data=FOLDER")
    words = [f"delta={delta}", f"backbone.source={home / 'bert'}", f"task.data={home / 'reviews'}", QUIET]
    assert main(["eval", *words, f"json={tmp_path / 'm.json'}"]) == 0
    found = json.loads((tmp_path / "m.json").read_text())
    assert found["deltas"][0]["metrics"] == read_results(delta)["metrics"]["after"]

    # Where nothing is recorded, backbone and task have to be named.
    (delta / "results.json").unlink()
    assert main(["eval", *words]) == 2
    assert "results.json is not there" in (said := capsys.readouterr().err)
    assert said.rstrip().endswith("add backbone=... and task=...")
    assert main(["eval", *words, "backbone=local", "task=sst2", "task.labels=[]", f"json={tmp_path / 'n.json'}"]) == 0
    found = json.loads((tmp_path / "n.json").read_text())["deltas"][0]["metrics"]
    assert found == pytest.approx(json.loads((tmp_path / "m.json").read_text())["deltas"][0]["metrics"], rel=1e-5)


def test_what_does_not_fit(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    delta = f"delta={home / 'runs/lora/delta'}"
    reviews(tmp_path / "other", 8)
    others = {
        "task.labels=[bad,good]": "have the labels bad, good, and the delta was trained on negative, positive",
        "split=dev": "no split of .*'dev'",
        "task.inputs=[sentense]": "Did you mean 'sentence'",
        f"task.data={tmp_path / 'nowhere'}": "no folder or file",
    }
    for word, says in others.items():
        assert main(["eval", delta, word, QUIET]) == 1, word
        said = capsys.readouterr().err
        assert says.split(".*")[0] in said, said
    import torch
    from transformers import BertModel

    model = BertModel.from_pretrained(bert(tmp_path / "bert"))
    with torch.no_grad():
        model.embeddings.word_embeddings.weight[3, 3] += 1
    model.save_pretrained(tmp_path / "bert")
    assert main(["eval", delta, f"backbone.source={tmp_path / 'bert'}", QUIET]) == 1
    said = capsys.readouterr().err
    assert "runs/lora/delta: " in said
    assert "word_embeddings.weight" in said


def test_merged(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(home / "runs/lora/delta"), "merged=true", f"json={tmp_path / 'm.json'}", QUIET]) == 0
    found = json.loads((tmp_path / "m.json").read_text())["deltas"][0]["metrics"]
    assert found == pytest.approx(read_results(home / "runs/lora/delta")["metrics"]["after"], rel=1e-5)
    capsys.readouterr()
    assert main(["eval", str(home / "runs/adapter/delta"), "merged=true", QUIET]) == 1
    said = capsys.readouterr().err
    assert "Leave merged=true out." in said


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "eval needs a delta"),
        (["delta=DELTA", "predictions=true"], "add out=FOLDER"),
        (["delta=DELTA", "lora_r=4"], "'lora_r=4' is none: the delta is what it was trained to be"),
        (["delta=DELTA", "trainer.eval_batchsize=4"], "no key of trainer 'eval_batchsize'"),
        (["delta=DELTA", "backbone=tiny_t6"], "Did you mean 'tiny_t5'"),
        (["delta=DELTA", "trainer.eval_batch_size=0"], "must be at least 1"),
        (["delta=DELTA,DELTA"], "twice"),
        (["delta=nowhere/**/delta"], "matches no folder of a delta"),
        (["delta=./nowhere"], "There is no folder './nowhere'"),
        (["delta=DELTA", "merged=maybe"], "must be true or false"),
        (["delta=DELTA", "split="], "split= has no value"),
    ],
)
def test_a_mistake_is_said_at_once(home: Path, words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", *(word.replace("DELTA", str(home / "runs/lora/delta")) for word in words)]) == 2
    assert says in capsys.readouterr().err


def test_names_are_short_and_differ(tmp_path: Path) -> None:
    for run_name in ("a/one", "b/one", "two"):
        (tmp_path / run_name / "delta").mkdir(parents=True)
    places = [str(tmp_path / name / "delta") for name in ("a/one", "b/one", "two")]
    assert evaluating.names([*places, "Org/one"]) == ["one", "one~2", "two", "one~3"]
