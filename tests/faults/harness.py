"""Run the road of the recipe `minute`, kill all of it at random instants, and compare what comes out."""

from __future__ import annotations

import contextlib
import csv
import os
import queue
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("data", "teacher", "distill", "baseline", "assemble", "evaluate")
TIMEOUT_S = 900.0


@dataclass
class Road:
    """`python -m pipeline run` of the recipe `minute` in one run directory."""

    run_dir: Path
    options: tuple[str, ...] = ()

    def start(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-u", "-m", "pipeline", "run", "--config", "minute", "--run_dir", str(self.run_dir)]
        return subprocess.Popen(
            [*command, *self.options],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def finish(self) -> str:
        """Run to the end; what it printed."""
        process = self.start()
        try:
            output, _ = process.communicate(timeout=TIMEOUT_S)
        finally:
            kill_group(process)
        assert process.returncode == 0, output[-3000:]
        return output

    def forget(self, stage: str) -> None:
        """Remove what a stage and those after it have made."""
        for name in STAGES[STAGES.index(stage) :]:
            shutil.rmtree(self.run_dir / name, ignore_errors=True)

    def kill_in(self, stage: str, after_s: float) -> bool:
        """Start, wait until `stage` works, wait `after_s`, SIGKILL the whole group; False when the stage was faster."""
        process = self.start()
        lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=lambda: [lines.put(line) for line in process.stdout], daemon=True).start()
        before = STAGES[: STAGES.index(stage)]
        seen: set[str] = set()
        deadline = time.monotonic() + TIMEOUT_S
        try:
            while not set(before) <= seen:
                seen |= finished_stage(lines.get(timeout=deadline - time.monotonic()))
            end = time.monotonic() + after_s
            while time.monotonic() < end and process.poll() is None:
                time.sleep(0.02)
            while not lines.empty():
                seen |= finished_stage(lines.get())
            return stage not in seen
        finally:
            kill_group(process)

    def kill_when_there_is(self, pattern: str) -> None:
        """Start, wait until a path of the run directory matches, SIGKILL the whole group."""
        process = self.start()
        threading.Thread(target=process.stdout.read, daemon=True).start()
        deadline = time.monotonic() + TIMEOUT_S
        try:
            while not any(self.run_dir.glob(pattern)):
                assert process.poll() is None, f"it ended without {pattern}"
                assert time.monotonic() < deadline, f"no {pattern}"
                time.sleep(0.01)
        finally:
            kill_group(process)


def kill_group(process: subprocess.Popen[str]) -> None:
    """SIGKILL to every process of the group, as a scheduler or an impatient user sends it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def finished_stage(line: str) -> set[str]:
    """The stage that a line reports as done: `teacher 12.3 s` or `teacher up to date`."""
    words = line.split()
    done = words[1:] == ["up", "to", "date"] or (len(words) == 3 and words[2] == "s")
    return set(words[:1]) & set(STAGES) if done else set()


def seconds_of_stages(output: str) -> dict[str, float]:
    """How long each stage took, from what a run prints."""
    found = {}
    for line in output.splitlines():
        words = line.split()
        if len(words) == 3 and words[0] in STAGES and words[2] == "s":
            found[words[0]] = float(words[1])
    return found


def scores(run_dir: Path) -> list[dict[str, str]]:
    """scores.csv without the columns of measured times."""
    with open(run_dir / "evaluate" / "scores.csv", newline="", encoding="utf-8") as file:
        return [
            {key: value for key, value in row.items() if not key.startswith("time_")} for row in csv.DictReader(file)
        ]


def random_instants(seed: int, stage: str, seconds: float, count: int) -> list[float]:
    generator = random.Random(f"kill/{seed}/{stage}")
    return [generator.uniform(0.0, seconds) for _ in range(count)]
