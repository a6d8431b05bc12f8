"""Time and memory of steps that are compared with one another in one process."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

L2_FLUSH_BYTES = 256 * 2**20  # five times the L2 cache of an H200
Step = Callable[[], object]


def median_ms(steps: Mapping[str, Step], device: torch.device, rounds: int) -> dict[str, float]:
    """Median milliseconds of each step; all run in turns, so that a change of clock or load meets all of them."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    once = _cuda_ms if device.type == "cuda" else _cpu_ms
    for number in range(-min(3, rounds), rounds):
        for name, run in steps.items():
            elapsed = once(run)
            if number >= 0:
                times[name].append(elapsed)
    return {name: statistics.median(values) for name, values in times.items()}


def _cpu_ms(run: Step) -> float:
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


def _cuda_ms(run: Step) -> float:
    """Device time from an empty L2 cache, with the host's gaps between launches in it."""
    torch.empty(L2_FLUSH_BYTES, dtype=torch.uint8, device="cuda").zero_()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def peak_mib(run: Step, device: torch.device) -> float:
    """Memory that a step takes at most beyond what is there before it, in MiB.

    CUDA: of the caching allocator. CPU: resident memory by the kernel's own high-water mark (Linux).
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    before = _status_kib("VmRSS")
    run()
    return max(1, _status_kib("VmHWM") - before) / 2**10  # small steps may live in memory that was there


def _status_kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])
