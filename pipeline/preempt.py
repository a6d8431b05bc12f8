"""When to stop: SIGUSR1 or SIGTERM to any worker, or a STOP file in the run directory, agreed by all ranks."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType

from pipeline.world import World

EXIT_REQUEUE = 85


class StopSignal:
    """Asked once in a while at a step boundary; a handler only sets a flag, so no step is cut in two."""

    def __init__(self, stop_file: Path, world: World) -> None:
        self._stop_file = stop_file
        self._world = world
        self._received = False
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._received = True

    def agreed(self) -> bool:
        """True on all ranks when any was asked to stop. Collective."""
        asked = self._received or (self._world.local_rank == 0 and self._stop_file.exists())
        return self._world.any(asked)
