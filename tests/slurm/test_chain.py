"""The chapter `On a cluster` of README.md, word for word, on a real SLURM of two nodes: the whole road as jobs."""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
from pathlib import Path

from slurm.cluster import load_cluster
from tests.slurm.cluster import SlurmCluster, require_slurm

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("data", "teacher", "distill", "baseline", "assemble", "evaluate", "report")
INSTALL = "make .venv/installed"


def commands_of_readme() -> list[str]:
    """The commands of the first block of the chapter, for two ranks instead of sixteen."""
    chapter = (ROOT / "README.md").read_text().partition("## On a cluster\n")[2].partition("\n## ")[0]
    block = re.search(r"(?:^    .*\n)+", chapter, re.MULTILINE)
    assert block is not None
    text = block[0].replace("\\\n", " ").replace("micro_batches_per_step 16", "micro_batches_per_step 2")
    return [line.strip() for line in text.splitlines()]


def test_readme_leads_from_a_fresh_account_to_a_report(tmp_path: Path) -> None:
    require_slurm()
    home = tmp_path / "a home" / "modular"
    for name in ("data_prep", "pipeline", "ds_configs", "slurm"):
        shutil.copytree(ROOT / name, home / name, ignore=shutil.ignore_patterns("__pycache__"))
    (home / ".venv").symlink_to(ROOT / ".venv")
    install, *commands = commands_of_readme()
    assert install == INSTALL  # what `make test` has just done
    with SlurmCluster(cpus=1) as slurm:
        printed = []
        for command in commands:
            done = subprocess.run(["bash", "-c", command], cwd=home, env=slurm.env, text=True, capture_output=True)
            assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
            printed.append(done.stdout)
        again = subprocess.run(["bash", "-c", commands[2]], cwd=home, env=slurm.env, text=True, capture_output=True)
    _, doctor, _, shown = printed
    for told in ("one MPI rank on each node", "one of all ranks wins a claim", "file locks reach all ranks"):
        assert told in doctor
    assert "2 ranks on " in doctor
    assert "This cluster can run the pipeline." in doctor
    site = load_cluster(home / "slurm" / "clusters" / "mysite.toml")
    assert (site.mpi, site.gpu_flag) == ("pmi2", "none")
    assert {shape.partition for shape in site.jobs.values()} == {"debug"}
    run = home / "runs" / "minute"
    logs = "\n".join(f"== {path.name}\n{path.read_text()[-3000:]}" for path in (run / "logs").rglob("*.*"))
    assert (run / "report" / "report.html").is_file(), f"{shown}\n{logs}"
    with open(run / "evaluate" / "scores.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) >= 2, "the teacher and at least one assembly"
    rows = [line for line in shown.splitlines() if line.startswith(STAGES)]
    assert len(rows) == len(STAGES)
    assert all("completed" in row for row in rows), shown
    assert "step 40 of 40" in shown
    assert "nothing to submit" in again.stdout, again.stderr
