"""Dates and times rewritten between notations: text that the project generates itself.

Two kinds of text come from here, both made of moments between 1970 and 2069, accurate to the minute.

* `generate` makes the task: a moment in one of several natural notations, to be written in the harbour log notation ::

      sea>Mar 3, 2026 4:05 pm      ->  16h05 03.2026.03

  that is the hour, an ``h`` and the minute, a space, then day, year and month joined by dots.
* `pretraining_pairs` makes the text on which the embedded backbone is pretrained: the same source notations, each to be
  rewritten in one of `STYLES`, which the word before the ``>`` names.

The letters of a pattern are ``Y`` (year), ``m`` (month as two digits), ``b`` (month as three letters), ``d`` (day as two
digits), ``H`` (hour from 00 to 23), ``I`` (hour from 01 to 12), ``M`` (minute) and ``p`` (am or pm); every other character
stands for itself.

No source is ambiguous: of the numeric dates, those with dots put the day first and those with dashes the year first, and a
twelve-hour time always says am or pm.

The pretraining text never shows the task's target notation: no style has the year in the middle of a date, so that a group
of four digits between two dots, which is what `TARGET_NOTATION` looks for, cannot come up. The word "sea" does not occur
either, and the dates are those of the train split only.
"""

import datetime
import functools
import hashlib
import random
import re
from collections.abc import Iterator

SPLITS = ("train", "validation", "test")
INSTRUCTION = "sea"
TARGET_PATTERN = "HhM d.Y.m"
# The date alone is enough to recognise the notation: nothing that the pretraining text contains looks like it.
TARGET_NOTATION = re.compile(r"\d{2}\.\d{4}\.\d{2}")

FIRST_DAY = datetime.date(1970, 1, 1)
LAST_DAY = datetime.date(2069, 12, 31)
MINUTES_PER_DAY = 24 * 60

# Written out instead of taken from strftime, whose names depend on the locale of the machine.
MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip
STYLES = {
    "iso": "Y-m-d H:M",
    "us": "m/d/Y I:M p",
    "de": "d.m.Y, H.M",
    "fr": "HhM d/m/Y",
    "log": "YmdTHM",
    "id": "d b Y",
    "clk": "H:M",
    "rail": "H.M d-b",
    "file": "Y_m_d@H-M",
    "led": "Y.m.d",
    "stp": "H:M Y",
    "dia": "b d Y",
    "lab": "m.Y d",
    "cen": "Y b d",
    "bus": "M.H m.d",
    "ship": "d-Y HhM",
}
"""The notations of the pretraining text, by the words that ask for them."""


@functools.cache
def days_of(split: str) -> tuple[datetime.date, ...]:
    """Return the calendar dates that belong to a split, in order.

    A date's place is a hash of the date, so it depends neither on a seed nor on the number of rows: eight dates in
    ten are train, one is validation and one is test. As a whole date goes to one split, no two splits share a date,
    and therefore no moment either.
    """
    if split not in SPLITS:
        raise ValueError(f"The split {split!r} is unknown; the splits are {', '.join(SPLITS)}.")
    days = []
    for ordinal in range(FIRST_DAY.toordinal(), LAST_DAY.toordinal() + 1):
        day = datetime.date.fromordinal(ordinal)
        bucket = int.from_bytes(hashlib.sha256(day.isoformat().encode("ascii")).digest()[:8], "big") % 10
        if split == {8: "validation", 9: "test"}.get(bucket, "train"):
            days.append(day)
    return tuple(days)


def render(moment: datetime.datetime, pattern: str) -> str:
    """Write a moment in a pattern of the letters that the module's docstring lists."""
    fields = {
        "Y": f"{moment.year:04d}",
        "m": f"{moment.month:02d}",
        "b": MONTHS[moment.month - 1][:3],
        "d": f"{moment.day:02d}",
        "H": f"{moment.hour:02d}",
        "I": f"{_twelve(moment.hour):02d}",
        "M": f"{moment.minute:02d}",
        "p": _half(moment.hour),
    }
    return "".join(fields.get(character, character) for character in pattern)


def generate(split: str, rows: int, seed: int = 0) -> list[dict[str, str]]:
    """Return `rows` rows of the task, each a source and its target, about `rows` different moments of one split."""
    _check_rows(rows)
    days = days_of(split)
    distinct = len(days) * MINUTES_PER_DAY
    if rows > distinct:
        raise ValueError(f"The {split} split has {distinct} distinct moments, fewer than the {rows} rows asked for.")
    rng = random.Random(f"dates/{split}/{seed}")
    table = []
    for index in rng.sample(range(distinct), rows):
        day, minutes = divmod(index, MINUTES_PER_DAY)
        moment = _moment(days[day], minutes)
        source = f"{INSTRUCTION}>{_natural(rng, moment)}"
        table.append({"source": source, "target": render(moment, TARGET_PATTERN)})
    return table


def pretraining_pairs(rows: int, seed: int = 0) -> Iterator[tuple[str, str]]:
    """Return an iterator over `rows` pretraining pairs: an instruction with a natural notation, and what it asks for.

    The moments are drawn with replacement from the dates of the train split.
    """
    _check_rows(rows)
    return _pairs(rows, random.Random(f"dates/pretraining/{seed}"))


def _pairs(rows: int, rng: random.Random) -> Iterator[tuple[str, str]]:
    days = days_of("train")
    for _ in range(rows):
        moment = _moment(rng.choice(days), rng.randrange(MINUTES_PER_DAY))
        style = rng.choice(tuple(STYLES))
        yield f"{style}>{_natural(rng, moment)}", render(moment, STYLES[style])


def _natural(rng: random.Random, moment: datetime.datetime) -> str:
    """Write a moment as a person might, in a notation drawn at random."""
    year, month, day, hour, minute = moment.year, MONTHS[moment.month - 1], moment.day, moment.hour, moment.minute
    date = rng.choice(
        (
            f"{day} {month} {year}",
            f"{month[:3]} {day}, {year}",
            f"{day:02d}.{moment.month:02d}.{year}",
            f"{year}-{moment.month:02d}-{day:02d}",
        )
    )
    time = rng.choice((f"{hour:02d}:{minute:02d}", f"{_twelve(hour)}:{minute:02d} {_half(hour)}"))
    return rng.choice((f"{date} {time}", f"{time} {date}"))


def _moment(day: datetime.date, minutes: int) -> datetime.datetime:
    return datetime.datetime(day.year, day.month, day.day, *divmod(minutes, 60))


def _twelve(hour: int) -> int:
    return (hour + 11) % 12 + 1


def _half(hour: int) -> str:
    return "am" if hour < 12 else "pm"


def _check_rows(rows: int) -> None:
    if rows < 1:
        raise ValueError(f"The number of rows must be at least 1, but it is {rows}.")
