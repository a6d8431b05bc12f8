"""This process among the ranks: who am I, small collectives, and a logger that says so."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import os
import platform
import random
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

M_MMAP_THRESHOLD = -3
"""Parameter of mallopt, from glibc's malloc.h."""
MAPPED_BYTES = 2**20
"""Pieces of memory from this size on go back to the system when they are freed."""


@dataclass(frozen=True)
class World:
    """Ranks of a run, from the environment that torchrun or srun gives; a plain process is a world of one."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    ranks_per_node: int = 1

    @staticmethod
    def from_environment() -> World:
        rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        device = _take_gpu(local_rank) if torch.cuda.is_available() else torch.device("cpu")
        return World(rank, size, local_rank, device, int(os.environ.get("LOCAL_WORLD_SIZE", size)))

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if dist.is_initialized():
            dist.barrier()

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum of a tensor over all ranks, in place."""
        if dist.is_initialized() and self.size > 1:
            dist.all_reduce(values)
        return values

    def max(self, values: torch.Tensor) -> torch.Tensor:
        """Largest of a tensor over all ranks, element by element, in place."""
        if dist.is_initialized() and self.size > 1:
            dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return values

    def any(self, flag: bool) -> bool:
        """True on every rank when it is true on one."""
        return flag if self.size == 1 else bool(self.max(torch.tensor(float(flag), device=self.device)).item())

    def side_group(self) -> dist.ProcessGroup | None:
        """A process group of all ranks' CPUs for what runs beside training, so that its collectives never meet those of
        the model; None alone. Collective."""
        return dist.new_group(backend="gloo") if dist.is_initialized() and self.size > 1 else None

    def gather(self, value: Any, group: dist.ProcessGroup | None) -> list[Any]:
        """Every rank's value, by rank, over a group from side_group()."""
        if group is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=group)
        return values

    @property
    def device_bytes(self) -> float:
        """Memory that one rank may use: its GPU's, or an equal share of the machine's."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_properties(self.device).total_memory
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / self.ranks_per_node

    def close(self) -> None:
        """Leave the process group together, so that no rank tears down while another still talks."""
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()


def _take_gpu(local_rank: int) -> torch.device:
    """The GPU of this process, as torch is to use it from now on."""
    if torch.cuda.device_count() == 1:
        local_rank = 0  # of several tasks each may be shown its own GPU alone, which is number 0 to all of them
        os.environ["LOCAL_RANK"] = "0"  # DeepSpeed goes by it
    # of attention with a bias cuDNN plans every shape anew, which takes longer than the attention, and shapes vary
    torch.backends.cuda.enable_cudnn_sdp(False)
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def return_freed_memory() -> None:
    """Have glibc give freed tensors of a MiB and more back to the system at once; elsewhere nothing happens.

    By itself it raises that size up to 32 MiB as it sees such pieces freed. Layers that are gathered and released then
    leave holes in the heap, which were measured to take as much memory again as training does.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES)


def free_port() -> int:
    """A port that is free now, below the ephemeral range, so that no outgoing connection takes it meanwhile; a fixed
    one would collide between runs on one machine."""
    while True:
        port = random.SystemRandom().randrange(20000, 32000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port


def logger_of(world: World, name: str = "pipeline") -> logging.Logger:
    """Logger with a [rank/size] prefix; ranks other than 0 only speak up with warnings."""
    logger = logging.getLogger(name)
    if not logger.handlers:
        handler = logging.StreamHandler()
        prefix = f"[{world.rank}/{world.size}] " if world.size > 1 else ""
        handler.setFormatter(logging.Formatter(f"{prefix}%(message)s"))
        logger.addHandler(handler)
        logger.propagate = False
    logger.setLevel(logging.INFO if world.is_main else logging.WARNING)
    return logger


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory has run out, on a GPU or on the CPU."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return any(words in str(error) for words in ("can't allocate memory", "Cannot allocate memory"))


def release_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def device_name(device: torch.device) -> str:
    """What a GPU is called, or a CPU, with the threads that are used of it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"CPU {next(names, platform.machine())}, {torch.get_num_threads()} threads"
