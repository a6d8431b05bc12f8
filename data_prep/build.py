"""Runs a build on MPI ranks: mpiexec -n N, srun, or one plain process, which is a world of one.

Rank 0 makes the plan and tells it to the others; that is all that MPI is used for, and it is finalized before any unit
is made, so that a rank that dies cannot hold up the others. Each rank makes and publishes its units; rank 0 sees in the
folder when all stand and publishes the manifest. The bytes depend on the plan only, so a killed build is finished by
running it again, with any number of ranks.
"""

from __future__ import annotations

import errno
import gc
import json
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from mpi4py import MPI
from tqdm import tqdm

from data_prep.config import DataConfig, identity_settings
from data_prep.hub import names_data
from data_prep.partition import Unit, share_of_rank
from data_prep.plan import (
    PLAN,
    SPLITS,
    TOKENIZER,
    Plan,
    make_plan,
    read_plan,
    refuse_difference,
    unit_name,
)
from data_prep.publish import is_temporary, make_folder, publish_bytes, temporary_name
from data_prep.served import Served
from data_prep.shards import (
    FORMAT_VERSION,
    MANIFEST,
    Ledger,
    Manifest,
    ShardEntry,
    Split,
    publish_index,
    read_manifest,
)
from data_prep.testpart import TEST_TEXT, lines_of_test_part
from data_prep.units import UnitMaker, published, sample_of_unit, sidecar_path

_FAILURE = "failure.tmp-"  # begins the names of notes of failed ranks
_POLL_S = 0.02
_COMPARED_UNITS = 8
_WARN_TRUNCATED = 0.05  # share of the records of a split
_RANK, _WORLD = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size
T = TypeVar("T")


class _OtherRankFailedError(Exception):
    """This rank is well, but the build failed; rank 0 tells why."""


def is_first_rank() -> bool:
    """Whether this process speaks for all."""
    return _RANK == 0


def build(out: Path, config: DataConfig, plan_only: bool = False) -> None:
    """Make the data directory `out`, or its plan only; every rank calls it once. A finished one is left as it is.

    Raises ValueError and OSError on rank 0, for a failure of any rank; the others then return as if all were well.
    """
    begin = time.monotonic()
    try:
        with Served() as served:
            done = _on_first_rank(lambda: _is_finished(out, config))
            if is_first_rank() and not (done or plan_only):
                served.start()
            plan, missing = (None, []) if done else _on_first_rank(lambda: _plan_and_missing(out, config, served))
            MPI.Finalize()
            if plan is None or plan_only:
                if is_first_rank():
                    print(f"data: {_plan_summary(out) if plan_only else _nothing_to_do(out)}")
                return
            _make_share(out, plan, missing)
            if is_first_rank():
                _wait_for_others(out, plan, missing, config.patience_s)
                _compare_sample(out, plan, served)
                manifest = _finish(out, plan)
                seconds = time.monotonic() - begin
                print(f"data: {_summary(manifest)}; {seconds:.1f} s on {_WORLD} rank(s), in {out}")
    except _OtherRankFailedError:
        return


def _on_first_rank(work: Callable[[], T]) -> T:
    """Do `work` on rank 0 and give its result to every rank; an exception there ends all ranks."""
    comm = MPI.COMM_WORLD
    result: T | None = None
    failure: Exception | None = None
    if comm.rank == 0:
        try:
            result = work()
        except Exception as err:
            failure = err
    # A blocking collective spins at full load; the cores are better left to the rank that works.
    request = comm.Ibarrier()
    while not request.Test():
        time.sleep(_POLL_S / 4)
    result, failed = comm.bcast((result, failure is not None))
    if failed:
        MPI.Finalize()
        raise failure or _OtherRankFailedError
    return result


def _is_finished(out: Path, config: DataConfig) -> bool:
    if not (out / MANIFEST).is_file():
        return False
    manifest = read_manifest(out)
    refuse_difference(out, manifest.settings, _settings_of_format(manifest.format_version, config))
    for item in manifest.inputs:
        path = Path(item["path"])
        is_local_text = config.corpus == "files" and not names_data(item["path"]) and path.is_file()
        if is_local_text and path.stat().st_size != item["bytes"]:
            raise ValueError(f"{path}: changed since {out} was built from it; choose another --out")
    names = [manifest.tokenizer["file"], PLAN, *([TEST_TEXT] if "test" in manifest.splits else [])]
    names += [split.index["path"] for split in manifest.splits.values()]
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    sizes_right = all((out / s.path).is_file() and (out / s.path).stat().st_size == s.bytes for s in shards)
    return sizes_right and all((out / name).is_file() for name in names)


def _settings_of_format(version: int, config: DataConfig) -> dict[str, Any]:
    """Settings as a build of this format knew them, so that what it has finished stays finished."""
    settings = identity_settings(config)
    if version < FORMAT_VERSION:
        for each in (settings, *settings["sets"]):
            del each["quotes"]
    return settings


def _plan_and_missing(out: Path, config: DataConfig, served: Served) -> tuple[Plan, list[Unit]]:
    plan = make_plan(out, config, served)
    missing = [unit for unit in plan.units if published(out, plan, unit) is None]
    if missing:
        (out / MANIFEST).unlink(missing_ok=True)  # readers refuse a directory that is being repaired
    for unit in missing:
        sidecar_path(out, unit).unlink(missing_ok=True)  # of a shard that is gone: it would be taken for made
    for split in {unit.split for unit in plan.units}:
        make_folder(out / split)
    return plan, missing


# ---- units


def _make_share(out: Path, plan: Plan, missing: Sequence[Unit]) -> None:
    """Make this rank's share of the missing units. A failure of a later rank is left as a note for rank 0."""
    mine = [missing[number] for number in share_of_rank(len(missing), _RANK, _WORLD)]
    gc.disable()  # records hold no cycles, and looking for some takes 4 % of the time
    try:
        if mine:
            maker = UnitMaker(out, plan)
            with tqdm(total=len(mine), unit="shard", disable=None if is_first_rank() else True) as bar:
                begin, tokens = time.monotonic(), 0
                for unit in mine:
                    shard = maker.publish(unit)
                    tokens += shard.source_tokens + shard.target_tokens
                    rate = tokens / (time.monotonic() - begin)
                    bar.set_postfix_str(f"{rate / 1e6:.2f} M tokens/s on each of {_WORLD} rank(s)", refresh=False)
                    bar.update()
    except Exception as err:
        if is_first_rank():
            raise
        publish_bytes(_failure_note(out), json.dumps(_number_and_text(err)).encode())
        raise _OtherRankFailedError from err


def _number_and_text(error: Exception) -> tuple[int | None, str]:
    if isinstance(error, OSError) and error.errno:
        return error.errno, str(error.strerror)
    return None, str(error) if isinstance(error, (ValueError, OSError)) else traceback.format_exc()


def _failure_note(out: Path) -> Path:
    return temporary_name(out / "failure")  # a temporary name, so that the next run removes it


def _is_being_written(note: Path) -> bool:
    """Whether a note of a failed rank is not whole yet: it then has a second temporary name behind the first."""
    return is_temporary(note.with_name(note.name.removeprefix(_FAILURE)))


def _wait_for_others(out: Path, plan: Plan, missing: Sequence[Unit], patience_s: float) -> None:
    """Until every missing unit stands. Raises what another rank failed with, TimeoutError where nothing new came for
    `patience_s`."""
    pending = list(missing)
    last_news = time.monotonic()
    while True:
        still = [unit for unit in pending if not sidecar_path(out, unit).is_file()]
        if not still:
            return
        for note in out.glob(_FAILURE + "*"):
            if not _is_being_written(note):
                number, text = json.loads(note.read_text(encoding="utf-8"))
                raise OSError(number, text) if number else ValueError(text)
        if len(still) < len(pending):
            last_news = time.monotonic()
        pending = still
        if time.monotonic() - last_news > patience_s:
            raise TimeoutError(
                errno.ETIMEDOUT,
                f"{out}: {len(pending)} of {len(plan.units)} shards are missing (first {unit_name(pending[0])}) and "
                f"none was added for {patience_s} s: a rank has died; run the same command again",
            )
        time.sleep(_POLL_S)


# ---- the end


def _compare_sample(out: Path, plan: Plan, served: Served) -> None:
    """The first examples of the first unit of each file have the ids that the tokenizer's folder gives by itself."""
    first_of_input = {unit.input: unit for unit in reversed(plan.units)}
    units = list(first_of_input.values())[:_COMPARED_UNITS]
    served.compare(out / TOKENIZER, [example for unit in units for example in sample_of_unit(out, plan, unit)])


def _finish(out: Path, plan: Plan) -> Manifest:
    """On rank 0: check that every record is accounted for, then publish test texts, indices and last the manifest."""
    sidecars: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    for unit in plan.units:
        sidecar = published(out, plan, unit)
        if sidecar is None:
            raise ValueError(f"{out / unit_name(unit)}.tar: gone or of another plan; run the same command again")
        sidecars[unit.split].append(sidecar)
    splits = {name: _split_of_sidecars(out, plan, name, rows) for name, rows in sidecars.items() if rows}
    for name, split in splits.items():
        split.ledger.check(name)
        planned = sum(item.records for item in plan.inputs if item.split == name)
        if split.ledger.read != planned:
            raise ValueError(f"{name}: {planned} records planned, {split.ledger.read} read; build into another --out")
        _warn_of_truncation(name, split)
    if splits["train"].num_examples == 0:
        raise ValueError(
            f"{out}: every training record was dropped ({splits['train'].ledger.dropped}); check the inputs"
        )
    if "test" in splits:
        publish_bytes(out / TEST_TEXT, lines_of_test_part(out, plan, sidecars["test"]))
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        plan_hash=plan.hash,
        settings=plan.settings,
        inputs=tuple(asdict(item) for item in plan.inputs),
        tokenizer=plan.tokenizer,
        sets=tuple(
            {"name": each.name, "weight": each.weight, "licence": each.licence} for each in plan.config.all_sets
        ),
        splits=splits,
    )
    manifest.publish(out)
    return manifest


def _split_of_sidecars(out: Path, plan: Plan, name: str, sidecars: list[dict[str, Any]]) -> Split:
    dropped: Counter[str] = Counter()
    for sidecar in sidecars:
        dropped.update({reason: len(numbers) for reason, numbers in sidecar["dropped"].items()})
    truncated, unknown = (
        {side: sum(sidecar[key][side] for sidecar in sidecars) for side in ("source", "target")}
        for key in ("truncated", "unknown")
    )
    read, written, whole = (sum(sidecar[key] for sidecar in sidecars) for key in ("read", "written", "whole"))
    sets = Counter(plan.inputs[unit.input].set for unit in plan.units if unit.split == name)
    return Split(
        shards=tuple(ShardEntry(**sidecar["shard"]) for sidecar in sidecars),
        shards_of_sets=tuple(sets[each.name] for each in plan.config.all_sets),
        index=publish_index(out, name, [sidecar["blocks"] for sidecar in sidecars]),
        ledger=Ledger(read, written, dict(dropped), truncated, unknown, whole),
    )


def _warn_of_truncation(name: str, split: Split) -> None:
    for side, count in split.ledger.truncated.items():
        if count > _WARN_TRUNCATED * split.num_examples:
            share = count / split.num_examples
            print(
                f"data_prep: warning: {share:.1%} of the {side}s of {name} were cut; raise data.max_{side}_tokens",
                file=sys.stderr,
            )


def _summary(manifest: Manifest) -> str:
    splits = sorted(manifest.splits.items(), key=lambda item: SPLITS.index(item[0]))
    parts = ", ".join(f"{name} {split.num_examples:,}" for name, split in splits)
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    tokens = sum(shard.source_tokens + shard.target_tokens for shard in shards)
    text = f"{parts} examples, {tokens:,} tokens of {manifest.tokenizer['vocab_size']:,}, {len(shards)} shards"
    ledgers = [split.ledger for _, split in splits]
    if unknown := sum(sum(ledger.unknown.values()) for ledger in ledgers):
        text += f"; unknown tokens, for characters that the tokenizer does not have: {unknown:,}"
    if whole := sum(ledger.whole for ledger in ledgers):
        text += f"; texts not put together word by word: {whole:,}"
    return text


def _nothing_to_do(out: Path) -> str:
    return f"nothing to do, {out} is complete: {_summary(read_manifest(out))}"


def _plan_summary(out: Path) -> str:
    plan = read_plan(out)
    assert plan is not None
    counts = Counter[str]()
    for item in plan.inputs:
        counts[item.split] += item.records
    records = ", ".join(f"{split} {count:,}" for split, count in counts.items())
    return f"planned {records} records of {len(plan.inputs)} file(s), {len(plan.units)} units, in {out / PLAN}"
