"""The built-in corpus: English -> German localisation of dates, times, numbers, prices, units and lists of them.

The German text is a function of the English one (checked while generating), so a model can in principle be perfect,
and some ordered pairs of kinds stand next to each other only in the test part: it measures composition, not memory.
"""

from __future__ import annotations

import datetime
import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

from babel.dates import format_date, format_time
from babel.numbers import format_currency, format_percent
from babel.units import format_unit
from num2words import num2words

from data_prep.partition import mix

HELD_OUT_SHARE = 0.4  # of the test part
# Ordered pairs of neighbours that occur in the test part only. Every kind stays common on both sides of other pairs.
HELD_OUT_PAIRS = frozenset(
    {
        ("date", "price"),
        ("price", "unit"),
        ("unit", "time"),
        ("time", "number"),
        ("number", "percent"),
        ("percent", "ordinal"),
        ("ordinal", "date"),
    }
)
_DATE_FORMATS = ("short", "medium", "long", "full", "full", "MMMM y")
_CURRENCIES = ("EUR", "USD", "GBP", "CHF", "JPY")
_UNITS = (
    "length-kilometer",
    "length-meter",
    "mass-kilogram",
    "volume-liter",
    "temperature-celsius",
    "duration-day",
    "duration-hour",
    "duration-minute",
    "speed-kilometer-per-hour",
)
_LIST_LENGTHS = (1, 2, 2, 3, 3, 3, 3)  # drawn evenly: few single items, because their closed sets are soon used up
_FIRST_DAY = datetime.date(1950, 1, 1)
_NUM_DAYS = 36_525  # 1950-2049

Pair = tuple[str, str]


@dataclass(frozen=True)
class DemoPair:
    """One pair; `kind` names its items in order ("date+price"), `held_out` marks neighbours never trained on."""

    source: str
    target: str
    kind: str
    held_out: bool


def _both(render: Callable[[str], str]) -> Pair:
    # Babel writes no-break spaces; SentencePiece normalises them, so decoded text could never equal the reference.
    return tuple(render(locale).replace("\u00a0", " ").replace("\u202f", " ") for locale in ("en", "de"))  # type: ignore[return-value]


@cache
def _date(day: int, form: str) -> Pair:
    date = _FIRST_DAY + datetime.timedelta(days=day)
    if form == "medium" and date.month == 5:
        form = "long"  # "May 1, 2030" is both in English, but German tells 01.05.2030 from 1. Mai 2030
    return _both(lambda locale: format_date(date, form, locale=locale))


@cache
def _time(minute: int) -> Pair:
    return _both(lambda locale: format_time(datetime.time(minute // 60, minute % 60), "short", locale=locale))


@cache
def _words(number: int, form: str) -> Pair:
    english, german = (num2words(number, lang=locale, to=form) for locale in ("en", "de"))
    # "two hundred and five" could also be the list of two hundred and five: write numbers the American way.
    return english.replace(",", "").replace(" and ", " "), german


@cache
def _price(cents: int, currency: str, form: str) -> Pair:
    return _both(lambda locale: format_currency(cents / 100, currency, locale=locale, format_type=form))  # type: ignore[arg-type]


@cache
def _unit(tenths: int, unit: str) -> Pair:
    return _both(lambda locale: format_unit(tenths / 10, unit, "long", locale=locale))


def _draw_date(rng: random.Random) -> Pair:
    return _date(rng.randrange(_NUM_DAYS), rng.choice(_DATE_FORMATS))


def _draw_time(rng: random.Random) -> Pair:
    return _time(rng.randrange(24 * 60))


def _draw_number(rng: random.Random) -> Pair:
    return _words(rng.randrange(10 ** rng.choice((2, 3, 4, 5))), "cardinal")


def _draw_ordinal(rng: random.Random) -> Pair:
    return _words(rng.randrange(1, 10 ** rng.choice((2, 3))), "ordinal")


def _draw_price(rng: random.Random) -> Pair:
    cents = rng.randrange(100, 10 ** rng.choice((4, 6, 8)))
    return _price(cents, rng.choice(_CURRENCIES), rng.choice(("standard", "name")))


def _draw_unit(rng: random.Random) -> Pair:
    tenths = rng.randrange(10 ** rng.choice((2, 3, 5)))
    return _unit(tenths if rng.random() < 0.5 else tenths // 10 * 10, rng.choice(_UNITS))


def _draw_percent(rng: random.Random) -> Pair:
    share = rng.randrange(1000) / 1000
    return _both(lambda locale: format_percent(share, locale=locale, decimal_quantization=False))


_DRAW: dict[str, Callable[[random.Random], Pair]] = {
    "date": _draw_date,
    "time": _draw_time,
    "number": _draw_number,
    "ordinal": _draw_ordinal,
    "price": _draw_price,
    "unit": _draw_unit,
    "percent": _draw_percent,
}


def is_held_out(kinds: tuple[str, ...]) -> bool:
    """Whether two neighbours of a list of kinds are a pair that only the test part may hold."""
    return any(pair in HELD_OUT_PAIRS for pair in itertools.pairwise(kinds))


def draw_pairs(seed: int) -> Iterator[DemoPair]:
    """An endless stream of distinct pairs, a pure function of the seed. Two targets for one source are an error."""
    rng = random.Random(mix(seed, 0xDE))
    german_of: dict[str, str] = {}
    seen: set[str] = set()
    names = tuple(_DRAW)
    while True:
        kinds = tuple(rng.choice(names) for _ in range(rng.choice(_LIST_LENGTHS)))
        items = [_DRAW[kind](rng) for kind in kinds]
        for english, german in items:
            assert german_of.setdefault(english, german) == german, f"{english!r}: {german!r}, {german_of[english]!r}"
        source, target = _join([i[0] for i in items], "and"), _join([i[1] for i in items], "und")
        if source in seen:
            continue
        seen.add(source)
        yield DemoPair(source, target, "+".join(kinds), is_held_out(kinds))


def make_corpus(seed: int, num_pairs: int, num_validation: int, num_test: int) -> dict[str, list[DemoPair]]:
    """The parts train, validation and test: disjoint, `num_pairs` distinct pairs together."""
    num_held_out = round(num_test * HELD_OUT_SHARE)
    common: list[DemoPair] = []
    held_out: list[DemoPair] = []
    for pair in draw_pairs(seed):
        wanted, limit = (held_out, num_held_out) if pair.held_out else (common, num_pairs - num_held_out)
        if len(wanted) < limit:
            wanted.append(pair)
        if len(common) + len(held_out) == num_pairs:
            break
    test = held_out + common[: num_test - num_held_out]
    random.Random(mix(seed, 0x7E)).shuffle(test)
    rest = common[num_test - num_held_out :]
    return {"train": rest[num_validation:], "validation": rest[:num_validation], "test": test}


def _join(items: list[str], word: str) -> str:
    if len(items) == 1:
        return items[0]
    return f"{', '.join(items[:-1])} {word} {items[-1]}"
