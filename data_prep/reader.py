"""Reads examples of a finished data directory by their place in the split, checking every block it reads."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.shards import INDEX_COLUMNS, Block, Manifest, decode_member, read_index


@dataclass(frozen=True)
class Examples:
    """Some examples: example i is ids[offsets[i] : offsets[i + 1]]; offsets int64 [num_examples + 1]."""

    source_ids: np.ndarray
    source_offsets: np.ndarray
    target_ids: np.ndarray
    target_offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.source_offsets) - 1

    def take(self, rows: np.ndarray) -> Examples:
        """The chosen examples in the given order."""
        source = _gather(self.source_ids, self.source_offsets, rows)
        return Examples(*source, *_gather(self.target_ids, self.target_offsets, rows))

    @property
    def source_lengths(self) -> np.ndarray:
        """Tokens of every source, int64 [num_examples]."""
        return np.diff(self.source_offsets)

    @property
    def target_lengths(self) -> np.ndarray:
        """Tokens of every target, int64 [num_examples]."""
        return np.diff(self.target_offsets)


class SplitReader:
    """Any examples of a split in time that depends on how many blocks they lie in, not on the size of the data.

    ValueError on an unknown or empty split and on damage, naming shard and block. Safe to share between threads.
    """

    def __init__(self, folder: Path, manifest: Manifest, split: str) -> None:
        if split not in manifest.splits:
            raise ValueError(f"{folder}: no split {split!r}; the build made {', '.join(manifest.splits)}")
        self._folder = Path(folder)
        self._split = manifest.splits[split]
        self._compressed = bool(manifest.settings.get("compress"))
        index = read_index(self._folder, self._split)
        if not len(index):
            raise ValueError(f"{folder}: split {split!r} holds no example")
        self.index = {name: index[:, column] for column, name in enumerate(INDEX_COLUMNS)}
        """Columns of the index, int64 [num_blocks] each."""
        self.starts = np.concatenate(([0], np.cumsum(self.index["examples"])))
        """The first example of every block, and the number of examples, int64 [num_blocks + 1]."""
        first_shards = np.cumsum([0, *self._split.shards_of_sets])
        self.blocks_of_sets = [
            np.arange(*np.searchsorted(self.index["shard"], first_shards[number : number + 2]))
            for number in range(len(self._split.shards_of_sets))
        ]
        """Block numbers of every set of the mixture."""

    def __len__(self) -> int:
        return int(self.starts[-1])

    def block(self, number: int) -> Block:
        """One block, read by a seek and checked against the index and its own CRC32."""
        offset, size = int(self.index["offset"][number]), int(self.index["bytes"][number])
        path = self._folder / self._split.shards[int(self.index["shard"][number])].path
        place = f"{path}: block {number - int(np.searchsorted(self.index['shard'], self.index['shard'][number]))}"
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            raise ValueError(f"{path}: missing; run python -m data_prep repair {self._folder}") from None
        try:
            member = os.pread(descriptor, size, offset)
        finally:
            os.close(descriptor)
        if len(member) != size or zlib.crc32(member) != self.index["crc32"][number]:
            raise ValueError(f"{place} is damaged (size or CRC32); run python -m data_prep repair {self._folder}")
        return decode_member(member, self._compressed, place)

    def blocks(self) -> Iterator[Block]:
        """All blocks in order."""
        return (self.block(number) for number in range(len(self.index["shard"])))

    def stretches(self, num_examples: int) -> Iterator[Examples]:
        """All examples in order, in stretches of whole blocks of about `num_examples`."""
        edges = np.searchsorted(self.starts, np.arange(0, len(self), num_examples)).tolist()
        for first, stop in zip(edges, [*edges[1:], len(self.starts) - 1], strict=True):
            yield _joined([self.block(number) for number in range(first, stop)])

    def read(self, examples: np.ndarray) -> Examples:
        """The examples at the given places of the split, int64 [n], in that order. Each block is read once."""
        blocks = np.searchsorted(self.starts, examples, side="right") - 1
        needed = np.unique(blocks)
        parts = [self.block(int(number)) for number in needed]
        # Rows of the needed blocks back to back, and where among them each example is.
        rows = np.concatenate(([0], np.cumsum(self.index["examples"][needed])))
        row_of_example = rows[np.searchsorted(needed, blocks)] + examples - self.starts[blocks]
        return _joined(parts).take(row_of_example)


def _joined(blocks: list[Block]) -> Examples:
    return Examples(
        np.concatenate([block.source_ids for block in blocks]),
        _offsets([block.source_lengths for block in blocks]),
        np.concatenate([block.target_ids for block in blocks]),
        _offsets([block.target_lengths for block in blocks]),
    )


def _offsets(lengths: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(([0], np.cumsum(np.concatenate(lengths), dtype=np.int64)))


def _gather(ids: np.ndarray, offsets: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The chosen rows back to back and their offsets."""
    starts, lengths = offsets[rows], offsets[rows + 1] - offsets[rows]
    new = np.concatenate(([0], np.cumsum(lengths)))
    shift = np.repeat(starts - new[:-1], lengths)
    return ids[np.arange(new[-1]) + shift], new
