"""Dates and times rewritten between notations: text that the project generates itself.

Two kinds of text come from here, both made of moments between 1970 and 2069, accurate to the minute.

* `generate` makes the task: a moment in one of several natural notations, to be written in the harbour log
  notation, for example ::

      harbour log > Tuesday, 3 March 2026 at 4:05 pm      ->  16h05 03.2026.03

  that is the hour, an ``h`` and the minute, a space, then day, year and month joined by dots.
* `pretraining_pairs` makes the text on which the embedded backbone is pretrained: the same source notations, each
  to be rewritten as an instruction says, which is either a pattern (``d/m/Y H:M``) or the name of a style (``iso``).

The letters of a pattern are ``Y`` (year), ``m`` (month as two digits), ``b`` (month as three letters), ``d`` (day as
two digits), ``H`` (hour from 00 to 23), ``I`` (hour from 01 to 12), ``M`` (minute) and ``p`` (am or pm); every other
character stands for itself.

No source is ambiguous: of the numeric dates, those with dots put the day first and those with dashes or slashes the
year first, and a twelve-hour time always says am or pm ("quarter to 12 pm" is 11:45, as the am or pm belongs to the
hour that is named).

The pretraining text never shows the task's target notation. A date in it consists of fields in the orders of
`DATE_ORDERS`, where the year is first or last whenever day and month are both there, and what joins a date to a time
is never a dot: hence a group of four digits between two dots, which is what `TARGET_NOTATION` looks for, cannot
come up. The words "harbour log" do not occur either, and the dates are those of the train split only.
"""

import datetime
import functools
import hashlib
import random
import re
from collections.abc import Iterator

SPLITS = ("train", "validation", "test")
INSTRUCTION = "harbour log"
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
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

# Every order of one, two or three date fields but the two with the year in the middle; ``m`` may become ``b``.
DATE_ORDERS = {
    3: ("Ymd", "Ydm", "dmY", "mdY"),
    2: ("Ym", "Yd", "mY", "dY", "md", "dm"),
    1: ("Y", "m", "d"),
}
DATE_SEPARATORS = ("-", "/", ".", " ", "_", "")
TIMES = ("H:M", "H.M", "HhM", "H-M", "HM", "I:M p", "I.Mp")
JOINTS = (" ", "T", "@", ", ")
STYLES = {
    "iso": "Y-m-d H:M",
    "american": "m/d/Y I:M p",
    "german": "d.m.Y, H.M",
    "french": "d/m/Y HhM",
    "compact": "YmdTHM",
    "passport": "d b Y",
    "clock": "H:M",
    "railway time": "H.M d-b",
    "night shift": "I:M p, d b",
    "file name": "Y_m_d@H-M",
}


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
        source = f"{INSTRUCTION} > {_natural(rng, moment)}"
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
        minutes = rng.randrange(MINUTES_PER_DAY)
        if rng.random() < 0.15:
            minutes -= minutes % 15  # or quarters of an hour, which have words of their own, would be rare
        moment = _moment(rng.choice(days), minutes)
        if rng.random() < 0.2:
            instruction = rng.choice(tuple(STYLES))
            pattern = STYLES[instruction]
        else:
            instruction = pattern = _pattern(rng)
        yield f"{instruction} > {_natural(rng, moment)}", render(moment, pattern)


def _pattern(rng: random.Random) -> str:
    """Draw a pattern: a date, a time, or both in either order."""
    fields = list(rng.choice(DATE_ORDERS[rng.choice((1, 2, 2, 3, 3, 3))]))
    if rng.random() < 0.3:
        fields = ["b" if field == "m" else field for field in fields]
    date = rng.choice(DATE_SEPARATORS).join(fields)
    time = rng.choice(TIMES)
    kind = rng.random()
    if kind < 0.2:
        return date
    if kind < 0.3:
        return time
    return rng.choice(JOINTS).join((date, time) if rng.random() < 0.5 else (time, date))


def _natural(rng: random.Random, moment: datetime.datetime) -> str:
    """Write a moment as a person might, in a notation drawn at random."""
    date, time = _natural_date(rng, moment), _natural_time(rng, moment)
    return rng.choice((f"{date} at {time}", f"{date}, {time}", f"{date} {time}", f"{time} on {date}"))


def _natural_date(rng: random.Random, moment: datetime.datetime) -> str:
    year, month, day = moment.year, MONTHS[moment.month - 1], moment.day
    forms = (
        f"{day} {month} {year}",
        f"{month} {day}, {year}",
        f"the {day}{_ordinal_ending(day)} of {month} {year}",
        f"{day} {month[:3]} {year}",
        f"{month[:3]} {day}, {year}",
        f"{day:02d}.{moment.month:02d}.{year}",
        f"{year}-{moment.month:02d}-{day:02d}",
        f"{year}/{moment.month:02d}/{day:02d}",
    )
    form = rng.randrange(len(forms))
    if form < 5 and rng.random() < 0.3:
        weekday = WEEKDAYS[moment.weekday()]
        return rng.choice((f"{weekday}, ", f"{weekday[:3]} ")) + forms[form]
    return forms[form]


def _natural_time(rng: random.Random, moment: datetime.datetime) -> str:
    hour, minute = moment.hour, moment.minute
    if minute % 15 == 0 and rng.random() < 0.7:
        named = (hour + minute // 45) % 24
        words = {0: "", 15: "quarter past ", 30: "half past ", 45: "quarter to "}[minute]
        return f"{words}{_twelve(named)} {_half(named)}"
    return rng.choice(
        (
            f"{hour:02d}:{minute:02d}",
            f"{_twelve(hour)}:{minute:02d} {_half(hour)}",
            f"{_twelve(hour)}.{minute:02d} {_half(hour)[0]}.m.",
        )
    )


def _moment(day: datetime.date, minutes: int) -> datetime.datetime:
    return datetime.datetime(day.year, day.month, day.day, *divmod(minutes, 60))


def _twelve(hour: int) -> int:
    return (hour + 11) % 12 + 1


def _half(hour: int) -> str:
    return "am" if hour < 12 else "pm"


def _ordinal_ending(day: int) -> str:
    return "th" if day in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")


def _check_rows(rows: int) -> None:
    if rows < 1:
        raise ValueError(f"The number of rows must be at least 1, but it is {rows}.")
