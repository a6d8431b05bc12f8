"""Training input: (data, cursor) -> the micro-batches of one step. Order is a function, position is a value.

The order of an epoch depends on (seed, epoch) and the batch geometry only, never on ranks: examples are permuted, cut
into windows, sorted by length inside a window so that both sides are bucketed, cut into micro-batches under a token
budget, and the micro-batches of the window are permuted again. Nothing is carried from one window to the next.

Shapes: B examples, S source tokens, T target tokens (both padded to the longest of the micro-batch).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from data_prep.partition import permutation
from data_prep.shards import Examples, read_manifest, read_split

IGNORED_LABEL = -100  # what cross entropy leaves out
_ORDER_OF_EXAMPLES, _ORDER_OF_MICRO_BATCHES = 1, 2  # streams of the keyed permutation
_BUCKETS_PER_DOUBLING = 8  # of source lengths: finer fills the encoder better, coarser the decoder


@dataclass(frozen=True)
class Cursor:
    """Where the next step begins: independent of the number of ranks, and all there is to save."""

    epoch: int = 0
    window: int = 0
    step_in_window: int = 0

    def to_dict(self) -> dict[str, int]:
        """As JSON-able integers."""
        return asdict(self)

    @classmethod
    def from_dict(cls, value: dict[str, int]) -> Cursor:
        """The inverse of to_dict."""
        return cls(**value)


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch; `index` is its place in the global batch, `example_ids` are places in the split [B].

    An empty one (no example ids) is a single padding token whose labels are all ignored: it weighs nothing.
    """

    index: int
    example_ids: np.ndarray
    source_BS: torch.Tensor
    """int64, padded with the tokenizer's padding id."""
    source_mask_BS: torch.Tensor
    """bool, True where there is a token."""
    labels_BT: torch.Tensor
    """int64, padded with -100."""


@dataclass(frozen=True)
class StepBatch:
    """This rank's micro-batches of one step; the counts are of the WHOLE global batch, the same on every rank."""

    micro_batches: list[MicroBatch]
    num_source_tokens: int
    num_target_tokens: int
    num_micro_batches_with_data: int


class Batches:
    """Steps of training input from a finished data directory.

    Raises ValueError where the longest example exceeds the token budget or the world does not divide the global batch,
    and what read_manifest and read_split raise.
    """

    def __init__(
        self,
        data_dir: Path,
        split: str,
        seed: int,
        tokens_per_micro_batch: int,
        micro_batches_per_step: int,
        window_examples: int = 4096,
    ) -> None:
        for name, value in (("micro_batches_per_step", micro_batches_per_step), ("window_examples", window_examples)):
            if value < 1:
                raise ValueError(f"{name} is {value}: choose at least 1")
        manifest = read_manifest(Path(data_dir))
        self.micro_batches_per_step = micro_batches_per_step
        self._collator = _Collator(read_split(Path(data_dir), manifest, split), manifest.pad_id)
        self._collator.check_budget(tokens_per_micro_batch)
        self._seed = seed
        self._budget = tokens_per_micro_batch
        self._window_examples = window_examples
        self.num_examples = len(self._collator.source_lengths)
        self.windows_per_epoch = -(-self.num_examples // window_examples)
        # One epoch and two windows are enough: steps go forward.
        self._order = lru_cache(maxsize=1)(self._order_of_epoch)
        self._plan = lru_cache(maxsize=2)(self._plan_of_window)

    def step(self, cursor: Cursor, rank: int, world: int) -> tuple[StepBatch, Cursor]:
        """The step at `cursor`: micro-batches m of the global batch with m % world == rank, and the cursor after it."""
        self._check_world(rank, world)
        groups = self._plan(cursor.epoch, cursor.window)
        if not 0 <= cursor.step_in_window < len(groups):
            raise ValueError(f"{cursor} is outside this data; it was saved with other data or batch settings")
        return self._step_batch(groups[cursor.step_in_window], rank, world), self._next(cursor, len(groups))

    def steps(self, cursor: Cursor, rank: int, world: int) -> Iterator[tuple[StepBatch, Cursor]]:
        """Steps from `cursor` without end, each with the cursor after it."""
        while True:
            batch, cursor = self.step(cursor, rank, world)
            yield batch, cursor

    def steps_per_epoch(self, epoch: int = 0) -> int:
        """Steps of one epoch; epochs differ by a few, because windows fill their last step up."""
        return sum(len(self._plan_of_window(epoch, window)) for window in range(self.windows_per_epoch))

    def longest_step(self, rank: int, world: int) -> StepBatch:
        """A step of the largest micro-batches in the data, to run first: what does not fit in memory fails early.

        Every rank alternates between the longest examples, the longest sources and the longest targets.
        """
        self._check_world(rank, world)
        extremes = self._collator.extremes(self._budget)
        group = [extremes[index // world % len(extremes)] for index in range(self.micro_batches_per_step)]
        return self._step_batch(group, rank, world)

    def _check_world(self, rank: int, world: int) -> None:
        if world < 1 or self.micro_batches_per_step % world:
            raise ValueError(
                f"{self.micro_batches_per_step} micro-batches per step do not divide among {world} ranks: "
                f"choose a multiple of {world}"
            )
        assert 0 <= rank < world

    def _step_batch(self, group: list[np.ndarray], rank: int, world: int) -> StepBatch:
        collator = self._collator
        mine = range(rank, self.micro_batches_per_step, world)
        empty = np.empty(0, dtype=np.int64)
        everything = np.concatenate([*group, empty])
        return StepBatch(
            micro_batches=[collator.micro_batch(m, group[m] if m < len(group) else empty) for m in mine],
            num_source_tokens=int(collator.source_lengths[everything].sum()),
            num_target_tokens=int(collator.target_lengths[everything].sum()),
            num_micro_batches_with_data=len(group),
        )

    def _next(self, cursor: Cursor, steps_in_window: int) -> Cursor:
        if cursor.step_in_window + 1 < steps_in_window:
            return Cursor(cursor.epoch, cursor.window, cursor.step_in_window + 1)
        if cursor.window + 1 < self.windows_per_epoch:
            return Cursor(cursor.epoch, cursor.window + 1, 0)
        return Cursor(cursor.epoch + 1, 0, 0)

    def _order_of_epoch(self, epoch: int) -> np.ndarray:
        return permutation(self.num_examples, self._seed, epoch, _ORDER_OF_EXAMPLES)

    def _plan_of_window(self, epoch: int, window: int) -> list[list[np.ndarray]]:
        """The steps of a window, each the example ids of its micro-batches with data (the last step may have fewer)."""
        start = window * self._window_examples
        examples = self._order(epoch)[start : start + self._window_examples]
        if not 0 <= window < self.windows_per_epoch:
            raise ValueError(f"window {window} is outside 0..{self.windows_per_epoch - 1}; the cursor is of other data")
        micro_batches = self._collator.cut(self._collator.sort(examples), self._budget)
        order = permutation(len(micro_batches), self._seed, epoch, _ORDER_OF_MICRO_BATCHES, window)
        size = self.micro_batches_per_step
        return [[micro_batches[m] for m in order[first : first + size]] for first in range(0, len(order), size)]


def evaluation_batches(
    data_dir: Path, split: str, tokens_per_micro_batch: int, max_examples: int | None = None
) -> list[MicroBatch]:
    """A split, or an evenly spaced part of it, as micro-batches sorted by length; the same on every rank and call."""
    manifest = read_manifest(Path(data_dir))
    collator = _Collator(read_split(Path(data_dir), manifest, split), manifest.pad_id)
    collator.check_budget(tokens_per_micro_batch)
    num_examples = len(collator.source_lengths)
    wanted = num_examples if max_examples is None else min(max_examples, num_examples)
    if wanted < 1:
        raise ValueError(f"max_examples is {max_examples}: choose at least 1")
    chosen = np.arange(wanted, dtype=np.int64) * num_examples // wanted
    cut = collator.cut(collator.sort(chosen), tokens_per_micro_batch)
    return [collator.micro_batch(index, examples) for index, examples in enumerate(cut)]


class _Collator:
    """Lengths, bucketing and padding of one split."""

    def __init__(self, examples: Examples, pad_id: int) -> None:
        self._examples = examples
        self._pad_id = pad_id
        self.source_lengths = examples.source_lengths
        self.target_lengths = examples.target_lengths

    def check_budget(self, tokens_per_micro_batch: int) -> None:
        longest = int((self.source_lengths + self.target_lengths).max())
        if tokens_per_micro_batch < longest:
            raise ValueError(
                f"tokens_per_micro_batch is {tokens_per_micro_batch}, but the longest example has {longest} tokens "
                f"(source and target): choose at least {longest}"
            )

    def sort(self, examples: np.ndarray) -> np.ndarray:
        """Order example ids so that neighbours are alike in both lengths.

        By bucket of source lengths, inside a bucket by target length, up in one bucket and down in the next, so that
        a micro-batch that spans two buckets still holds similar targets.
        """
        source, target = self.source_lengths[examples], self.target_lengths[examples]
        fraction, exponent = np.frexp(source)  # exact, unlike a logarithm: source = fraction * 2^exponent
        bucket = exponent * _BUCKETS_PER_DOUBLING + np.floor((2 * fraction - 1) * _BUCKETS_PER_DOUBLING).astype(int)
        return examples[np.lexsort((examples, source, np.where(bucket % 2 == 0, target, -target), bucket))]

    def cut(self, examples: np.ndarray, budget: int) -> list[np.ndarray]:
        """Cut sorted example ids into micro-batches of at most `budget` padded tokens, both sides together."""
        micro_batches: list[np.ndarray] = []
        first = longest_source = longest_target = 0
        lengths = zip(self.source_lengths[examples].tolist(), self.target_lengths[examples].tolist(), strict=True)
        for position, (source, target) in enumerate(lengths):
            longest_source, longest_target = max(longest_source, source), max(longest_target, target)
            if (position + 1 - first) * (longest_source + longest_target) > budget:
                micro_batches.append(examples[first:position])
                first, longest_source, longest_target = position, source, target
        micro_batches.append(examples[first:])
        return micro_batches

    def extremes(self, budget: int) -> list[np.ndarray]:
        """Example ids of the micro-batches with the longest examples, the longest sources and the longest targets."""
        source, target = self.source_lengths, self.target_lengths
        orders = (np.argsort(-key, kind="stable") for key in (source + target, source, target))
        return [self.cut(order[: max(1, budget // 2)], budget)[0] for order in orders]

    def micro_batch(self, index: int, examples: np.ndarray) -> MicroBatch:
        """Pad the given examples to their longest; none gives the empty micro-batch."""
        data = self._examples
        source_BS, source_mask_BS = _padded(data.source_ids, data.source_offsets, examples, self._pad_id)
        labels_BT, _ = _padded(data.target_ids, data.target_offsets, examples, IGNORED_LABEL)
        if len(examples) == 0:
            # A fully masked row would make attention divide by zero; the token weighs nothing, as no label counts.
            source_mask_BS[:] = True
        return MicroBatch(index, examples, *map(torch.from_numpy, (source_BS, source_mask_BS, labels_BT)))


def _padded(ids: np.ndarray, offsets: np.ndarray, examples: np.ndarray, fill: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of `examples` as int64 [B, L] padded with `fill`, and the bool mask [B, L]; [1, 1] of `fill` for none."""
    if len(examples) == 0:
        return np.full((1, 1), fill, dtype=np.int64), np.zeros((1, 1), dtype=bool)
    starts = offsets[examples]
    lengths = offsets[examples + 1] - starts
    place = np.arange(lengths.max())
    mask = place[None, :] < lengths[:, None]
    rows = np.full(mask.shape, fill, dtype=np.int64)
    rows[mask] = ids[(starts[:, None] + place[None, :])[mask]]
    return rows, mask
