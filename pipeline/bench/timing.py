"""Time and memory of steps that are compared with one another in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from itertools import accumulate
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

L2_FLUSH_BYTES = 256 * 2**20  # five times the L2 cache of an H200
HEAD_START_CYCLES = 10**8  # of the GPU's clock: 50 ms, longer than the host takes to queue any of these steps
Step = Callable[[], object]


def median_ms(title: str, steps: Mapping[str, Step], device: torch.device, rounds: int) -> dict[str, float]:
    """Median milliseconds of each step; all run in turns, so that a change of clock or load meets all of them. Prints
    the spread: from the time that a fifth of the runs stay below to that which a fifth exceed."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    once = _cuda_ms if device.type == "cuda" else _cpu_ms
    for number in range(-min(3, rounds), rounds):
        for name, run in steps.items():
            elapsed = once(run)
            if number >= 0:
                times[name].append(elapsed)
    medians = {name: statistics.median(values) for name, values in times.items()}
    spreads = (f"{name} {medians[name]:.4g} ({_spread(values)})" for name, values in times.items())
    print(f"{title}, ms: {', '.join(spreads)}", flush=True)
    return medians


def _spread(values: list[float]) -> str:
    ordered, fifth = sorted(values), len(values) // 5
    return f"{ordered[fifth]:.4g} to {ordered[-1 - fifth]:.4g}"


def _cpu_ms(run: Step) -> float:
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


def _cuda_ms(run: Step) -> float:
    """Device time from an empty L2 cache. The GPU waits until the host has queued the step, as it is ahead in training,
    too; only a step that itself waits for the device has the host's gaps between launches in it."""
    torch.empty(L2_FLUSH_BYTES, dtype=torch.uint8, device="cuda").zero_()
    torch.cuda._sleep(HEAD_START_CYCLES)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def works(name: str, run: Step) -> bool:
    """Whether a baseline runs here at all: other people's packages and compilers, and memory."""
    try:
        run()
    except Exception as error:  # a missing compiler, too little memory, a changed interface: many different types
        print(f"no baseline {name}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        return False
    return True


def num_launches(run: Step) -> int:
    """Kernels that a step starts on the GPU; copies and fills of memory are not counted."""
    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    on_device = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not (event.is_user_annotation or event.name.startswith(("Memcpy", "Memset"))) for event in on_device)


def peak_mib(run: Step, device: torch.device) -> float:
    """Memory that a step takes at most beyond what is there before it, in MiB.

    CUDA: of the caching allocator. CPU: of torch's allocator, each block by the profiler's records (resident memory
    would not show blocks that malloc keeps). What BLAS libraries take for themselves is in neither.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    recorded: Any = profiler.profiler
    changes = (event.nbytes() for event in recorded.kineto_results.events() if event.name() == "[memory]")
    return max(accumulate(changes, initial=0)) / 2**20
