"""This process among the ranks: who am I, small collectives, and a logger that says so."""

from __future__ import annotations

import logging
import os
import random
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class World:
    """Ranks of a run, from the environment that torchrun or srun gives; a plain process is a world of one."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @staticmethod
    def from_environment() -> World:
        rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
        if device.type == "cuda":
            torch.cuda.set_device(device)
        return World(rank, size, local_rank, device)

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

    def any(self, flag: bool) -> bool:
        """True on every rank when it is true on one."""
        value = torch.tensor(float(flag), device=self.device)
        if dist.is_initialized() and self.size > 1:
            dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return bool(value.item())

    def close(self) -> None:
        """Leave the process group together, so that no rank tears down while another still talks."""
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()


def free_port() -> int:
    """A port below the ephemeral range that is likely free; a fixed one would collide between runs on one machine."""
    return random.SystemRandom().randrange(20000, 32000)


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
