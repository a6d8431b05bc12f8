"""What starting again costs: the first batch anywhere in an epoch, and the rerun of a finished build."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from data_prep.shards import read_manifest
from pipeline.bench import Measure
from pipeline.data import Batches, Cursor

PLACES = ((0, 0.5), (0, 0.99), (7, 0.99))  # epoch, and share of it that is behind
MICRO_BATCHES_PER_STEP = 8
TOKENS_PER_MICRO_BATCH = 16_384
EXAMPLES_PER_SHARD = 29  # of 30,000 pairs: more than 1,000 shards


def first_batch(name: str, out: Path) -> list[Measure]:
    """Seconds from nothing to the first step at places of an epoch, against reading up to there from its beginning."""

    def batches() -> Batches:
        return Batches(out, "train", 0, TOKENS_PER_MICRO_BATCH, MICRO_BATCHES_PER_STEP)

    def seconds_to(cursor: Cursor) -> float:
        start = time.perf_counter()
        batches().step(cursor, 0, 1)
        return time.perf_counter() - start

    at_the_start = seconds_to(Cursor())
    measures = []
    for epoch, share in PLACES:
        cursor = Cursor(epoch, int(share * batches().windows_per_epoch), 0)
        ours = seconds_to(cursor)
        state = len(json.dumps(cursor.to_dict()))
        measure = f"{name}: first step at {share:.0%} of epoch {epoch} from a state of {state} bytes"
        steps = batches().steps(Cursor(epoch), 0, 1)
        start, reached = time.perf_counter(), Cursor(epoch)
        while reached != cursor:
            _, reached = next(steps)
        next(steps)
        passed = time.perf_counter() - start
        measures.append(Measure("data", measure, ours, passed, "reading up to there", "s", at_the_start))
    return measures


def rerun(build: Callable[..., float], out: Path, pairs: Path) -> Measure:
    """A finished build of more than 1,000 shards run again. ValueError if that changes a file."""
    settings = {"examples_per_block": EXAMPLES_PER_SHARD, "blocks_per_shard": 1}
    made = build("rerun", pairs, **settings)
    before = _versions(out)
    again = build("rerun", pairs, anew=False, **settings)
    if _versions(out) != before:
        raise ValueError(f"{out}: running a finished build again wrote something")
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import data_prep.__main__, data_prep.build"], check=True)
    imports = time.perf_counter() - start
    count = len(read_manifest(out).splits["train"].shards)
    return Measure("data", f"rerun of a finished build of {count:,} shards", again, made, "the build", "s", imports)


def _versions(folder: Path) -> dict[Path, tuple[int, int]]:
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}
