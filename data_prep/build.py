"""Runs a build on MPI ranks: mpiexec -n N, srun, or one plain process, which is a world of one.

Rank 0 makes the plan; each rank encodes and publishes its own units without talking to the others; at the end one
gather collects failures and rank 0 publishes the manifest. The bytes depend on the plan only, so a killed build is
finished by running it again, with any number of ranks.
"""

from __future__ import annotations

import json
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from mpi4py import MPI
from tqdm import tqdm

from data_prep.config import DataConfig, identity_settings
from data_prep.encode import Encoder
from data_prep.partition import Unit, units_of_rank
from data_prep.plan import SPLITS, Line, Plan, make_plan, refuse_difference
from data_prep.shards import (
    FORMAT_VERSION,
    MANIFEST,
    Block,
    Ledger,
    Manifest,
    ShardEntry,
    ShardWriter,
    Split,
    publish_bytes,
    publish_json,
    read_manifest,
    sha256_of,
)

TEST_TEXT = "test.jsonl"
BLANK = "blank line"
T = TypeVar("T")


class _OtherRankFailedError(Exception):
    """This rank is well, but the build failed; rank 0 tells why."""


def is_first_rank() -> bool:
    """Whether this process speaks for all."""
    return MPI.COMM_WORLD.rank == 0


def build(out: Path, config: DataConfig) -> bool:
    """Make the data directory `out`; collective over all ranks. A finished one is left as it is.

    Raises ValueError and FileNotFoundError for users' mistakes on rank 0; the other ranks then return False.
    """
    try:
        _build(MPI.COMM_WORLD, out, config)
    except _OtherRankFailedError:
        return False
    return True


def _build(comm: MPI.Comm, out: Path, config: DataConfig) -> None:
    begin = time.monotonic()
    if _on_first_rank(comm, lambda: _is_finished(out, config)):
        if comm.rank == 0:
            print(f"data: nothing to do, {out} is complete: {_summary(read_manifest(out))}")
        return
    plan = _on_first_rank(comm, lambda: make_plan(out, config))
    failure: Exception | None = None
    try:
        _make_units(out, plan, comm.rank, comm.size)
    except Exception as err:  # carried to rank 0, so that no rank is left waiting in the gather
        failure = _portable(err)
    _wait_for_all(comm)
    failures = [err for err in comm.gather(failure) or [] if err is not None]
    manifest = _on_first_rank(comm, lambda: _finish(out, plan, failures))
    if comm.rank == 0:
        print(f"data: {_summary(manifest)}; {time.monotonic() - begin:.1f} s on {comm.size} rank(s), in {out}")


def _on_first_rank(comm: MPI.Comm, work: Callable[[], T]) -> T:
    """Do `work` on rank 0 and give its result to every rank; an exception there ends all ranks."""
    result: T | None = None
    failure: Exception | None = None
    if comm.rank == 0:
        try:
            result = work()
        except Exception as err:
            failure = err
    _wait_for_all(comm)
    result, failed = comm.bcast((result, failure is not None))
    if failure is not None:
        raise failure
    if failed:
        raise _OtherRankFailedError
    return result


def _portable(err: Exception) -> Exception:
    # What crosses ranks must pickle. A full disk is told in one line like a user's mistake; a bug with its traceback.
    if isinstance(err, (ValueError, OSError)):
        return ValueError(str(err))
    return RuntimeError("".join(traceback.format_exception(err)))


def _wait_for_all(comm: MPI.Comm) -> None:
    # A blocking collective spins at full load; the cores are better left to the ranks that still work.
    request = comm.Ibarrier()
    while not request.Test():
        time.sleep(0.005)


def _is_finished(out: Path, config: DataConfig) -> bool:
    if not (out / MANIFEST).is_file():
        return False
    manifest = read_manifest(out)
    refuse_difference(out, manifest.settings, identity_settings(config))
    if config.corpus == "files":
        for item in manifest.inputs:
            path = Path(item["path"])
            if path.is_file() and path.stat().st_size != item["bytes"]:
                raise ValueError(f"{path}: changed since {out} was built from it; choose another --out")
    texts = [manifest.tokenizer["file"], *([TEST_TEXT] if "test" in manifest.splits else [])]
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    sizes_right = all((out / s.path).is_file() and (out / s.path).stat().st_size == s.bytes for s in shards)
    return sizes_right and all((out / name).is_file() for name in texts)


# ---- units


def _make_units(out: Path, plan: Plan, rank: int, world: int) -> None:
    units = plan.units()
    mine = [units[number] for number in units_of_rank(len(units), rank, world)]
    missing = [unit for unit in mine if _published(out, plan, unit) is None]
    if not missing:
        return
    encoder = plan.encoder(out)
    with tqdm(
        total=len(mine), initial=len(mine) - len(missing), unit="shard", disable=None if rank == 0 else True
    ) as bar:
        for split in SPLITS:
            wanted = [unit for unit in missing if unit.split == split]
            if wanted:
                (out / split).mkdir(exist_ok=True)
            for unit, lines in _lines_of_units(out, plan, split, wanted):
                _make_unit(out, plan, encoder, unit, lines)
                bar.update()


def _lines_of_units(out: Path, plan: Plan, split: str, units: list[Unit]) -> Iterator[tuple[Unit, list[Line]]]:
    lines = plan.lines(out, split)
    position = 0
    for unit in units:
        wanted = list(islice(lines, unit.start - position, unit.stop - position))
        position = unit.stop
        if len(wanted) != unit.stop - unit.start:
            raise ValueError(f"{split}: fewer lines than the plan counted; an input changed while it was read")
        yield unit, wanted


def _make_unit(out: Path, plan: Plan, encoder: Encoder, unit: Unit, lines: list[Line]) -> None:
    """Encode the records of a unit and publish its shard, then the sidecar, which says that the shard is good."""
    records = [line.record(plan.fields) for line in lines]
    kept = [number for number, record in enumerate(records) if record is not None]
    texts = [record for record in records if record is not None]
    prefix = plan.settings["prefix"]
    # An empty source stays empty, so that a prefix alone is dropped too.
    sources = [prefix + record.source if record.source.strip() else "" for record in texts]
    encoded = encoder.encode(sources, [record.target for record in texts])
    dropped = {reason: [kept[position] for position in positions] for reason, positions in encoded.dropped.items()}
    if len(kept) < len(lines):
        dropped[BLANK] = [number for number, record in enumerate(records) if record is None]
    block_size = plan.settings["examples_per_block"]
    with ShardWriter(out / unit.split, f"{unit.index:06d}.tar") as writer:
        for start in range(0, len(encoded.source_ids), block_size):
            stop = start + block_size
            writer.write(Block.of(encoded.source_ids[start:stop], encoded.target_ids[start:stop]))
    assert writer.entry is not None
    truncated = {"source": encoded.num_truncated_sources, "target": encoded.num_truncated_targets}
    sidecar = {"plan_hash": plan.hash, "shard": asdict(writer.entry), "read": len(lines)}
    publish_json(_sidecar_path(out, unit), {**sidecar, "dropped": dropped, "truncated": truncated})


def _sidecar_path(out: Path, unit: Unit) -> Path:
    return out / unit.split / f"{unit.index:06d}.json"


def _published(out: Path, plan: Plan, unit: Unit) -> dict[str, Any] | None:
    """The sidecar of a unit if its shard stands, belongs to this plan and has the recorded sha256; else None."""
    try:
        sidecar = json.loads(_sidecar_path(out, unit).read_text(encoding="utf-8"))
        shard = ShardEntry(**sidecar["shard"])
        good = sidecar["plan_hash"] == plan.hash and sha256_of(out / shard.path) == shard.sha256
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return sidecar if good else None


# ---- the end


def _finish(out: Path, plan: Plan, failures: list[Exception]) -> Manifest:
    """On rank 0: check that every record is accounted for, then publish the test texts and last the manifest."""
    if failures:
        raise failures[0]
    sidecars: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    units = plan.units()
    for unit in units:
        sidecars[unit.split].append(json.loads(_sidecar_path(out, unit).read_text(encoding="utf-8")))
    splits = {split: _split_of_sidecars(rows) for split, rows in sidecars.items() if rows}
    for name, split in splits.items():
        split.ledger.check(name)
        planned = sum(item.lines for item in plan.inputs if item.split == name)
        assert split.ledger.read == planned, f"{name}: {planned} lines planned, {split.ledger.read} read"
    if splits["train"].num_examples == 0:
        raise ValueError(
            f"{out}: every training record was dropped ({splits['train'].ledger.dropped}); check the inputs"
        )
    if "test" in splits:
        _publish_test_text(out, plan, sidecars["test"])
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        plan_hash=plan.hash,
        settings=plan.settings,
        inputs=tuple(asdict(item) for item in plan.inputs),
        tokenizer=plan.tokenizer,
        splits=splits,
    )
    manifest.publish(out)
    return manifest


def _split_of_sidecars(sidecars: list[dict[str, Any]]) -> Split:
    shards = tuple(ShardEntry(**sidecar["shard"]) for sidecar in sidecars)
    dropped: Counter[str] = Counter()
    truncated: Counter[str] = Counter({"source": 0, "target": 0})
    for sidecar in sidecars:
        dropped.update({reason: len(numbers) for reason, numbers in sidecar["dropped"].items()})
        for side, count in sidecar["truncated"].items():
            truncated[side] += count
    read = sum(sidecar["read"] for sidecar in sidecars)
    written = sum(shard.examples for shard in shards)
    return Split(shards, Ledger(read=read, written=written, dropped=dict(dropped), truncated=dict(truncated)))


def _publish_test_text(out: Path, plan: Plan, sidecars: list[dict[str, Any]]) -> None:
    """test.jsonl: line k is the text of example k of the test shards, the source exactly as it was encoded."""
    lines = plan.lines(out, "test")
    rows = []
    for sidecar in sidecars:
        dropped = {number for numbers in sidecar["dropped"].values() for number in numbers}
        for number, line in enumerate(islice(lines, sidecar["read"])):
            record = None if number in dropped else line.record(plan.fields)
            if record is not None:
                source = plan.settings["prefix"] + record.source
                rows.append({"id": record.id, "source": source, "target": record.target})
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    publish_bytes(out / TEST_TEXT, text.encode())


def _summary(manifest: Manifest) -> str:
    parts = ", ".join(f"{name} {split.num_examples:,}" for name, split in manifest.splits.items())
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    tokens = sum(shard.source_tokens + shard.target_tokens for shard in shards)
    return f"{parts} examples, {tokens:,} tokens of {manifest.tokenizer['vocab_size']:,}, {len(shards)} shards"
