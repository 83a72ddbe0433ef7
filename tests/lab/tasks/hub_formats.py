"""A few made-up rows of each shipped task, in the columns and types that its data set has on the Hub."""

import io
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, Translation, Value
from PIL import Image as Picture

TEXT, INT = Value("string"), Value("int32")
FALSE_TRUE = ClassLabel(names=["False", "True"])
NER = ["O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC", "B-MISC", "I-MISC"]
WNUT = [
    "O", "B-corporation", "I-corporation", "B-creative-work", "I-creative-work", "B-group", "I-group", "B-location",
    "I-location", "B-person", "I-person", "B-product", "I-product",
]  # fmt: skip
CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
FINE = [f"{coarse}:{n}" for coarse in ("ABBR", "ENTY", "DESC", "HUM", "LOC", "NUM") for n in range(8)]


def picture(colour: int) -> dict[str, Any]:
    file = io.BytesIO()
    Picture.new("RGB", (32, 32), (colour, 0, 0)).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def pairs(first: str, second: str, names: list[str]) -> tuple[dict, list[dict]]:
    features = {first: TEXT, second: TEXT, "label": ClassLabel(names=names), "idx": INT}
    return features, [{first: f"one {n}", second: f"two {n}", "label": n % len(names), "idx": n} for n in range(6)]


def single(column: str, names: list[str], index: bool = True) -> tuple[dict, list[dict]]:
    features = {column: TEXT, "label": ClassLabel(names=names)} | ({"idx": INT} if index else {})
    rows = [{column: f"text {n}", "label": n % len(names)} | ({"idx": n} if index else {}) for n in range(6)]
    return features, rows


def columns(features: dict, *rows: tuple) -> tuple[dict, list[dict]]:
    return features, [dict(zip(features, row, strict=True)) for row in rows]


WSC_TEXT = "Mark told Pete many lies about himself, which Pete included in his book. He should have been more skeptical."
PASSAGE = 'The ship left Oslo on Monday\n@highlight\nIt reached Bergen "safely."\n@highlight\nNobody was hurt'

FORMATS: dict[str, tuple[dict, list[dict]]] = {
    "cola": single("sentence", ["unacceptable", "acceptable"]),
    "sst2": single("sentence", ["negative", "positive"]),
    "mrpc": pairs("sentence1", "sentence2", ["not_equivalent", "equivalent"]),
    "qqp": pairs("question1", "question2", ["not_duplicate", "duplicate"]),
    "mnli": pairs("premise", "hypothesis", ["entailment", "neutral", "contradiction"]),
    "qnli": pairs("question", "sentence", ["entailment", "not_entailment"]),
    "rte": pairs("sentence1", "sentence2", ["entailment", "not_entailment"]),
    "wnli": pairs("sentence1", "sentence2", ["not_entailment", "entailment"]),
    "stsb": columns(
        {"sentence1": TEXT, "sentence2": TEXT, "label": Value("float32"), "idx": INT},
        ("a", "b", 5.0, 0), ("c", "d", 2.5, 1), ("e", "f", 0.0, 2),
    ),
    "boolq": columns(
        {"question": TEXT, "passage": TEXT, "idx": INT, "label": FALSE_TRUE},
        ("is oil lighter", "Oil floats on water.", 0, 1), ("is it heavy", "It is light.", 1, 0),
    ),
    "cb": columns(
        {
            "premise": TEXT, "hypothesis": TEXT, "idx": INT,
            "label": ClassLabel(names=["entailment", "contradiction", "neutral"]),
        },
        ("It was lost.", "it was lost", 0, 0), ("It was not.", "it was lost", 1, 1), ("Was it?", "it was lost", 2, 2),
    ),
    "copa": columns(
        {
            "premise": TEXT, "choice1": TEXT, "choice2": TEXT, "question": TEXT, "idx": INT,
            "label": ClassLabel(names=["choice1", "choice2"]),
        },
        ("The man broke his toe.", "He got a hole in his sock.", "He dropped a hammer on his foot.", "cause", 0, 1),
        ("I ran out of breath.", "I climbed the stairs.", "Tom read.", "effect", 1, 0),
    ),
    "multirc": columns(
        {
            "paragraph": TEXT, "question": TEXT, "answer": TEXT, "idx": {"paragraph": INT, "question": INT, "answer": INT},
            "label": FALSE_TRUE,
        },
        ("Ann and Bo ran.", "Who ran?", "Ann", {"paragraph": 0, "question": 0, "answer": 0}, 1),
        ("Ann and Bo ran.", "Who ran?", "Cy", {"paragraph": 0, "question": 0, "answer": 1}, 0),
        ("Ann and Bo ran.", "Who sat?", "Bo", {"paragraph": 0, "question": 1, "answer": 0}, 0),
    ),
    "record": columns(
        {
            "passage": TEXT, "query": TEXT, "entities": List(TEXT),
            "entity_spans": List({"text": TEXT, "start": INT, "end": INT}), "answers": List(TEXT),
            "idx": {"passage": INT, "query": INT},
        },
        (PASSAGE, "It came to @placeholder.", ["Oslo", "Bergen", "Oslo"], [], ["Bergen", "Bergen"], {"passage": 0, "query": 0}),
        (PASSAGE, "It left @placeholder.", ["Bergen", "Oslo"], [], ["Oslo"], {"passage": 0, "query": 1}),
    ),
    "wic": columns(
        {
            "word": TEXT, "sentence1": TEXT, "sentence2": TEXT, "start1": INT, "start2": INT, "end1": INT, "end2": INT,
            "idx": INT, "label": FALSE_TRUE,
        },
        ("place", "Do you want to come over to my place?", "A place of worship.", 31, 2, 36, 7, 0, 0),
        ("run", "A run of luck.", "They had a run.", 2, 11, 5, 14, 1, 1),
    ),
    "wsc": columns(
        {
            "text": TEXT, "span1_index": INT, "span2_index": INT, "span1_text": TEXT, "span2_text": TEXT, "idx": INT,
            "label": FALSE_TRUE,
        },
        (WSC_TEXT, 0, 13, "Mark", "He", 0, 0), (WSC_TEXT, 2, 13, "Pete", "He", 1, 1),
    ),
    "trec": columns(
        {
            "text": TEXT, "coarse_label": ClassLabel(names=["ABBR", "ENTY", "DESC", "HUM", "LOC", "NUM"]),
            "fine_label": ClassLabel(names=FINE),
        },
        *[(f"What is it {n} ?", n % 6, n) for n in range(12)],
    ),
    "imdb": single("text", ["neg", "pos"], index=False),
    "ag_news": single("text", ["World", "Sports", "Business", "Sci/Tech"], index=False),
    "e2e_nlg": columns(
        {"meaning_representation": TEXT, "human_reference": TEXT},
        ("name[Alimentum], area[city centre]", "Alimentum is in the centre."),
        ("name[Alimentum], area[city centre]", "In the centre there is Alimentum."),
    ),
    "xsum": columns({"document": TEXT, "summary": TEXT, "id": TEXT}, ("A long\ntext.", "Short.", "1"), ("More.", "Less.", "2")),
    "samsum": columns(
        {"id": TEXT, "dialogue": TEXT, "summary": TEXT},
        ("1", "A: hi\r\nB: bye", "They meet."), ("2", None, "Nothing."), ("3", "C: yes\r\nD: no", "They differ."),
    ),
    "wmt16_en_ro": columns(
        {"translation": Translation(languages=["ro", "en"])},
        ({"ro": "Bună ziua", "en": "Good day"},), ({"ro": "Da", "en": "Yes"},),
    ),
    "squad": columns(
        {
            "id": TEXT, "title": TEXT, "context": TEXT, "question": TEXT,
            "answers": {"text": List(TEXT), "answer_start": List(INT)},
        },
        ("1", "T", "Oil floats on water.", "What floats?", {"text": ["Oil"], "answer_start": [0]}),
        ("2", "T", "Oil floats on water.", "On what?", {"text": ["water", "on water"], "answer_start": [14, 11]}),
    ),
    "wikitext": columns({"text": TEXT}, ("",), (" = Title = \n",), ("",), (" Some words of text , as they are . \n",)),
    "alpaca": columns(
        {"instruction": TEXT, "input": TEXT, "output": TEXT, "text": TEXT},
        *[(f"Add {n}.", f"{n}" if n % 2 else "", f"Sum {n}.", "") for n in range(6)],
    ),
    "gsm8k": columns(
        {"question": TEXT, "answer": TEXT},
        *[(f"How much is {n} and 1?", f"It is <<{n}+1={n + 1}>>{n + 1}.\n#### {n + 1}") for n in range(6)],
    ),
    "conll2003": columns(
        {
            "id": TEXT, "tokens": List(TEXT), "pos_tags": List(INT), "chunk_tags": List(INT),
            "ner_tags": List(ClassLabel(names=NER)),
        },
        ("0", ["Ann", "saw", "Oslo"], [0, 0, 0], [0, 0, 0], [1, 0, 5]), ("1", ["EU", "rejects"], [0, 0], [0, 0], [3, 0]),
    ),
    "wnut_17": columns(
        {"id": TEXT, "tokens": List(TEXT), "ner_tags": List(ClassLabel(names=WNUT))},
        ("0", ["@x", "Empire", "State"], [0, 7, 8]), ("1", ["no", "name"], [0, 0]),
    ),
    "beans": columns(
        {"image_file_path": TEXT, "image": Image(), "labels": ClassLabel(names=["angular_leaf_spot", "bean_rust", "healthy"])},
        *[(f"{n}.jpg", picture(n * 40), n % 3) for n in range(6)],
    ),
    "cifar10": columns(
        {"img": Image(), "label": ClassLabel(names=CIFAR10)}, *[(picture(n * 20), n) for n in range(10)],
    ),
}  # fmt: skip
UNLABELLED = {"cola", "sst2", "qqp", "mnli", "qnli", "rte", "wnli", "boolq", "cb", "copa", "multirc", "wic", "wsc"}
"""Those whose test split has -1 for each label."""
SPLITS = {
    "mnli": ["train", "validation_matched", "validation_mismatched", "test_matched", "test_mismatched"],
    "squad": ["train", "validation"],
    "alpaca": ["train"],
    **{choice: ["train", "test"] for choice in ("trec", "gsm8k", "ag_news", "cifar10")},
    "imdb": ["train", "test", "unsupervised"],
}
"""The splits on the Hub, where they are others than training, validation and test."""


def hub(choice: str) -> DatasetDict:
    """Return the splits of a data set as the Hub has them."""
    features, rows = FORMATS[choice]
    found = {}
    for split in SPLITS.get(choice, ["train", "validation", "test"]):
        public = not (split.startswith("test") and choice in UNLABELLED) and split != "unsupervised"
        kept = rows if public else [{**row, "label": -1} for row in rows]
        if choice == "record" and split == "test":
            kept = [{**row, "answers": []} for row in rows]
        found[split] = Dataset.from_list(kept, features=Features(features))
    return DatasetDict(found)
