"""Questions and orders to SLURM, through its commands."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from slurm.stages import stage_of

ENDED = (
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT",
)  # fmt: skip
# What SLURM and launchers tell the processes of a job about it, and what a site or a person tells SLURM.
_OF_A_JOB = re.compile(
    "(SLURM|SLURMD|SRUN|PMI|PMIX|OMPI|TORCHELASTIC)_.*|RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|GROUP_RANK|MASTER_(ADDR|PORT)"
)
_OF_A_PERSON = {"SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_JWT", "SLURM_TIME_FORMAT"}
_FIELDS = ("%i", "%F", "%T", "%r", "%S", "%N", "%j", "%Z")


@dataclass(frozen=True)
class Job:
    """A job, or one task of an array, as squeue shows it."""

    label: str
    """Its number; of a task of an array, as <array>_<index>."""
    number: int
    """Its number; of a task of an array, that of the array."""
    state: str
    reason: str
    start: str
    """When it started or is expected to, as SLURM writes it; "N/A" when SLURM does not know."""
    nodes: str
    stage: str
    run_dir: Path

    @property
    def is_alive(self) -> bool:
        return self.state not in ENDED


def own_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment without what the job has put there whose shell this may be: jobs that are submitted from it
    would take over its binding, memory, tasks and count of starts."""
    return {name: value for name, value in environment.items() if name in _OF_A_PERSON or not _OF_A_JOB.fullmatch(name)}


def run_command(words: Sequence[str], *, stdin: str | None = None) -> str:
    """What a SLURM command prints.

    Raises:
        FileNotFoundError: there is no such command on this machine.
        ValueError: the command refused; with its words.
    """
    if shutil.which(words[0]) is None:
        raise FileNotFoundError(f"no {words[0]} on this machine: run this on a login node of the cluster")
    done = subprocess.run(words, input=stdin, capture_output=True, text=True, env=own_environment(os.environ))
    if done.returncode:
        told = " ".join(done.stderr.split()) or f"exit status {done.returncode}"
        raise ValueError(f"{words[0]} refuses: {told}")
    return done.stdout


def jobs_of_run(run_dir: Path) -> list[Job]:
    """Jobs of a run that SLURM still knows, alive and recently ended, oldest first.

    They are found by the folder they run in, which the batch scripts set: so no job escapes, whether it was submitted
    by `submit`, by hand, or by a `submit` that was killed before it could write the number down.
    """
    text = run_command(["squeue", "--me", "-h", "-r", "--states=all", "-o", "\t".join(_FIELDS)])
    jobs = [_job_of_line(line) for line in text.splitlines()]
    mine = [job for job in jobs if job.run_dir == run_dir]
    return sorted(mine, key=lambda job: (job.number, len(job.label), job.label))


def _job_of_line(line: str) -> Job:
    label, number, state, reason, start, nodes, name, folder = line.split("\t")
    # the script runs in RUN/slurm and is named <name of the run>-<stage>
    return Job(label, int(number), state, reason, start, nodes, stage_of(name.rpartition("-")[2]), Path(folder).parent)


def test_only(script: str) -> None:
    """Ask the controller whether it would take a batch script, without submitting it.

    Raises:
        ValueError: it would not; with its words.
    """
    run_command(["sbatch", "--test-only"], stdin=script)


def sbatch_words(path: Path, after: Sequence[str]) -> list[str]:
    """The command that submits a script.

    Args:
        after: what to wait for, such as afterok:123; a job whose wait becomes vain is cancelled.
    """
    wait = [f"--dependency={','.join(after)}", "--kill-on-invalid-dep=yes"] if after else []
    return ["sbatch", "--parsable", *wait, str(path)]


def sbatch(path: Path, after: Sequence[str]) -> int:
    """Submit a script; its job number."""
    return int(run_command(sbatch_words(path, after)).strip().partition(";")[0])


def scancel(numbers: Sequence[int]) -> None:
    run_command(["scancel", *map(str, numbers)])
