"""Jobs of the recipe `minute` on a test cluster: submitted as a user submits them, hit, watched, and compared with a
quiet run without SLURM on the same number of ranks; trials are counted over any number of slices."""

from __future__ import annotations

import fcntl
import hashlib
import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slurm.controller import ENDED
from slurm.starts import Start, read_starts
from tests.faults import trials
from tests.faults.harness import STAGES, Road, scores
from tests.faults.trials import SEED, folder_of
from tests.slurm.cluster import SlurmCluster, slurm_version
from tests.slurm.standin import ROOT, cluster_file

FOLDER = folder_of("slurm")
TIMEOUT_S = 280.0


@dataclass
class Jobs:
    """A run directory whose jobs one test cluster runs."""

    slurm: SlurmCluster
    run: Path

    def submit(self, *options: object, environment: str = "", **facts: str | int) -> dict[str, int]:
        """Job numbers by stage.

        Args:
            environment: a line of the cluster file's table of that name.
            facts: further facts of the site.
        """
        file = cluster_file(self.run.parent / "here.toml", python=sys.executable, **facts)
        file.write_text(file.read_text().replace("[environment]", f"[environment]\n{environment}"))
        plan = ("--config", "minute", "--cluster", file, "--run-dir", self.run)
        done = self.command("submit", *plan, *options)
        assert done.returncode == 0, done.stderr
        pairs = (line.split() for line in done.stdout.splitlines())
        return {words[0]: int(words[1]) for words in pairs if len(words) == 2 and words[1].isdigit()}

    def command(self, *words: object) -> subprocess.CompletedProcess[str]:
        """python -m slurm WORDS."""
        command = [sys.executable, "-m", "slurm", *map(str, words)]
        return subprocess.run(command, cwd=ROOT, env=self.slurm.env, text=True, capture_output=True)

    def states(self) -> list[str]:
        """Of all jobs of the run, those of arrays task by task."""
        shown = self.slurm.run("squeue", "-h", "-r", "--states=all", "-o", "%T\t%Z").stdout.splitlines()
        return [line.split("\t")[0] for line in shown if line.endswith(f"\t{self.run}/slurm")]

    def busy_nodes(self) -> list[str]:
        """Nodes that work for a job."""
        lists = self.slurm.run("squeue", "-h", "-r", "-t", "RUNNING", "-o", "%N").stdout.split()
        found = {
            name for each in lists for name in self.slurm.run("scontrol", "show", "hostnames", each).stdout.split()
        }
        return sorted(found)

    def wait(self, true: Callable[[], bool], what: str, poll_s: float = 0.05) -> None:
        end = time.monotonic() + TIMEOUT_S
        while not true():
            assert time.monotonic() < end, f"{what} never came; {self.states()}\n{self.logs()}"
            time.sleep(poll_s)

    def wait_end(self) -> None:
        self.wait(lambda: all(state in ENDED for state in self.states()), "the end")

    def wait_working(self) -> None:
        """Until a rank of the newest start writes its log."""
        self.wait(lambda: any(self.run.glob("logs/*/start-*/rank-*.log")), "the first log")

    def wait_training(self, stage: str, more_than: int = 0) -> None:
        """Until a training stage has recorded a step."""
        file = self.run / stage / "metrics.jsonl"
        self.wait(lambda: file.is_file() and len(file.read_text().splitlines()) > more_than, "a step")

    def pid(self, stage: str, rank: int) -> int:
        """The process of a training rank."""
        heartbeat = self.run / "heartbeat" / stage / f"rank_{rank:05d}.json"
        return int(json.loads(heartbeat.read_text())["pid"])

    def starts(self) -> list[Start]:
        """Of all jobs and tasks of the run."""
        return [start for folder in sorted((self.run / "logs").glob("*-*/")) for start in read_starts(folder)]

    def story(self) -> str:
        return "\n".join(path.read_text() for path in sorted((self.run / "logs").glob("*.out")))

    def logs(self) -> str:
        files = sorted(path for path in (self.run / "logs").rglob("*.*") if path.is_file())
        return "\n".join(
            f"== {path.relative_to(self.run)}\n{path.read_text(errors='replace')[-2000:]}" for path in files
        )


def quiet_run() -> Path:
    """A finished run without SLURM, on two ranks, by the program as it is; slices side by side share it."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    road, made_by = Road(FOLDER / "quiet"), FOLDER / "quiet.version"
    with open(FOLDER / "quiet.lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made_by.exists() or made_by.read_text() != version():
            shutil.rmtree(road.run_dir, ignore_errors=True)
            road.finish()
            made_by.write_text(version())
    return road.run_dir


def version() -> str:
    digest = hashlib.sha256()
    for package in ("data_prep", "pipeline"):
        for path in sorted((ROOT / package).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def product(run: Path, stage: str) -> Any:
    """What a stage is there for, exactly."""
    files = {
        "data": "data/manifest.json",
        "teacher": "teacher/model/model.safetensors",
        "distill": "distill/library/modular.safetensors",
    }
    return (run / files[stage]).read_bytes() if stage in files else scores(run)


def begun(quiet: Path, stage: str, folder: Path) -> Path:
    """A run directory in `folder` that stands before a stage."""
    run = folder / "a trial"
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir(parents=True)
    for name in STAGES[: STAGES.index(stage)]:
        shutil.copytree(quiet / name, run / name)
    return run


def fast_cluster() -> SlurmCluster:
    """A cluster that notices a dead node within seconds, and whose nodes have room for one process each."""
    # nodes of newer versions flap with 1
    return SlurmCluster(cpus=1, slurmd_timeout_s=1 if slurm_version() < (23, 0) else 5, message_timeout_s=2)


def count_trials(
    kind: str, wanted: int, trial: Callable[[random.Random], dict[str, Any] | None]
) -> list[dict[str, Any]]:
    """trials.count_trials in the folder of this suite, each trial with its own random numbers."""
    return trials.count_trials(FOLDER, kind, wanted, lambda number: trial(random.Random(f"{kind}/{SEED}/{number}")))
