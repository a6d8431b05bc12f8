"""One record, two views: metrics.jsonl is the truth, TensorBoard shows the same numbers."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
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
