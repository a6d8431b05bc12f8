"""SIGKILL of the evaluation again and again; then the scores must be those of an uninterrupted one."""

from __future__ import annotations

import os
import shutil

import pytest

from tests.faults.harness import Road, random_instants, scores, seconds_of_stages

SEED = int(os.environ.get("FAULT_SEED", "0"))
NUM_KILLS = 10


@pytest.mark.faults
@pytest.mark.timeout(2400)
def test_kills_of_the_evaluation_lose_and_double_nothing(tmp_path):
    road = Road(tmp_path / "run")
    seconds = seconds_of_stages(road.finish())
    expected = scores(road.run_dir)
    shutil.rmtree(road.run_dir / "evaluate")
    hits = sum(
        road.kill_in("evaluate", after_s)
        for after_s in random_instants(SEED, "evaluate", 0.7 * seconds["evaluate"], NUM_KILLS)
    )
    road.finish()
    assert hits >= 1
    assert scores(road.run_dir) == expected
