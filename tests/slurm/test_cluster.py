"""The test cluster leaves nothing behind."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from tests.slurm.cluster import SlurmCluster, require_slurm

OWNER = """
import time
from tests.slurm.cluster import SlurmCluster
with SlurmCluster() as cluster:
    job = cluster.sbatch("--wrap", "sleep 1000")
    cluster.wait_job(job, ["RUNNING"])
    print(cluster.root, flush=True)
    time.sleep(1000)
"""


def processes_of(root: str) -> list[int]:
    """Processes whose command line or environment names the cluster's folder."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if root.encode() in (folder / "cmdline").read_bytes() + (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:  # it has ended, or belongs to another user
            continue
    return found


def wait_until_gone(root: str) -> None:
    end = time.monotonic() + 10
    while processes_of(root) or Path(root).exists():
        assert time.monotonic() < end, f"{root} still has processes {processes_of(root)}"
        time.sleep(0.05)


def test_nothing_outlives_a_killed_owner() -> None:
    require_slurm()
    root_of_project = Path(__file__).resolve().parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", OWNER], cwd=root_of_project, stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        root = owner.stdout.readline().strip()
        assert len(processes_of(root)) >= 5, "munged, slurmctld, two slurmd, the job"
        owner.kill()
    wait_until_gone(root)


def test_nothing_outlives_the_with_block() -> None:
    require_slurm()
    with SlurmCluster() as cluster:
        root = str(cluster.root)
        assert cluster.run("srun", "-N2", "hostname").stdout.count("\n") == 2
    wait_until_gone(root)
