"""What ranks read of each other while they wait, in a world of many. Real ranks: tests/distributed/test_stopping.py."""

from __future__ import annotations

import errno
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.training.watchdog import EXIT_LOST, NUM_READ, Watchdog
from pipeline.world import World
from tests.patience import wait_until

SIZE = 64


class Counting(Watchdog):
    """Writes down whose files it reads."""

    def __init__(self, folder: Path, rank: int) -> None:
        super().__init__(folder, World(rank, SIZE, 0, torch.device("cpu")), hang_timeout_s=60.0)
        self.read: list[int] = []

    def _read(self, rank: int) -> dict[str, Any] | None:
        self.read.append(rank)
        return super()._read(rank)


def test_ranks_that_wait_read_a_few_files_at_a_time_and_all_in_turn(tmp_path):
    ranks = [Counting(tmp_path, rank) for rank in range(SIZE)]
    for rank in ranks:
        rank._beat()
    one = ranks[5]
    turns = math.ceil((SIZE - 1) / NUM_READ)
    for _ in range(turns):
        before = len(one.read)
        assert one._look_around() is None
        assert len(one.read) - before <= NUM_READ
    assert sorted(one.read) == [rank for rank in range(SIZE) if rank != 5]
    assert one.report().count("\n") == SIZE - 1, "a report is of all"


def test_a_rank_that_has_left_is_found_by_all_within_one_round(tmp_path):
    ranks = [Counting(tmp_path, rank) for rank in range(SIZE)]
    for rank in ranks:
        rank._beat(left="ValueError: a shard is missing" if rank._world.rank == 40 else None)
    for rank in ranks[:3]:
        said = [rank._look_around() for _ in range(math.ceil((SIZE - 1) / NUM_READ))]
        assert [each for each in said if each] == ["rank 40 has left (ValueError: a shard is missing)"]


def test_a_file_system_that_is_away_for_a_beat_does_not_end_the_watch(tmp_path, monkeypatch):
    beats, beat = [], Watchdog._write

    def fail_at_the_second(self, left=None):
        beats.append(left)
        if len(beats) == 2:
            raise OSError(errno.ESTALE, "stale")
        beat(self, left)

    monkeypatch.setattr(Watchdog, "_write", fail_at_the_second)
    with Watchdog(tmp_path, World(0, 1, 0, torch.device("cpu")), hang_timeout_s=60.0, beat_s=0.01) as watchdog:
        wait_until(lambda: len(beats) > 3)
        assert watchdog._thread.is_alive()


@pytest.mark.parametrize("is_lost", [True, False])
def test_a_file_system_that_stays_away_keeps_no_rank_from_leaving(is_lost, tmp_path, monkeypatch, capsys):
    left, written = [], []

    def fail_from_the_second(self, left=None):
        written.append(left)
        if len(written) > 1:
            raise OSError(errno.ESTALE, "stale")

    monkeypatch.setattr(os, "_exit", left.append)
    monkeypatch.setattr(Watchdog, "_write", fail_from_the_second)
    with Watchdog(tmp_path, World(0, 1, 0, torch.device("cpu")), hang_timeout_s=60.0) as watchdog:
        if is_lost:
            watchdog._leave("a collective hangs")
    assert left == [EXIT_LOST] * is_lost
    assert ("a collective hangs" in capsys.readouterr().err) is is_lost
    assert written[-1] == "in good order"
