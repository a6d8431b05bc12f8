"""Where the time and the memory of a training process go."""

from __future__ import annotations

import resource
import time
from typing import Any

import torch


class PhaseClock:
    """What this process does now (data, forward, backward, optimizer, save, ...), and how long each of it takes.

    On a GPU, times are those of the device, between events that are read only by take(): the host runs ahead of it.
    """

    def __init__(self, device: torch.device) -> None:
        self.step = 0
        """The step that is being made, from 0."""
        self.phase = "start"
        self.detail = ""
        """What of it, such as the draw of the micro-batch."""
        self.num_phases = 0
        """Phases entered so far: a sign of life."""
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []
        self.enter("start")

    def begin(self, step: int) -> None:
        """The first phase of a step, in which its data are made."""
        self.step = step
        self.enter("data")

    def enter(self, phase: str, detail: str = "") -> None:
        """From now on it is this phase, until the next is entered."""
        self.phase, self.detail = phase, detail
        self.num_phases += 1
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((phase, event))
        else:
            self._marks.append((phase, time.perf_counter()))

    def take(self) -> dict[str, float]:
        """Seconds of each phase since the last call."""
        self.enter(self.phase, self.detail)
        if self._on_gpu:
            self._marks[-1][1].synchronize()
        seconds: dict[str, float] = {}
        for (phase, begin), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            passed = begin.elapsed_time(end) / 1e3 if self._on_gpu else end - begin
            seconds[phase] = seconds.get(phase, 0.0) + passed
        del self._marks[:-1]
        return seconds


def memory_gib(device: torch.device) -> dict[str, float]:
    """Most memory that this process has had: resident on the host, and allocated on its GPU."""
    found = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}  # ru_maxrss is in KiB
    if device.type == "cuda":
        found["device"] = torch.cuda.max_memory_allocated(device) / 2**30
    return found
