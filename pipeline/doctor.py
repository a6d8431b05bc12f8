"""Check this machine: what will run, what will not, and what to do about it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from importlib.util import find_spec

import torch

MINIMUM_PYTHON = (3, 11)
PACKAGES = ("torch", "deepspeed", "transformers", "safetensors", "sentencepiece", "webdataset", "mpi4py", "sacrebleu")


def doctor() -> None:
    """Print one line for each check.

    Raises:
        ValueError: something that a run needs is missing.
    """
    failed = []
    for name, check in CHECKS.items():
        try:
            print(f"ok      {name:<12} {check()}")
        except Exception as error:
            print(f"failed  {name:<12} {error}")
            failed.append(name)
    if failed:
        raise ValueError(f"this machine cannot run the pipeline yet: {', '.join(failed)}")


def _python() -> str:
    if sys.version_info < MINIMUM_PYTHON:
        raise ValueError("Python 3.11 or newer is needed")
    return sys.version.split()[0]


def _packages() -> str:
    return ", ".join(f"{name} {metadata.version(name)}" for name in PACKAGES)


def _device() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, NCCL"
    return f"CPU with {torch.get_num_threads()} threads, gloo"


def _mpi() -> str:
    from pipeline.run import mpiexec

    count = "from mpi4py import MPI; print(MPI.COMM_WORLD.allreduce(1))"
    output = _output_of([mpiexec(), "-n", "2", sys.executable, "-c", count])
    if output.split() != ["2", "2"]:
        raise ValueError(f"two MPI ranks do not see each other: {output!r}; mpiexec and mpi4py must be of one MPI")
    return f"2 ranks by {mpiexec()}"


def _ranks() -> str:
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    size = max(1, torch.cuda.device_count()) if torch.cuda.is_available() else 2
    code = (
        "import os, torch, torch.distributed as d; d.init_process_group('gloo'); x = torch.ones(1); "
        "d.all_reduce(x); assert x.item() == d.get_world_size(); d.destroy_process_group()"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    _output_of([*torchrun, "--no-python", sys.executable, "-c", code])
    return f"{size} ranks by torchrun; training will use {backend}"


def _output_of(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise ValueError(done.stderr.strip().splitlines()[-1])
    return done.stdout


def _kernels() -> str:
    from pipeline.kernels import HiddenPair, hidden_loss, reference

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and find_spec("triton") is None:
        raise ValueError("triton is missing: the fused kernels need it on a GPU")
    states = torch.randn(3, 2, 7, 64, device=device)
    pair = HiddenPair(states[0], states[1], torch.ones(2, 7, dtype=torch.bool, device=device), states[2])
    torch.testing.assert_close(hidden_loss([pair], "span"), reference.hidden_loss([pair], "span"))
    return f"hidden loss on {device} equals its definition"


def _slurm() -> str:
    return shutil.which("sbatch") or "no sbatch here (only needed to submit jobs)"


CHECKS: dict[str, Callable[[], str]] = {
    "python": _python,
    "packages": _packages,
    "device": _device,
    "mpi": _mpi,
    "ranks": _ranks,
    "kernels": _kernels,
    "slurm": _slurm,
}
