"""What a CPU cannot tell, in six minutes of one GPU: every part in a process and under a limit of its own.

Results are written after each part, as JSON and Markdown: a part that fails or hangs takes nothing from the others.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.bench import hardware

SECONDS = {
    "machine": 50, "shapes": 45, "step": 100, "kernels": 100, "gathers": 50, "bart": 40, "norm": 20, "decoding": 40,
    "compiled": 90,
}  # fmt: skip
"""Parts, the most telling first, and how long each may take."""
LIMIT_S = 360.0
LINES_KEPT = 12


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--part", choices=SECONDS, action="append", help="only these, in the order of the list")
    parser.add_argument("--dry", action="store_true", help="tiny sizes on any device, in one process: does it run?")
    parser.add_argument("--write", type=Path, default=Path("runs/gpu_day"), metavar="DIR", help="where results go")


def main(arguments: argparse.Namespace) -> None:
    names = [name for name in SECONDS if name in (arguments.part or SECONDS)]
    arguments.write.mkdir(parents=True, exist_ok=True)
    found: list[dict[str, Any]] = []
    deadline = time.monotonic() + LIMIT_S
    for group in [names] if arguments.dry else [[name] for name in names]:
        limit_s = LIMIT_S if arguments.dry else min(SECONDS[group[0]], deadline - time.monotonic())
        found += _run(group, limit_s, dry=arguments.dry)
        _write(found, arguments.write, dry=arguments.dry)
    failed = [each["part"] for each in found if each["status"] != "ok"]
    print(f"results: {arguments.write / 'gpu_day.md'}")
    if failed:
        raise ValueError(f"not all parts came to their end: {', '.join(failed)}")


def _run(names: Sequence[str], limit_s: float, *, dry: bool) -> list[dict[str, Any]]:
    """Run parts in one process; what each found, and how it ended."""
    if limit_s <= 0:
        return [{"part": name, "status": "no time left", "seconds": 0.0, "figures": {}, "said": ""} for name in names]
    command = [sys.executable, "-m", "pipeline.bench.gpu_day_parts", *names, *(["--dry"] if dry else [])]
    started_at, status = time.monotonic(), "ok"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s)
        output, errors = done.stdout, done.stderr
        status = "ok" if done.returncode == 0 else f"exit code {done.returncode}"
    except subprocess.TimeoutExpired as late:
        output, errors = (_text(each) for each in (late.stdout, late.stderr))
        status = f"over {limit_s:.0f} s"
    figures = {each["part"]: each["figures"] for each in map(json.loads, filter(_is_found, output.splitlines()))}
    said = "\n".join(errors.splitlines()[-LINES_KEPT:])
    seconds = time.monotonic() - started_at
    print(f"{', '.join(names):<10} {status}, {seconds:.1f} s", *([said] if status != "ok" else []), flush=True)
    return [
        {"part": name, "status": "ok" if name in figures else status, "seconds": seconds,
         "figures": figures.get(name, {}), "said": "" if name in figures else said}
        for name in names
    ]  # fmt: skip


def _is_found(line: str) -> bool:
    return line.startswith('{"part": ')


def _text(output: str | bytes | None) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""


def _write(found: Sequence[dict[str, Any]], folder: Path, *, dry: bool) -> None:
    (folder / "gpu_day.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    title = "# A day on a GPU" + (", dry: tiny sizes, whose figures say nothing" if dry else "")
    lines = [title, "", f"{hardware()}, {datetime.now(UTC):%Y-%m-%d}", ""]
    for each in found:
        lines += [f"## {each['part']}: {each['status']}, {each['seconds']:.0f} s", ""]
        lines += [f"- {name}: {_shown(value)}" for name, value in each["figures"].items()]
        lines += ["", *(f"    {line}" for line in each["said"].splitlines()), ""]
    (folder / "gpu_day.md").write_text("\n".join(lines), encoding="utf-8")


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
