"""The text of the task `dates`: what is promised about it, checked without the generator's own rendering."""

import datetime
import random
import re

import pytest

from deltaexp.lab.tasks import dates

SEEDS = (0, 1)
ROWS = [
    {"source": "sea>02:55 Sep 8, 2018", "target": "02h55 08.2018.09"},
    {"source": "sea>23 February 2031 10:44", "target": "10h44 23.2031.02"},
]
PAIRS = [("dia>2029-05-09 5:48 am", "May 09 2029"), ("log>30.11.2020 19:26", "20201130T1926")]


def parse(source: str) -> datetime.datetime:
    """Read the moment that a source tells, by strptime: all the notations that fit must tell the same one."""
    text = source.split(">", 1)[1]
    found = set()
    for date in ("%d %B %Y", "%b %d, %Y", "%d.%m.%Y", "%Y-%m-%d"):
        for time in ("%H:%M", "%I:%M %p"):
            for form in (f"{date} {time}", f"{time} {date}"):
                try:
                    found.add((form, datetime.datetime.strptime(text, form)))
                except ValueError:
                    continue
    assert len({moment for _, moment in found}) == 1, f"{text}: {found}"
    return found.pop()[1]


def read_target(target: str) -> datetime.datetime:
    return datetime.datetime.strptime(target, "%Hh%M %d.%Y.%m")


@pytest.mark.parametrize("split", dates.SPLITS)
def test_target_tells_the_moment_of_the_source(split: str) -> None:
    for row in dates.generate(split, 600, seed=5):
        assert row["source"].startswith("sea>")
        assert parse(row["source"]) == read_target(row["target"]), row
        assert re.fullmatch(r"\d\dh\d\d \d\d\.\d{4}\.\d\d", row["target"])
        assert dates.TARGET_NOTATION.search(row["target"])


def test_targets_spelt_out() -> None:
    moment = datetime.datetime(2026, 3, 3, 16, 5)
    assert dates.render(moment, dates.TARGET_PATTERN) == "16h05 03.2026.03"
    assert dates.render(moment, "d b Y, I:M p") == "03 Mar 2026, 04:05 pm"
    assert dates.render(datetime.datetime(1999, 12, 31, 0, 7), "I:M p") == "12:07 am"
    assert dates.render(datetime.datetime(1999, 12, 31, 12, 0), "I.Mp") == "12.00pm"


def test_every_notation_comes_up() -> None:
    text = "\n".join(row["source"] for row in dates.generate("train", 500))
    date = r"(?:\d+ [A-Z][a-z]{2,8} \d{4}|[A-Z][a-z]{2} \d+, \d{4}|\d\d\.\d\d\.\d{4}|\d{4}-\d\d-\d\d)"
    time = r"(?:\d\d:\d\d|\d{1,2}:\d\d [ap]m)"
    assert all(re.fullmatch(f"sea>(?:{date} {time}|{time} {date})", line) for line in text.splitlines())
    for piece in date[3:-1].split("|"):
        for half in time[3:-1].split("|"):
            assert re.search(f"^sea>{piece} {half}$", text, re.MULTILINE)
            assert re.search(f"^sea>{half} {piece}$", text, re.MULTILINE)


@pytest.mark.parametrize("split", dates.SPLITS)
def test_same_arguments_same_rows_and_no_global_state(split: str) -> None:
    random.seed(3)
    state = random.getstate()
    first = dates.generate(split, 50, seed=7)
    random.seed(4)
    assert dates.generate(split, 50, seed=7) == first
    assert dates.generate(split, 50, seed=8) != first
    random.seed(3)
    list(dates.pretraining_pairs(20))
    assert random.getstate() == state


def test_text_does_not_change_from_one_version_to_the_next() -> None:
    # The embedded backbone and the figures in the documentation were made with exactly this text.
    assert dates.generate("test", 2, seed=0) == ROWS
    assert list(dates.pretraining_pairs(2, seed=0)) == PAIRS


def test_pretraining_is_deterministic() -> None:
    assert list(dates.pretraining_pairs(100, seed=1)) == list(dates.pretraining_pairs(100, seed=1))
    assert list(dates.pretraining_pairs(100, seed=1)) != list(dates.pretraining_pairs(100, seed=2))
    assert list(dates.pretraining_pairs(10, seed=1)) == list(dates.pretraining_pairs(100, seed=1))[:10]


def test_splits_share_no_date() -> None:
    days = [set(dates.days_of(split)) for split in dates.SPLITS]
    assert sum(len(part) for part in days) == len(set().union(*days)) == 36525
    assert len(days[0]) > 0.75 * 36525
    assert min(len(part) for part in days) > 0.08 * 36525
    moments = {split: set() for split in dates.SPLITS}
    for split in dates.SPLITS:
        for seed in SEEDS:
            rows = [read_target(row["target"]) for row in dates.generate(split, 1000, seed)]
            assert len(set(rows)) == len(rows)
            moments[split] |= {moment.date() for moment in rows}
    assert not moments["train"] & moments["test"]
    assert not moments["train"] & moments["validation"]
    assert not moments["validation"] & moments["test"]


def test_pretraining_never_shows_the_target_notation() -> None:
    for source, target in dates.pretraining_pairs(20_000, seed=11):
        assert not dates.TARGET_NOTATION.search(source), source
        assert not dates.TARGET_NOTATION.search(target), target
        assert not source.startswith("sea")
    # ... and cannot: what a style writes has the same shape for every moment, so one moment stands for them all.
    moment = datetime.datetime(2026, 3, 3, 16, 5)
    assert not any(dates.TARGET_NOTATION.search(dates.render(moment, pattern)) for pattern in dates.STYLES.values())
    assert dates.TARGET_PATTERN not in dates.STYLES.values()
    assert dates.INSTRUCTION not in dates.STYLES


def test_pretraining_uses_train_dates_and_means_what_it_says() -> None:
    train = set(dates.days_of("train"))
    # The letters of a pattern are strptime's own, but for `p`, whose half of the day strptime reads in capitals too.
    forms = {name: re.sub("([YmbdHIMp])", r"%\1", pattern) for name, pattern in dates.STYLES.items()}
    seen = set()
    for source, target in dates.pretraining_pairs(1_000, seed=12):
        moment = parse(source)
        assert moment.date() in train
        name = source.split(">")[0]
        letters = dates.STYLES[name]
        # A style without a year is read with a leap year, or 29 February could not be.
        year, form = ("", "") if "Y" in letters else (" 2000", " %Y")
        read = datetime.datetime.strptime(target + year, forms[name] + form)
        for letter, field in (("Y", "year"), ("m", "month"), ("b", "month"), ("d", "day"), ("M", "minute")):
            assert letter not in letters or getattr(read, field) == getattr(moment, field)
        assert ("H" not in letters and "I" not in letters) or read.hour == moment.hour
        seen.add(name)
    assert seen == set(dates.STYLES)


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"The split 'dev' is unknown; the splits are train, validation, test\."):
        dates.generate("dev", 1)
    with pytest.raises(ValueError, match=r"The number of rows must be at least 1, but it is 0\."):
        dates.generate("train", 0)
    with pytest.raises(ValueError, match=r"The number of rows must be at least 1, but it is -2\."):
        dates.pretraining_pairs(-2)
    distinct = len(dates.days_of("test")) * 1440
    with pytest.raises(ValueError, match=rf"has {distinct} distinct moments, fewer than the {distinct + 1} rows"):
        dates.generate("test", distinct + 1)
