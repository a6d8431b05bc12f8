"""What the ranks of test_stopping.py run."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import torch

from pipeline.metrics import PhaseClock
from pipeline.preempt import StepFlags, StopSignal
from pipeline.watchdog import Watchdog
from pipeline.world import World

STEP_S = 0.02


def stop_by_signal(world: World, folder: Path, asked_rank: int, asked_step: int) -> None:
    """Steps of different length until all agree; each rank writes down at which step that was."""
    flags = StepFlags(world.side_group())
    with StopSignal(folder / "STOP", world, lead_s=60) as stop:
        for step in range(asked_step + 10):
            time.sleep(STEP_S * (1 + world.rank))
            if (world.rank, step) == (asked_rank, asked_step):
                os.kill(os.getpid(), signal.SIGUSR1)
            stopping, other = flags.exchange(stop.asked(), False)
            assert not other
            if stopping:
                break
    flags.close()
    (folder / f"rank_{world.rank}").write_text(str(step))


def watch(world: World, folder: Path, clock: PhaseClock, hang_timeout_s: float = 60) -> Watchdog:
    """One with the patience of a test."""
    return Watchdog(
        folder / "heartbeat", world, clock, hang_timeout_s=hang_timeout_s, beat_s=0.1, look_after_s=0.4, silence_s=2.0
    )


def steps_under_watch(world: World, folder: Path) -> None:
    """Steps until one rank is gone: in step 3 rank 1 sits in the forward pass and waits for that."""
    clock = PhaseClock(world.device)
    with watch(world, folder, clock):
        for step in range(100):
            clock.begin(step)
            clock.enter("forward", "e2x3-d6")
            if step == 3 and world.rank == 1:
                while '"step": 3, "phase": "forward"' not in (folder / "heartbeat/rank_00001.json").read_text():
                    time.sleep(0.01)
                (folder / "go").touch()
                time.sleep(600)
            world.sum(torch.ones(1))


def rank_that_waits(world: World, folder: Path) -> None:
    """Rank 1 does not come to the collective of step 3, but lives."""
    clock = PhaseClock(world.device)
    with watch(world, folder, clock, hang_timeout_s=2.0 + world.rank):
        for step in range(100):
            clock.begin(step)
            if step == 2 and world.rank == 1:
                time.sleep(600)
            clock.enter("backward")
            if step != 2:
                world.sum(torch.ones(1))


def rank_that_fails(world: World, folder: Path) -> None:
    clock = PhaseClock(world.device)
    with watch(world, folder, clock):
        for step in range(100):
            clock.begin(step)
            if step == 3 and world.rank == 1:
                raise ValueError("a shard is missing")
            world.sum(torch.ones(1))


def beats_without_pause(folder: Path) -> None:
    world = World.from_environment()
    watchdog = watch(world, folder, PhaseClock(world.device))
    with watchdog:
        while True:
            watchdog._beat()
