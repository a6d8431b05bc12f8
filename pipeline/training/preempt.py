"""When to stop: a signal to any worker, the end of the job's time, or a STOP file; agreed by all ranks at a step."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from pipeline.world import World, logger_of

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)


class StopSignal:
    """Whether this rank was asked to stop. Signal handlers only set a flag, so no step is cut in two; they are in force
    inside of the `with` statement.

    Args:
        stop_file: asks to stop while it exists.
        lead_s: seconds before the end of the job's time (SLURM_JOB_END_TIME, seconds since 1970) at which to stop; not
            more than half of the time that is left at the start, so that every start makes progress.
    """

    def __init__(self, stop_file: Path, world: World, lead_s: float) -> None:
        self._stop_file = stop_file
        self._world = world
        self._received = ""
        end = os.environ.get("SLURM_JOB_END_TIME", "")
        left_s = float(end) - time.time() if end.isdigit() else float("inf")
        if left_s <= 0:  # of an allocation that this shell has outlived
            left_s = float("inf")
        self._deadline = time.monotonic() + max(left_s - lead_s, left_s / 2)

    def asked(self) -> bool:
        """A signal came, the job's time ends, or the STOP file is there (one rank of a node looks)."""
        reason = self._received
        if time.monotonic() >= self._deadline:
            reason = reason or "the job's time ends"
        elif self._world.local_rank == 0 and self._stop_file.exists():
            reason = reason or f"{self._stop_file} exists"
        if reason and reason != self._received:
            logger_of(self._world).info("asked to stop: %s", reason)
            self._received = reason
        return bool(self._received)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._received = signal.Signals(number).name

    def __enter__(self) -> StopSignal:
        self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *error: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class StepFlags:
    """Flags that any rank can raise and all ranks see at the same step boundary.

    The exchange is one small all-reduce a step between the ranks' CPUs. It is begun at one boundary and read at the
    next, so it waits for nobody and no device, and a flag is seen by all at most two steps after it was raised.

    Args:
        group: from World.side_group(); None alone.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self._begun: tuple[torch.Tensor, dist.Work] | None = None

    def exchange(self, *raised: bool) -> list[bool]:
        """Which flags were raised on any rank at the boundary before (alone: now). Collective."""
        if self._group is None:
            return list(raised)
        before = self._begun
        flags = torch.tensor(raised, dtype=torch.int32)
        self._begun = (flags, dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self._group, async_op=True))
        if before is None:
            return [False] * len(raised)
        agreed, work = before
        work.wait()
        return [bool(flag) for flag in agreed.tolist()]

    def close(self) -> None:
        """End the exchange that was begun last. Collective."""
        if self._begun is not None:
            self._begun[1].wait()
            self._begun = None
