"""Rendered scripts on a real controller with two nodes: what it accepts, and how each of their jobs ends."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from slurm.cluster import STAGE_JOBS, find_cluster, load_cluster
from slurm.render import Nodes, Script, render
from slurm.starts import read_starts
from tests.slurm.cluster import SlurmCluster, require_slurm, slurm_version
from tests.slurm.standin import StandIn

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def slurm() -> Iterator[SlurmCluster]:
    require_slurm()
    with SlurmCluster(cpus=128, memory_mb=1_000_000, gpus=8, partitions=("debug", "cpu", "gpu")) as cluster:
        yield cluster


@pytest.mark.parametrize("cluster_name", ["example", "local", "container"])
def test_controller_accepts_every_stage(slurm: SlurmCluster, tmp_path: Path, cluster_name: str) -> None:
    cluster = load_cluster(find_cluster(cluster_name))

    def tried(stage: str, nodes: str | None = None):
        script = Script(
            stage=stage,
            cluster=cluster,
            name="a run",
            run_dir=tmp_path / "a run",
            code_dir=tmp_path,
            nodes=Nodes.parse(nodes) if nodes else None,
        )
        (tmp_path / "script").write_text(render(script))
        return slurm.run("sbatch", "--test-only", tmp_path / "script", check=False)

    for stage in STAGE_JOBS:
        assert tried(stage).returncode == 0, f"{stage}: {tried(stage).stderr}"
    assert tried("distill", "1-2").returncode == 0
    assert tried("distill", "3").returncode == 1, "the controller has two nodes and must see the script ask for three"


@pytest.mark.parametrize("launcher", ["srun", "torchrun"])
def test_signal_saves_and_requeues(slurm: SlurmCluster, tmp_path: Path, launcher: str) -> None:
    stand_in = StandIn(slurm, tmp_path, launcher=launcher)
    stand_in.behave(num_steps=10_000)
    job = stand_in.train()
    after = slurm.sbatch(f"--dependency=afterok:{job}", "--kill-on-invalid-dep=yes", "--wrap=true", cwd=tmp_path)
    slurm.run("scancel", "--batch", "--signal=USR1", job)  # what slurmctld sends before the time limit
    stand_in.behave(num_steps=1)
    stand_in.wait_requeued(job)
    assert not (stand_in.run / "STOP").exists()
    ended = slurm.wait_job(job)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), stand_in.log()
    first, second = read_starts(stand_in.run / "logs" / f"teacher-{job}")
    assert first.why == "told to stop (preemption, or a signal by hand)"
    assert second.why == "finished"
    assert first.progress_after == second.progress_before != "no checkpoint"
    saved_step = int(first.progress_after.removeprefix("step_"))
    for rank in (0, 1):
        for start, step in ((0, 0), (1, saved_step)):
            log = stand_in.run / "logs" / f"teacher-{job}" / f"start-{start}" / f"rank-{rank}.log"
            assert f"rank {rank} of 2 starts at step {step}\n" in log.read_text()
    assert slurm.wait_job(after)["JobState"] == "COMPLETED"


def test_a_job_without_the_environment_of_its_submission_runs(slurm: SlurmCluster, tmp_path: Path) -> None:
    """As where SBATCH_EXPORT=NONE is set, which SLURM hands on to the steps of a job."""
    stand_in = StandIn(slurm, tmp_path)
    job = slurm.sbatch("--export=NONE", stand_in.script("teacher"))
    assert slurm.wait_job(job)["JobState"] == "COMPLETED", stand_in.log()
    assert "rank 1 of 2 starts at step 0" in stand_in.log(), "what the script exports reaches the ranks"


@pytest.mark.parametrize(
    "asked",
    [
        ("--ntasks=3",),
        ("--mem-per-cpu=10",),
        ("--gpus-per-node=1",),
        ("--gpus=1", "--ntasks-per-gpu=1", "--cpus-per-gpu=1"),
    ],
)
def test_a_script_submitted_by_hand_inside_another_job_takes_nothing_over(
    slurm: SlurmCluster, tmp_path: Path, asked: tuple[str, ...]
) -> None:
    stand_in = StandIn(slurm, tmp_path, launcher="torchrun")
    script = stand_in.script("teacher", nodes="1-2")
    # a rank of torchrun, in the eighth start of a task of an array
    outer = ("RANK=3", "LOCAL_RANK=1", "WORLD_SIZE=4", "MASTER_ADDR=elsewhere", "TORCHELASTIC_USE_AGENT_STORE=True")
    outer += ("SLURM_ARRAY_JOB_ID=5", "SLURM_ARRAY_TASK_ID=3", "SLURM_RESTART_COUNT=7")
    by_hand = ("env", *outer, "sbatch", "--parsable", "--mem=500", script)
    shown = slurm.run("salloc", *asked, "srun", "--ntasks=1", "--mpi=pmi2", *by_hand)
    job = int(shown.stdout.split()[-1])
    assert slurm.wait_job(job)["JobState"] == "COMPLETED", stand_in.log()
    (start,) = read_starts(stand_in.run / "logs" / f"teacher-{job}")
    assert (start.number, start.why) == (0, "finished")
    assert "rank 1 of 2 starts at step 0" in stand_in.log()


def test_preempted_job_saves_and_requeues(slurm: SlurmCluster, tmp_path: Path) -> None:
    """SIGTERM to every task of the job, which is what a preemption with a grace time sends."""
    stand_in = StandIn(slurm, tmp_path)
    stand_in.behave(num_steps=10_000)
    job = stand_in.train()
    slurm.run("scancel", "--signal=TERM", job)
    stand_in.behave(num_steps=1)
    stand_in.wait_requeued(job)
    assert slurm.wait_job(job)["JobState"] == "COMPLETED", stand_in.log()
    first, _ = read_starts(stand_in.run / "logs" / f"teacher-{job}")
    assert first.progress_after != "no checkpoint"


def test_stop_by_hand_saves_and_stays_stopped(slurm: SlurmCluster, tmp_path: Path) -> None:
    stand_in = StandIn(slurm, tmp_path)
    stand_in.behave(num_steps=10_000)
    job = stand_in.train()
    (stand_in.run / "STOP").touch()
    ended = slurm.wait_job(job)
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "0")
    assert "saved and stopped, because" in stand_in.told(job)
    assert list((stand_in.run / "teacher" / "checkpoints").glob("step_*"))
    again = stand_in.sbatch("teacher")
    assert slurm.wait_job(again)["JobState"] == "FAILED"
    assert "not started, because" in stand_in.told(again)


@pytest.mark.parametrize("launcher", ["srun", "torchrun"])
def test_crash_without_progress_ends_at_the_second_start(slurm: SlurmCluster, tmp_path: Path, launcher: str) -> None:
    stand_in = StandIn(slurm, tmp_path, launcher=launcher)
    stand_in.behave(num_steps=100, crash_at=5)
    job = stand_in.sbatch("distill")
    after = slurm.sbatch(f"--dependency=afterok:{job}", "--kill-on-invalid-dep=yes", "--wrap=true", cwd=tmp_path)
    stand_in.wait_requeued(job)
    ended = slurm.wait_job(job)
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "1"), stand_in.log()
    told = stand_in.told(job, "distill")
    cause = "rank 1 failed first (exit status 1): RuntimeError: boom at step 5"
    assert f"distill: {cause}; at no checkpoint; back into the queue" in told
    assert f"distill: {cause}; not requeued: 2 starts without progress (no checkpoint)" in told
    assert slurm.wait_job(after)["JobState"] == "CANCELLED"


def test_crash_after_progress_is_tried_again(slurm: SlurmCluster, tmp_path: Path) -> None:
    stand_in = StandIn(slurm, tmp_path)
    stand_in.behave(num_steps=25, crash_at=15)
    job = stand_in.sbatch("distill")
    stand_in.wait_requeued(job)  # it saved at step 10, so this start made progress
    stand_in.wait_requeued(job, restarts=2)  # this one did not
    assert slurm.wait_job(job)["JobState"] == "FAILED"
    assert [start.progress_after for start in read_starts(stand_in.run / "logs" / f"distill-{job}")] == [
        "step_00000010"
    ] * 3
    assert "not requeued: 2 starts without progress (step_00000010)" in stand_in.told(job, "distill")


def test_users_mistake_is_not_tried_again(slurm: SlurmCluster, tmp_path: Path) -> None:
    stand_in = StandIn(slurm, tmp_path)
    stand_in.behave(mistake_at=0)
    ended = slurm.wait_job(job := stand_in.sbatch("teacher"))
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "0")
    assert "(exit status 2): error: num_steps is wrong; not requeued: a mistake" in stand_in.told(job)


def test_hung_job_is_ended_and_tried_again(slurm: SlurmCluster, tmp_path: Path) -> None:
    stand_in = StandIn(slurm, tmp_path, hang_timeout_s=8)
    stand_in.behave(num_steps=20, hang_at=15)
    job = stand_in.sbatch("teacher")
    stand_in.wait_requeued(job)
    stand_in.behave(num_steps=20)
    assert slurm.wait_job(job)["JobState"] == "COMPLETED", stand_in.log()
    assert "teacher: hung: nothing has been written for 8 s" in stand_in.told(job)
    logs = stand_in.run / "logs" / f"teacher-{job}" / "start-0"
    assert "in train" in (logs / "rank-1.log").read_text(), "the stack of where it hung"


def test_cancelled_job_stays_cancelled(slurm: SlurmCluster, tmp_path: Path) -> None:
    stand_in = StandIn(slurm, tmp_path)
    stand_in.behave(num_steps=10_000, slow_stage="report")
    jobs = [stand_in.sbatch("report"), stand_in.train()]
    slurm.wait_job(jobs[0], ["RUNNING"])
    for job in jobs:
        slurm.run("scancel", job)  # SIGTERM: workers save and ask for another start, which nobody wants now
    for job in jobs:
        assert slurm.wait_job(job)["JobState"] == "CANCELLED"
    time.sleep(2)
    assert [(slurm.job(job)["JobState"], slurm.job(job)["Restarts"]) for job in jobs] == [("CANCELLED", "0")] * 2


def test_requeues_have_an_end(slurm: SlurmCluster, tmp_path: Path) -> None:
    stand_in = StandIn(slurm, tmp_path, max_requeues=0)
    stand_in.behave(num_steps=10_000)
    job = stand_in.train()
    slurm.run("scancel", "--batch", "--signal=USR1", job)
    assert slurm.wait_job(job)["JobState"] == "FAILED"
    assert "not requeued: max_requeues of the cluster file is 0" in stand_in.told(job)


def test_killed_task_of_the_evaluation_starts_again(slurm: SlurmCluster, tmp_path: Path) -> None:
    stand_in = StandIn(slurm, tmp_path)
    stand_in.behave(die_once=2)
    array = stand_in.sbatch("evaluate", nodes="4")
    scores = stand_in.run / "evaluate" / "scores"
    stand_in.wait(lambda: sorted(path.name for path in scores.glob("*")) == [f"{k}-of-4.json" for k in range(4)])
    assert "rank 2 failed first (killed by SIGKILL" in stand_in.told(f"{array}_2", "evaluate")


def test_killed_rank_of_data_lets_the_others_finish(slurm: SlurmCluster, tmp_path: Path) -> None:
    stand_in = StandIn(slurm, tmp_path)
    stand_in.behave(die_once=1)
    job = stand_in.sbatch("data")
    stand_in.wait_requeued(job)
    (first,) = read_starts(stand_in.run / "logs" / f"data-{job}")
    slurm.run("scancel", job)
    assert first.progress_after == "1 shards", "of the rank that lived on"
    assert "killed by SIGKILL" in stand_in.told(job, "data")


def test_lost_node_starts_the_job_again_on_the_node_that_is_left(tmp_path: Path) -> None:
    require_slurm()
    slurmd_timeout_s = 1 if slurm_version() < (23, 0) else 5  # nodes of newer versions flap with 1
    with SlurmCluster(slurmd_timeout_s=slurmd_timeout_s, message_timeout_s=2) as slurm:
        stand_in = StandIn(slurm, tmp_path)
        stand_in.behave(num_steps=10_000)
        job = stand_in.train(nodes="1-2")
        stand_in.wait(lambda: (stand_in.run / "teacher" / "checkpoints" / "step_00000010").is_dir())
        slurm.kill_node(slurm.nodes[1])
        stand_in.behave(num_steps=1)
        stand_in.wait_requeued(job)
        ended = slurm.wait_job(job)
        assert (ended["JobState"], ended["Restarts"], ended["NumNodes"]) == ("COMPLETED", "1", "1"), stand_in.log()
        first, second = read_starts(stand_in.run / "logs" / f"teacher-{job}")
        assert first.why.startswith(("lost", "ended by SLURM"))
        assert second.progress_before != "no checkpoint"
        assert "rank 0 of 1 starts" in stand_in.log()


def test_missing_recipe_is_said(slurm: SlurmCluster, tmp_path: Path) -> None:
    stand_in = StandIn(slurm, tmp_path)
    (stand_in.run / "recipe.yaml").unlink()
    ended = slurm.wait_job(job := stand_in.sbatch("report"))
    assert ended["ExitCode"] == "2:0"
    assert "put the resolved recipe there" in stand_in.told(job, "report")


def test_ranks_for_one_machine_start_inside_of_a_step(slurm: SlurmCluster) -> None:
    """As in `srun --pty bash`, whose step holds what a second srun would wait for."""
    code = (
        "import os, subprocess; from data_prep.processes import mpiexec, on_this_machine; "
        "environment = on_this_machine({**os.environ, 'I_MPI_HYDRA_BOOTSTRAP': 'slurm'}); "
        "assert 'slurm' not in environment['I_MPI_HYDRA_BOOTSTRAP']; "
        "subprocess.run([mpiexec(), '-n', '2', 'true'], env=environment, check=True, timeout=60)"
    )
    slurm.run("srun", "--ntasks=1", "--cpus-per-task=128", sys.executable, "-c", code, cwd=ROOT)
