"""What a task is configured with: its data, which columns mean what, and how it is measured. Nothing here imports torch."""

from __future__ import annotations

import string
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Optional

from deltaexp.errors import ConfigError, unknown

KINDS = (
    "classification",
    "regression",
    "token_classification",
    "multiple_choice",
    "seq2seq",
    "causal_lm",
    "instruction",
    "extractive_qa",
    "image_classification",
)
ANSWERS = ("auto", "head", "text")
METRIC_PACKAGES = {
    "seqeval": "seqeval",
    "bleu": "sacrebleu",
    "chrf": "sacrebleu",
    "rouge": "rouge_score",
}
"""Packages beyond deltaexp's own dependencies that a metric needs, by what is imported; the extra ``metrics`` has them all."""


@dataclass
class TaskConfig:
    """The data, what is to be learnt from them and how it is measured.

    Where a key takes a column, it takes a template too: a text with columns in braces, such as ``{question} {passage}``.
    What lies inside of a column is reached by brackets, as in ``{translation[ro]}`` and ``{answers[text][0]}``.
    """

    name: str = ""
    """Short name, used in folders and tables."""
    kind: str = ""
    """``classification`` and ``regression`` of a text or a pair of texts, ``token_classification``, ``multiple_choice``,
    ``seq2seq`` (text to text), ``causal_lm`` (plain text), ``instruction`` (chat), ``extractive_qa``,
    ``image_classification``."""
    data: str = ""
    """A dataset of the Hub, a local folder or file, or ``generated:NAME`` for one that deltaexp makes itself."""
    subset: Optional[str] = None
    """Configuration of a dataset of the Hub that has several."""
    revision: Optional[str] = None
    """Branch, tag or commit of a dataset of the Hub."""
    train_split: str = "train"
    validation_split: str = "validation"
    test_split: Optional[str] = "test"
    """Split of the final evaluation; null where its labels are not public, then the validation split is taken."""
    holdout: int = 0
    """Where the data have no validation split: so many rows of the training split, drawn with `data_seed`, become one."""
    columns: list[str] = field(default_factory=list)
    """Names of the columns of csv and tsv files that have no header line; empty where they have one."""
    inputs: list[str] = field(default_factory=list)
    """The columns that hold the text, or the two texts of a pair; the tokens, the image, the question and the context."""
    target: str = ""
    """The column that holds the label, the target text, the tags, the messages of a chat."""
    choices: list[str] = field(default_factory=list)
    """For multiple choice: a column for each answer to choose from, or one column that holds a list of them."""
    labels: list[str] = field(default_factory=list)
    """Names of the classes, in the order of their numbers; where it is empty they are read from the data."""
    answer: str = "auto"
    """Whether a classification is answered by a new ``head`` or as ``text`` by the language model; ``auto`` takes the head on
    encoders and text on models with a decoder."""
    verbalizer: list[str] = field(default_factory=list)
    """For answers as text: the word for each label; where it is empty, the label's name."""
    prompt: Optional[str] = None
    """For answers as text: a template of the input; null writes the task's name and each column's name before its text."""
    separator: str = "\n"
    """For decoders: what stands between the input and the answer; for plain text, between rows, where ``{eos}`` is the
    tokenizer's end of a text."""
    metrics: list[str] = field(default_factory=list)
    """Names of metrics; runs are compared by the first. Where it is empty, the kind's usual ones. ``package.module:function``
    or ``FILE.py:function`` is one of your own."""
    references: Optional[str] = None
    """The column that metrics compare with, where it is not the target, such as a list of answers that are all right."""
    group: Optional[str] = None
    """A column by which metrics put rows together: questions with several answers, or sources with several references."""
    prepare: Optional[str] = None
    """A function on the rows before anything else, for what YAML cannot say: ``package.module:function`` or
    ``FILE.py:function``, called with a `datasets.Dataset` and this config, returning a `datasets.Dataset`."""
    streaming: bool = False
    """Read the rows that are taken (`train_rows` and the like) from the beginning of the data or, mixed, as they come, and
    nothing more: for sets that are larger than the disk, or of which only a part is to be downloaded."""
    shuffle_buffer: int = 10_000
    """With `streaming`: rows are drawn with `data_seed` from so many that come next, and files in another order; 0 takes the
    first ones as they come."""
    train_rows: Optional[int] = None
    """Take only so many rows of the training split, drawn with `data_seed`; null takes all."""
    validation_rows: Optional[int] = None
    test_rows: Optional[int] = None
    max_source_length: int = 128
    """Longest input in tokens; what is longer is cut, and counted. The backbone's own limit holds where it is lower."""
    max_target_length: int = 64
    """Longest target in tokens, and longest generated answer."""
    doc_stride: int = 128
    """For extractive QA: by how many tokens the windows overlap into which a long context is cut."""
    white: Optional[int] = None
    """For images that are given as numbers: the number that is white; null takes the first of 1, 16, 255 and 65535 that no
    pixel exceeds."""
    packing: bool = False
    """For plain text and chat: the rows to train on are joined and cut into blocks of `max_source_length` tokens, without
    padding; what is left over is left out. A token sees what stands before it in its block, of other rows, too."""
    num_beams: int = 1
    """Beams of the search for generated answers; 1 takes the likeliest token each time."""
    save_predictions: bool = False
    """Keep the answers to the final split beside the delta's folder, as ``predictions.jsonl``."""
    probe_rows: int = 4
    """Rows of the final split that are saved with the delta, as tokens, with some logits on them: `verify` compares these with
    ``probe=true``. 0 saves none, for data that nobody else may see."""
    data_seed: int = 0
    """Seed of generated data and of the choice of rows; the same for all seeds of a study."""
    dataset: Optional[str] = None
    """The dataset of the Hub that the model card names, where `data` is a copy of it; null takes `data` if it is one."""
    language: Optional[str] = None
    """The language of the data for the model card, such as ``en``; null leaves it out."""


def fields_of(template: str) -> list[str]:
    """Return the columns that a template names; none for a plain column.

    Raises:
        ConfigError: If its braces do not match, or it asks for anything but columns and what lies in them.
    """
    return [column for column, _ in _parts(template)]


def _parts(template: str) -> Iterator[tuple[str, list[str | int]]]:
    """Return for every field of a template the column and the keys into it."""
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(f"The braces of the template {template!r} do not match: {error}. Write {{{{ for a brace.") from error
    for _, field_name, form, conversion in parsed:
        if field_name is None:
            continue
        column, *rest = field_name.replace("]", "").split("[")
        # Attributes would reach into Python objects; data have none.
        if not column or "." in field_name or form or conversion or field_name.count("[") != field_name.count("]"):
            raise ConfigError(
                f"{{{field_name}}} in the template {template!r} is no column; write {{column}}, or "
                "{{column[key]}} for what lies in it."
            )
        yield column, [int(key) if key.isdigit() else key for key in rest]


def check(task: TaskConfig) -> None:
    """Check the values of a task that types alone do not rule out.

    Raises:
        ConfigError: If one is out of range, or two contradict one another.
    """
    for key, allowed in (("kind", KINDS), ("answer", ANSWERS)):
        if getattr(task, key) not in allowed:
            raise ConfigError(unknown(f"task.{key}", getattr(task, key), allowed))
    if not task.data:
        raise ConfigError("task.data is empty; name a dataset of the Hub or a folder, e.g. task.data=../data/sst2.")
    for key in (
        "train_rows",
        "validation_rows",
        "test_rows",
        "max_source_length",
        "max_target_length",
        "num_beams",
        "white",
        "doc_stride",
    ):
        value = getattr(task, key)
        if value is not None and value < 1:
            raise ConfigError(f"task.{key} is {value}; it must be at least 1.")
    for key in ("probe_rows", "holdout", "shuffle_buffer"):
        if getattr(task, key) < 0:
            raise ConfigError(f"task.{key} is {getattr(task, key)}; it must be at least 0.")
    _check_columns(task)
    if task.streaming and task.data.startswith("generated:"):
        raise ConfigError(f"task.streaming=true reads a part of files or of a dataset of the Hub; {task.data!r} is neither.")
    if task.streaming and task.train_rows is None:
        raise ConfigError(
            "task.streaming=true reads only the rows that are taken, so it needs task.train_rows: for rows that are all seen "
            "once, the number of steps times the rows of a step."
        )
    if task.labels and len(task.labels) < 2:
        raise ConfigError("task.labels has one name; a task needs at least two, in the order of their numbers, or none.")
    if len(set(task.labels)) < len(task.labels):
        raise ConfigError(f"task.labels names a label twice: {', '.join(task.labels)}.")
    if task.verbalizer and task.labels and len(task.verbalizer) != len(task.labels):
        raise ConfigError(
            f"task.verbalizer has {len(task.verbalizer)} words and task.labels {len(task.labels)} names; it needs one for each."
        )
    if len(set(task.verbalizer)) < len(task.verbalizer):
        raise ConfigError(f"task.verbalizer has the same word for two labels: {', '.join(task.verbalizer)}.")
    if task.packing and task.kind not in ("causal_lm", "instruction"):
        raise ConfigError(f"task.packing joins rows of plain text or chat; the kind of task {task.name!r} is {task.kind!r}.")
    for metric in task.metrics:
        package = METRIC_PACKAGES.get(metric)
        if package and find_spec(package) is None:
            raise ConfigError(f"The metric {metric!r} needs the package {package}: pip install 'deltaexp[metrics]'.")


def _check_columns(task: TaskConfig) -> None:
    least, most = {"extractive_qa": (2, 2), "instruction": (0, 2)}.get(task.kind, (1, 2))
    if task.kind in ("token_classification", "causal_lm", "image_classification"):
        most = 1
    if not least <= len(task.inputs) <= most:
        wanted = f"{least} to {most}" if least < most else str(most)
        raise ConfigError(f"task.inputs names {len(task.inputs)} columns; a task of kind {task.kind!r} takes {wanted}.")
    if not task.target and task.kind not in ("causal_lm",):
        raise ConfigError("task.target is empty; name the column that is to be learnt, e.g. task.target=label.")
    if task.kind == "multiple_choice" and not task.choices:
        raise ConfigError("task.choices is empty; name a column for each answer, or one that holds a list of answers.")
    for template in (*task.inputs, task.target, *task.choices, task.prompt or "", task.references or "", task.group or ""):
        fields_of(template)
    for key in ("prepare", *(f"metrics[{n}]" for n, name in enumerate(task.metrics) if ":" in name)):
        value = task.prepare if key == "prepare" else task.metrics[int(key[8:-1])]
        if value is not None and not (value.count(":") == 1 and all(value.split(":"))):
            raise ConfigError(f"task.{key} is {value!r}; write package.module:function or FILE.py:function.")
