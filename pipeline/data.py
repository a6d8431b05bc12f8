"""Training input: (data, cursor) -> the micro-batches of one step. Order is a function, position is a value.

The order of an epoch depends on (seed, epoch) and the batch geometry only, never on ranks or workers: the blocks of the
data are permuted and their examples cut into windows; inside a window examples are shuffled, sorted so that both
lengths are bucketed, cut into micro-batches under a token budget, and the micro-batches are permuted. Nothing is
carried from one window to the next, and only the blocks of a window are read, so any place of an epoch is reached at
once. Threads read the next window and make the next step while the caller computes.

A mixture with weights takes from every set exactly its share of every window. Each set is a stream of its own passes,
every example once a pass; an epoch of the mixture is as many examples as all sets have together.

Shapes: B examples, S source tokens, T target tokens (both padded to the longest of the micro-batch).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import chain
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch

from data_prep.batching import cut_by_tokens, sort_by_lengths
from data_prep.partition import Mixture, permutation
from data_prep.reader import Examples, SplitReader
from data_prep.shards import read_manifest
from pipeline.world import World

IGNORED_LABEL = -100  # what cross entropy leaves out
_ORDER_OF_EXAMPLES, _ORDER_OF_MICRO_BATCHES, _ORDER_OF_BLOCKS = 1, 2, 3  # streams of the keyed permutation
_WINDOWS_KEPT = 3  # the one before, the current and the next


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
    """int64, padded with IGNORED_LABEL."""
    places_N: torch.Tensor = None  # type: ignore[assignment]
    """Places in the flattened labels of those that are not IGNORED_LABEL, in order; found here where not given. On a
    GPU the host would wait for them, so they are found before a micro-batch goes there."""

    def __post_init__(self) -> None:
        if self.places_N is None:
            places_N = (self.labels_BT != IGNORED_LABEL).flatten().nonzero().squeeze(1)
            object.__setattr__(self, "places_N", places_N)

    @property
    def labels_N(self) -> torch.Tensor:
        """The labels that are not IGNORED_LABEL."""
        return self.labels_BT.flatten().index_select(0, self.places_N)


@dataclass(frozen=True)
class StepBatch:
    """This rank's micro-batches of one step; the counts are of the WHOLE global batch, the same on every rank."""

    micro_batches: list[MicroBatch]
    num_source_tokens: int
    num_target_tokens: int
    num_micro_batches_with_data: int


@dataclass(frozen=True)
class _Window:
    """Examples in the order of their micro-batches, their places in the split, and the steps as cuts of that order."""

    examples: Examples
    places: np.ndarray
    steps: list[list[slice]]


class Batches:
    """Steps of training input from a finished data directory.

    `num_workers` threads make the micro-batches of the next step ahead of time; 0 makes each step when it is asked for.
    Raises ValueError where the longest example exceeds the token budget or the world does not divide the global batch,
    and what read_manifest and SplitReader raise.
    """

    def __init__(
        self,
        data_dir: Path,
        split: str,
        seed: int,
        tokens_per_micro_batch: int,
        micro_batches_per_step: int,
        window_examples: int = 25_600,
        num_workers: int = 1,
    ) -> None:
        for name, value in (("micro_batches_per_step", micro_batches_per_step), ("window_examples", window_examples)):
            if value < 1:
                raise ValueError(f"{name} is {value}: choose at least 1")
        manifest = read_manifest(Path(data_dir))
        self.micro_batches_per_step = micro_batches_per_step
        self._reader = SplitReader(Path(data_dir), manifest, split)
        _check_budget(self._reader, tokens_per_micro_batch)
        self._order = _Order(self._reader, [each["weight"] for each in manifest.sets], seed)
        self._pad_id = manifest.pad_id
        self._seed = seed
        self._budget = tokens_per_micro_batch
        self._window_examples = window_examples
        self.num_examples = len(self._reader)
        self.windows_per_epoch = -(-self.num_examples // window_examples)
        self._windows: OrderedDict[tuple[int, int], Future[_Window]] = OrderedDict()
        self._lock = Lock()
        self._window_thread = ThreadPoolExecutor(1, "data-window")
        self._step_thread = ThreadPoolExecutor(1, "data-step") if num_workers else None
        self._workers = ThreadPoolExecutor(num_workers, "data-worker") if num_workers else None
        self._ahead: dict[tuple[Cursor, int, int], Future[tuple[StepBatch, Cursor]]] = {}

    @property
    def longest(self) -> tuple[int, int]:
        """Tokens of the longest source and of the longest target."""
        index = self._reader.index
        return int(index["longest_source"].max()), int(index["longest_target"].max())

    def step(self, cursor: Cursor, rank: int, world: int) -> tuple[StepBatch, Cursor]:
        """The step at `cursor`: micro-batches m of the global batch with m % world == rank, and the cursor after it."""
        self._check_world(rank, world)
        waiting = self._ahead.pop((cursor, rank, world), None)
        batch, after = waiting.result() if waiting else self._make_step(cursor, rank, world)
        if self._step_thread:
            self._ahead = {(after, rank, world): self._step_thread.submit(self._make_step, after, rank, world)}
        return batch, after

    def steps(self, cursor: Cursor, rank: int, world: int) -> Iterator[tuple[StepBatch, Cursor]]:
        """Steps from `cursor` without end, each with the cursor after it."""
        while True:
            batch, cursor = self.step(cursor, rank, world)
            yield batch, cursor

    def steps_per_epoch(self, epoch: int = 0) -> int:
        """Steps of one epoch, which takes reading all of it; epochs differ by a few, because windows fill their last
        step up."""
        return sum(len(self._load_window(epoch, window).steps) for window in range(self.windows_per_epoch))

    def longest_step(self, rank: int, world: int) -> StepBatch:
        """A step of the largest micro-batches that the data can give, to run first: what does not fit in memory fails
        early.

        Every rank alternates between the longest example, the longest source and the longest target, each repeated
        until the budget is full.
        """
        self._check_world(rank, world)
        extremes = [self._extreme(side) for side in range(3)]
        group = [extremes[index // world % len(extremes)] for index in range(self.micro_batches_per_step)]
        window = _Window(
            self._reader.read(np.concatenate(group)),
            np.concatenate(group),
            [
                [
                    slice(end - len(part), end)
                    for part, end in zip(group, np.cumsum([len(p) for p in group]), strict=True)
                ]
            ],
        )
        return self._step_batch(window, 0, rank, world)

    def _extreme(self, side: int) -> np.ndarray:
        """The place of the example that is longest on a side (0 both, 1 source, 2 target), as often as fits."""
        column = self._reader.index[("longest_pair", "longest_source", "longest_target")[side]]
        block = int(column.argmax())
        source, target = (lengths.astype(np.int64) for lengths in self._reader.block(block).lengths)
        lengths = (source + target, source, target)[side]
        row = int(lengths.argmax())
        return np.full(self._budget // int(source[row] + target[row]), self._reader.starts[block] + row)

    def _check_world(self, rank: int, world: int) -> None:
        if world < 1 or self.micro_batches_per_step % world:
            raise ValueError(
                f"{self.micro_batches_per_step} micro-batches per step do not divide among {world} ranks: "
                f"choose a multiple of {world}"
            )
        assert 0 <= rank < world

    def _make_step(self, cursor: Cursor, rank: int, world: int) -> tuple[StepBatch, Cursor]:
        window = self._window(cursor.epoch, cursor.window)
        if not 0 <= cursor.step_in_window < len(window.steps):
            raise ValueError(f"{cursor} is outside this data; it was saved with other data or batch settings")
        self._fetch(*self._after_window(cursor))
        return self._step_batch(window, cursor.step_in_window, rank, world), self._next(cursor, len(window.steps))

    def _step_batch(self, window: _Window, step: int, rank: int, world: int) -> StepBatch:
        cuts = window.steps[step]
        indices = range(rank, self.micro_batches_per_step, world)
        mine = [cuts[index] if index < len(cuts) else slice(0, 0) for index in indices]
        run = self._workers.map if self._workers else map
        source, target = window.examples.source_offsets, window.examples.target_offsets
        return StepBatch(
            micro_batches=list(run(lambda m, cut: _micro_batch(window, m, cut, self._pad_id), indices, mine)),
            num_source_tokens=sum(int(source[cut.stop] - source[cut.start]) for cut in cuts),
            num_target_tokens=sum(int(target[cut.stop] - target[cut.start]) for cut in cuts),
            num_micro_batches_with_data=len(cuts),
        )

    def _next(self, cursor: Cursor, steps_in_window: int) -> Cursor:
        if cursor.step_in_window + 1 < steps_in_window:
            return Cursor(cursor.epoch, cursor.window, cursor.step_in_window + 1)
        return Cursor(*self._after_window(cursor), 0)

    def _after_window(self, cursor: Cursor) -> tuple[int, int]:
        if cursor.window + 1 < self.windows_per_epoch:
            return cursor.epoch, cursor.window + 1
        return cursor.epoch + 1, 0

    def _window(self, epoch: int, window: int) -> _Window:
        if not 0 <= window < self.windows_per_epoch:
            raise ValueError(f"window {window} is outside 0..{self.windows_per_epoch - 1}; the cursor is of other data")
        return self._fetch(epoch, window).result()

    def _fetch(self, epoch: int, window: int) -> Future[_Window]:
        """Have a window read in the background, once."""
        with self._lock:
            if (epoch, window) not in self._windows:
                self._windows[epoch, window] = self._window_thread.submit(self._load_window, epoch, window)
                while len(self._windows) > _WINDOWS_KEPT:
                    self._windows.popitem(last=False)
            return self._windows[epoch, window]

    def _load_window(self, epoch: int, window: int) -> _Window:
        start = window * self._window_examples
        stop = min(start + self._window_examples, self.num_examples)
        places = self._order.places(epoch * self.num_examples + start, epoch * self.num_examples + stop)
        places = places[permutation(len(places), self._seed, epoch, _ORDER_OF_EXAMPLES, window)]
        examples, order, cuts = _bucketed(self._reader.read(places), self._budget)
        micro_batches = [cuts[m] for m in permutation(len(cuts), self._seed, epoch, _ORDER_OF_MICRO_BATCHES, window)]
        size = self.micro_batches_per_step
        steps = [micro_batches[first : first + size] for first in range(0, len(cuts), size)]
        return _Window(examples, places[order], steps)


class _Order:
    """Which example stands at every position of the endless stream of training: pure arithmetic on the index."""

    def __init__(self, reader: SplitReader, weights: list[int], seed: int) -> None:
        self._sizes, self._starts, self._seed = reader.index["examples"], reader.starts, seed
        used = [(blocks, weight) for blocks, weight in zip(reader.blocks_of_sets, weights, strict=True) if len(blocks)]
        # Without weights all sets are one stream: every example once an epoch.
        self._mixture = Mixture([weight for _, weight in used] if all(weights) else [1])
        self._streams = [blocks for blocks, _ in used] if all(weights) else [np.concatenate([b for b, _ in used])]
        self._pass = lru_cache(maxsize=2 * len(self._streams))(self._order_of_pass)

    def places(self, start: int, stop: int) -> np.ndarray:
        """Places in the split of the examples at positions start..stop-1, int64, the sets one after the other."""
        ranges = zip(self._mixture.taken(start).tolist(), self._mixture.taken(stop).tolist(), strict=True)
        return np.concatenate([self._places_of_stream(k, *taken) for k, taken in enumerate(ranges)])

    def _places_of_stream(self, stream: int, start: int, stop: int) -> np.ndarray:
        size = int(self._sizes[self._streams[stream]].sum())
        parts = [np.empty(0, dtype=np.int64)]
        while start < stop:
            number, first = divmod(start, size)
            last = min(first + stop - start, size)
            blocks, ends = self._pass(stream, number)
            begin, end = np.searchsorted(ends, (first, last - 1), side="right").tolist()
            chosen = blocks[begin : end + 1]
            before = int(ends[begin]) - int(self._sizes[chosen[0]])
            runs = [np.arange(self._starts[block], self._starts[block] + self._sizes[block]) for block in chosen]
            parts.append(np.concatenate(runs)[first - before : last - before])
            start += last - first
        return np.concatenate(parts)

    def _order_of_pass(self, stream: int, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Blocks of a stream in the order of one pass, and after how many examples each ends."""
        blocks = self._streams[stream]
        blocks = blocks[permutation(len(blocks), self._seed, number, _ORDER_OF_BLOCKS, stream)]
        return blocks, np.cumsum(self._sizes[blocks])


def evaluation_batches(
    data_dir: Path, split: str, tokens_per_micro_batch: int, max_examples: int | None = None
) -> list[MicroBatch]:
    """A split, or an evenly spaced part of it, as micro-batches sorted by length; the same on every rank and call."""
    manifest = read_manifest(Path(data_dir))
    reader = SplitReader(Path(data_dir), manifest, split)
    _check_budget(reader, tokens_per_micro_batch)
    wanted = len(reader) if max_examples is None else min(max_examples, len(reader))
    if wanted < 1:
        raise ValueError(f"max_examples is {max_examples}: choose at least 1")
    places = np.arange(wanted, dtype=np.int64) * len(reader) // wanted
    examples, order, cuts = _bucketed(reader.read(places), tokens_per_micro_batch)
    window = _Window(examples, places[order], [])
    return [_micro_batch(window, index, cut, manifest.pad_id) for index, cut in enumerate(cuts)]


def _check_budget(reader: SplitReader, tokens_per_micro_batch: int) -> None:
    longest = int(reader.index["longest_pair"].max())
    if tokens_per_micro_batch < longest:
        raise ValueError(
            f"tokens_per_micro_batch is {tokens_per_micro_batch}, but the longest example has {longest} tokens "
            f"(source and target): choose at least {longest}"
        )


def _bucketed(examples: Examples, budget: int) -> tuple[Examples, np.ndarray, list[slice]]:
    """Examples sorted by both lengths, the order that does it, and the cuts into micro-batches."""
    order = sort_by_lengths(examples.source_lengths, examples.target_lengths)
    examples = examples.take(order)
    return examples, order, cut_by_tokens(examples.source_lengths, examples.target_lengths, budget)


def _micro_batch(window: _Window, index: int, cut: slice, pad_id: int) -> MicroBatch:
    """Pad the examples of a cut to their longest; none gives the empty micro-batch."""
    data = window.examples
    source_BS, source_mask_BS = padded(data.source_ids, data.source_offsets[cut.start : cut.stop + 1], pad_id)
    labels_BT, _ = padded(data.target_ids, data.target_offsets[cut.start : cut.stop + 1], IGNORED_LABEL)
    if cut.start == cut.stop:
        # A fully masked row would make attention divide by zero; the token weighs nothing, as no label counts.
        source_mask_BS[:] = True
    tensors = map(torch.from_numpy, (source_BS, source_mask_BS, labels_BT))
    return MicroBatch(index, window.places[cut], *tensors)


def padded(ids: np.ndarray, offsets: np.ndarray, fill: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows ids[offsets[b] : offsets[b + 1]] as int64 [B, L] padded with `fill`, and their mask, bool [B, L].

    [1, 1] of `fill` for no rows.
    """
    if len(offsets) == 1:
        return np.full((1, 1), fill, dtype=np.int64), np.zeros((1, 1), dtype=bool)
    lengths = np.diff(offsets)
    mask = np.arange(lengths.max()) < lengths[:, None]
    rows = np.full(mask.shape, fill, dtype=np.int64)
    rows[mask] = ids[offsets[0] : offsets[-1]]
    return rows, mask


def padded_rows(
    rows: Sequence[Sequence[int]], fill: int, device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of rows that are lists, on a device."""
    offsets = np.cumsum([0, *map(len, rows)])
    ids, mask = padded(np.fromiter(chain.from_iterable(rows), dtype=np.int64, count=offsets[-1]), offsets, fill)
    return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)


def on_device(batch: MicroBatch, world: World) -> MicroBatch:
    """The same on this rank's device; the host does not wait for it."""
    tensors = {key: value for key, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    if world.device.type == "cuda":
        # from pinned memory a copy is queued; from other memory the host waits until the device comes to it
        tensors = {key: tensor.pin_memory() for key, tensor in tensors.items()}
    moved: dict[str, Any] = {key: tensor.to(world.device, non_blocking=True) for key, tensor in tensors.items()}
    return replace(batch, **moved)
