"""Loading data: from files of several kinds, with messages for what does not fit."""

import json
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, DatasetDict

from deltaexp.errors import TaskError
from deltaexp.lab.taskconfig import TaskConfig
from deltaexp.lab.tasks import cache, data
from deltaexp.lab.tasks.kinds.heads import Classification

ROWS = {"text": ["a", "b", "c", "d"], "label": [0, 1, 0, 1]}


def task(place: object, **changes: object) -> TaskConfig:
    values = {"name": "t", "kind": "classification", "inputs": ["text"], "target": "label", "labels": ["no", "yes"]}
    return TaskConfig(**{**values, "data": str(place), "test_split": None, **changes})  # type: ignore[arg-type]


def splits(rows: dict = ROWS) -> DatasetDict:
    return DatasetDict({name: Dataset.from_dict(rows) for name in ("train", "validation")})


def write(folder: Path, kind: str) -> Path:
    folder.mkdir()
    if kind == "saved":
        splits().save_to_disk(str(folder))
    for name, rows in splits().items():
        if kind == "parquet":
            rows.to_parquet(str(folder / f"{name}.parquet"))
        if kind == "csv":
            rows.to_csv(str(folder / f"{name}.csv"))
        if kind == "json":
            rows.to_json(str(folder / f"{name}.jsonl"))
    return folder


@pytest.mark.parametrize("kind", ["parquet", "csv", "json", "saved"])
def test_local_folders(kind: str, tmp_path: Path) -> None:
    loaded = data.load(task(write(tmp_path / "d", kind)), Classification, progress=False)
    assert loaded.evaluated == "validation"
    assert list(loaded.splits["train"]["text"]) == ROWS["text"]
    assert list(loaded.splits["train"]["target"]) == ROWS["label"]


def test_the_fingerprint_is_that_of_the_content(tmp_path: Path) -> None:
    prints = [
        data.load(task(write(tmp_path / name, kind)), Classification, progress=False).fingerprint
        for name, kind in (("a", "parquet"), ("b", "csv"))
    ]
    assert prints[0] == prints[1]
    fewer = data.load(task(tmp_path / "a", train_rows=2), Classification, progress=False)
    assert len(fewer.splits["train"]) == 2
    assert fewer.fingerprint != prints[0]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"inputs": ["txt"]}, "no column 'txt'. Did you mean 'text'"),
        ({"target": "lable"}, "Did you mean 'label'"),
        ({"labels": ["a", "b"], "target": "text"}, "labels c, d, which are no numbers or names"),
        ({"validation_split": "dev"}, "Set task.validation_split"),
        ({"test_split": "test"}, "or to null"),
    ],
)
def test_what_does_not_fit(changes: dict, says: str, tmp_path: Path) -> None:
    with pytest.raises(TaskError) as caught:
        data.load(task(write(tmp_path / "d", "parquet"), **changes), Classification, progress=False)
    assert says in str(caught.value)


def test_an_empty_split(monkeypatch: pytest.MonkeyPatch) -> None:
    # `datasets` cannot read an empty split from a file at all; a repository of the Hub may still have one.
    table = splits()
    table["validation"] = table["validation"].select([])
    monkeypatch.setattr(data.sources, "load", lambda task: (table, []))
    with pytest.raises(TaskError, match="'validation' of task 't' is empty"):
        data.load(task("somebody/empty"), Classification, progress=False)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="no folder or file"):
        data.load(task(tmp_path / "nowhere"), Classification, progress=False)
    with pytest.raises(TaskError, match="no folder or file 'rows.csv'"):  # and the Hub is not asked for it
        data.load(task("rows.csv"), Classification, progress=False)
    with pytest.raises(TaskError, match="Did you mean 'dates'"):
        data.load(task("generated:date"), Classification, progress=False)
    (tmp_path / "x.xyz").write_text("1")
    with pytest.raises(TaskError, match="not of a known kind"):
        data.load(task(tmp_path / "x.xyz"), Classification, progress=False)
    (tmp_path / "bad.parquet").write_text("no parquet")
    with pytest.raises(TaskError, match="could not be loaded"):
        data.load(task(tmp_path / "bad.parquet"), Classification, progress=False)


def test_an_interrupted_tokenisation_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELTAEXP_CACHE", str(tmp_path))

    def fail() -> DatasetDict:
        raise RuntimeError("the power went")

    with pytest.raises(RuntimeError):
        cache.cached({"a": 1}, fail)
    assert not list((tmp_path / "tokenised").iterdir())
    made = cache.cached({"a": 1}, splits)
    assert json.dumps(made["train"].to_dict()) == json.dumps(ROWS)


def test_one_split_alone_is_the_one_that_a_run_has(tmp_path: Path) -> None:
    asked = task(write(tmp_path / "d", "parquet"), holdout=1, validation_split="dev", train_rows=2)
    whole = data.load(asked, Classification, progress=False)
    for split in ("train", "validation"):
        alone = data.load_split(asked, Classification, split, whole.labels, progress=False)
        assert alone.splits["test"].to_list() == whole.splits[split].to_list()
    assert len(data.load_split(asked, Classification, "validation", progress=False).splits["test"]) == 1
    # A name of the data's own is another thing than a name of the task's.
    plain = task(asked.data, train_split="validation", validation_split="train", train_rows=3)
    assert len(data.load_split(plain, Classification, "train", ["no", "yes"], False).splits["test"]) == 3
    with pytest.raises(TaskError, match=r"no split of .* 'dev2'.*train.*split=NAME"):
        data.load_split(asked, Classification, "dev2", progress=False)


def test_a_file_alone_is_the_split(tmp_path: Path) -> None:
    path = tmp_path / "more.jsonl"
    path.write_text("\n".join(json.dumps({"text": t, "label": n}) for t, n in (("a", "yes"), ("b", "no"))))
    loaded = data.load_split(task(path), Classification, labels=["no", "yes"], progress=False)
    assert loaded.splits["test"]["target"][:] == [1, 0]
    assert "the one split" in loaded.notes[0]


def test_labels_of_an_evaluation_are_those_of_the_training(tmp_path: Path) -> None:
    def fives(*labels: int) -> TaskConfig:
        path = tmp_path / f"{len(labels)}.jsonl"
        path.write_text("\n".join(json.dumps({"text": "a", "label": label}) for label in labels))
        return task(path, labels=[])

    # In training the numbers 1, 2 and 5 are the names of three classes; the first two of them alone stay what they are.
    assert data.load_split(fives(1, 2), Classification, labels=["1", "2", "5"], progress=False).splits["test"]["target"][:] == [
        0,
        1,
    ]
    with pytest.raises(TaskError, match="labels 3, which are no numbers or names"):
        data.load_split(fives(1, 2, 3), Classification, labels=["1", "2", "5"], progress=False)
    with pytest.raises(TaskError, match="have the labels no, yes, and the delta was trained on yes, no"):
        data.load_split(task(write(tmp_path / "d", "parquet")), Classification, labels=["yes", "no"], progress=False)
    described = DatasetDict(test=Dataset.from_dict(ROWS).cast_column("label", ClassLabel(names=["yes", "no"])))
    described.save_to_disk(str(tmp_path / "named"))
    unnamed = task(tmp_path / "named", labels=[])
    assert data.load_split(unnamed, Classification, "test", ["no", "yes"], False).splits["test"]["target"][:] == [1, 0, 1, 0]
    with pytest.raises(TaskError, match="have the labels yes, no, and the delta was trained on no, yes, maybe"):
        data.load_split(unnamed, Classification, "test", ["no", "yes", "maybe"], progress=False)
