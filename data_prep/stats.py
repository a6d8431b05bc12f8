"""What a finished data directory holds: stats (numbers) and cat (texts, and where they came from)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_prep.batching import cut_by_examples, padding_efficiency, sort_by_lengths
from data_prep.encode import Encoder
from data_prep.partition import permutation
from data_prep.plan import SPLITS, read_plan, unit_name
from data_prep.reader import SplitReader
from data_prep.shards import Manifest, read_manifest
from data_prep.units import published

_QUANTILES = (50, 95, 100)
_HEAD = (
    "split", "shards", "examples", "dropped", "source tokens", "p50/p95/max", "cut", "target tokens", "p50/p95/max",
    "cut", "unknown", "duplicates", "also in train", "encoder filled", "decoder filled",
)  # fmt: skip


def stats_report(folder: Path, micro_batch: int, window: int) -> str:
    """A table of all splits, then what its columns mean.

    Filled: real over padded tokens when examples are bucketed in windows and batched in `micro_batch` examples.
    """
    manifest = read_manifest(folder)
    train: tuple[set[bytes], set[bytes]] = (set(), set())
    rows: list[tuple[str, ...]] = [_HEAD]
    for name in sorted(manifest.splits, key=SPLITS.index):  # train first: the others are compared with it
        rows.append(_row(SplitReader(folder, manifest, name), manifest, name, train, micro_batch, window))
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
    table = "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    reasons = [f"{name}: {split.ledger.dropped}" for name, split in manifest.splits.items() if split.ledger.dropped]
    return "\n".join(
        [
            table,
            f"cut: truncated by the length limits; duplicates: examples that occurred before in the split; also in "
            f"train: sources that training has too; filled: real over padded tokens, micro-batches of {micro_batch} "
            f"examples bucketed in windows of {window:,}",
            *(["dropped: " + "; ".join(reasons)] if reasons else []),
        ]
    )


def _row(
    reader: SplitReader,
    manifest: Manifest,
    name: str,
    train: tuple[set[bytes], set[bytes]],
    micro_batch: int,
    window: int,
) -> tuple[str, ...]:
    split = manifest.splits[name]
    seen_pairs, seen_sources = train if name == "train" else (set(), set())
    duplicates = leaked = unknown = 0
    lengths: list[tuple[np.ndarray, np.ndarray]] = []
    for block in reader.blocks():
        lengths.append(block.lengths)
        for ids in (block.source_ids, block.target_ids):
            unknown += int((ids == manifest.tokenizer["unk_id"]).sum())
        sources, targets = (np.cumsum(n, dtype=np.int64)[:-1] for n in block.lengths)
        for source, target in zip(
            np.split(block.source_ids, sources), np.split(block.target_ids, targets), strict=True
        ):
            source_hash = hashlib.blake2b(source.tobytes(), digest_size=16).digest()
            pair = hashlib.blake2b(source_hash + target.tobytes(), digest_size=16).digest()
            duplicates += pair in seen_pairs
            leaked += name != "train" and source_hash in train[1]
            seen_pairs.add(pair)
            seen_sources.add(source_hash)
    source, target = (np.concatenate(side).astype(np.int64) for side in zip(*lengths, strict=True))
    cells = [name, f"{len(split.shards)}", f"{len(reader):,}", f"{sum(split.ledger.dropped.values()):,}"]
    for side, side_lengths in (("source", source), ("target", target)):
        cells.append(f"{side_lengths.sum():,}")
        cells.append("/".join(f"{q:.0f}" for q in np.percentile(side_lengths, _QUANTILES)))
        cells.append(f"{split.ledger.truncated[side]:,}")
    cells += [f"{unknown / (source.sum() + target.sum()):.3%}", f"{duplicates:,}"]
    cells.append("-" if name == "train" else f"{leaked:,}")
    cells += [f"{share:.1%}" for share in bucketed_efficiency(source, target, micro_batch, window)]
    return tuple(cells)


def bucketed_efficiency(source: np.ndarray, target: np.ndarray, micro_batch: int, window: int) -> tuple[float, float]:
    """Real over padded tokens of (encoder, decoder) for lengths int64 [num_examples], shuffled and bucketed."""
    order = permutation(len(source), 0)
    starts = range(0, len(order), window)
    parts = [order[start : start + window] for start in starts]
    parts = [part[sort_by_lengths(source[part], target[part])] for part in parts]
    cuts = [
        slice(s + c.start, s + c.stop)
        for s, p in zip(starts, parts, strict=True)
        for c in cut_by_examples(len(p), micro_batch)
    ]
    order = np.concatenate(parts)
    return padding_efficiency(source[order], cuts), padding_efficiency(target[order], cuts)


def decoded_examples(folder: Path, split: str, first: int, num_examples: int) -> Iterator[tuple[str, str, str]]:
    """(where it came from, source, target) of examples of a split, decoded from the shards."""
    manifest = read_manifest(folder)
    reader = SplitReader(folder, manifest, split)
    if first >= len(reader):
        raise ValueError(f"{folder}: {split} has {len(reader):,} examples; --first is {first}")
    encoder = Encoder((folder / manifest.tokenizer["file"]).parent, 2, 2)
    wanted = np.arange(first, min(first + num_examples, len(reader)))
    examples = reader.read(wanted)
    for number, place in enumerate(wanted.tolist()):
        source = examples.source_ids[examples.source_offsets[number] : examples.source_offsets[number + 1]]
        target = examples.target_ids[examples.target_offsets[number] : examples.target_offsets[number + 1]]
        yield (
            f"{split} {place}: {_origin(folder, split, reader, place)}",
            encoder.decode(source),
            encoder.decode(target),
        )


def _origin(folder: Path, split: str, reader: SplitReader, place: int) -> str:
    """Block, shard and, of a pair, the record of the input file."""
    block = int(np.searchsorted(reader.starts, place, side="right")) - 1
    shard = int(reader.index["shard"][block])
    text = f"{split}/{shard:06d}.tar"
    plan = read_plan(folder)
    unit = next((u for u in plan.units if u.split == split and u.index == shard), None) if plan else None
    sidecar = published(folder, plan, unit) if plan and unit else None
    if plan is None or unit is None or sidecar is None:
        return text
    source = plan.inputs[unit.input]
    if plan.set_of(unit).task != "pairs":
        return f"{text}, made of records {unit.start + 1}-{unit.stop} of {source.path}"
    first_block = int(np.searchsorted(reader.index["shard"], shard))
    dropped = {number for numbers in sidecar["dropped"].values() for number in numbers}
    kept = [number for number in range(unit.stop - unit.start) if number not in dropped]
    record = unit.start + kept[place - int(reader.starts[first_block])] + 1
    return f"{text}, record {record} of {source.path} (set {source.set}, unit {unit_name(unit)})"
