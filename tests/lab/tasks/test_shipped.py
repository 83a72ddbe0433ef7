"""The shipped tasks: each composes, and its rows, as the Hub has them, become the columns, labels and prompts of its kind."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from models import slow_but
from omegaconf import OmegaConf
from transformers import BertConfig, GPT2Config, T5Config, ViTConfig, ViTImageProcessor

from deltaexp.errors import TaskError
from deltaexp.lab import schema, taskconfig
from deltaexp.lab.taskconfig import TaskConfig
from deltaexp.lab.tasks import digits, preparing
from deltaexp.lab.tasks.data import TaskData, load
from deltaexp.lab.tasks.kinds import FORMS, Kind, architecture, choose

sys.path.insert(0, str(Path(__file__).parent))

from hub_formats import FORMATS, hub
from small import byte_tokenizer

GLUE = ["cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli"]
SUPERGLUE = ["boolq", "cb", "copa", "multirc", "record", "rte", "wic", "wsc"]
OTHERS = [
    "trec", "imdb", "ag_news", "e2e_nlg", "xsum", "samsum", "wmt16_en_ro", "squad", "wikitext", "alpaca", "gsm8k", "conll2003",
    "wnut_17", "beans", "cifar10", "digits", "dates",
]  # fmt: skip
CHOICES = sorted(schema.choices("task"))
SETTINGS = {
    "bert": BertConfig(max_position_embeddings=64), "gpt2": GPT2Config(n_positions=64), "t5": T5Config(), "vit": ViTConfig(),
}  # fmt: skip
NOT = {("record", "bert")}
"""What an architecture cannot do although it can do tasks of the kind: an encoder ranks a fixed number of answers."""


def processor(model_type: str) -> Any:
    return (
        ViTImageProcessor(size={"height": 16, "width": 16}) if model_type == "vit" else byte_tokenizer(ends=model_type == "t5")
    )


def described(choice: str) -> TaskConfig:
    """Return a task as its file says, without all of the other groups."""
    values = OmegaConf.load(schema.config_dir() / "task" / f"{choice}.yaml")["task"]
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(TaskConfig), values))
    assert isinstance(config, TaskConfig)
    return config


def test_all_are_there() -> None:
    assert set(CHOICES) >= {*GLUE, *SUPERGLUE, *OTHERS}


@pytest.mark.parametrize("choice", CHOICES)
def test_a_choice_is_right_in_itself(choice: str) -> None:
    task = described(choice)
    taskconfig.check(task)
    assert task.name == choice
    assert task.data.startswith("generated:") or (task.data.count("/") == 1 and task.dataset == task.data)
    assert task.language or task.kind == "image_classification"
    assert schema.choices("task")[choice].endswith("."), "it has no line for --help"


@pytest.mark.parametrize("choice", slow_but(CHOICES, ["dates", "sst2", "multirc", "wmt16_en_ro"]))
def test_a_choice_composes(choice: str) -> None:
    assert schema.composed([f"task={choice}"])[0].task == described(choice)


def loaded(choice: str, folder: Path, settings: Any, **changes: Any) -> tuple[TaskConfig, type[Kind], TaskData]:
    """Load a task from rows in the Hub's format."""
    task = described(choice)
    if choice in FORMATS:
        hub(choice).save_to_disk(str(folder))
        # Of a few rows, a few are held out.
        task = dataclasses.replace(task, data=str(folder), holdout=min(task.holdout, 1), **changes)
    kind = choose(task, settings)
    data = load(task, kind, progress=False)
    return dataclasses.replace(task, labels=data.labels), kind, data


def possible() -> list[tuple[str, str]]:
    return [
        (choice, model_type)
        for choice in CHOICES
        for model_type, settings in SETTINGS.items()
        if any(built == architecture(settings) for built, _ in FORMS[described(choice).kind])
        and (choice, model_type) not in NOT
    ]


@pytest.mark.parametrize(("choice", "model_type"), possible())
def test_rows_as_the_hub_has_them_become_features(choice: str, model_type: str, tmp_path: Path) -> None:
    task, kind_class, data = loaded(choice, tmp_path / "data", SETTINGS[model_type], max_source_length=48, max_target_length=16)
    assert data.evaluated == ("validation" if task.test_split is None else "test")
    kind = kind_class(task, processor(model_type), SETTINGS[model_type])
    splits = kind.splits(data)
    assert splits.keys() == data.splits.keys()
    for split in splits.values():
        assert len(split.features) > 0
        # Plain text is measured as a whole.
        assert len(kind.references(split.rows)) == (1 if task.kind == "causal_lm" else len(split.rows))


@pytest.mark.parametrize("choice", sorted(FORMATS))
def test_labels_have_the_hubs_order(choice: str, tmp_path: Path) -> None:
    task = described(choice)
    feature = hub(choice)["train"].features.get(task.target)
    names = getattr(getattr(feature, "feature", feature), "names", None)
    if task.kind in ("classification", "token_classification", "image_classification"):
        assert task.labels == names
    else:
        assert not task.labels


PROMPTS = {
    "cola": ("cola sentence: text 0", "unacceptable"),
    "mrpc": ("mrpc sentence1: one 0 sentence2: two 0", "not_equivalent"),
    "mnli": ("mnli hypothesis: two 0 premise: one 0", "entailment"),
    "qnli": ("qnli question: one 0 sentence: two 0", "entailment"),
    "boolq": ("boolq passage: Oil floats on water. question: is oil lighter", "True"),
    "cb": ("cb hypothesis: it was lost premise: It was lost.", "entailment"),
    "multirc": ("multirc question: Who ran? answer: Ann paragraph: Ann and Bo ran.", "True"),
    "wic": (
        "wic sentence1: Do you want to come over to my *place*? sentence2: A *place* of worship. word: place",
        "False",
    ),
    "wsc": (
        "wsc text: * Mark * told Pete many lies about himself, which Pete included in his book. # He # should have been more "
        "skeptical.",
        "False",
    ),
    "imdb": ("Review: text 0 Is the review negative or positive?", "negative"),
    "ag_news": ("text 0 Is this news about the world, sports, business or technology?", "world"),
    "trec": ("trec text: What is it 0 ?", "abbreviation"),
    "e2e_nlg": ("name[Alimentum], area[city centre]", "Alimentum is in the centre."),
    "xsum": ("summarize: A long\ntext.", "Short."),
    "samsum": ("summarize: A: hi\r\nB: bye", "They meet."),
    "wmt16_en_ro": ("translate English to Romanian: Good day", "Bună ziua"),
    "gsm8k": ("Question: How much is 0 and 1?\nAnswer:", "It is <<0+1=1>>1.\n#### 1"),
}
"""What the first row reads like as text, and its answer. GLUE and SuperGLUE are as in Raffel et al. (2020, appendix D)."""


@pytest.mark.parametrize("choice", PROMPTS)
def test_prompts_read_well(choice: str, tmp_path: Path) -> None:
    task, _, data = loaded(choice, tmp_path / "data", SETTINGS["t5"])
    row = (
        next(iter(sorted(data.splits["train"], key=lambda row: "0" not in row["text"])))
        if task.holdout
        else data.splits["train"][0]
    )
    words = task.verbalizer or task.labels
    assert (row["text"], words[row["target"]] if words else row["target"]) == PROMPTS[choice]


def test_pairs_of_an_encoder(tmp_path: Path) -> None:
    _, _, data = loaded("multirc", tmp_path / "data", SETTINGS["bert"])
    row = data.splits["train"][0]
    assert row == {"text": "Who ran? Ann", "text_pair": "Ann and Bo ran.", "target": 1, "group": "0-0"}


def test_choices_go_on_from_the_premise(tmp_path: Path) -> None:
    _, _, data = loaded("copa", tmp_path / "data", SETTINGS["t5"])
    first, second = data.splits["train"]
    assert first["text"] == "The man broke his toe because"
    assert first["choices"] == ["he got a hole in his sock.", "he dropped a hammer on his foot."]
    assert (first["target"], second["target"]) == (1, 0)
    assert second["text"] == "I ran out of breath so"
    assert second["choices"] == ["I climbed the stairs.", "Tom read."]


def test_names_to_choose_from(tmp_path: Path) -> None:
    task, kind_class, data = loaded("record", tmp_path / "data", SETTINGS["t5"])
    row = data.splits["train"][0]
    told = 'The ship left Oslo on Monday. It reached Bergen "safely." Nobody was hurt'
    assert row["text"] == f"record query: It came to @placeholder. passage: {told}"
    assert (row["choices"], row["target"], row["references"]) == (["Oslo", "Bergen"], 1, ["Bergen"])
    kind = kind_class(task, processor("t5"), SETTINGS["t5"])
    # The places of a right name and a wrong one, compared as texts.
    assert kind.measure([1, 0], data.splits["train"]) == {"record": 0.5, "record_exact_match": 0.5}


@pytest.mark.parametrize(
    ("text", "first", "second", "expected"),
    [
        # A pronoun before the noun, a noun of several words, and a span that the text writes in another way.
        ("When he came, the tall man sat.", (4, "tall man"), (1, "he"), "When # he # came, the * tall man * sat."),
        ("Ann's dog, it barked.", (0, "Ann"), (2, "it"), "* Ann *'s dog, # it # barked."),
        ("The cat sat as it was tired.", (0, "the cat"), (4, "it"), "* The cat * sat as # it # was tired."),
        ("The cat sat as it was tired.", (0, "That cat"), (4, "it"), "* The cat * sat as # it # was tired."),
    ],
)
def test_marks_of_a_winograd_schema(text: str, first: tuple, second: tuple, expected: str) -> None:
    row = {"text": text, "span1_index": first[0], "span1_text": first[1], "span2_index": second[0], "span2_text": second[1]}
    assert preparing.wsc(Dataset.from_list([row]), described("wsc"))["text"] == [expected]


def test_a_function_for_other_data_says_what_it_needs() -> None:
    with pytest.raises(TaskError, match=r"needs the columns text, span1_index.* lack span1_index.*task.prepare=null"):
        preparing.wsc(Dataset.from_list([{"text": "a"}]), described("wsc"))


def test_rows_without_text_are_taken_out(tmp_path: Path) -> None:
    _, _, data = loaded("samsum", tmp_path / "data", SETTINGS["t5"])
    assert data.splits["train"]["target"][:] == ["They meet.", "They differ."]


SHARED = Path(__file__).resolve().parents[3].parent / "shared" / "data"
LOCAL = {
    "cb": {}, "cola": {}, "e2e_nlg": {}, "gsm8k": {}, "mrpc": {}, "rte": {}, "sst2": {}, "stsb": {}, "trec": {},
    "wnut_17": {}, "wikitext2_raw": {"train_split": "validation", "validation_split": "test", "test_split": None},
    "digits": {},
}  # fmt: skip


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real data sets of ../shared/data are not there")
@pytest.mark.parametrize("folder", LOCAL)
def test_local_copies_load_with_the_same_config(folder: str) -> None:
    task = described("wikitext" if folder == "wikitext2_raw" else folder)
    task = dataclasses.replace(task, data=str(SHARED / folder), **LOCAL[folder])
    settings = SETTINGS["vit"] if folder == "digits" else SETTINGS["gpt2"]
    if task.kind == "regression":
        settings = SETTINGS["bert"]
    data = load(task, choose(task, settings), progress=False)
    assert len(data.splits["train"]) > 200
    assert data.labels == task.labels
    assert data.notes == ([] if folder != "digits" else ["pixels are numbers from 0, which is black, to 16, which is white"])


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real data sets of ../shared/data are not there")
@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_digits_are_those_of_the_shared_copy(split: str) -> None:
    assert digits.generate(split) == Dataset.from_parquet(str(SHARED / "digits" / f"{split}.parquet")).to_list()
