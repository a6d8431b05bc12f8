"""Rendered scripts on a real controller with two nodes: what it accepts, and what a signal to a training job does."""

from __future__ import annotations

import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from slurm.cluster import STAGE_JOBS, find_cluster, load_cluster
from slurm.render import render
from tests.slurm.cluster import SlurmCluster, require_slurm, slurm_version

# Trains by counting steps; stops, saves and asks for another start as pipeline.preempt promises, without torch.
STAND_IN = """
import os, signal, sys, time
from pathlib import Path

rank, folder = int(os.environ["RANK"]), Path(sys.argv[sys.argv.index("--run_dir") + 1]) / sys.argv[1]
state, marker, last_step = folder / "step", folder / "REQUEUE", 10_000
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append("SIGTERM"))
step = int(state.read_text()) if state.exists() else 0
print(f"rank {rank} of {os.environ['WORLD_SIZE']} starts at step {step}", flush=True)
(folder / f"running-{rank}").touch()
while step < last_step:
    step += 1
    time.sleep(0.05)
    if asked or (folder.parent / "STOP").exists():
        if rank == 0:
            state.write_text(str(last_step - 2))
            marker.touch()
        while not marker.exists():  # what the barrier does
            time.sleep(0.01)
        sys.exit(85)
"""


@pytest.fixture(scope="module")
def slurm() -> Iterator[SlurmCluster]:
    require_slurm()
    with SlurmCluster(cpus=128, memory_mb=1_000_000, gpus=8, partitions=("debug", "cpu", "gpu")) as cluster:
        yield cluster


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    run = tmp_path / "a run"  # with a space, as users have them
    (run / "logs").mkdir(parents=True)
    (run / "recipe.yaml").write_text("name: a run\n")
    return run


@pytest.mark.parametrize("cluster_name", ["example", "local"])
def test_controller_accepts_every_stage(slurm: SlurmCluster, run_dir: Path, cluster_name: str) -> None:
    cluster = load_cluster(find_cluster(cluster_name))
    for stage in STAGE_JOBS:
        script = run_dir / f"{stage}.sbatch"
        script.write_text(render(stage, cluster, name="a run", run_dir=run_dir, code_dir=run_dir))
        tried = slurm.run("sbatch", "--test-only", script, check=False)
        assert tried.returncode == 0, f"{stage}: {tried.stderr}"
    script.write_text(render("distill", cluster, name="a run", run_dir=run_dir, code_dir=run_dir, nodes=3))
    refused = slurm.run("sbatch", "--test-only", script, check=False)
    assert refused.returncode == 1, "the controller has two nodes and must see that the script asks for three"


def submit_stand_in(slurm: SlurmCluster, run_dir: Path, *, max_requeues: int = 20) -> int:
    """Job number of a `teacher` job in which the stand-in above is the program; returns once it trains."""
    program = run_dir / "code" / "pipeline"
    program.mkdir(parents=True)
    (program / "__main__.py").write_text(STAND_IN)
    local = load_cluster(find_cluster("local"))
    cluster = replace(local, python=sys.executable, max_requeues=max_requeues)
    script = run_dir / "teacher.sbatch"
    script.write_text(render("teacher", cluster, name="a run", run_dir=run_dir, code_dir=run_dir / "code"))
    job = slurm.sbatch(script)
    end = time.monotonic() + 60
    while not all((run_dir / "teacher" / f"running-{rank}").exists() for rank in (0, 1)):
        assert time.monotonic() < end, log_of(run_dir)
        time.sleep(0.1)
    return job


def log_of(run_dir: Path) -> str:
    return "\n".join(path.read_text() for path in (run_dir / "logs").glob("*.out"))


def test_signal_saves_and_requeues(slurm: SlurmCluster, run_dir: Path) -> None:
    (run_dir / "STOP").touch()  # left behind by a killed start; must not stop this one
    job = submit_stand_in(slurm, run_dir)
    after = slurm.sbatch(f"--dependency=afterok:{job}", "--kill-on-invalid-dep=yes", "--wrap=true", cwd=run_dir)
    slurm.run("scancel", "--batch", "--signal=USR1", job)  # what slurmctld sends before the time limit
    slurm.wait_job(job, ["PENDING"], timeout_s=30)
    assert not (run_dir / "STOP").exists()
    ended = slurm.wait_job(job)
    log = log_of(run_dir)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), log
    for rank in (0, 1):
        assert f"rank {rank} of 2 starts at step 0" in log
        assert f"rank {rank} of 2 starts at step 9998" in log
    assert slurm.wait_job(after)["JobState"] == "COMPLETED"


def test_requeues_have_an_end(slurm: SlurmCluster, run_dir: Path) -> None:
    job = submit_stand_in(slurm, run_dir, max_requeues=0)
    slurm.run("scancel", "--batch", "--signal=USR1", job)
    assert slurm.wait_job(job)["JobState"] == "FAILED"
    assert "not requeued" in log_of(run_dir)


def test_cancelled_job_stays_cancelled(slurm: SlurmCluster, run_dir: Path) -> None:
    job = submit_stand_in(slurm, run_dir)
    slurm.run("scancel", job)  # SIGTERM: the workers save and ask for another start, which nobody wants now
    assert slurm.wait_job(job)["JobState"] == "CANCELLED"
    time.sleep(2)
    ended = slurm.job(job)
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0")


def test_failing_worker_fails_the_job(slurm: SlurmCluster, run_dir: Path) -> None:
    """One worker of two dies; the other would wait for ever."""
    program = run_dir / "code" / "pipeline"
    program.mkdir(parents=True)
    (program / "__main__.py").write_text(
        textwrap.dedent("""
        import os, sys, time
        print("rank", os.environ["RANK"], flush=True)
        sys.exit(3) if os.environ["RANK"] == "1" else time.sleep(600)
        """)
    )
    cluster = replace(load_cluster(find_cluster("local")), python=sys.executable)
    script = run_dir / "distill.sbatch"
    script.write_text(render("distill", cluster, name="a run", run_dir=run_dir, code_dir=run_dir / "code"))
    ended = slurm.wait_job(slurm.sbatch(script))
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "0"), log_of(run_dir)


def test_lost_node_starts_the_job_again(run_dir: Path) -> None:
    require_slurm()
    slurmd_timeout_s = 1 if slurm_version() < (23, 0) else 5  # nodes of newer versions flap with 1
    with SlurmCluster(slurmd_timeout_s=slurmd_timeout_s, message_timeout_s=2) as slurm:
        job = submit_stand_in(slurm, run_dir)
        slurm.kill_node(slurm.nodes[1])
        slurm.wait_job(job, ["PENDING"])
        slurm.start_node(slurm.nodes[1])
        assert slurm.wait_job(job, ["RUNNING"])["Restarts"] == "1"


def test_missing_recipe_is_said(slurm: SlurmCluster, run_dir: Path) -> None:
    (run_dir / "recipe.yaml").unlink()
    script = run_dir / "report.sbatch"
    cluster = load_cluster(find_cluster("local"))
    script.write_text(render("report", cluster, name="a run", run_dir=run_dir, code_dir=run_dir))
    ended = slurm.wait_job(slurm.sbatch(script))
    assert ended["ExitCode"] == "2:0"
    assert "put the resolved recipe there" in log_of(run_dir)
