"""What all benchmarks share: one measure, the table, the JSON lines and the results file."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch


@dataclass(frozen=True)
class Measure:
    """One cost (a time, a size: less is better) of ours and of one named baseline, taken in the same run."""

    bench: str
    measure: str
    ours: float
    baseline: float
    baseline_name: str
    unit: str
    floor: float  # what no implementation can go below, in the same unit and measured in the same run where possible

    @property
    def ratio(self) -> float:
        """How many times cheaper ours is."""
        return self.baseline / self.ours

    def to_json(self) -> str:
        fields = {
            "bench": self.bench,
            "measure": self.measure,
            "ours": _rounded(self.ours),
            "baseline": _rounded(self.baseline),
            "baseline_name": self.baseline_name,
            "ratio": _rounded(self.ratio),
            "unit": self.unit,
            "floor": _rounded(self.floor),
        }
        return json.dumps(fields)


def report(bench: str, measures: Sequence[Measure], notes: str, write_dir: Path | None) -> None:
    """Print the table, then one line of JSON a measure; with write_dir also a Markdown file of the same table."""
    table = markdown_table(measures)
    print(f"{bench} on {hardware()}, torch {torch.__version__}\n{notes}\n\n{table}\n")
    for measure in measures:
        print(measure.to_json(), flush=True)
    if write_dir is not None:
        write_dir.mkdir(parents=True, exist_ok=True)
        slug = re.sub(r"[^a-z0-9]+", "-", hardware().lower()).strip("-")
        path = write_dir / f"{bench}_{slug}_{datetime.now(UTC):%Y%m}.md"
        versions = f"{hardware()}, torch {torch.__version__}, {datetime.now(UTC):%Y-%m-%d}"
        path.write_text(f"# {bench}\n\n{versions}\n\n{notes}\n\n{table}\n")


def markdown_table(measures: Sequence[Measure]) -> str:
    rows = [["measure", "baseline", "unit", "ours", "baseline", "ratio", "floor", "floor / ours"]]
    for measure in measures:
        figures = (measure.ours, measure.baseline, measure.ratio, measure.floor)
        share = f"{measure.floor / measure.ours:.0%}"
        rows.append([measure.measure, measure.baseline_name, measure.unit, *(f"{x:.4g}" for x in figures), share])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    rows.insert(1, ["-" * width for width in widths])
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


def hardware() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU {platform.machine()} with {torch.get_num_threads()} threads"


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
