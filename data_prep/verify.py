"""Looks at a finished data directory: verify (is it whole?), stats (what is in it?), cat (what does it say?)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data_prep.encode import Encoder
from data_prep.shards import Manifest, ShardEntry, blocks_of_shard, read_manifest, read_shard, read_split, sha256_of

_QUANTILES = (50, 95, 100)


def find_damage(folder: Path) -> list[str]:
    """One line for everything that is not as the manifest says: shards (sha256, every CRC, counts) and tokenizer."""
    manifest = read_manifest(folder)
    problems = [
        problem
        for split in manifest.splits.values()
        for shard in split.shards
        if (problem := _damage_of_shard(folder, shard)) is not None
    ]
    tokenizer = folder / manifest.tokenizer["file"]
    if not tokenizer.is_file() or sha256_of(tokenizer) != manifest.tokenizer["sha256"]:
        problems.append(f"{tokenizer}: missing or its sha256 differs from the manifest; build the data again")
    return problems


def _damage_of_shard(folder: Path, shard: ShardEntry) -> str | None:
    try:
        blocks = list(blocks_of_shard(read_shard(folder, shard), shard.path))
    except ValueError as err:
        return str(err)
    counts = tuple(
        sum(len(getattr(block, name)) for block in blocks) for name in ("source_lengths", "source_ids", "target_ids")
    )
    if counts != (shard.examples, shard.source_tokens, shard.target_tokens):
        return f"{folder / shard.path}: holds {counts} examples, source and target tokens, not what the manifest says"
    return None


def stats_table(folder: Path) -> str:
    """Counts, token lengths and what was dropped or truncated, one line a split."""
    manifest = read_manifest(folder)
    head = (
        "split",
        "shards",
        "examples",
        "source tokens",
        "p50/p95/max",
        "target tokens",
        "p50/p95/max",
        "dropped",
        "cut",
    )
    rows = [head, *(_stats_row(folder, manifest, name) for name in manifest.splits)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def _stats_row(folder: Path, manifest: Manifest, name: str) -> tuple[str, ...]:
    split = manifest.splits[name]
    examples = read_split(folder, manifest, name)
    cells = [name, f"{len(split.shards)}", f"{len(examples):,}"]
    for lengths in (examples.source_lengths, examples.target_lengths):
        cells.append(f"{lengths.sum():,}")
        cells.append("/".join(f"{q:.0f}" for q in np.percentile(lengths, _QUANTILES)))
    cells.append(f"{sum(split.ledger.dropped.values()):,}")
    cells.append(f"{sum(split.ledger.truncated.values()):,}")
    return tuple(cells)


def decoded_examples(folder: Path, split: str, num_examples: int) -> list[tuple[str, str]]:
    """The first examples of a split as text, decoded from the shards."""
    manifest = read_manifest(folder)
    examples = read_split(folder, manifest, split)
    encoder = Encoder((folder / manifest.tokenizer["file"]).parent, 2, 2)
    return [
        (
            encoder.decode(examples.source_ids[examples.source_offsets[i] : examples.source_offsets[i + 1]]),
            encoder.decode(examples.target_ids[examples.target_offsets[i] : examples.target_offsets[i + 1]]),
        )
        for i in range(min(num_examples, len(examples)))
    ]
