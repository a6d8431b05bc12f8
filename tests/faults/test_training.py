"""SIGKILL of the whole process group at random instants inside each stage of the road; then it must complete as if
nothing had happened. Seeded: FAULT_SEED chooses other instants."""

from __future__ import annotations

import os

import pytest

from tests.faults.harness import STAGES, Road, random_instants, scores, seconds_of_stages

SEED = int(os.environ.get("FAULT_SEED", "0"))
KILLS_PER_STAGE = 3


@pytest.mark.faults
@pytest.mark.timeout(2400)
def test_kills_in_every_stage_leave_the_scores_as_they_are(tmp_path):
    whole, broken = Road(tmp_path / "whole"), Road(tmp_path / "broken")
    seconds = seconds_of_stages(whole.finish())
    num_kills = 0
    for stage in STAGES:
        for after_s in random_instants(SEED, stage, seconds[stage], KILLS_PER_STAGE):
            hit = broken.kill_in(stage, after_s)
            num_kills += hit
            print(f"{stage}: killed {after_s:.1f} s of {seconds[stage]:.1f} s in" + ("" if hit else " (was done)"))
            if not hit:
                break
    broken.finish()
    assert num_kills >= 2 * len(STAGES) - 3
    assert scores(broken.run_dir) == scores(whole.run_dir)
