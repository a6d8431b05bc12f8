"""A first cluster file for a site, from what its controller says."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import sys
from dataclasses import dataclass

from slurm.cluster import seconds_of
from slurm.controller import run_command
from slurm.render import TEMPLATES

# what the templates ask for, where the partition allows it
WANTED = {"data": "08:00:00", "train": "1-00:00:00", "search": "02:00:00", "evaluate": "08:00:00",
          "single": "02:00:00"}  # fmt: skip
_GRES = re.compile(r"gpu(?::(?P<type>[A-Za-z][\w.-]*))?:(?P<count>\d+)")
_LIMIT = re.compile(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)")


@dataclass(frozen=True)
class Partition:
    """A kind of node in a partition, as sinfo shows it."""

    name: str
    is_default: bool
    limit_s: int | None
    """Longest time limit; None: infinite."""
    num_nodes: int
    cpus: int
    memory_mb: int
    gpus: int
    gpu_type: str


def parse_partitions(text: str) -> list[Partition]:
    """From `sinfo -h -o "%P|%l|%D|%c|%m|%G"`."""
    found = []
    for line in text.splitlines():
        name, limit, nodes, cpus, memory, gres = line.split("|")
        gpu = _GRES.search(gres)
        found.append(
            Partition(
                name=name.rstrip("*"),
                is_default=name.endswith("*"),
                limit_s=_seconds(limit),
                num_nodes=int(nodes),
                cpus=int(cpus.rstrip("+")),
                memory_mb=int(memory.rstrip("+")),
                gpus=int(gpu["count"]) if gpu else 0,
                gpu_type=(gpu["type"] or "") if gpu else "",
            )
        )
    return found


def discover() -> str:
    """The text of a cluster file with this site's facts.

    Raises:
        FileNotFoundError: no SLURM on this machine.
        ValueError: the controller does not answer, or has no partition.
    """
    partitions = parse_partitions(run_command(["sinfo", "-h", "-o", "%P|%l|%D|%c|%m|%G"]))
    if not partitions:
        raise ValueError("sinfo shows no partition: ask the site for access")
    plugins = run_command(["srun", "--mpi=list"])
    return cluster_file(partitions, mpi=choose_mpi(plugins), account=_account(), python=sys.executable)


def cluster_file(partitions: list[Partition], *, mpi: str, account: str, python: str) -> str:
    """The text of a cluster file for these partitions."""
    train = max(partitions, key=lambda each: (each.gpus * each.num_nodes, each.is_default, each.num_nodes))
    without_gpus = [each for each in partitions if not each.gpus]
    other = max(without_gpus, key=lambda each: (each.is_default, each.num_nodes)) if without_gpus else train
    num_processes = train.gpus or 1
    limits = {kind: _limit(WANTED[kind], other if kind in ("data", "single") else train) for kind in WANTED}
    shortest_s = min(map(seconds_of, limits.values()))
    return TEMPLATES.get_template("cluster.toml.j2").render(
        partitions=partitions,
        train=train,
        other=other,
        num_processes=num_processes,
        cpus_per_process=max(1, train.cpus // num_processes),
        num_nodes=min(2, train.num_nodes),
        data_processes=min(other.cpus, 32) if mpi != "none" else 1,
        mpi=mpi,
        account=account,
        python=python,
        modules=[name for name in os.environ.get("LOADEDMODULES", "").split(":") if name],
        limits=limits,
        signal_lead_s=max(1, min(600, (shortest_s - 120) // 2)),
    )


def choose_mpi(plugins: str) -> str:
    """How to start MPI ranks, from what `srun --mpi=list` shows and which MPI is installed beside mpi4py."""
    known = set(re.findall(r"\w+", plugins))
    if _installed("mpich") or _installed("impi-rt"):
        return "pmi2" if "pmi2" in known else "mpiexec"
    if _installed("openmpi") or shutil.which("ompi_info"):
        return "pmix" if "pmix" in known else "mpiexec"
    return next((kind for kind in ("pmi2", "pmix") if kind in known), "none")


def _installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _account() -> str:
    """The user's default account, where the site keeps accounts."""
    try:
        shown = run_command(["sacctmgr", "-nP", "show", "user", os.environ.get("USER", ""), "format=defaultaccount"])
    except (ValueError, FileNotFoundError):
        return ""
    return shown.strip().splitlines()[0] if shown.strip() else ""


def _seconds(limit: str) -> int | None:
    match = _LIMIT.fullmatch(limit)
    if match is None:  # infinite
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def _limit(wanted: str, partition: Partition) -> str:
    allowed_s = partition.limit_s
    if allowed_s is None or seconds_of(wanted) <= allowed_s:
        return wanted
    hours, rest = divmod(allowed_s, 3600)
    return f"{hours:02}:{rest // 60:02}:{rest % 60:02}"
