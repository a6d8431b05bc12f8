"""Jobs of a real SLURM of two nodes, hit by everything that happens to jobs; what comes out must be that of a quiet run
without SLURM on the same number of ranks, and no hand may be needed.

Seeded: FAULT_SEED chooses other instants. Trials are counted in FAULT_DIR over as many starts of this suite as it
takes, each of about FAULT_SECONDS; with FAULT_WHOLE=1 a count that is not reached is a failure.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from slurm.controller import ENDED
from slurm.starts import read_starts
from tests.builds import contents
from tests.faults.jobs import Jobs, begun, count_trials, fast_cluster, product, quiet_run
from tests.slurm.cluster import SlurmCluster, require_slurm
from tests.slurm.standin import StandIn, cluster_file

pytestmark = [pytest.mark.faults, pytest.mark.timeout(2400)]
TRAINING = ("teacher", "distill")
NUM_DEAD_NODES = 10

RAISED = "failed first (exit status 1): sitecustomize.TrialError: a rank raises"
# what the start is said to have ended of: one of these; {rank} and {pid} of the rank that was hit
HITS = {
    "killed": ["rank {rank} failed first (killed by SIGKILL"],
    "stopped": ["rank {rank} (process {pid}"],
    "raises": ["rank {rank} " + RAISED],
    "requeued": ["lost: ", "ended by SLURM ("],
    "preempted": ["told to stop (preemption"],
    "asked to stop": ["saved and stopped, because"],
}
# in PYTHONPATH of the ranks: what a file names raises, the process of a rank or a rank in every start
RAISES = """
import ctypes, os, sys, threading, time
from pathlib import Path


class TrialError(RuntimeError):
    def __init__(self):
        super().__init__("a rank raises")


def ready():
    return hasattr(sys.modules.get("pipeline.distill"), "train_modular")  # imported to its end


def look():
    named = Path(__file__).with_name("raises")
    mine = (str(os.getpid()), f"rank {os.environ['RANK']}")
    while not named.exists() or named.read_text() not in mine or not ready():
        time.sleep(0.05)
    main = ctypes.c_ulong(threading.main_thread().ident)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(main, ctypes.py_object(TrialError))


if "RANK" in os.environ:
    threading.Thread(target=look, daemon=True).start()
"""


@pytest.fixture(scope="module")
def quiet() -> Path:
    require_slurm()
    return quiet_run()


def test_chain_ends_with_the_scores_of_a_run_without_slurm(quiet: Path, tmp_path: Path) -> None:
    def trial(_: random.Random) -> dict[str, Any]:
        with SlurmCluster() as slurm:
            jobs = Jobs(slurm, begun(quiet, "data", tmp_path))
            jobs.submit("--nodes", "2")
            jobs.wait_end()
            assert set(jobs.states()) == {"COMPLETED"}, jobs.logs()
            assert (jobs.run / "report" / "report.html").is_file()
            for stage in ("data", *TRAINING, "evaluate"):
                assert product(jobs.run, stage) == product(quiet, stage), stage
        return {"num_scores": len(product(quiet, "evaluate"))}

    count_trials("chain", 1, trial)


@pytest.mark.parametrize("stage", TRAINING)
def test_time_limits_lose_nothing(quiet: Path, tmp_path: Path, stage: str) -> None:
    """The signal that comes before the time limit, at random instants, several times in one training."""

    def trial(generator: random.Random) -> dict[str, Any] | None:
        with SlurmCluster() as slurm:
            jobs = Jobs(slurm, begun(quiet, stage, tmp_path))
            job = jobs.submit("--only", stage, "--nodes", "2")[stage]
            for restarts in ("1", "2"):
                metrics = jobs.run / stage / "metrics.jsonl"
                jobs.wait_training(stage, len(metrics.read_text().splitlines()) if metrics.is_file() else 0)
                time.sleep(generator.uniform(0, 3))
                slurm.run("scancel", "--batch", "--signal=USR1", job, check=False)
                jobs.wait(
                    lambda wanted=restarts: slurm.job(job)["Restarts"] == wanted or slurm.job(job)["JobState"] in ENDED,
                    "the next start",
                )
            jobs.wait_end()
            assert jobs.states() == ["COMPLETED"], jobs.logs()
            assert product(jobs.run, stage) == product(quiet, stage)
            logs = jobs.run / "logs" / f"{stage}-{job}"
            starts = read_starts(logs)
            for before, after in itertools.pairwise(starts):
                saved = int(before.progress_after.removeprefix("step_"))
                assert f"saved at step {saved}" in (logs / f"start-{before.number}" / "rank-0.log").read_text()
                assert f"continuing from step {saved} of" in (logs / f"start-{after.number}" / "rank-0.log").read_text()
        return {"steps": [start.progress_after for start in starts]} if len(starts) > 1 else None

    count_trials(f"time-limit-{stage}", 5, trial)


def kill_node(jobs: Jobs, stage: str, node: str, generator: random.Random, *, in_save: bool) -> bool:
    """Take the power from a node while a stage works; whether a save had begun then that was never published."""
    checkpoints = jobs.run / stage / "checkpoints"
    if not in_save:
        time.sleep(generator.uniform(0, {"data": 3.0, "evaluate": 15.0}.get(stage, 20.0)))
        jobs.slurm.kill_node(node)
        return False
    jobs.wait_training(stage)
    time.sleep(generator.uniform(0, 5))
    pid, done = jobs.pid(stage, jobs.slurm.nodes.index(node)), jobs.run / stage / "stage.json"
    jobs.wait(lambda: any(checkpoints.glob(".step_*.tmp")) or done.exists(), "a save", poll_s=0.0003)
    os.kill(pid, signal.SIGSTOP)  # a save takes milliseconds, and so does the kill of everything on a node
    jobs.slurm.kill_node(node)
    return any(checkpoints.glob(".step_*.tmp"))


@pytest.mark.parametrize("stage", ["data", "distill", "evaluate"])
def test_dead_nodes_need_no_hand(quiet: Path, tmp_path: Path, stage: str) -> None:
    """A node loses its power while a stage works; it comes back, and the job starts again."""

    def trial(generator: random.Random) -> dict[str, Any] | None:
        with fast_cluster() as slurm:
            jobs = Jobs(slurm, begun(quiet, stage, tmp_path))
            jobs.submit("--only", stage)
            jobs.wait_working()
            node = generator.choice(slurm.nodes)
            aimed = stage == "distill" and generator.random() < 0.5
            in_save = kill_node(jobs, stage, node, generator, in_save=aimed)
            jobs.wait(
                lambda: slurm.run("sinfo", "-h", "-n", node, "-o", "%t").stdout.split()[0].startswith("down"),
                "the node's death",
            )
            slurm.start_node(node)
            jobs.wait_end()
            assert set(jobs.states()) == {"COMPLETED"}, jobs.logs()
            assert product(jobs.run, stage) == product(quiet, stage)
            starts = [[start.why, start.progress_after] for start in jobs.starts()]
            hit = any(why != "finished" for why, _ in starts)
            return {"node": node, "in_save": in_save, "starts": starts} if hit else None

    records = count_trials(f"dead-node-{stage}", NUM_DEAD_NODES, trial)
    assert len(records) >= NUM_DEAD_NODES
    assert len({record["node"] for record in records}) == 2
    assert stage != "distill" or any(record["in_save"] for record in records)


@pytest.mark.parametrize("how", HITS)
def test_hits_of_training_are_named_and_survived(quiet: Path, tmp_path: Path, how: str) -> None:
    """A rank is killed, stands still or raises; the whole job is requeued from outside, preempted, asked to stop."""

    def trial(generator: random.Random) -> dict[str, Any]:
        with SlurmCluster() as slurm:
            jobs = Jobs(slurm, begun(quiet, "distill", tmp_path))
            (tmp_path / "sitecustomize.py").write_text(RAISES)
            environment = f'PYTHONPATH = "{tmp_path}"' if how == "raises" else ""
            job = jobs.submit("--only", "distill", "--nodes", "2", environment=environment)["distill"]
            jobs.wait_training("distill")
            time.sleep(generator.uniform(0, 2))
            rank = generator.randrange(2)
            pid = jobs.pid("distill", rank)
            hit(jobs, job, how, pid)
            jobs.wait_end()
            states = jobs.states()
            if how == "asked to stop":
                assert states == ["FAILED"], jobs.logs()
                again = jobs.submit("--only", "distill", "--nodes", "2", environment=environment)["distill"]
                jobs.wait_end()
                states = [slurm.job(again)["JobState"]]
            assert states == ["COMPLETED"], jobs.logs()
            assert product(jobs.run, "distill") == product(quiet, "distill")
            why = read_starts(jobs.run / "logs" / f"distill-{job}")[0].why
            assert any(each.format(rank=rank, pid=pid) in why for each in HITS[how]), why
            shown = " ".join(jobs.command("status", jobs.run).stdout.split())
            assert " ".join(why.split()) in shown, shown
            return {"why": why}

    count_trials(how.replace(" ", "-"), 2, trial)


def hit(jobs: Jobs, job: int, how: str, pid: int) -> None:
    if how in ("killed", "stopped"):
        os.kill(pid, signal.SIGKILL if how == "killed" else signal.SIGSTOP)
    elif how == "raises":
        (jobs.run.parent / "raises").write_text(str(pid))
    elif how == "requeued":
        jobs.slurm.run("scontrol", "requeue", job)
    elif how == "preempted":
        jobs.slurm.run("scancel", "--signal=TERM", job)
    else:
        (jobs.run / "STOP").touch()


def test_crash_that_comes_again_ends_the_chain(quiet: Path, tmp_path: Path) -> None:
    def trial(_: random.Random) -> dict[str, Any]:
        with SlurmCluster() as slurm:
            jobs = Jobs(slurm, begun(quiet, "distill", tmp_path))
            (tmp_path / "sitecustomize.py").write_text(RAISES)
            (tmp_path / "raises").write_text("rank 1")
            numbers = jobs.submit("--nodes", "2", environment=f'PYTHONPATH = "{tmp_path}"')
            jobs.wait_end()
            states = jobs.states()
            assert slurm.job(numbers["distill"])["JobState"] == "FAILED", jobs.logs()
            assert sorted(states)[:-1] == ["CANCELLED"] * (len(states) - 1), states
            why = jobs.starts()[-1].why
            assert why == f"rank 1 {RAISED}; not requeued: 2 starts without progress (no checkpoint)"
            assert why in " ".join(jobs.command("status", jobs.run).stdout.split())
            return {"why": why, "cancelled": len(states) - 1}

    count_trials("crash", 1, trial)


def test_one_node_continues_what_two_began(quiet: Path, tmp_path: Path) -> None:
    def trial(generator: random.Random) -> dict[str, Any]:
        with SlurmCluster() as slurm:
            jobs = Jobs(slurm, begun(quiet, "distill", tmp_path))
            job = jobs.submit("--only", "distill", "--nodes", "1-2")["distill"]
            jobs.wait_training("distill")
            time.sleep(generator.uniform(0, 3))
            slurm.run("scancel", "--batch", "--signal=USR1", job)
            jobs.wait(lambda: slurm.job(job)["Restarts"] == "1", "the next start")
            slurm.run("scontrol", "update", f"nodename={slurm.nodes[1]}", "state=down", "reason=test")
            jobs.wait_end()
            ended = slurm.job(job)
            assert (ended["JobState"], ended["NumNodes"]) == ("COMPLETED", "1"), jobs.logs()
        saved = int(jobs.starts()[0].progress_after.removeprefix("step_"))
        losses = {"quiet": losses_of(quiet), "here": losses_of(jobs.run)}
        assert losses["quiet"].keys() == losses["here"].keys()
        # a record is the mean since the one before it, or since the start: the first after the stop is of fewer steps
        cut = min((step for step, _ in losses["quiet"] if step > saved), default=0)
        whole = [key for key in losses["quiet"] if key[0] != cut]
        largest = max(abs(losses["here"][key] - losses["quiet"][key]) for key in whole)
        assert largest < 1e-5
        starts = [start.progress_after for start in jobs.starts()]
        return {"largest_difference": largest, "num_losses": len(whole), "steps": starts}

    count_trials("one-node", 2, trial)


def losses_of(run: Path) -> dict[tuple[int, str], float]:
    """Every recorded loss of the distill stage, by step and name."""
    records = [json.loads(line) for line in (run / "distill" / "metrics.jsonl").read_text().splitlines()]
    names = ("hidden", "logit", "task", "validation/")
    return {
        (record["step"], name): value for record in records for name, value in record.items() if name.startswith(names)
    }


def test_evaluation_array_with_a_killed_task(quiet: Path, tmp_path: Path) -> None:
    """Eight tasks on two nodes; one task's worker is killed."""

    def trial(generator: random.Random) -> dict[str, Any] | None:
        with SlurmCluster(cpus=4) as slurm:
            jobs = Jobs(slurm, begun(quiet, "evaluate", tmp_path))
            eight = cluster_file(tmp_path / "eight.toml", python=sys.executable)
            head, table, tail = eight.read_text().partition("[jobs.evaluate]")
            eight.write_text(head + table + tail.replace("nodes = 2", "nodes = 8", 1))
            jobs.submit("--only", "evaluate", "--cluster", eight)
            claims = jobs.run / "evaluate" / "claims"
            jobs.wait(lambda: any(claims.glob("*")), "a claim")
            time.sleep(generator.uniform(0, 5))
            holders = [json.loads(path.read_text()) for path in claims.glob("[!.]*")]
            if not holders:
                return None
            os.kill(generator.choice(holders)["pid"], signal.SIGKILL)
            jobs.wait_end()
            assert jobs.states() == ["COMPLETED"] * 8, jobs.logs()
            assert product(jobs.run, "evaluate") == product(quiet, "evaluate")
            outputs = [contents(run / "evaluate" / "outputs") for run in (jobs.run, quiet)]
            assert outputs[0] == outputs[1]
            whys = [start.why for start in jobs.starts()]
            hit = [why for why in whys if why != "finished"]
            return {"starts": len(whys), "outputs": len(outputs[0]), "hit": hit} if hit else None

    count_trials("array", 2, trial)


@pytest.mark.skipif(os.geteuid() != 0, reason="a small disk is mounted by root only")
def test_full_disk_is_named_and_room_is_enough(quiet: Path, tmp_path: Path) -> None:
    def trial(_: random.Random) -> dict[str, Any]:
        disk = tmp_path / "disk"
        disk.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1g", "tmpfs", disk], check=True)
        with ExitStack() as stack:
            stack.callback(subprocess.run, ["umount", "-l", disk])
            run = begun(quiet, "distill", disk)
            slurm = stack.enter_context(SlurmCluster())
            jobs = Jobs(slurm, run)
            job = jobs.submit("--only", "distill", "--nodes", "2")["distill"]
            jobs.wait_training("distill")
            used = shutil.disk_usage(disk).used
            # inside of the nodes too: they have mount tables of their own, but this file system is one
            subprocess.run(["mount", "-o", f"remount,size={used // 1024 + 100}k", disk], check=True)
            jobs.wait_end()
            assert jobs.states() == ["FAILED"], jobs.logs()
            told = jobs.story()
            assert "No space left on device" in told, told
            subprocess.run(["mount", "-o", "remount,size=1g", disk], check=True)
            again = jobs.submit("--only", "distill", "--nodes", "2")["distill"]
            jobs.wait_end()
            assert slurm.job(again)["JobState"] == "COMPLETED", jobs.logs()
            assert product(run, "distill") == product(quiet, "distill")
            return {"first": read_starts(run / "logs" / f"distill-{job}")[-1].why}

    count_trials("full-disk", 1, trial)


def test_the_clock_of_slurm_sends_the_signal(tmp_path: Path) -> None:
    """A real time limit of two minutes, shorter than the work: as many starts as it takes."""
    require_slurm()
    with SlurmCluster() as slurm:
        stand_in = StandIn(slurm, tmp_path, signal_lead_s=30)
        stand_in.behave(num_steps=2200)  # of 50 ms
        job = slurm.sbatch("--time=2", stand_in.script("teacher"))
        ended = slurm.wait_job(job, timeout_s=400)
        starts = read_starts(stand_in.run / "logs" / f"teacher-{job}")
        assert ended["JobState"] == "COMPLETED", stand_in.log()
        assert len(starts) >= 2
        assert {start.why for start in starts[:-1]} == {"time limit"}
