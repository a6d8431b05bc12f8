"""SIGKILL of the whole process group at random instants inside each stage of the road; then it must complete as if
nothing had happened. Seeded: FAULT_SEED chooses other instants."""

from __future__ import annotations

import os

import pytest

from tests.faults.harness import STAGES, Road, random_instants, scores, seconds_of_stages

SEED = int(os.environ.get("FAULT_SEED", "0"))
KILLS_PER_STAGE = 3
MAX_TRIES = 12


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
