"""Hashes that workers share: each file is read once, by one of them, and again when it is written anew."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import pytest

from pipeline.evaluation.subject import folder_hashes
from pipeline.rundir import claims, hashes
from tests.forks import context
from tests.patience import PATIENCE_S

NUM_BYTES = (hashes.SMALL + 1, 3 * hashes.SMALL, 100)


def make(folder: Path) -> list[Path]:
    files = [folder / f"{number}.bin" for number in range(len(NUM_BYTES))]
    for number, (file, count) in enumerate(zip(files, NUM_BYTES, strict=True)):
        file.write_bytes(bytes([number]) * count)
    return files


def expected(files: list[Path]) -> dict[Path, str]:
    return {file: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def work(folder: Path, files: list[Path]) -> None:
    """A worker that writes down what it reads and what it is told."""

    def sha256_of(file: Path) -> str:
        with open(folder / "read", "a") as log:
            log.write(f"{file.name}\n")
        return hashlib.sha256(file.read_bytes()).hexdigest()

    hashes.sha256_of = sha256_of
    found = hashes.shared_hashes(files, folder / "hashes")
    (folder / f"told-{os.getpid()}").write_text(repr(found == expected(files)))


def test_each_large_file_is_read_by_one_of_six_workers(tmp_path):
    files = make(tmp_path)
    workers = [context().Process(target=work, args=(tmp_path, files)) for _ in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(PATIENCE_S)
    assert [path.read_text() for path in tmp_path.glob("told-*")] == ["True"] * 6
    assert sorted((tmp_path / "read").read_text().split()) == ["0.bin", "1.bin", *["2.bin"] * 6]


def test_a_file_that_is_written_anew_is_read_again_and_a_dead_reader_is_outdone(tmp_path, monkeypatch):
    files = make(tmp_path)
    reads = []
    monkeypatch.setattr(hashes, "sha256_of", lambda file: reads.append(file) or expected([file])[file])
    monkeypatch.setattr(claims, "is_held", lambda claim: False)  # as of a process that is no more
    claims.create_once(tmp_path / "hashes/claims" / f"{claims.digest_of(hashes._key(files[0]))[:16]}.0", {"pid": 0})
    assert hashes.shared_hashes(files, tmp_path / "hashes") == expected(files)
    assert reads == [files[2], *files[:2]]
    assert hashes.shared_hashes(files[:2], tmp_path / "hashes") == expected(files[:2])
    assert len(reads) == 3, "known"
    content = bytearray(files[0].read_bytes())
    content[0] ^= 1
    files[0].write_bytes(content)
    assert hashes.shared_hashes(files[:2], tmp_path / "hashes") == expected(files[:2])
    assert reads[3:] == [files[0]]
    damaged = next(path for path in (tmp_path / "hashes").glob("*.json"))
    damaged.write_text(damaged.read_text().replace('"sha256": "', '"sha256": "0'))
    assert hashes.shared_hashes(files[:2], tmp_path / "hashes") == expected(files[:2])


def test_a_folder_has_the_same_hashes_by_itself_and_shared(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    make(folder)
    (folder / "config.json").write_text("{}")
    assert folder_hashes(folder) == folder_hashes(folder, tmp_path / "hashes")
    shutil.rmtree(tmp_path / "hashes")
    with pytest.raises(FileNotFoundError, match=r"is not a checkpoint"):
        folder_hashes(tmp_path, tmp_path / "hashes")
