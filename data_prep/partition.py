"""Pure arithmetic of the data: units, who does which, mixtures, keyed permutations (integers in, integers out)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class Unit:
    """Records start..stop-1 of one input, which become shard `index` of the split whoever does the work.

    `input` counts the inputs of the plan, `first` the records of the set in this split before it. For text files
    `offset` and `bytes` say where the records lie in the decompressed text, and `sha256` what is there.
    """

    split: str
    index: int
    input: int
    start: int
    stop: int
    first: int
    offset: int = 0
    bytes: int = 0
    sha256: str = ""


def share_of_rank(num_items: int, rank: int, world: int) -> range:
    """The items of one rank: a run of neighbours, so that a rank reads few files. Over all ranks each occurs once."""
    if not 0 <= rank < world:
        raise ValueError(f"rank {rank} is outside a world of {world}")
    return range(num_items * rank // world, num_items * (rank + 1) // world)


class Mixture:
    """Which set every example of an endless stream is of: of every sum-of-weights in a row, weight k are of set k."""

    def __init__(self, weights: Sequence[int]) -> None:
        assert min(weights) > 0
        self._weights = np.array(weights, dtype=np.int64)
        self.cycle = int(self._weights.sum())
        # Set k's j-th turn is due at (j + 1/2) / weight of the cycle: compared as exact fractions.
        turns = [(j, k) for k, weight in enumerate(weights) for j in range(weight)]
        turns.sort(key=lambda turn: (Fraction(2 * turn[0] + 1, 2 * weights[turn[1]]), turn[1]))
        taken = np.zeros((self.cycle + 1, len(weights)), dtype=np.int64)
        for position, (_, k) in enumerate(turns):
            taken[position + 1] = taken[position]
            taken[position + 1, k] += 1
        self._taken = taken

    def taken(self, position: int) -> np.ndarray:
        """How many of the first `position` examples of the stream are of each set, int64 [num_sets]."""
        cycles, rest = divmod(position, self.cycle)
        return cycles * self._weights + self._taken[rest]


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
    return np.argsort(keyed_bits(num_items, np.uint64(mix(*key))), kind="stable")


def keyed_bits(num_items: int, keys: np.ndarray | np.uint64) -> np.ndarray:
    """64 random bits for each item under each key, uint64 [*keys.shape, num_items] (SplitMix64 as a counter)."""
    counter = np.arange(1, num_items + 1, dtype=np.uint64) * np.uint64(_GOLDEN) + np.asarray(keys)[..., None]
    counter = (counter ^ (counter >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    counter = (counter ^ (counter >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return counter ^ (counter >> np.uint64(31))
