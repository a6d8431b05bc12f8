"""Data builds as users start them, on any number of MPI ranks, and what it takes to kill one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.patience import PATIENCE_S

ROOT = Path(__file__).resolve().parents[1]
MPIEXEC = Path(sys.executable).with_name("mpiexec")
SMALL = {"num_demo_pairs": 1500, "num_validation": 60, "num_test": 60, "examples_per_block": 32, "blocks_per_shard": 2}


def command(recipe: Path, out: Path, ranks: int, *options: str) -> list[str]:
    build = [sys.executable, "-m", "data_prep", "build", "--config", str(recipe), "--out", str(out), *options]
    return build if ranks == 0 else [str(MPIEXEC), "-n", str(ranks), *build]


def build(recipe: Path, out: Path, ranks: int = 0, *options: str) -> subprocess.CompletedProcess[str]:
    """ranks = 0 is one plain process."""
    return subprocess.run(
        command(recipe, out, ranks, *options), cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def write_recipe(path: Path, data: dict) -> Path:
    path.write_text(json.dumps({"name": "test", "teacher": {"any": 1}, "data": data}), encoding="utf-8")  # JSON is YAML
    return path


def family_of(process: subprocess.Popen) -> set[int]:
    """The process and everything it started, also ranks that moved to their own process group or session."""
    listing = subprocess.run(["ps", "-eo", "pid=,ppid=,sid="], capture_output=True, text=True, check=True).stdout
    rows = [tuple(map(int, row.split())) for row in listing.splitlines()]
    family = {process.pid} | {pid for pid, _, session in rows if session == process.pid}
    while more := {pid for pid, parent, _ in rows if parent in family} - family:
        family |= more
    return family


def kill_session(process: subprocess.Popen) -> None:
    """SIGKILL for the process and everything it started."""
    for pid in family_of(process):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()
