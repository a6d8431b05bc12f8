"""What the ranks of test_stopping.py run."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipeline.training.clock import PhaseClock
from pipeline.training.preempt import StepFlags, StopSignal
from pipeline.training.watchdog import Watchdog
from pipeline.world import World
from tests.patience import PATIENCE_S

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


def watchdog_of(world: World, folder: Path, hang_timeout_s: float = PATIENCE_S) -> Watchdog:
    """One with the patience of a test."""
    return Watchdog(
        folder / "heartbeat", world, hang_timeout_s=hang_timeout_s, beat_s=0.1, look_after_s=0.4, silence_s=2.0
    )


@contextlib.contextmanager
def watch(world: World, folder: Path, clock: PhaseClock, hang_timeout_s: float = PATIENCE_S) -> Iterator[None]:
    """In training, after the ranks have met."""
    with watchdog_of(world, folder, hang_timeout_s) as watchdog:
        watchdog.met()
        with watchdog.training(clock):
            yield


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
    with watchdog_of(World.from_environment(), folder) as watchdog:
        while True:
            watchdog._beat()


def record_of(folder: Path, rank: int) -> dict[str, Any]:
    """What a rank's file says now; before its first beat, nothing has been said."""
    try:
        return json.loads((folder / "heartbeat" / f"rank_{rank:05d}.json").read_text())
    except (OSError, ValueError):
        return {"pid": 0, "beat": 0}


def wait_for_looks(folder: Path, rank: int, count: int) -> None:
    """Until a rank has looked at the files of the others several times; it does so between two beats."""
    while not record_of(folder, rank)["pid"]:
        time.sleep(0.01)
    begin = record_of(folder, rank)["beat"]
    while record_of(folder, rank)["beat"] <= begin + count:
        time.sleep(0.01)


def rank_that_dies_on_its_way(folder: Path, is_seen: bool) -> None:
    """Rank 1 dies before the ranks have met; the others have seen it by then, or not."""
    world = World.from_environment()
    if world.rank == 1 and not is_seen:
        return
    with watchdog_of(world, folder, hang_timeout_s=PATIENCE_S if is_seen else 1.0) as watchdog:
        if world.rank == 1:
            for rank in (0, 2):
                wait_for_looks(folder, rank, 3)
            os.kill(os.getpid(), signal.SIGKILL)
        dist.init_process_group("gloo")
        watchdog.met()


def rank_that_comes_late(folder: Path) -> None:
    """Rank 1 comes when rank 0 has looked at what an earlier start has left of it."""
    world = World.from_environment()
    if world.rank == 1:
        wait_for_looks(folder, 0, 5)
    with watchdog_of(world, folder) as watchdog:
        dist.init_process_group("gloo")
        watchdog.met()
        world.close()
