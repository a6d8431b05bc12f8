"""Whether a cluster can run the pipeline: a small job on two nodes that checks what training needs of them."""

from __future__ import annotations

import time
from pathlib import Path

from slurm.cluster import Cluster
from slurm.controller import Job, jobs_of_run, sbatch, test_only
from slurm.render import Nodes, Script, render

POLL_S = 2.0


def doctor_script(cluster: Cluster, folder: Path, code_dir: Path, nodes: Nodes) -> Script:
    return Script(stage="doctor", cluster=cluster, name="modular", run_dir=folder, code_dir=code_dir, nodes=nodes)


def examine(cluster: Cluster, folder: Path, code_dir: Path, nodes: Nodes) -> bool:
    """Submit the job, wait for it, print what it says; True when all is well.

    Raises:
        ValueError: the controller refuses the job.
    """
    text = render(doctor_script(cluster, folder, code_dir, nodes))
    test_only(text)
    for name in ("slurm", "logs"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    path = folder / "slurm" / "doctor.sbatch"
    path.write_text(text, encoding="utf-8")
    number = sbatch(path, [])
    print(f"job {number}, {nodes} nodes; `scancel {number}` ends it", flush=True)
    job = _wait(folder, number)
    log = folder / "logs" / f"doctor-{number}.out"
    print(log.read_text(encoding="utf-8") if log.is_file() else f"the job wrote no {log}")
    if job is not None and job.state not in ("COMPLETED", "FAILED"):
        print(f"failed  the job ended {job.state}")
    return job is not None and job.state == "COMPLETED"


def _wait(folder: Path, number: int) -> Job | None:
    """The job once it has ended; None when SLURM has forgotten it."""
    shown = ""
    while True:
        job = next((job for job in jobs_of_run(folder) if job.number == number), None)
        if job is None or not job.is_alive:
            return job
        words = f"{job.state.lower()}{f' ({job.reason})' if job.reason not in ('None', '') else ''}"
        if words != shown:
            print(words, flush=True)
            shown = words
        time.sleep(POLL_S)
