"""Pure arithmetic of the data: units of work, who does which, and keyed permutations (integers in, integers out)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class Unit:
    """Records start..stop-1 of a split, which become shard `index` of that split whoever does the work."""

    split: str
    index: int
    start: int
    stop: int


def units_of_split(split: str, num_records: int, records_per_unit: int) -> list[Unit]:
    """Cut a split into units by content alone: no rank, no clock, no file size enters."""
    if records_per_unit < 1:
        raise ValueError(f"records_per_unit is {records_per_unit}: choose at least 1")
    starts = range(0, num_records, records_per_unit)
    return [Unit(split, i, start, min(start + records_per_unit, num_records)) for i, start in enumerate(starts)]


def units_of_rank(num_units: int, rank: int, world: int) -> range:
    """The unit numbers of one rank: every `world`-th. Over all ranks each unit occurs exactly once."""
    if not 0 <= rank < world:
        raise ValueError(f"rank {rank} is outside a world of {world}")
    return range(rank, num_units, world)


def mix(*parts: int) -> int:
    """One 64-bit key from several integers (SplitMix64, Steele et al. 2014, applied as a chain)."""
    key = 0
    for part in parts:
        key = (key + _GOLDEN + part) & _MASK
        key = ((key ^ (key >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        key = ((key ^ (key >> 27)) * 0x94D049BB133111EB) & _MASK
        key ^= key >> 31
    return key


def permutation(num_items: int, *key: int) -> np.ndarray:
    """A permutation of 0..num_items-1 as int64 [num_items], a pure function of the key, for example (seed, epoch).

    Items are sorted by a hash of (key, item) and not drawn from a NumPy generator, whose streams may change between
    versions: a cursor must mean the same example for ever.
    """
    counter = np.arange(1, num_items + 1, dtype=np.uint64) * np.uint64(_GOLDEN) + np.uint64(mix(*key))
    counter = (counter ^ (counter >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    counter = (counter ^ (counter >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(counter ^ (counter >> np.uint64(31)), kind="stable")
