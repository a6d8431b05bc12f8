"""Units of work that workers share through a folder, whichever of them dies: sealed results and claims.

A result is sealed with a checksum and published whole, so a reader trusts it or does the unit again. A claim is only a
hint that saves work; no result depends on it, and a unit that is done twice counts once.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_prep.processes import process_start
from data_prep.publish import discard
from pipeline.rundir.files import read_json, write_atomic

POLL_S = 0.2
STALE_CLAIM_S = 600.0  # holders touch their claim after every batch; on other hosts silence is the only sign of death


def publish_sealed(path: Path, record: dict[str, Any]) -> None:
    """Publish a JSON object together with its checksum."""
    write_atomic(path, json.dumps({**record, "checksum": digest_of(record)}, indent=1))


def read_sealed(path: Path) -> dict[str, Any] | None:
    """The object that publish_sealed wrote, or None when it is missing or damaged."""
    try:
        record = read_json(path)
    except ValueError:
        return None
    if not isinstance(record, dict) or record.pop("checksum", None) != digest_of(record):
        return None
    return record


def digest_of(value: Any) -> str:
    """sha256 of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def create_once(path: Path, content: dict[str, Any]) -> bool:
    """Publish a JSON object unless there is a file of that name; whether this process did.

    (Linking a finished file creates it exclusively and whole, on network file systems too.)
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content), encoding="utf-8")
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)
    return True


def take_claim(folder: Path, name: str) -> Path | None:
    """Claim a unit for this process, or None when a living worker has it.

    A dead worker's claim is never removed but outdone by the next number: two workers that see it dead both try to
    create the same next file, and one of them wins. Should a slow worker be taken for dead, a unit is done twice, with
    the same result.
    """
    number = 0
    while (path := folder / f"{name}.{number}").exists():
        if is_held(path):
            return None
        number += 1
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "start": process_start(os.getpid())}
    return path if create_once(path, holder) else None


def is_held(claim: Path) -> bool:
    """Whether the holder of a claim is, as far as can be seen from here, another process that still works on it."""
    try:
        age_s = time.time() - claim.stat().st_mtime
        holder = json.loads(claim.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return True  # released this instant: the result, if there is one, is seen on the next look
    except ValueError:
        return False
    if age_s > STALE_CLAIM_S:
        return False
    if holder["host"] != socket.gethostname():
        return True
    start = process_start(holder["pid"])
    return holder["pid"] != os.getpid() and start is not None and start == holder["start"]


def touch(claim: Path) -> None:
    """Say that the claim's holder is alive."""
    with contextlib.suppress(FileNotFoundError):
        os.utime(claim)


def work_off(
    claims: Path,
    units: list[Any],
    *,
    name: Callable[[Any], str],
    is_done: Callable[[Any], bool],
    do: Callable[[Any, Callable[[], None]], None],
    wait: bool,
    progress: Callable[[], Any] = lambda: None,
) -> None:
    """Do every unit that nobody has done or claimed; with `wait`, return only when all are done."""
    left = list(units)
    while True:
        for unit in list(left):
            done = is_done(unit)
            if not done and (claim := take_claim(claims, name(unit))):
                # Another worker may have published and released between the look and the claim.
                if not is_done(unit):
                    do(unit, lambda claim=claim: touch(claim))  # type: ignore[misc]
                discard(claim)
                done = True
            if done:
                left.remove(unit)
                progress()
        if not left or not wait:
            return
        time.sleep(POLL_S)
