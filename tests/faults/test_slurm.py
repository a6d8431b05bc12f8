"""The chain of jobs on a real SLURM with both long training jobs told to save and requeue in the middle; the scores
must be those of a quiet run on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.harness import Road, scores
from tests.slurm.cluster import SlurmCluster, require_slurm
from tests.slurm.test_chain import STAGES, logs, submit_chain

TIMEOUT_S = 1500.0


def wait_for(true: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + TIMEOUT_S
    while not true():
        assert time.monotonic() < end, f"{what} never came"
        time.sleep(0.05)


@pytest.mark.faults
@pytest.mark.timeout(2400)
def test_requeued_jobs_end_with_the_scores_of_a_quiet_run(tmp_path: Path) -> None:
    require_slurm()
    quiet = Road(tmp_path / "quiet run")
    quiet.finish()
    run = tmp_path / "cluster run"
    with SlurmCluster() as slurm:
        jobs = submit_chain(slurm, run)
        for stage in ("teacher", "distill"):
            checkpoints = run / stage / "checkpoints"
            wait_for(lambda folder=checkpoints: any(folder.glob("step_*/manifest.json")), f"a checkpoint of {stage}")
            slurm.run("scancel", "--batch", "--signal=USR1", jobs[stage])
        slurm.wait_job(jobs["report"], timeout_s=TIMEOUT_S)
        ended = {stage: slurm.job(job) for stage, job in jobs.items()}
    assert {stage: job["JobState"] for stage, job in ended.items()} == dict.fromkeys(STAGES, "COMPLETED"), logs(run)
    assert [ended[stage]["Restarts"] for stage in ("teacher", "distill")] == ["1", "1"], logs(run)
    assert scores(run) == scores(quiet.run_dir)
