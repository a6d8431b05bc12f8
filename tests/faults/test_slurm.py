"""Jobs of a real SLURM of two nodes, hit by everything that happens to jobs; what comes out must be that of a quiet run
without SLURM on the same number of ranks, and no hand may be needed.

Seeded: FAULT_SEED chooses other instants. Trials are counted in FAULT_DIR over as many starts of this suite as it
takes, each of about FAULT_SECONDS.
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
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from slurm.controller import ENDED
from slurm.starts import read_starts
from tests.faults.harness import STAGES, Road, scores
from tests.slurm.cluster import SlurmCluster, require_slurm, slurm_version
from tests.slurm.standin import ROOT, StandIn, cluster_file

SEED = int(os.environ.get("FAULT_SEED", "0"))
FOLDER = Path(os.environ.get("FAULT_DIR", f"runs/faults/slurm-{SEED}")).absolute()
SECONDS = float(os.environ.get("FAULT_SECONDS", "1500"))
STARTED_S = time.monotonic()
TIMEOUT_S = 280.0
TRAINING = ("teacher", "distill")


@dataclass
class Jobs:
    """A run directory whose jobs one test cluster runs."""

    slurm: SlurmCluster
    run: Path

    def submit(self, *options: object, **facts: str | int) -> dict[str, int]:
        """Job numbers by stage."""
        file = cluster_file(self.run.parent / "here.toml", python=sys.executable, **facts)
        words = ["submit", "--config", "minute", "--cluster", file, "--run-dir", self.run, *options]
        done = self._command(*words)
        assert done.returncode == 0, done.stderr
        pairs = (line.split() for line in done.stdout.splitlines())
        return {words[0]: int(words[1]) for words in pairs if len(words) == 2 and words[1].isdigit()}

    def _command(self, *words: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "slurm", *map(str, words)]
        return subprocess.run(command, cwd=ROOT, env=self.slurm.env, text=True, capture_output=True)

    def states(self) -> list[str]:
        """Of all jobs of the run, those of arrays task by task."""
        shown = self.slurm.run("squeue", "-h", "-r", "--states=all", "-o", "%T\t%Z").stdout.splitlines()
        return [line.split("\t")[0] for line in shown if line.endswith(f"\t{self.run}/slurm")]

    def wait(self, true: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + TIMEOUT_S
        while not true():
            assert time.monotonic() < end, f"{what} never came; {self.states()}\n{self.logs()}"
            time.sleep(0.05)

    def wait_end(self) -> None:
        self.wait(lambda: all(state in ENDED for state in self.states()), "the end")

    def wait_working(self) -> None:
        """Until a rank of the newest start writes its log."""
        self.wait(lambda: any(self.run.glob("logs/*/start-*/rank-*.log")), "the first log")

    def wait_training(self, stage: str, more_than: int = 0) -> None:
        """Until a training stage has recorded a step."""
        file = self.run / stage / "metrics.jsonl"
        self.wait(lambda: file.is_file() and len(file.read_text().splitlines()) > more_than, "a step")

    def story(self) -> str:
        return "\n".join(path.read_text() for path in sorted((self.run / "logs").glob("*.out")))

    def logs(self) -> str:
        files = sorted(path for path in (self.run / "logs").rglob("*.*") if path.is_file())
        return "\n".join(
            f"== {path.relative_to(self.run)}\n{path.read_text(errors='replace')[-2000:]}" for path in files
        )


@pytest.fixture(scope="module")
def quiet() -> Path:
    """A finished run without SLURM, on two ranks."""
    require_slurm()
    FOLDER.mkdir(parents=True, exist_ok=True)
    road = Road(FOLDER / "quiet")
    road.finish()
    return road.run_dir


def product(run: Path, stage: str) -> Any:
    """What a stage is there for, exactly."""
    files = {
        "data": "data/manifest.json",
        "teacher": "teacher/model/model.safetensors",
        "distill": "distill/library/modular.safetensors",
    }
    return (run / files[stage]).read_bytes() if stage in files else scores(run)


def begun(quiet: Path, stage: str, root: Path = FOLDER) -> Path:
    """A run directory that stands before a stage."""
    run = root / "a trial"
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir(parents=True)
    for name in STAGES[: STAGES.index(stage)]:
        shutil.copytree(quiet / name, run / name)
    return run


def fast_cluster() -> SlurmCluster:
    """A cluster that notices a dead node within seconds."""
    # nodes of newer versions flap with 1
    return SlurmCluster(slurmd_timeout_s=1 if slurm_version() < (23, 0) else 5, message_timeout_s=2)


def count_trials(kind: str, wanted: int, trial: Callable[[random.Random], dict[str, Any] | None]) -> None:
    """Run trials of a kind until there are enough of them over all starts of the suite, or the time is up; a trial that
    came too late (None) counts for nothing."""
    file = FOLDER / f"{kind}.jsonl"
    found = file.read_text().splitlines() if file.is_file() else []
    number = json.loads(found[-1])["number"] if found else 0
    while len(found) < wanted and time.monotonic() - STARTED_S < SECONDS:
        number += 1
        record = trial(random.Random(f"{kind}/{SEED}/{number}"))
        if record is not None:
            found.append(json.dumps({"number": number, **record}))
            file.write_text("\n".join(found) + "\n")
            print(f"{kind}: {found[-1]}", flush=True)
    if len(found) < wanted:
        pytest.skip(f"{kind}: {len(found)} of {wanted} trials so far: start again to go on")


@pytest.mark.faults
@pytest.mark.timeout(2400)
def test_chain_ends_with_the_scores_of_a_run_without_slurm(quiet: Path) -> None:
    def trial(_: random.Random) -> dict[str, Any]:
        with SlurmCluster() as slurm:
            jobs = Jobs(slurm, begun(quiet, "data"))
            jobs.submit("--nodes", "2")
            jobs.wait_end()
            assert set(jobs.states()) == {"COMPLETED"}, jobs.logs()
            assert (jobs.run / "report" / "report.html").is_file()
            for stage in ("data", *TRAINING, "evaluate"):
                assert product(jobs.run, stage) == product(quiet, stage), stage
        return {}

    count_trials("chain", 1, trial)


@pytest.mark.faults
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("stage", TRAINING)
def test_time_limits_lose_nothing(quiet: Path, stage: str) -> None:
    """The signal that comes before the time limit, at random instants, several times in one training."""

    def trial(generator: random.Random) -> dict[str, Any]:
        with SlurmCluster() as slurm:
            jobs = Jobs(slurm, begun(quiet, stage))
            job = jobs.submit("--only", stage, "--nodes", "2")[stage]
            stops = 0
            for _ in range(2):
                metrics = jobs.run / stage / "metrics.jsonl"
                num_records = len(metrics.read_text().splitlines()) if metrics.is_file() else 0
                jobs.wait_training(stage, num_records)
                time.sleep(generator.uniform(0, 3))
                slurm.run("scancel", "--batch", "--signal=USR1", job, check=False)
                restarts = str(stops + 1)
                jobs.wait(
                    lambda wanted=restarts: slurm.job(job)["Restarts"] == wanted or slurm.job(job)["JobState"] in ENDED,
                    "the next start",
                )
                stops = int(slurm.job(job)["Restarts"])
            jobs.wait_end()
            assert jobs.states() == ["COMPLETED"], jobs.logs()
            assert product(jobs.run, stage) == product(quiet, stage)
            logs = jobs.run / "logs" / f"{stage}-{job}"
            starts = read_starts(logs)
            for before, after in itertools.pairwise(starts):
                saved = int(before.progress_after.removeprefix("step_"))
                assert f"saved at step {saved}" in (logs / f"start-{before.number}" / "rank-0.log").read_text()
                assert f"continuing from step {saved} of" in (logs / f"start-{after.number}" / "rank-0.log").read_text()
        return {"stops": stops, "steps": [start.progress_after for start in starts]}

    count_trials(f"time-limit-{stage}", 5, trial)


def kill_node(quiet: Path, stage: str, generator: random.Random, *, in_save: bool) -> dict[str, Any] | None:
    """One trial: a node loses its power while a stage works; it comes back, and the job starts again."""
    with fast_cluster() as slurm:
        jobs = Jobs(slurm, begun(quiet, stage))
        name = "prepare" if stage == "data" else stage
        jobs.submit("--only", name)
        jobs.wait_working()
        if in_save:
            checkpoints = jobs.run / stage / "checkpoints"
            jobs.wait(lambda: any(checkpoints.glob(".step_*.tmp")), "a save")
        else:
            seconds = {"data": 3.0, "evaluate": 15.0}.get(stage, 20.0)
            time.sleep(generator.uniform(0, seconds))
        if all(state in ENDED for state in jobs.states()):
            return None
        node = generator.choice(slurm.nodes)
        slurm.kill_node(node)
        down = ("down", "down*")
        jobs.wait(
            lambda: slurm.run("sinfo", "-h", "-n", node, "-o", "%t").stdout.split()[0] in down, "the node's death"
        )
        slurm.start_node(node)
        jobs.wait_end()
        assert set(jobs.states()) == {"COMPLETED"}, jobs.logs()
        assert product(jobs.run, stage) == product(quiet, stage)
        starts = [start for folder in (jobs.run / "logs").glob("*-*/") for start in read_starts(folder)]
        return {"node": node, "in_save": in_save, "starts": [[start.why, start.progress_after] for start in starts]}


@pytest.mark.faults
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("stage", ["data", "distill", "evaluate"])
def test_dead_nodes_need_no_hand(quiet: Path, stage: str) -> None:
    def trial(generator: random.Random) -> dict[str, Any] | None:
        in_save = stage == "distill" and generator.random() < 0.3
        return kill_node(quiet, stage, generator, in_save=in_save)

    count_trials(f"dead-node-{stage}", 10, trial)


@pytest.mark.faults
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("how", ["killed", "stopped", "requeued"])
def test_lost_ranks_are_named_and_replaced(quiet: Path, how: str) -> None:
    """A rank is killed, a rank stands still, the whole job is requeued from outside."""

    def trial(generator: random.Random) -> dict[str, Any] | None:
        with SlurmCluster() as slurm:
            jobs = Jobs(slurm, begun(quiet, "distill"))
            job = jobs.submit("--only", "distill", "--nodes", "2")["distill"]
            jobs.wait_training("distill")
            rank = generator.randrange(2)
            heartbeat = jobs.run / "distill" / "heartbeat" / f"rank_{rank:05d}.json"
            pid = json.loads(heartbeat.read_text())["pid"]
            if how == "requeued":
                slurm.run("scontrol", "requeue", job)
            else:
                os.kill(pid, signal.SIGKILL if how == "killed" else signal.SIGSTOP)
            jobs.wait_end()
            assert jobs.states() == ["COMPLETED"], jobs.logs()
            assert product(jobs.run, "distill") == product(quiet, "distill")
            why = read_starts(jobs.run / "logs" / f"distill-{job}")[0].why
            expected = {
                "killed": f"rank {rank} failed first (killed by SIGKILL",
                "stopped": f"rank {rank} (process {pid}",
                "requeued": "",
            }
            assert expected[how] in why, why
            return {"why": why}

    count_trials(f"rank-{how}", 2, trial)


@pytest.mark.faults
@pytest.mark.timeout(2400)
def test_one_node_continues_what_two_began(quiet: Path) -> None:
    def trial(generator: random.Random) -> dict[str, Any]:
        with SlurmCluster() as slurm:
            jobs = Jobs(slurm, begun(quiet, "distill"))
            job = jobs.submit("--only", "distill", "--nodes", "1-2")["distill"]
            jobs.wait_training("distill")
            time.sleep(generator.uniform(0, 3))
            slurm.run("scancel", "--batch", "--signal=USR1", job)
            jobs.wait(lambda: slurm.job(job)["Restarts"] == "1", "the next start")
            slurm.run("scontrol", "update", f"nodename={slurm.nodes[1]}", "state=down", "reason=test")
            jobs.wait_end()
            ended = slurm.job(job)
            assert (ended["JobState"], ended["NumNodes"]) == ("COMPLETED", "1"), jobs.logs()
        losses = {"quiet": losses_of(quiet), "here": losses_of(jobs.run)}
        assert losses["quiet"].keys() == losses["here"].keys()
        largest = max(abs(losses["here"][key] - loss) for key, loss in losses["quiet"].items())
        assert largest < 1e-5
        return {"largest_difference": largest, "num_losses": len(losses["quiet"])}

    count_trials("one-node", 2, trial)


def losses_of(run: Path) -> dict[tuple[int, str], float]:
    """Every recorded loss of the distill stage, by step and name."""
    records = [json.loads(line) for line in (run / "distill" / "metrics.jsonl").read_text().splitlines()]
    names = ("hidden", "logit", "task", "validation/")
    return {
        (record["step"], name): value for record in records for name, value in record.items() if name.startswith(names)
    }


@pytest.mark.faults
@pytest.mark.timeout(2400)
def test_evaluation_array_with_a_killed_task(quiet: Path) -> None:
    """Eight tasks on two nodes; one task's worker is killed."""

    def trial(generator: random.Random) -> dict[str, Any] | None:
        with SlurmCluster(cpus=4) as slurm:
            jobs = Jobs(slurm, begun(quiet, "evaluate"))
            text = cluster_file(FOLDER / "eight.toml", python=sys.executable).read_text()
            head, table, tail = text.partition("[jobs.evaluate]")
            (FOLDER / "eight.toml").write_text(head + table + tail.replace("nodes = 2", "nodes = 8", 1))
            jobs.submit("--only", "evaluate", "--cluster", FOLDER / "eight.toml")
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
            restarts = [start for folder in (jobs.run / "logs").glob("evaluate-*/") for start in read_starts(folder)]
            return {"starts": len(restarts)}

    count_trials("array", 2, trial)


@pytest.mark.faults
@pytest.mark.timeout(2400)
@pytest.mark.skipif(os.geteuid() != 0, reason="a small disk is mounted by root only")
def test_full_disk_is_named_and_room_is_enough(quiet: Path) -> None:
    def trial(_: random.Random) -> dict[str, Any]:
        disk = FOLDER / "disk"
        disk.mkdir(exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1g", "tmpfs", disk], check=True)
        with ExitStack() as stack:
            stack.callback(subprocess.run, ["umount", "-l", disk])
            run = begun(quiet, "distill", disk)
            slurm = stack.enter_context(SlurmCluster())
            jobs = Jobs(slurm, run)
            used = sum(path.stat().st_size for path in disk.rglob("*") if path.is_file())
            remount = ["mount", "-o", f"remount,size={used // 1024 + 400}k", str(disk)]
            # inside of the nodes too: they have mount tables of their own, but this file system is one
            subprocess.run(remount, check=True)
            job = jobs.submit("--only", "distill", "--nodes", "2")["distill"]
            jobs.wait_end()
            assert jobs.states() == ["FAILED"], jobs.logs()
            told = jobs.story()
            assert "No space left on device" in told, told
            subprocess.run(["mount", "-o", "remount,size=1g", str(disk)], check=True)
            again = jobs.submit("--only", "distill", "--nodes", "2")["distill"]
            jobs.wait_end()
            assert slurm.job(again)["JobState"] == "COMPLETED", jobs.logs()
            assert product(run, "distill") == product(quiet, "distill")
            return {"first": read_starts(run / "logs" / f"distill-{job}")[-1].why}

    count_trials("full-disk", 1, trial)


@pytest.mark.faults
@pytest.mark.timeout(600)
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
