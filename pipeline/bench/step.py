"""A training step of the engine: bytes moved, memory, and time against the same step in plain PyTorch.

Each part starts its own ranks with torchrun (pipeline/bench/step_ranks.py) and prints what rank 0 measured.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch

from pipeline.bench import Measure, report, step_draws
from pipeline.bench.step_host import PLAIN
from pipeline.footprint.estimate import GIB
from pipeline.world import free_port

PARTS = ("traffic", "memory", "overhead", "draws", "host", "gpu")
TOLERANCE = 1e-9
SHORT = (2, 32, 16)
"""Examples, source and target tokens of a micro-batch of the full-size benchmark."""
LARGE = {"num_layers": 24, "d_model": 1024, "d_ff": 2816, "shape_BST": (32, 512, 128)}
"""Of the GPU part: a teacher as large as T5-large, and the examples, source and target tokens of a micro-batch."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--part", choices=PARTS, action="append", help="what to measure; may be given again (default: all)"
    )
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each side, in turns (default 5)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of the overhead part (default 2)")
    parser.add_argument("--write", type=Path, metavar="DIR", help="write the table to DIR as Markdown, too")


def main(arguments: argparse.Namespace) -> None:
    has_gpu = torch.cuda.is_available()
    parts = (
        arguments.part or ["traffic", "gpu"]
        if has_gpu
        else arguments.part or ["traffic", "memory", "overhead", "draws", "host"]
    )
    if "gpu" in parts and not has_gpu:
        raise ValueError("--part gpu, but torch sees no CUDA device")
    measures: list[Measure] = []
    notes: list[str] = []
    for part in parts:
        found = MEASURED[part](arguments)
        measures += found[0]
        notes.append(found[1])
    report("step", measures, "\n".join(notes), arguments.write)


def _ranks(part: str, num_ranks: int, threads: int = 1, **options: Any) -> Any:
    """Run a part on real ranks and return what rank 0 found."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "found.json"
        torchrun = [
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            str(num_ranks),
            "--master-port",
            str(free_port()),
        ]
        command = [sys.executable, *torchrun, "-m", "pipeline.bench.step_ranks", part, str(path), json.dumps(options)]
        done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": str(threads)})
        if done.returncode:
            raise ValueError(f"part {part} failed with exit code {done.returncode}; what it said stands above")
        return json.loads(path.read_text(encoding="utf-8"))


def _traffic(arguments: argparse.Namespace) -> tuple[list[Measure], str]:
    found = _ranks("traffic", 2)
    for name, (counted, formula) in found["exact"].items():
        if abs(counted - formula) > TOLERANCE * formula:
            raise ValueError(f"{name}: counted {counted} bytes, but the formula gives {formula}")
    mib = 2**20
    rows = [(name, counted, formula, "closed formula", formula) for name, (counted, formula) in found["exact"].items()]
    gathered, drawn = found["exact"]["gathered in a step, layers"][0], found["drawn"]
    rows.append(("gathered in a step, layers", gathered, drawn, "only what was drawn", drawn))
    rows.append(("gathered in a step, zero3 with prefetching", found["prefetching"], gathered, "without", drawn))
    measures = [
        Measure("step", name, a / mib, b / mib, baseline, "MiB", floor / mib) for name, a, b, baseline, floor in rows
    ]
    return measures, (
        f"Traffic: {found['setting']}; counted at torch.distributed on one of 2 ranks, whole tensors, of which a rank\n"
        "receives half. Formula: every leaf once forward and once backward, the rest as often as it is called; P_m\n"
        "reduced once in each micro-batch."
    )


def _memory(arguments: argparse.Namespace) -> tuple[list[Measure], str]:
    found = _ranks("memory", 2)
    rows = [
        ("resident memory of a rank over an idle one", found["peak"], found["estimate"], "estimate", found["floor"])
    ]
    rows.append(("private memory while loading", found["loading"], found["shards"], "shards", found["shards"]))
    measures = [
        Measure("step", name, a / GIB, b / GIB, baseline, "GiB", floor / GIB) for name, a, b, baseline, floor in rows
    ]
    return measures, f"Memory: {found['setting']}."


def _overhead(arguments: argparse.Namespace) -> tuple[list[Measure], str]:
    found = _ranks("overhead", 1, threads=arguments.threads, steps=arguments.steps)
    measures = [
        Measure("step", f"step time, {name}", found["ours"][name], found["plain"][name], "plain PyTorch", "s", floor)
        for name, floor in found["floor"].items()
    ]
    return (
        measures,
        f"Overhead: {found['setting']}; median of {arguments.steps} steps in turns.\nProfile: {found['profile']}",
    )


def _draws(arguments: argparse.Namespace) -> tuple[list[Measure], str]:
    """Two and more draws a micro-batch, each cost held against that of one draw."""
    rows: list[tuple[str, dict[Any, float], dict[Any, float], str, float]] = []
    for recipe, found in step_draws.flops().items():
        of_teacher = {k: 0.0 for k in step_draws.DRAWS}
        rows.append((f"FLOPs of a micro-batch, {recipe}", found["estimated"], of_teacher, "TFLOP", 1e12))
        rows.append((f"FLOPs counted at 1/16 of its width, {recipe}", found["counted"], of_teacher, "GFLOP", 1e9))
        for num_draws, counted in found["counted"].items():
            expected = found["of the same draws"][num_draws]
            if abs(counted - expected) > 0.02 * expected:
                raise ValueError(f"{recipe}, {num_draws} draws: counted {counted:g} FLOPs, but estimated {expected:g}")
    moved = _of_draws(_ranks("draws-traffic", 2))
    rows += [(f"{name} in a step", moved[name], moved[name], "MiB", 2**20) for name in ("gathered", "reduced")]
    timed = _of_draws(_ranks("draws-seconds", 1, threads=arguments.threads, steps=arguments.steps))
    rows.append(("step time", timed["seconds"], timed["floor"], "s", 1.0))
    peaks = {k: _ranks("memory", 2, draws=draws, shape_BST=SHORT) for k, draws in step_draws.DRAWS.items()}
    fullest = {k: found["peak"] for k, found in peaks.items()}
    rows.append(("resident memory over an idle rank", fullest, {k: f["floor"] for k, f in peaks.items()}, "GiB", GIB))
    measures = [
        Measure("step", f"{name}, {num_draws} draws", costs[num_draws] / unit, costs[1] / unit, "one draw", unit_name,
                floors[num_draws] / unit)
        for name, costs, floors, unit_name, unit in rows for num_draws in step_draws.DRAWS if num_draws > 1
    ]  # fmt: skip
    named = "; ".join(f"{num_draws}: {' + '.join(draws)}" for num_draws, draws in step_draws.DRAWS.items())
    return measures, (
        f"Draws of a micro-batch: {named}.\nFLOPs: replacing phase, {step_draws.NUM_MICRO_BATCHES} micro-batches. "
        f"Traffic: T5 6+6 on 2 ranks.\nTime: {timed['setting']}, mean of {arguments.steps} steps in turns.\n"
        f"Memory: {peaks[1]['setting']}, micro-batches of {SHORT[0]} x {SHORT[1]}/{SHORT[2]} tokens."
    )


def _of_draws(found: dict[str, Any]) -> dict[str, Any]:
    """Tables by number of draws, which JSON has made text of."""
    return {
        name: {int(key): value for key, value in table.items()} if isinstance(table, dict) else table
        for name, table in found.items()
    }


def _host(arguments: argparse.Namespace) -> tuple[list[Measure], str]:
    """CPU time under each configuration, held against plain PyTorch."""
    measures, spreads = [], []
    for row in _ranks("host", 2, steps=arguments.steps):
        times = row["ms"]
        ranges = (f"{name} {min(each):.4g} to {max(each):.4g}" for name, each in times.items())
        spreads.append(f"{row['name']}, ms: {', '.join(ranges)}")
        plain = median(times.pop(PLAIN))
        measures += [
            Measure("step", f"CPU time, {row['name']}, {name}", median(each), plain, PLAIN, "ms", row["floor"])
            for name, each in times.items()
        ]
    setting = (
        "Host: CPU time of rank 0's main thread; T5 24+24, d 64, granularities 2, 3, 6, fp32, 1 x 4/4 tokens, 2 ranks\n"
        f"of 1 thread; median of {arguments.steps} steps in turns.\n"
        "Floor: the operations of plain PyTorch, if each were one of the smallest."
    )
    return measures, "\n".join([setting, *spreads])


def _gpu(arguments: argparse.Namespace) -> tuple[list[Measure], str]:
    return on_devices(torch.cuda.device_count(), steps=arguments.steps, **LARGE)


def on_devices(num_ranks: int, **options: Any) -> tuple[list[Measure], str]:
    """Distillation and what it is held against, at the sizes of `options`; a baseline that is not installed is left out
    and said to be."""
    found = _ranks("gpu", num_ranks, **options)
    measures = [
        Measure("step", f"step time, {name}", seconds, baseline, baseline_name, "s", floor)
        for name, seconds, baseline, baseline_name, floor in found["rows"]
    ]
    note = "Hugging Face's Trainer is left out: pip install accelerate"
    if find_spec("accelerate") is not None:
        taken = _ranks("trainer", num_ranks, **options)["seconds"]
        row = ("step time, distillation", found["rows"][0][1], taken, "fine-tuning by Trainer with ZeRO-3")
        measures.append(Measure("step", *row, "s", found["rows"][0][4]))
        share = found["fine-tuning"] / taken
        note = f"Fine-tuning of all parameters by Hugging Face's Trainer with ZeRO-3: useful FLOPs {share:.1%}."
    memory = found["memory"]
    measures.append(
        Measure("step", "memory at its fullest", memory["peak"] / GIB, memory["estimate"] / GIB, "estimate", "GiB",
                memory["floor"] / GIB)
    )  # fmt: skip
    return measures, f"GPU: {found['setting']}.\n{found['summary']}\n{note}"


MEASURED = {"traffic": _traffic, "memory": _memory, "overhead": _overhead, "draws": _draws, "host": _host, "gpu": _gpu}
