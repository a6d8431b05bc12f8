"""Training, and the road around it, killed and damaged in every way; what comes out must be as if nothing had happened.

Seeded: FAULT_SEED chooses other instants. The kills of training are counted in FAULT_DIR over as many starts of this
suite as it takes, each of FAULT_SECONDS.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.distributed.test_checkpoint import check_damages
from tests.faults import kills
from tests.faults.harness import STAGES, Road, random_instants, scores, seconds_of_stages

SEED = int(os.environ.get("FAULT_SEED", "0"))
FOLDER = Path(os.environ.get("FAULT_DIR", f"runs/faults/training-{SEED}"))
SECONDS = float(os.environ.get("FAULT_SECONDS", "1500"))
KILLS_PER_STAGE = 3
MAX_TRIES = 12
NUM_KILLS = 60
NUM_DAMAGES = 600


@pytest.mark.faults
@pytest.mark.timeout(2400)
def test_kills_in_every_stage_leave_the_scores_as_they_are(tmp_path):
    whole, broken = Road(tmp_path / "whole"), Road(tmp_path / "broken")
    seconds = seconds_of_stages(whole.finish())
    for stage in STAGES:
        num_kills = 0
        for after_s in random_instants(SEED, stage, seconds[stage], MAX_TRIES):
            if broken.kill_in(stage, after_s):
                num_kills += 1
                print(f"{stage}: killed {after_s:.1f} s of about {seconds[stage]:.1f} s in")
            else:
                broken.forget(stage)  # it was done before the kill
            if num_kills == KILLS_PER_STAGE:
                break
        assert num_kills == KILLS_PER_STAGE, stage
    broken.finish()
    assert scores(broken.run_dir) == scores(whole.run_dir)


@pytest.mark.faults
@pytest.mark.timeout(2400)
def test_kills_of_training_lose_nothing():
    """At random instants and in saves, of one rank or all: it resumes from a checkpoint that verifies, the others leave
    within a minute, and the final weights are the same, bit for bit."""
    found = kills.count(FOLDER.absolute(), SEED, NUM_KILLS, SECONDS)
    num_in_save = sum(kill.in_save for kill in found)
    slowest = max((kill.others_left_s for kill in found), default=0.0)
    print(f"{len(found)} of {NUM_KILLS} kills, {num_in_save} in a save; others had left after {slowest} s at most")
    if len(found) < NUM_KILLS:
        pytest.skip(f"{len(found)} of {NUM_KILLS} kills so far: start again to go on")
    assert num_in_save >= NUM_KILLS // 2


@pytest.mark.faults
def test_damaged_bytes_are_found_and_named(tmp_path):
    check_damages(tmp_path, seed=SEED + 1, num_damages=NUM_DAMAGES)
