"""The whole road as a chain of jobs on a real SLURM of two nodes, with the programs, the recipe and the commands of a
user."""

from __future__ import annotations

import csv
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from slurm.cluster import find_cluster
from tests.slurm.cluster import SlurmCluster, require_slurm

CODE = Path(__file__).resolve().parents[2]
STAGES = ("prepare", "teacher", "distill", "baseline", "assemble", "evaluate", "report")
TIMEOUT_S = 540.0


@pytest.fixture(scope="module")
def slurm() -> Iterator[SlurmCluster]:
    require_slurm()
    with SlurmCluster() as cluster:
        yield cluster


def output_of(*words: object) -> str:
    """What a program of the project prints."""
    done = subprocess.run([sys.executable, "-m", *map(str, words)], cwd=CODE, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def logs(run: Path) -> str:
    files = sorted((run / "logs").glob("*.out"), key=lambda path: path.stat().st_mtime)
    return "\n".join(f"== {path.name}\n{path.read_text(errors='replace')[-3000:]}" for path in files)


def submit_chain(slurm: SlurmCluster, run: Path) -> dict[str, int]:
    """Job numbers of all stages of the recipe `minute`, each waiting for the one before."""
    facts = find_cluster("local").read_text()
    interpreter = 'python = ".venv/bin/python"'
    assert interpreter in facts
    cluster_file = run.parent / "here.toml"
    cluster_file.write_text(facts.replace(interpreter, f'python = "{sys.executable}"'))
    (run / "logs").mkdir(parents=True)
    recipe = output_of("pipeline", "report", "--config", "minute", "--run_dir", run, "--print_config")
    (run / "recipe.yaml").write_text(recipe)
    jobs: dict[str, int] = {}
    for stage in STAGES:
        script = run / f"{stage}.sbatch"
        script.write_text(
            output_of("slurm", "render", stage, "--cluster", cluster_file, "--config", run / "recipe.yaml")
        )
        wait_for = [f"--dependency=afterok:{list(jobs.values())[-1]}", "--kill-on-invalid-dep=yes"] if jobs else []
        jobs[stage] = slurm.sbatch(*wait_for, script)
    return jobs


@pytest.mark.timeout(600)
def test_chain_of_all_stages(slurm: SlurmCluster, tmp_path: Path) -> None:
    run = tmp_path / "minute run"
    jobs = submit_chain(slurm, run)
    slurm.wait_job(jobs["report"], timeout_s=TIMEOUT_S)
    states = {stage: slurm.job(job)["JobState"] for stage, job in jobs.items()}
    assert states == dict.fromkeys(STAGES, "COMPLETED"), logs(run)
    with open(run / "evaluate" / "scores.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) >= 2, "the teacher and at least one assembly"
    assert "<html" in (run / "report" / "report.html").read_text().lower()
