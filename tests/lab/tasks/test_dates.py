"""The text of the task `dates`: what is promised about it, checked without the generator's own rendering."""

import datetime
import random
import re

import pytest

from deltaexp.lab.tasks import dates

HELPER_SEEDS = (0, 1)
ROWS = [
    {"source": "harbour log > 8 Sep 2018, 2.55 a.m.", "target": "02h55 08.2018.09"},
    {"source": "harbour log > 2031-02-23, 10:44", "target": "10h44 23.2031.02"},
]
PAIRS = [("passport > 2065/07/23 6.09 p.m.", "23 Jul 2065"), ("H.M@bY > 6:41 pm on Sep 20, 1976", "18.41@Sep1976")]


def parse_time(text: str) -> datetime.time:
    """Read one of the natural notations of a time by strptime, after the words for quarters have been removed."""
    shift = 0
    for words, minutes in (("quarter past ", 15), ("half past ", 30), ("quarter to ", -15)):
        if text.startswith(words):
            text, shift = text.removeprefix(words), minutes
    text = text.replace("a.m.", "am").replace("p.m.", "pm")
    for form in ("%H:%M", "%I:%M %p", "%I.%M %p", "%I %p"):
        try:
            moment = datetime.datetime.strptime(text, form)
        except ValueError:
            continue
        return (moment + datetime.timedelta(minutes=shift)).time()
    raise AssertionError(f"no known notation of a time: {text}")


def parse_date(text: str) -> datetime.date:
    """Read one of the natural notations of a date by strptime, and hold the weekday in it, if any, to the calendar."""
    weekday = re.match(r"((?:Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)day, |(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun) )", text)
    text = re.sub(r"^the (\d+)(?:st|nd|rd|th) of ", r"\1 ", text[weekday.end() if weekday else 0 :])
    for form in ("%d %B %Y", "%B %d, %Y", "%d %b %Y", "%b %d, %Y", "%d.%m.%Y", "%Y-%m-%d", "%Y/%m/%d"):
        try:
            date = datetime.datetime.strptime(text, form).date()
        except ValueError:
            continue
        assert weekday is None or date.strftime("%A").startswith(weekday[0].strip(" ,")[:3])
        return date
    raise AssertionError(f"no known notation of a date: {text}")


def parse(source: str) -> datetime.datetime:
    """Read the moment that a source tells, whatever its instruction."""
    text = source.split(" > ", 1)[1]
    if " on " in text:
        time, date = text.split(" on ")
    else:
        found = re.fullmatch(r"(.*\d)(?: at |, | )((?:half |quarter |\d{1,2}[:.]\d\d\b(?!\.\d)|\d{1,2} [ap]m).*)", text)
        assert found, text
        date, time = found.groups()
    return datetime.datetime.combine(parse_date(date), parse_time(time))


def read_target(target: str) -> datetime.datetime:
    return datetime.datetime.strptime(target, "%Hh%M %d.%Y.%m")


@pytest.mark.parametrize("split", dates.SPLITS)
def test_target_tells_the_moment_of_the_source(split: str) -> None:
    for row in dates.generate(split, 3000, seed=5):
        assert row["source"].startswith("harbour log > ")
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
    text = "\n".join(row["source"] for row in dates.generate("train", 3000))
    for piece in (
        "half past",
        "quarter past",
        "quarter to",
        "p.m.",
        " pm",
        " on ",
        "the 1st of",
        ", 2",
        "Sunday",
        "Sun ",
    ):
        assert piece in text


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
        for seed in HELPER_SEEDS:
            rows = [read_target(row["target"]) for row in dates.generate(split, 4000, seed)]
            assert len(set(rows)) == len(rows)
            moments[split] |= {moment.date() for moment in rows}
    assert not moments["train"] & moments["test"]
    assert not moments["train"] & moments["validation"]
    assert not moments["validation"] & moments["test"]


def test_pretraining_never_shows_the_target_notation() -> None:
    for source, target in dates.pretraining_pairs(40_000, seed=11):
        assert not dates.TARGET_NOTATION.search(source), source
        assert not dates.TARGET_NOTATION.search(target), target
        assert "harbour" not in source
    # ... and cannot, as no order puts the year between two other fields, and no joint is a dot.
    assert all(order.index("Y") != 1 for order in dates.DATE_ORDERS[3])
    assert "." not in dates.JOINTS
    moment = datetime.datetime(2026, 3, 3, 16, 5)
    assert not any(dates.TARGET_NOTATION.search(dates.render(moment, pattern)) for pattern in dates.STYLES.values())


def test_pretraining_uses_train_dates_and_means_what_it_says() -> None:
    train = set(dates.days_of("train"))
    forms = {"iso": "%Y-%m-%d %H:%M", "american": "%m/%d/%Y %I:%M %p", "german": "%d.%m.%Y, %H.%M"}
    seen = set()
    for source, target in dates.pretraining_pairs(10_000, seed=12):
        moment = parse(source)
        assert moment.date() in train
        name = source.split(" > ")[0]
        if name in forms:
            assert datetime.datetime.strptime(target, forms[name]) == moment
            seen.add(name)
    assert seen == set(forms)


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
