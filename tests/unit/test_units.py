"""Batches of like length, and claims on units of work."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.decoding.plain import MAX_EXAMPLES_PER_BATCH, batches_of
from pipeline.rundir import claims as units
from tests.patience import wait_until

REPOSITORY = Path(__file__).resolve().parents[2]


def test_batches_hold_every_example_once_and_no_more_tokens_than_allowed() -> None:
    lengths = [random.Random(1).randrange(1, 40) for _ in range(500)]
    batches = batches_of(lengths, tokens_per_batch=300)
    assert sorted(i for batch in batches for i in batch) == list(range(500))
    assert all(len(batch) * max(lengths[i] for i in batch) <= 300 for batch in batches)
    assert batches == batches_of(lengths, tokens_per_batch=300)
    assert batches_of([9, 9], tokens_per_batch=4) == [[0], [1]]
    assert max(map(len, batches_of([1] * 1000, tokens_per_batch=10**6))) == MAX_EXAMPLES_PER_BATCH


def test_claims(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    holder = subprocess.Popen([sys.executable, "-c", f"import sys; sys.path.insert(0, {str(REPOSITORY)!r})\n"
        f"from pathlib import Path; from pipeline.rundir.claims import take_claim\n"
        f"print(take_claim(Path({str(tmp_path)!r}), 'unit'), flush=True); sys.stdin.read()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
    assert holder.stdout is not None
    claim = Path(holder.stdout.readline().decode().strip())
    assert claim == tmp_path / "unit.0"
    assert units.take_claim(tmp_path, "unit") is None, "its holder lives"
    assert units.take_claim(tmp_path, "other") == tmp_path / "other.0"
    os.utime(claim, (0, 0))
    assert not units.is_held(claim), "silent for too long"
    units.touch(claim)
    assert units.is_held(claim)
    monkeypatch.setattr(units.socket, "gethostname", lambda: "elsewhere")
    assert units.is_held(claim), "nothing can be known of a process on another host"
    monkeypatch.undo()
    holder.kill()  # not waited for: a zombie is dead too
    wait_until(lambda: not units.is_held(claim))
    assert units.take_claim(tmp_path, "unit") == tmp_path / "unit.1"
    holder.wait()
