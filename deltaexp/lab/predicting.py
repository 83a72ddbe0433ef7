"""Answering rows with a saved delta: read, answered and written batch by batch, so that memory does not grow with them."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset
from pyarrow import ArrowException
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn

from deltaexp.checksum import file_sha256
from deltaexp.errors import ConfigError, InterruptedRunError, RunError, TaskError, did_you_mean, listing
from deltaexp.lab import backbones, predictions, reading, taskconfig
from deltaexp.lab.evaluating import attached, fetched, loaded, trainer_for
from deltaexp.lab.reading import Row
from deltaexp.lab.recorded import Recorded
from deltaexp.lab.recovery import StoppedByKeyboard, disk_fault
from deltaexp.lab.taskconfig import TaskConfig
from deltaexp.lab.tasks.columns import Spec, function, value_of
from deltaexp.lab.tasks.kinds import Kind, choose
from deltaexp.lab.training import DeltaTrainer
from deltaexp.lab.writing import sync

PARTIAL = ".partial"
"""What the name of an output ends in until it is complete; beside it lies what it is made with."""
ADDED = ("prediction", "prediction_number", "scores")
"""What is added to a row."""


@dataclass
class Asked:
    """What `predict` is to do."""

    place: str
    """The folder or repository of a delta."""
    input: str
    """A file, or ``-`` for standard input."""
    overrides: list[str] = field(default_factory=list)
    """Keys of a run in the place of what is recorded."""
    out: Path | None = None
    """The file for the answers; None is standard output."""
    scores: bool = False
    """Write the probability of each class."""
    merged: bool = False
    """Fold the delta into the weights first."""
    resume: bool = False
    """Go on with a file that was not completed."""
    revision: str | None = None
    """The revision of a repository."""


def predict(asked: Asked, console: Console | None = None) -> int:
    """Answer all rows and return how many there were.

    Raises:
        ConfigError: If the delta's backbone or task are not known, or its kind of task has no scores.
        TaskError: If a row cannot be read, or lacks a column.
        RunError: If an output that is to be continued was made with other rows or another delta.
        DeltaExpError: If the delta cannot be loaded on the backbone.
    """
    console = console or Console(highlight=False, soft_wrap=True, stderr=True)
    if asked.out is not None and not _new(asked.out, asked.resume, console):
        return 0
    one = fetched(asked.place, asked.overrides, "predict", asked.revision, data=False)
    config = one.config
    kind_class = choose(config.task, backbones.settings_of(config.backbone), config.backbone.name)
    # Some kinds write no answers where nobody wants to keep them.
    task = dataclasses.replace(config.task, labels=one.labels, save_predictions=True)
    if task.kind.endswith("classification") and not task.labels:
        raise ConfigError(
            f"Which classes the delta {one.place!r} was trained on is not recorded; name them, in the order of their numbers: "
            "task.labels=[...]"
        )
    if asked.scores and kind_class.scores is Kind.scores:
        raise ConfigError(
            f"scores=true is for classes that a head tells apart; {task.kind!r} by {kind_class.__name__} has none."
        )
    datasets.disable_progress_bars()
    backbone = loaded(one, task)
    with attached(one, backbone, asked.merged) as delta_model:
        kind = backbone.kind(task, backbone.processor, backbone.model.config, delta_model.config.positions())
        quiet = dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, progress=False))
        with trainer_for(quiet, delta_model, kind, {}) as trainer:
            answer = _answerer(trainer, kind, asked.scores)
            read = _batches(asked, kind, config.trainer.eval_batch_size)
            made_with = _made_with(one, asked)
            with _output(asked, made_with, console) as (done, write):
                bar = Progress(
                    TextColumn("answering: {task.completed:,} rows"), TimeElapsedColumn(), console=console,
                    disable=not config.trainer.progress, redirect_stdout=False, redirect_stderr=False,
                )  # fmt: skip
                with bar:
                    number = bar.add_task("", total=None)
                    return _stream(read, answer, done, write, lambda count: bar.update(number, completed=count))


def _stream(
    read: Iterator[list[Row]],
    answer: Callable[[list[Row], int], list[Row]],
    done: Iterator[Row] | None,
    write: Callable[[Row], None],
    tell: Callable[[int], None],
) -> int:
    """Answer batches of rows, those left out that a file has answers to already; return how many rows there were."""
    count = 0
    for batch in read:
        rest = list(batch)
        while done is not None and rest:
            old = next(done, None)
            if old is None:
                done = None
                break
            row = rest.pop(0)
            count += 1
            if {key: value for key, value in old.items() if key not in ADDED} != json.loads(predictions.dumped(row)):
                raise RunError(
                    f"Row {count:,} of the input is not the one that the unfinished output has an answer to. Give the same "
                    "input, or delete the unfinished output."
                )
        if rest:
            for line in answer(rest, count):
                write(line)
            count += len(rest)
        tell(count)
    if done is not None and next(done, None) is not None:
        raise RunError(f"The input has {count:,} rows, fewer than the unfinished output has answers to.")
    return count


def _batches(asked: Asked, kind: Kind, size: int) -> Iterator[list[Row]]:
    sources = columns_of(kind.asked(kind.task))
    rows = reading.rows(asked.input, sources[0] if len(sources) == 1 else None, size)
    return reading.batches(rows, size, waiting=asked.input == reading.STDIN)


def columns_of(specs: dict[str, Spec]) -> list[str]:
    """Return the columns of the data that columns and templates name, in their order, each once."""
    flat = itertools.chain.from_iterable([spec] if isinstance(spec, str) else spec for spec in specs.values())
    return list(dict.fromkeys(itertools.chain.from_iterable(taskconfig.fields_of(spec) or [spec] for spec in flat)))


def _answerer(trainer: DeltaTrainer, kind: Kind, scores: bool) -> Callable[[list[Row], int], list[Row]]:
    """Return what adds answers to rows, of which the first has the number that is given, from 0."""
    specs = kind.asked(kind.task)
    needed = columns_of(specs)

    def answer(rows: list[Row], first: int) -> list[Row]:
        taken = sorted({key for row in rows for key in row} & set(ADDED))
        if taken:
            raise TaskError(
                f"The input has the column {listing(taken)} already, which answers are written to. Rename it there."
            )
        asked = _prepared(rows, kind.task, first) if kind.task.prepare else rows
        table = _table([_filled(row, specs, needed, kind.task, first + n) for n, row in enumerate(asked)], first)
        answers, probabilities = trainer.answer(kind.unlabelled(table))
        lines = [{**row, **predictions.described(kind, found)} for row, found in zip(rows, answers, strict=True)]
        if scores:
            assert probabilities is not None
            lines = [{**line, "scores": found} for line, found in zip(lines, probabilities, strict=True)]
        return lines

    return answer


def _prepared(rows: Sequence[Row], task: TaskConfig, first: int) -> list[Row]:
    """Return what the function ``task.prepare`` makes of rows, one for each.

    Raises:
        TaskError: If it fails on rows without targets, or makes more or fewer rows.
    """
    keys = list(dict.fromkeys(key for row in rows for key in row))
    table = _table([{key: row.get(key) for key in keys} for row in rows], first)
    try:
        made = function(str(task.prepare), "task.prepare")(table, task)
    except KeyError as error:
        raise TaskError(
            f"task.prepare={task.prepare} asks for the column {error}, which the input has not ({listing(keys)}). Rows to "
            "answer need no target, so it must do without, or the input must have it."
        ) from error
    if len(made) != len(rows):
        raise TaskError(
            f"task.prepare={task.prepare} made {len(made)} rows of {len(rows)}; to answer rows it must keep each of them."
        )
    return list(made)


def _filled(row: Row, specs: dict[str, Spec], needed: Sequence[str], task: TaskConfig, number: int) -> Row:
    """Return the columns that the kind of task asks for, filled from one row.

    Raises:
        TaskError: If the row lacks a column, or has nothing in it.
    """
    for column in needed:
        if row.get(column) is None:
            what = "has nothing in" if column in row else "has no"
            hint = "" if column in row else f"{did_you_mean(column, row)} Its columns: {listing(row)}."
            raise TaskError(f"Row {number + 1:,} of the input {what} column {column!r}, which task.inputs names.{hint}")
    filled = {name: value_of(row, spec, task) for name, spec in specs.items()}
    for name in ("text", "text_pair", "question", "context"):
        if name in filled and not isinstance(filled[name], str):
            raise TaskError(f"Row {number + 1:,} of the input has no text in {specs[name]!r}: {filled[name]!r:.100}.")
    return filled


def _table(rows: list[Row], first: int) -> Dataset:
    try:
        return Dataset.from_list(rows)
    except (ArrowException, TypeError, ValueError) as error:
        line = (str(error).splitlines() or [""])[0]
        raise TaskError(
            f"Rows {first + 1:,} to {first + len(rows):,} of the input have values of different kinds in one column: {line}"
        ) from error


def _made_with(one: Recorded, asked: Asked) -> dict[str, Any]:
    """Return what answers depend on, besides the rows."""
    weights = [path for path in sorted(one.folder.iterdir()) if path.suffix in (".safetensors", ".bin", ".json")]
    return {
        "delta": {path.name: file_sha256(path) for path in weights},
        "task": dataclasses.asdict(one.config.task), "backbone": dataclasses.asdict(one.config.backbone),
        "scores": asked.scores, "merged": asked.merged,
    }  # fmt: skip


def _new(out: Path, resume: bool, console: Console) -> bool:
    """Say whether there is anything to do for an output.

    Raises:
        ConfigError: If it, or a part of it, is there already.
    """
    partial = out.with_name(out.name + PARTIAL)
    if out.exists():
        if not resume:
            raise ConfigError(f"{str(out)!r} is there already. Name another file with out=, or delete it.")
        console.print(f"{out} is complete already", markup=False)
        return False
    if partial.exists() and not resume:
        raise ConfigError(f"{str(partial)!r} is left from before: go on with it by resume=true, or delete it.")
    return True


@contextlib.contextmanager
def _output(
    asked: Asked, made_with: dict[str, Any], console: Console
) -> Iterator[tuple[Iterator[Row] | None, Callable[[Row], None]]]:
    """Within this context there are the answers that are there already, and what writes one more.

    Raises:
        RunError: If an output that is to be continued was made with something else.
        StoppedByKeyboard: Instead of `KeyboardInterrupt`, to say what is kept.
    """
    if asked.out is None:
        yield None, lambda line: print(predictions.dumped(line), flush=True)
        return
    partial = asked.out.with_name(asked.out.name + PARTIAL)
    beside = partial.with_name(partial.name + ".json")
    partial.parent.mkdir(parents=True, exist_ok=True)
    made_with = json.loads(json.dumps(made_with))
    kept = partial.exists()
    if kept:
        _check_same(partial, beside, made_with)
        _cut(partial)
    else:
        predictions.write_lines(beside, [json.dumps(made_with, indent=2)])
    try:
        with partial.open("a", encoding="utf-8", newline="\n") as file:

            def write(line: Row) -> None:
                file.write(predictions.dumped(line) + "\n")
                file.flush()

            old = partial.open(encoding="utf-8") if kept else contextlib.nullcontext()
            with old as lines:
                yield (map(json.loads, lines) if lines else None), write
            os.fsync(file.fileno())
        os.replace(partial, asked.out)
        beside.unlink()
        sync(asked.out.parent)
    except (KeyboardInterrupt, TaskError, OSError) as error:
        kept_so_far = f"The answers so far are kept in {str(partial)!r}; the same command with resume=true goes on."
        if isinstance(error, KeyboardInterrupt):
            raise StoppedByKeyboard(f"stopped by the keyboard. {kept_so_far}") from error
        if isinstance(error, TaskError):
            raise TaskError(f"{error} {kept_so_far}") from error
        fault = disk_fault(error)
        if fault is None:
            raise
        raise InterruptedRunError(f"{str(partial)!r} could not be written: {fault}. Make room. {kept_so_far}") from error
    console.print(f"written to {asked.out}", markup=False)


def _check_same(partial: Path, beside: Path, made_with: dict[str, Any]) -> None:
    try:
        before = json.loads(beside.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"What {str(partial)!r} was made with is not known ({error}). Delete it, and begin anew.") from error
    differ = [key for key in made_with if before.get(key) != made_with[key]]
    if differ:
        raise RunError(f"{str(partial)!r} was made with another {listing(differ)}. Go on with the same, or delete it.")


def _cut(partial: Path) -> None:
    """Cut off a last line that was not written whole."""
    with partial.open("rb+") as file:
        end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - 65536)
            file.seek(start)
            found = file.read(end - start).rfind(b"\n")
            if found >= 0:
                end = start + found + 1
                break
            end = start
        file.truncate(end)
