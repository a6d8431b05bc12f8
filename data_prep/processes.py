"""Processes: what makes them short, how ranks of a data build are started, and how one ends with what started it."""

from __future__ import annotations

import atexit
import ctypes
import errno
import gc
import os
import shutil
import signal
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

_PR_SET_PDEATHSIG = 1  # sys/prctl.h
_PASSING = {
    getattr(errno, name)
    for name in (
        "EAGAIN", "EBUSY", "ECOMM", "ECONNABORTED", "ECONNREFUSED", "ECONNRESET", "EDQUOT", "EHOSTDOWN", "EHOSTUNREACH",
        "EINTR", "EIO", "EMFILE", "ENETDOWN", "ENETRESET", "ENETUNREACH", "ENFILE", "ENOLCK", "ENOMEM", "ENOSPC",
        "ENOTCONN", "EREMOTEIO", "ESHUTDOWN", "ESTALE", "ETIMEDOUT",
    )
}  # fmt: skip


def run_as_process(program: Callable[[], None]) -> NoReturn:
    """Run a program that is all that its process does. Torch and transformers make a million objects: looking through
    them while they are imported, and taking them apart at the end, was two fifths of a process that does nothing else.

    So nothing is collected before `collect_garbage`, and at the end the process is left when functions registered with
    atexit have run and all output is written. Threads are not waited for.

    Raises:
        Exception: the program's own. SystemExit and Ctrl-C are none.
    """
    gc.disable()
    code: object = 0
    try:
        program()
    except SystemExit as ended:
        code = ended.code or 0
    except KeyboardInterrupt:
        print("stopped; the same command goes on from what is saved", file=sys.stderr)
        code = 128 + signal.SIGINT
    except BaseException:
        gc.unfreeze()  # as this process is taken apart
        raise
    if not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(BrokenPipeError):  # as where `| head` has read enough
            stream.flush()
    os._exit(code)


def collect_garbage() -> None:
    """From here on, but not what imports have made: everything large is imported. Elsewhere than in a process of
    `run_as_process` it is collected all the time."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()


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


def may_pass(error: BaseException) -> bool:
    """Whether an error is of a disk or a network, and another start may meet it no more; others a user must mend."""
    return isinstance(error, OSError) and error.errno in _PASSING


def on_this_machine(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment for an mpiexec whose ranks all belong to this machine. Within a job of SLURM MPICH's and Intel's
    would start them through srun, which waits for ever where the job's resources are in use, as in `srun --pty bash`.
    SLURM puts a variable of Intel's there itself.
    """
    return {**environment, "HYDRA_LAUNCHER": "fork", "HYDRA_RMK": "user", "I_MPI_HYDRA_BOOTSTRAP": "fork"}


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
