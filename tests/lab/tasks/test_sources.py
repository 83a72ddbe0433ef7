"""Data from files as people have them: with and without a header, one file or several, numbers, names and truth values."""

from pathlib import Path
from typing import Any

import datasets
import pytest
import small
from datasets import ClassLabel, Dataset, Features, Value

from deltaexp.errors import ConfigError, TaskError
from deltaexp.lab import taskconfig
from deltaexp.lab.taskconfig import TaskConfig
from deltaexp.lab.tasks import data, sources
from deltaexp.lab.tasks.kinds.heads import Classification
from deltaexp.lab.tasks.kinds.text import Labels

TSV = 'he said "no\t0\n"yes" she said\t1\nmaybe\t0\nso\t1\n'


def task(place: object, **changes: Any) -> TaskConfig:
    values = {"name": "t", "kind": "classification", "inputs": ["text"], "target": "label", "labels": ["no", "yes"]}
    return TaskConfig(**{**values, "data": str(place), "test_split": None, **changes})  # type: ignore[arg-type]


def load(asked: TaskConfig, kind: type = Classification) -> data.TaskData:
    return data.load(asked, kind, progress=False)


def test_quotes_in_a_tsv_file_are_characters_with_a_header_or_without(tmp_path: Path) -> None:
    for name in ("train.tsv", "dev.tsv"):
        (tmp_path / name).write_text("text\tlabel\n" + TSV)
    expected = ['he said "no', '"yes" she said', "maybe", "so"]
    found = load(task(tmp_path))
    assert found.splits["validation"]["text"][:] == found.splits["train"]["text"][:] == expected
    for name in ("train.tsv", "dev.tsv"):
        (tmp_path / name).write_text(TSV)
    assert load(task(tmp_path, columns=["text", "label"])).splits["train"]["text"][:] == expected


def test_columns_of_a_csv_file_without_a_header(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('"a, or b",0\nc,1\nd,0\ne,1\n')
    found = load(task(path, columns=["text", "label"], holdout=1))
    assert sorted([*found.splits["train"]["text"], *found.splits["validation"]["text"]]) == ["a, or b", "c", "d", "e"]
    assert found.notes[0] == "1 rows of train are held out for validation (task.holdout)"
    with pytest.raises(TaskError, match=r"names 3 columns \(text, label, more\), and the first line of .* has 2: a, or b, 0"):
        load(task(path, columns=["text", "label", "more"], holdout=1))
    with pytest.raises(
        TaskError, match=r"no column 'text'.*If the file has no line with their names, give them in task.columns"
    ):
        load(task(path, holdout=1))


def test_a_single_file_needs_rows_to_hold_out(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    Dataset.from_dict({"text": ["a"] * 30, "label": [0, 1] * 15}).to_json(str(path))
    with pytest.raises(TaskError, match=r"no split of .* 'validation'.*task.holdout=3 to hold rows of the training split out"):
        load(task(path))
    assert len(load(task(path, holdout=3)).splits["train"]) == 27
    with pytest.raises(TaskError, match="holdout is 30, and the training split has 30 rows"):
        load(task(path, holdout=30))


def test_one_split_that_was_saved(tmp_path: Path) -> None:
    Dataset.from_dict({"text": ["a", "b", "c"], "label": [0, 1, 0]}).save_to_disk(str(tmp_path / "saved"))
    assert len(load(task(tmp_path / "saved", holdout=1)).splits["train"]) == 2


def test_an_empty_file_says_so(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("")
    with pytest.raises(TaskError, match="empty, damaged or of another kind than its name says"):
        load(task(tmp_path / "rows.csv"))


def test_a_data_set_with_a_script_is_taken_from_the_hubs_conversion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `datasets` answers for such a repository; its branch of parquet files lies here, as no network is there."""
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    rows = Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}, features=features)
    for config in ("mine", "other"):
        for split in ("train", "validation"):
            (tmp_path / config / split).mkdir(parents=True)
            rows.to_parquet(str(tmp_path / config / split / "0000.parquet"))
    real = datasets.load_dataset

    def from_hub(path: str, name: str | None = None, revision: str | None = None, **options: Any) -> Any:
        if revision != sources.CONVERTED:
            raise RuntimeError("Dataset scripts are no longer supported, but found old.py")
        return real(str(tmp_path), name, **options)

    monkeypatch.setattr(datasets, "load_dataset", from_hub)
    found = load(task("somebody/old", subset="mine", labels=[]))
    assert (len(found.splits["train"]), found.labels) == (2, ["no", "yes"])
    assert "these are the Hub's parquet files of refs/convert/parquet" in found.notes[0]
    with pytest.raises(TaskError, match="scripts are no longer supported"):
        load(task("somebody/old", subset="mine", revision="v1"))


def rows(labels: list[Any], feature: Any = None, text: list[Any] | None = None) -> Dataset:
    texts = text or [f"text {n}" for n in range(len(labels))]
    table = Dataset.from_dict({"text": texts, "label": labels})
    return table if feature is None else table.cast_column("label", feature)


def of(table: Dataset, monkeypatch: pytest.MonkeyPatch, kind: type = Classification, **changes: Any) -> data.TaskData:
    """Load rows as both splits."""
    monkeypatch.setattr(sources, "load", lambda task: ({"train": table, "validation": table}, []))
    return load(task("somebody/mine", **changes), kind)


@pytest.mark.parametrize(
    ("labels", "feature", "names", "expected", "shown"),
    [
        ([0, 1, 1], None, ["no", "yes"], [0, 1, 1], ["no", "yes"]),
        (["no", "yes", "no"], None, ["yes", "no"], [1, 0, 1], ["yes", "no"]),
        (["no", "yes", "no"], None, [], [0, 1, 0], ["no", "yes"]),
        ([True, False, True], None, ["no", "yes"], [1, 0, 1], ["no", "yes"]),
        ([True, False, True], None, [], [1, 0, 1], ["False", "True"]),
        ([1.0, 0.0, 1.0], None, ["no", "yes"], [1, 0, 1], ["no", "yes"]),
        ([1.0, 2.0, 5.0], None, [], [0, 1, 2], ["1", "2", "5"]),
        ([5, 1, 2], None, [], [2, 0, 1], ["1", "2", "5"]),
        # Names that are numbers are no places.
        ([5, 1, 2], None, ["1", "2", "5"], [2, 0, 1], ["1", "2", "5"]),
        ([0, 1, 1], ClassLabel(names=["no", "yes"]), [], [0, 1, 1], ["no", "yes"]),
        # The data's own description says what their numbers mean; other names are taken in the order given.
        ([0, 1, 1], ClassLabel(names=["yes", "no"]), ["no", "yes"], [1, 0, 0], ["no", "yes"]),
        ([0, 1, 1], ClassLabel(names=["0", "1"]), ["no", "yes"], [0, 1, 1], ["no", "yes"]),
    ],
)
def test_labels_of_all_types(
    labels: list, feature: Any, names: list, expected: list, shown: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = of(rows(labels, feature), monkeypatch, labels=names)
    assert found.splits["train"]["target"][:] == expected
    assert found.labels == shown
    # As text, with a template, which must not lose what the data say of their labels.
    found = of(rows(labels, feature), monkeypatch, Labels, labels=names, prompt="{text}?")
    assert found.splits["train"]["target"][:] == expected
    assert found.labels == shown


@pytest.mark.parametrize(
    ("table", "changes", "says"),
    [
        (rows([0, None, None]), {}, "'label' of task 't' has no value in 2 of the 3 rows of the split 'train'; the first is"),
        (rows([0, 1], text=["a", None]), {}, "'text' of task 't' has no value in 1 of the 2 rows"),
        (rows([0, 1], text=["a", None]), {"inputs": ["{text}!"]}, "Row 1 of task 't' does not fit the template '{text}!'"),
        (rows([0, 1], text=[3, 4]), {}, "holds int64, and a text is wanted. Name another column, or make a text of it"),
        (rows([0, 1]), {"inputs": ["{txt}"]}, "no column 'txt'. Did you mean 'text'"),
        (rows([0, 1]), {"inputs": ["{text[0][a]}"]}, "does not fit the template '{text[0][a]}'"),
        (rows([0, 0]), {"labels": []}, "has the one label 0 in 'label'; there have to be two"),
        (rows([0, 2]), {}, "has labels 2, which are no numbers or names of task.labels (0 no, 1 yes)"),
        (rows([[0], [1]]), {}, "holds lists, and one label is wanted"),
    ],
)  # fmt: skip
def test_rows_that_do_not_fit(table: Dataset, changes: dict, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TaskError) as caught:
        of(table, monkeypatch, **changes)
    assert says in str(caught.value)


def test_labels_that_training_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert of(rows([0, 0, 0]), monkeypatch).notes == [
        "every row of the training split has the label no: there is nothing to learn from it"
    ]
    assert of(rows([0, 2]), monkeypatch, labels=["a", "b", "c"]).notes == ["no row of the training split has the label b"]
    table = {"train": rows(["a", "b"]), "validation": rows(["a", "c"])}
    monkeypatch.setattr(sources, "load", lambda task: (table, []))
    with pytest.raises(TaskError, match=r"labels that no row of the training split has: c\. Name all of them in task\.labels"):
        load(task("somebody/mine", labels=[]))


HOOK = """
def upper(rows, task):
    return rows.map(lambda row: {"text": row["text"].upper()})

def broken(rows, task):
    return rows.map(lambda row: {"text": row["txt"]})

def none(rows, task):
    return rows.select([])

def other(rows, task):
    return 3
"""


def test_a_function_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hook = tmp_path / "hook.py"
    hook.write_text(HOOK)
    table = rows([0, 1])
    assert of(table, monkeypatch, prepare=f"{hook}:upper").splits["train"]["text"][:] == ["TEXT 0", "TEXT 1"]
    with pytest.raises(TaskError, match=r"failed on the split 'train' of task 't': KeyError: 'txt' \(.*hook\.py, line 6\)"):
        of(table, monkeypatch, prepare=f"{hook}:broken")
    with pytest.raises(TaskError, match="left none of the 2 rows of the split 'train'"):
        of(table, monkeypatch, prepare=f"{hook}:none")
    with pytest.raises(TaskError, match="returned a int; it must return a datasets.Dataset"):
        of(table, monkeypatch, prepare=f"{hook}:other")
    with pytest.raises(ConfigError, match="'uper', and .* has no such function. Did you mean 'upper'"):
        of(table, monkeypatch, prepare=f"{hook}:uper")
    hook.write_text("def upper(")
    with pytest.raises(ConfigError, match="cannot be imported: SyntaxError"):
        of(table, monkeypatch, prepare=f"{hook}:upper")
    with pytest.raises(ConfigError, match="cannot be imported: FileNotFoundError"):
        of(table, monkeypatch, prepare=f"{tmp_path / 'nothing.py'}:upper")


UNCLOSED = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
"""`datasets` leaves it to the garbage collector to close files of which not all rows are read."""
ROWS = [{"text": f"text {number}", "label": number * 5 % 2} for number in range(30)]


def written(folder: Path, suffix: str, **splits: list[dict[str, Any]]) -> Path:
    folder.mkdir()
    for split, rows in splits.items():
        table = Dataset.from_list(rows)
        write = {"jsonl": table.to_json, "csv": table.to_csv, "parquet": table.to_parquet}[suffix]
        write(str(folder / f"{split}.{suffix}"))
    return folder


@UNCLOSED
@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_streamed_rows_are_those_of_a_set_that_has_no_others(suffix: str, tmp_path: Path) -> None:
    large = written(tmp_path / "large", suffix, train=ROWS, validation=ROWS[:8], test=ROWS[20:])
    small = written(tmp_path / "small", suffix, train=ROWS[:7], validation=ROWS[:5], test=ROWS[20:])
    streamed = load(
        task(large, streaming=True, shuffle_buffer=0, train_rows=7, validation_rows=5, test_split="test"),
    )
    whole = load(task(small, test_split="test"))
    assert {name: rows[:] for name, rows in streamed.splits.items()} == {name: rows[:] for name, rows in whole.splits.items()}
    assert streamed.fingerprint == whole.fingerprint  # by which all that follows is the same, and a run is continued


@UNCLOSED
def test_streamed_rows_are_mixed_the_same_way_each_time(tmp_path: Path) -> None:
    place = written(tmp_path / "data", "jsonl", train=ROWS, validation=ROWS[:8])

    def texts(**changes: Any) -> list[str]:
        return load(task(place, streaming=True, train_rows=10, **changes)).splits["train"]["text"][:]

    first = texts()
    assert first == texts()
    assert len(set(first)) == 10
    assert first != texts(data_seed=1)
    assert set(first) - {row["text"] for row in ROWS[:10]}
    assert set(texts(shuffle_buffer=2)) <= {row["text"] for row in ROWS[:12]}  # not from further away than the buffer holds
    assert len(set(texts(prepare="deltaexp.lab.tasks.preparing:nonempty", holdout=4))) == 10


@UNCLOSED
def test_rows_are_held_out_of_a_stream(tmp_path: Path) -> None:
    place = written(tmp_path / "data", "jsonl", train=ROWS)
    found = load(task(place, streaming=True, train_rows=10, holdout=4)).splits
    parts = {split: set(rows["text"]) for split, rows in found.items()}
    assert {split: len(texts) for split, texts in parts.items()} == {"train": 10, "validation": 4}
    assert not parts["train"] & parts["validation"]


@UNCLOSED
def test_what_cannot_be_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = written(tmp_path / "data", "jsonl", train=ROWS, validation=ROWS[:8])
    with pytest.raises(ConfigError, match="needs task.train_rows"):
        taskconfig.check(task(place, streaming=True))
    with pytest.raises(ConfigError, match="'generated:dates' is neither"):
        taskconfig.check(task("generated:dates", streaming=True, train_rows=5))
    with pytest.raises(ConfigError, match="shuffle_buffer is -1"):
        taskconfig.check(task(place, shuffle_buffer=-1))
    Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(TaskError, match="mapped into memory.*Leave task.streaming out"):
        load(task(tmp_path / "saved", streaming=True, train_rows=5))
    with pytest.raises(TaskError, match="no split of .* 'dev'|split.*'dev'"):
        load(task(place, streaming=True, train_rows=5, validation_split="dev"))
    (place / "train.jsonl").write_text("no json")
    with pytest.raises(TaskError, match="could not be loaded.*damaged"):
        load(task(place, streaming=True, train_rows=5))


@UNCLOSED
@pytest.mark.slow
def test_a_streamed_run_ends_in_the_same_delta(tmp_path: Path) -> None:
    backbone = small.bert(tmp_path / "backbone")
    rows = [{"sentence": f"the film was {small.WORDS[1 + n % 6]}", "label": int(n % 6 > 2)} for n in range(40)]
    large = written(tmp_path / "large", "parquet", train=rows, validation=rows[:8], test=rows[8:16])
    few = written(tmp_path / "few", "parquet", train=rows[:24], validation=rows[:8], test=rows[8:16])
    words = ["task=sst2", "task.test_split=test", "task.train_rows=24"]
    streamed = small.trained(
        tmp_path / "a", backbone, large, *words, "task.streaming=true", "task.shuffle_buffer=0", "trainer.group_by_length=true"
    )
    whole = small.trained(tmp_path / "b", backbone, few, *words, "trainer.group_by_length=true")
    assert streamed["digests"]["delta_model.safetensors"] == whole["digests"]["delta_model.safetensors"]
    assert streamed["metrics"] == whole["metrics"]
