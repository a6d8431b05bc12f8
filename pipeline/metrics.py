"""One record, two views: metrics.jsonl is the truth, TensorBoard shows the same numbers. And where the time goes."""

from __future__ import annotations

import io
import json
import resource
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from pipeline.rundir import write_atomic


class MetricLog:
    """Records of a training run by step, one a step; only rank 0 makes one.

    Args:
        step: step that training continues from: records of later steps, left by a run that was killed, are dropped.
    """

    def __init__(self, path: Path, tensorboard: Path, *, step: int) -> None:
        if path.is_file():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            write_atomic(path, "".join(line for line in lines if _step_of(line) <= step))
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 closed by close()
        self._writer = SummaryWriter(str(tensorboard), purge_step=step + 1)

    def log(self, step: int, values: dict[str, float]) -> None:
        record: dict[str, Any] = {"step": step, **values}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        self._writer.close()


def write_summary(folder: Path, scalars: dict[str, float], table: str, picture: bytes) -> None:
    """Show a report in TensorBoard: its numbers, its table (Markdown) and its picture (PNG); an older one goes."""
    shutil.rmtree(folder, ignore_errors=True)
    pixels = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"))
    with SummaryWriter(str(folder)) as writer:
        for name, value in scalars.items():
            writer.add_scalar(name, value, 0)
        writer.add_text("table", table, 0)
        writer.add_image("quality", pixels, 0, dataformats="HWC")


def _step_of(line: str) -> float:
    """Step of a record; infinity for a line that a killed process left half written."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return float("inf")


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
