"""Processes: how ranks of a data build are started, and how a process ends with the one that started it."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import sys
from pathlib import Path

_PR_SET_PDEATHSIG = 1  # sys/prctl.h


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies (Linux), so that a launcher that is killed leaves no
    worker behind to write into a run that is already being continued."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def die_with_mpiexec() -> None:
    """The same for a rank of MPICH's or Intel MPI's mpiexec, whose other ranks may wait in a collective for ever; SLURM
    and Open MPI end the ranks of a lost launcher themselves, and a plain process may outlive its shell."""
    if "MPI_LOCALNRANKS" in os.environ:
        die_with_parent()


def process_start(pid: int) -> str | None:
    """When a process of this machine started (kernel ticks), or None when there is none: a pid alone gets reused."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if stat[0] in "ZX" else stat[19]


def mpiexec() -> str:
    """The mpiexec beside this Python (pip's MPI), else the one on the path.

    Raises:
        ValueError: there is none.
    """
    beside = Path(sys.executable).with_name("mpiexec")
    found = str(beside) if beside.is_file() else shutil.which("mpiexec")
    if not found:
        raise ValueError("no mpiexec found: pip install mpich, or set launch.num_mpi_ranks to 1")
    return found
