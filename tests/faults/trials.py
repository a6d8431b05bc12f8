"""Trials counted over any number of slices of a suite: FAULT_SECONDS bounds a slice, FAULT_SEED gives other trials."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SEED = int(os.environ.get("FAULT_SEED", "0"))
SECONDS = float(os.environ.get("FAULT_SECONDS", "1500"))
MUST_COUNT = os.environ.get("FAULT_WHOLE") == "1"
STARTED_S = time.monotonic()


def folder_of(suite: str) -> Path:
    """Where a suite counts: FAULT_DIR, or a folder of runs/."""
    return Path(os.environ.get("FAULT_DIR", f"runs/faults/{suite}-{SEED}")).absolute()


def count_trials(
    folder: Path, kind: str, wanted: int, trial: Callable[[int], dict[str, Any] | None]
) -> list[dict[str, Any]]:
    """Run trials of a kind (1, 2 ...) until there are enough of them over all slices, or the time of this slice is up;
    the records of all of them. A trial that hit nothing (None) counts for nothing.

    A slice that ends short of the count skips its test, or fails it with FAULT_WHOLE=1.
    """
    file = folder / f"{kind}.jsonl"
    found = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    number = found[-1]["number"] if found else 0
    while len(found) < wanted and time.monotonic() - STARTED_S < SECONDS:
        number += 1
        begin_s = time.monotonic()
        record = trial(number)
        if record is None:
            print(f"{kind}: trial {number} came too late", flush=True)
            continue
        found.append({"number": number, "seconds": round(time.monotonic() - begin_s), **record})
        folder.mkdir(parents=True, exist_ok=True)
        with open(file, "a", encoding="utf-8") as ledger:
            ledger.write(json.dumps(found[-1]) + "\n")
        print(f"{kind}: {found[-1]}", flush=True)
    if len(found) < wanted:
        message = f"{kind}: {len(found)} of {wanted} trials so far: start again to go on"
        (pytest.fail if MUST_COUNT else pytest.skip)(message)
    return found
