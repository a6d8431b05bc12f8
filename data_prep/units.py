"""Makes one unit: its records -> a shard, published, then the sidecar, which says that the shard is good."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.corruption import corrupt, segment_tokens, span_counts
from data_prep.encode import Encoded, Encoder
from data_prep.languages import language_id
from data_prep.partition import Unit, mix
from data_prep.plan import SPLITS, Plan, RecordReader, unit_name
from data_prep.publish import publish_bytes, publish_json
from data_prep.served import Example
from data_prep.shards import Block, Shard, ShardEntry, blocks_of_shard, cut_block, make_shard
from data_prep.sources import Record

BLANK, DUPLICATE = "blank line", "duplicate"
_MASKS = 3  # stream of the keyed bits
_SAMPLE = 32  # examples of a unit that are compared with AutoTokenizer
_SEGMENTS_AT_ONCE = 512  # bounds the memory of span corruption


class UnitMaker:
    """Makes the units of a plan. Their bytes depend on the plan only."""

    def __init__(self, out: Path, plan: Plan) -> None:
        self._out, self._plan = out, plan
        self._encoder = plan.encoder(out)
        self._reader = RecordReader(out, plan)

    def publish(self, unit: Unit) -> ShardEntry:
        """Make a unit and publish its shard and sidecar."""
        shard, sidecar = self.make(unit)
        publish_bytes(self._out / shard.entry.path, shard.payload)
        publish_json(sidecar_path(self._out, unit), sidecar)
        return shard.entry

    def make(self, unit: Unit) -> tuple[Shard, dict[str, Any]]:
        """The shard and the sidecar of a unit, not published. ValueError on a record that cannot be used."""
        plan, config = self._plan, self._plan.config
        duplicates = set(plan.duplicates.get(unit_name(unit), ()))
        records = list(self._reader.records(unit))
        dropped: dict[str, list[int]] = {}
        kept: list[int] = []
        for position, record in enumerate(records):
            if record is None or position in duplicates:
                dropped.setdefault(BLANK if record is None else DUPLICATE, []).append(position)
            elif record.null:
                dropped.setdefault(f"null {record.null}", []).append(position)
            else:
                kept.append(position)
        texts = [record for position in kept if (record := records[position]) is not None]
        num_whole = self._encoder.num_whole
        if plan.set_of(unit).task == "pairs":
            self._refuse_languages(unit, kept, texts)
            encoded = self._encoder.encode(
                [record.source for record in texts],
                [record.target for record in texts],
                [record.languages for record in texts],
            )
        else:
            encoded = _span_corruption(plan, self._encoder, unit, texts)
        for reason, positions in encoded.dropped.items():
            dropped[reason] = [kept[position] for position in positions]
        if not config.drop_empty:
            self._refuse_first(unit, records, dropped)
        blocks = cut_block(encoded.block, config.examples_per_block)
        shard = make_shard(f"{unit_name(unit)}.tar", blocks, config.compress)
        num_dropped = sum(len(positions) for positions in dropped.values())
        sidecar = {
            "plan_hash": plan.hash,
            "shard": asdict(shard.entry),
            "read": unit.stop - unit.start,
            "written": len(records) - num_dropped,
            "dropped": dropped,
            "truncated": {"source": encoded.num_truncated_sources, "target": encoded.num_truncated_targets},
            "unknown": {
                side: int((ids == self._encoder.info.unk_id).sum())
                for side, ids in (("source", encoded.block.source_ids), ("target", encoded.block.target_ids))
            },
            "whole": self._encoder.num_whole - num_whole,
            "blocks": shard.blocks,
        }
        if plan.set_of(unit).task == "pairs":
            assert shard.entry.examples == sidecar["written"], f"{unit_name(unit)}: lost an example"
        return shard, sidecar

    def _refuse_first(self, unit: Unit, records: Sequence[Record | None], dropped: dict[str, list[int]]) -> None:
        """ValueError of the first record that is left out because it lacks a text, if one is."""
        firsts = [(min(places), reason) for reason, places in dropped.items() if reason not in (BLANK, DUPLICATE)]
        for position, reason in sorted(firsts)[:1]:
            record = records[position]
            assert record is not None
            raise ValueError(
                f"{self._place(unit, position, record)}: {reason}; remove it, or set data.drop_empty to leave out and "
                f"count such records"
            )

    def _refuse_languages(self, unit: Unit, positions: Sequence[int], records: Sequence[Record]) -> None:
        """ValueError of the first record in a language that the tokenizer has no token for, where it has such."""
        if ids := self._encoder.languages:
            for position, record in zip(positions, records, strict=True):
                try:
                    for language in record.languages:
                        language_id(ids, language)
                except ValueError as error:
                    raise ValueError(f"{self._place(unit, position, record)}: {error}") from None

    def _place(self, unit: Unit, position: int, record: Record) -> str:
        return f"{self._plan.inputs[unit.input].path}: record {unit.start + position + 1} (id {record.id})"


def _span_corruption(plan: Plan, encoder: Encoder, unit: Unit, records: Sequence[Record]) -> Encoded:
    """All texts of a unit back to back, cut into segments that fill a source, and corrupted. No token is lost: the
    rest is a shorter segment."""
    config = plan.config
    shape = (config.noise_density, config.mean_span_tokens)
    wanted = segment_tokens(config.max_source_tokens, *shape)
    empty = [position for position, record in enumerate(records) if not record.source.strip()]
    tokens = encoder.tokens([record.source for record in records])
    if len(tokens) % wanted == 1:
        tokens = np.append(tokens, encoder.info.eos_id)  # a single token cannot be corrupted; two can
    num_full = len(tokens) // wanted
    sizes = [(0, num_full, wanted), (num_full, num_full + 1, len(tokens) - num_full * wanted)]
    seed = mix(config.seed, _MASKS, SPLITS.index(unit.split), unit.index)
    blocks = []
    for first, stop, num_tokens in sizes:
        for start in range(first, stop if num_tokens else first, _SEGMENTS_AT_ONCE):
            end = min(start + _SEGMENTS_AT_ONCE, stop)
            segments_NL = tokens[start * wanted : start * wanted + (end - start) * num_tokens].reshape(-1, num_tokens)
            keys_N = np.array([mix(seed, number) for number in range(start, end)], dtype=np.uint64)
            sentinels = encoder.sentinels(span_counts(num_tokens, *shape)[1])
            blocks.append(encoder.block_of(*corrupt(segments_NL, keys_N, sentinels, encoder.info.eos_id, *shape)))
    return Encoded(Block.joined(blocks), {"empty source": empty} if empty else {})


def sample_of_unit(out: Path, plan: Plan, unit: Unit) -> list[Example]:
    """The first examples of a unit, the ids as its shard has them; of span corruption, which leaves no text as it was,
    as the encoder gives them."""
    config, reader = plan.config, RecordReader(out, plan)
    sidecar = published(out, plan, unit)
    assert sidecar is not None, f"{unit_name(unit)} is not published"
    dropped = {number for numbers in sidecar["dropped"].values() for number in numbers}
    kept = (record for number, record in enumerate(reader.records(unit)) if record and number not in dropped)
    records = list(itertools.islice(kept, _SAMPLE))
    sources = [record.source for record in records]
    sides = [("source", sources, [record.languages[0] for record in records], config.max_source_tokens)]
    if plan.set_of(unit).task == "pairs":
        targets, languages = [record.target for record in records], [record.languages[1] for record in records]
        sides.append(("target", targets, languages, config.max_target_tokens))
        shard = out / sidecar["shard"]["path"]
        block = next(blocks_of_shard(shard.read_bytes(), str(shard)), None)
    else:
        block = plan.encoder(out).encode(sources, sources).block
    if block is None:
        return []
    sample: list[Example] = []
    for (side, texts, languages, longest), lengths, ids in zip(
        sides, block.lengths, (block.source_ids, block.target_ids), strict=False
    ):
        rows = np.split(ids, np.cumsum(lengths, dtype=np.int64)[:-1])
        sample += [
            (text, side, language, row.tolist(), longest)
            for text, language, row in zip(texts, languages, rows, strict=False)
        ]
    return sample


def sidecar_path(out: Path, unit: Unit) -> Path:
    """Where the sidecar of a unit is."""
    return out / f"{unit_name(unit)}.json"


def published(out: Path, plan: Plan, unit: Unit) -> dict[str, Any] | None:
    """The sidecar of a unit if its shard stands with the recorded size and belongs to this plan; else None."""
    try:
        sidecar = json.loads(sidecar_path(out, unit).read_text(encoding="utf-8"))
        shard = ShardEntry(**sidecar["shard"])
        good = sidecar["plan_hash"] == plan.hash and (out / shard.path).stat().st_size == shard.bytes
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return sidecar if good else None
