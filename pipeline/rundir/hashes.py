"""Hashes of large files that many workers need at once: each file is read by one of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep.publish import sha256_of
from pipeline.rundir.claims import digest_of, publish_sealed, read_sealed, work_off

SMALL = 2**20
"""Bytes up to which a file is read by everybody: a claim would take longer."""


def shared_hashes(files: Sequence[Path], folder: Path) -> dict[Path, str]:
    """sha256 of each file, by all workers that call this with the same folder together: whoever claims a file reads it,
    and the others wait. What was hashed before is read again when its size or its time of change is another.

    Raises:
        FileNotFoundError: a file is missing.
    """
    found = {file: sha256_of(file) for file in files if file.stat().st_size < SMALL}
    large = [file for file in files if file not in found]
    records = {file: folder / f"{digest_of(_key(file))[:16]}.json" for file in large}

    def known(file: Path) -> str | None:
        record = read_sealed(records[file])
        return record["sha256"] if record else None

    work_off(
        folder / "claims", large, name=lambda file: records[file].stem, is_done=lambda file: known(file) is not None,
        do=lambda file, beat: publish_sealed(records[file], {**_key(file), "sha256": sha256_of(file)}), wait=True,
    )  # fmt: skip
    return found | {file: known(file) or sha256_of(file) for file in large}


def _key(file: Path) -> dict[str, Any]:
    """What is another when a file is written anew."""
    stat = file.stat()
    return {"file": str(file.resolve()), "bytes": stat.st_size, "changed_ns": stat.st_mtime_ns}
