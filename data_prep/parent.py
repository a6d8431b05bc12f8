"""A process that ends with the one that started it."""

from __future__ import annotations

import ctypes
import os
import signal

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
