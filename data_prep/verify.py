"""Looks at a finished data directory bit by bit: verify (is it whole?) and repair (make it whole again)."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_prep.plan import TOKENIZER, Plan, make_tokenizer_folder, read_plan, unit_name
from data_prep.publish import publish_bytes, publish_json, sha256_of
from data_prep.served import Served
from data_prep.shards import Manifest, ShardEntry, Split, blocks_of_shard, publish_index, read_index, read_manifest
from data_prep.units import UnitMaker, published, sidecar_path


def find_damage(folder: Path, workers: int = 1) -> list[str]:
    """One line for everything that is not as the manifest says: shards (sha256, CRCs, counts), index, tokenizer."""
    manifest = read_manifest(folder)
    damage = _damaged_shards(folder, manifest, workers)
    problems = [problem for problem in damage.values() if problem is not None]
    for split in manifest.splits.values():
        try:
            read_index(folder, split)
        except ValueError as err:
            problems.append(str(err))
    damaged = _damaged_tokenizer_files(folder, manifest)
    return problems + [f"{path}: missing or its sha256 differs from the manifest; repair it" for path in damaged]


def _damaged_shards(folder: Path, manifest: Manifest, workers: int) -> dict[ShardEntry, str | None]:
    # Threads: reading, sha256 and CRC32 all leave the interpreter's lock.
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    with ThreadPoolExecutor(workers) as pool:
        results = pool.map(lambda shard: _damage_of_shard(folder, shard), shards)
        return dict(zip(shards, tqdm(results, total=len(shards), unit="shard", disable=None), strict=True))


def _damage_of_shard(folder: Path, shard: ShardEntry) -> str | None:
    path = folder / shard.path
    if not path.is_file():
        return f"{path}: the manifest names this shard but it is missing; run python -m data_prep repair {folder}"
    payload = path.read_bytes()
    try:
        blocks = list(blocks_of_shard(payload, str(path)))
    except ValueError as err:
        return str(err)
    counts = tuple(
        sum(len(getattr(block, name)) for block in blocks) for name in ("source_lengths", "source_ids", "target_ids")
    )
    if counts != (shard.examples, shard.source_tokens, shard.target_tokens):
        return f"{path}: holds {counts} examples, source and target tokens, not what the manifest says; repair it"
    if len(payload) != shard.bytes or hashlib.sha256(payload).hexdigest() != shard.sha256:
        return f"{path}: size or sha256 differ from the manifest, outside of blocks; repair it"
    return None


def _damaged_tokenizer_files(folder: Path, manifest: Manifest) -> list[Path]:
    recorded = manifest.tokenizer
    of_format_2 = {Path(recorded["file"]).name: recorded.get("sha256")}
    files = {folder / TOKENIZER / name: sha256 for name, sha256 in recorded.get("files", of_format_2).items()}
    return [path for path, sha256 in files.items() if not path.is_file() or sha256_of(path) != sha256]


def repair(folder: Path) -> list[str]:
    """Make what is damaged or missing again; one line for each thing repaired.

    Raises ValueError, and leaves things as they are, where the recorded sha256 does not come out.
    """
    manifest, plan = read_manifest(folder), read_plan(folder)
    if plan is None or plan.hash != manifest.plan_hash:
        raise ValueError(f"{folder}: plan.json is missing or of another build; build the data again elsewhere")
    done = []
    if damaged := _damaged_tokenizer_files(folder, manifest):
        with Served() as served:
            made = make_tokenizer_folder(folder, plan, served, anew=True)
        _refuse_other(folder / TOKENIZER, made, plan.tokenizer)
        done.append(f"{', '.join(map(str, damaged))}: made again")
    wanted = {entry.path: problem for entry, problem in _damaged_shards(folder, manifest, 1).items() if problem}
    done += _repair_shards(folder, manifest, plan, wanted)
    for name, split in manifest.splits.items():
        done += _repair_index(folder, plan, name, split)
    return done


def _refuse_other(path: Path, found: Any, recorded: Any) -> None:
    if found != recorded:
        raise ValueError(f"{path}: cannot be made again as it was ({found} instead of {recorded}); an input changed")


def _repair_shards(folder: Path, manifest: Manifest, plan: Plan, damaged: dict[str, str]) -> list[str]:
    entries = {entry.path: entry for split in manifest.splits.values() for entry in split.shards}
    maker = UnitMaker(folder, plan) if damaged else None
    done = []
    for unit in plan.units:
        path = f"{unit_name(unit)}.tar"
        if path in damaged and maker is not None:
            shard, sidecar = maker.make(unit)
            _refuse_other(folder / path, shard.entry.sha256, entries[path].sha256)
            publish_bytes(folder / path, shard.payload)
            publish_json(sidecar_path(folder, unit), sidecar)
            done.append(f"{folder / path}: made again, sha256 {shard.entry.sha256} as recorded")
    return done


def _repair_index(folder: Path, plan: Plan, name: str, split: Split) -> list[str]:
    try:
        read_index(folder, split)
    except ValueError:
        units = [unit for unit in plan.units if unit.split == name]
        maker: UnitMaker | None = None
        rows = []
        for unit in units:
            sidecar = published(folder, plan, unit)
            if sidecar is None:
                maker = maker or UnitMaker(folder, plan)
                sidecar = maker.make(unit)[1]
            rows.append(sidecar["blocks"])
        _refuse_other(folder / split.index["path"], publish_index(folder, name, rows), split.index)
        return [f"{folder / split.index['path']}: made again"]
    return []
