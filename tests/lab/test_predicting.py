"""The command ``predict``: the answers of the run again, from files and standard input, and after an interruption."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from small import bert, reviews

from deltaexp.__main__ import main
from deltaexp.lab import predicting, schema
from deltaexp.lab.run import run

QUIET = "trainer.progress=false"


@pytest.fixture(scope="module")
def delta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A delta for reviews, beside which lie the run's own answers."""
    home = tmp_path_factory.mktemp("predicting")
    config, delta_config = schema.composed(
        [
            "delta_type=lora", "task=sst2", f"task.data={reviews(home / 'reviews')}", "backbone=local", "backbone.name=small",
            f"backbone.source={bert(home / 'bert')}", "trainer=smoke", QUIET, "task.save_predictions=true",
            "trainer.learning_rate=0.02", "trainer.max_steps=6",
        ]
    )  # fmt: skip
    return run(config, delta_config, home / "run").folder


def kept(delta: Path) -> list[dict[str, Any]]:
    return lines(delta.parent / "predictions.jsonl")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def rows(delta: Path) -> list[dict[str, Any]]:
    """The rows that the run was evaluated on, without their labels, and something of one's own."""
    return [{"id": line["row"], "sentence": line["inputs"]["text"]} for line in kept(delta)]


def write(path: Path, table: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in table))
    return path


def predict(delta: Path, *words: object) -> int:
    return main(["predict", f"delta={delta}", QUIET, *map(str, words)])


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet", "txt"])
def test_the_answers_are_those_of_the_run(delta: Path, suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, table = tmp_path / f"rows.{suffix}", Dataset.from_list(rows(delta))
    match suffix:
        case "jsonl":
            table.to_json(str(path))
        case "csv":
            table.to_csv(str(path))
        case "parquet":
            table.to_parquet(str(path))
        case "txt":
            path.write_text("\n".join(table["sentence"]))
    capsys.readouterr()
    assert predict(delta, f"input={path}", "batch_size=5") == 0  # whatever stands in a batch with a row
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(found) == 32
    for line, expected in zip(found, kept(delta), strict=True):
        assert line["sentence"] == expected["inputs"]["text"]
        assert {key: line[key] for key in line if key.startswith("pred")} == {
            "prediction": expected["prediction"], "prediction_number": expected["prediction_number"]
        }  # fmt: skip
        assert ("id" in line) == (suffix != "txt")
    assert len({line["prediction"] for line in found}) == 2


def test_a_pipe_in_and_out_with_scores(
    delta: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(json.dumps(row) + "\n" for row in rows(delta))))
    assert predict(delta, "input=-", "scores=true", "merged=true") == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["prediction"] for line in found] == [line["prediction"] for line in kept(delta)]
    for line in found:
        assert sum(line["scores"].values()) == pytest.approx(1)
        assert max(line["scores"], key=line["scores"].__getitem__) == line["prediction"]


def test_an_interrupted_output_goes_on(delta: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = rows(delta)
    whole, out = tmp_path / "whole.jsonl", tmp_path / "answers.jsonl"
    partial = tmp_path / "answers.jsonl.partial"
    assert predict(delta, f"input={write(tmp_path / 'good.jsonl', table)}", f"out={whole}", "batch_size=4") == 0
    bad = [*table[:13], {"id": 13, "sentense": "x"}, *table[14:]]
    words = (f"out={out}", "batch_size=4")
    assert predict(delta, f"input={write(tmp_path / 'rows.jsonl', bad)}", *words) == 1
    said = capsys.readouterr().err
    assert "Row 14 of the input has no column 'sentence', which task.inputs names. Did you mean 'sentense'?" in said
    assert "with resume=true goes on" in said
    assert not out.exists()
    assert partial.read_bytes() == b"".join(whole.read_bytes().splitlines(keepends=True)[:12])

    # What is there is not written over, and not mixed with the answers of something else.
    assert predict(delta, f"input={tmp_path / 'rows.jsonl'}", *words) == 2
    assert "go on with it by resume=true" in capsys.readouterr().err
    assert predict(delta, f"input={tmp_path / 'good.jsonl'}", *words, "resume=true", "scores=true") == 1
    assert "made with another scores" in capsys.readouterr().err
    others = [{**row, "id": -1} if row["id"] == 5 else row for row in table]
    assert predict(delta, f"input={write(tmp_path / 'others.jsonl', others)}", *words, "resume=true") == 1
    assert "Row 6 of the input is not the one" in capsys.readouterr().err
    assert predict(delta, f"input={write(tmp_path / 'few.jsonl', table[:3])}", *words, "resume=true") == 1
    assert "fewer than the unfinished output" in capsys.readouterr().err

    with partial.open("a") as file:
        file.write('{"id": 12, "sente')  # as a killed process leaves it
    assert predict(delta, f"input={tmp_path / 'good.jsonl'}", *words, "resume=true") == 0
    assert out.read_bytes() == whole.read_bytes()
    assert {path.name for path in tmp_path.glob("answers*")} == {"answers.jsonl"}
    assert predict(delta, f"input={tmp_path / 'good.jsonl'}", *words, "resume=true") == 0
    assert "is complete already" in capsys.readouterr().err
    assert predict(delta, f"input={tmp_path / 'good.jsonl'}", *words) == 2
    assert "is there already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"sentence": None}, "Row 1 of the input has nothing in column 'sentence'"),
        ({"sentence": 5}, "Row 1 of the input has no text in 'sentence': 5"),
        ({"sentence": "a", "prediction": "b"}, "has the column prediction already"),
        ({"text": "a"}, "Its columns: text."),
    ],
)
def test_rows_that_do_not_fit(delta: Path, row: dict, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert predict(delta, f"input={write(tmp_path / 'rows.jsonl', [row])}") == 1
    said = capsys.readouterr()
    assert says in said.err
    assert said.out == ""


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "predict needs rows"),
        (["input=nowhere.csv"], "There is no file 'nowhere.csv'"),
        (["input=-", "batch_size=0"], "a whole number from 1"),
        (["input=-", "resume=true"], "add out=FILE"),
        (["input=-", "delta=./nowhere"], "There is no folder"),
        (["input=-", "seed=1"], "'seed=1' is none"),
        (["input=-", "out=."], "is a folder; name a file"),
    ],
)
def test_a_mistake_is_said_at_once(delta: Path, words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert predict(delta, *words) == 2
    assert says in capsys.readouterr().err


def test_rows_may_be_prepared(delta: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "hook.py").write_text(
        "def joined(rows, task):\n"
        "    return rows.map(lambda row: {'sentence': ' '.join(row['words'])}, load_from_cache_file=False)\n"
        "def fewer(rows, task):\n"
        "    return rows.select([0])\n"
    )
    table = [{"words": row["sentence"].split()} for row in rows(delta)]
    words = [f"input={write(tmp_path / 'rows.jsonl', table)}", f"task.prepare={tmp_path / 'hook.py'}:joined"]
    assert predict(delta, *words) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["prediction"] for line in found] == [line["prediction"] for line in kept(delta)]
    assert set(found[0]) == {"words", "prediction", "prediction_number"}
    assert predict(delta, words[0], f"task.prepare={tmp_path / 'hook.py'}:fewer") == 1
    assert "it must keep each of them" in capsys.readouterr().err


def test_text_is_generated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, delta_config = schema.composed(
        [
            "task.train_rows=16", "task.validation_rows=4", "task.test_rows=6", "task.max_target_length=8",
            "task.save_predictions=true", "trainer=smoke", "trainer.evaluate_before=false", QUIET,
        ]
    )  # fmt: skip
    delta = run(config, delta_config, tmp_path / "run").folder
    table = [{"source": line["inputs"]["text"]} for line in kept(delta)]
    capsys.readouterr()
    assert predict(delta, f"input={write(tmp_path / 'rows.jsonl', table)}", "batch_size=4") == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["prediction"] for line in found] == [line["prediction"] for line in kept(delta)]
    assert predict(delta, f"input={tmp_path / 'rows.jsonl'}", "scores=true") == 2
    assert "scores=true is for classes" in capsys.readouterr().err


def test_columns_of_templates() -> None:
    assert predicting.columns_of({"text": "{a} {b[0]}", "pair": "c", "choices": ["d", "{a}"]}) == ["a", "b", "c", "d"]


@pytest.mark.slow
def test_a_line_is_answered_when_it_comes_and_ctrl_c_keeps_what_is_there(delta: Path, tmp_path: Path) -> None:
    def started(*words: str) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-m", "deltaexp", "predict", f"delta={delta}", "input=-", *words],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    table, expected = rows(delta), kept(delta)
    with started() as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for number in range(3):
            process.stdin.write(json.dumps(table[number]) + "\n")
            process.stdin.flush()
            assert json.loads(process.stdout.readline())["prediction"] == expected[number]["prediction"]
        out, _ = process.communicate(timeout=120)
        assert (process.returncode, out) == (0, "")

    out = tmp_path / "answers.jsonl"
    partial = Path(f"{out}.partial")
    with started(f"out={out}") as process:
        assert process.stdin is not None
        process.stdin.write(json.dumps(table[0]) + "\n")
        process.stdin.flush()
        deadline = time.monotonic() + 120
        while not (partial.exists() and partial.read_text()) and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "stopped by the keyboard. The answers so far are kept" in said
    assert [line["id"] for line in lines(partial)] == [0]
