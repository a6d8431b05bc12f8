"""The fused hidden-state loss, forward and backward, against the ways in which others compute it.

Shapes: P pairs, B batch, T tokens, D channels.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.bench import Measure, report
from pipeline.kernels import HiddenPair, Mode, hidden_loss, reference

Loss = Callable[[Sequence[HiddenPair], Mode], Tensor]

L2_FLUSH_BYTES = 256 * 2**20  # five times the L2 cache of an H200
LOSS_RTOL = 1e-4


class Case(NamedTuple):
    num_pairs: int
    shape_BTD: tuple[int, int, int]
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.num_pairs}x{'x'.join(map(str, self.shape_BTD))} {str(self.dtype).removeprefix('torch.')}"


GPU_CASES = [  # hidden states of T5-large
    Case(24, (8, 512, 1024), torch.bfloat16),
    Case(48, (8, 512, 1024), torch.bfloat16),
    Case(24, (8, 128, 1024), torch.bfloat16),
    Case(48, (8, 128, 1024), torch.bfloat16),
]
CPU_CASES = [
    Case(12, (8, 32, 128), torch.float32),
    Case(12, (4, 128, 512), torch.float32),
    Case(12, (4, 128, 512), torch.bfloat16),
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--valid", type=float, default=1.0, help="fraction of tokens that are not padding (default 1)")
    parser.add_argument("--rounds", type=int, default=30, help="timed runs of each, in turns (default 30)")
    parser.add_argument("--write", type=Path, metavar="DIR", help="write the table to DIR as Markdown, too")


def main(arguments: argparse.Namespace) -> None:
    if not 0 < arguments.valid <= 1:
        raise ValueError(f"--valid is {arguments.valid}; it must be above 0 and at most 1")
    if arguments.rounds < 1:
        raise ValueError(f"--rounds is {arguments.rounds}; it must be at least 1")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda, but torch sees no CUDA device; use --device cpu")
    measures: list[Measure] = []
    for case in GPU_CASES if arguments.device == "cuda" else CPU_CASES:
        pairs = make_pairs(case, arguments.device, arguments.valid)
        for mode in get_args(Mode):
            measures += measure_case(case, pairs, mode, arguments.rounds)
    notes = (
        f"Forward and backward of all pairs, median of {arguments.rounds} runs in turns, {arguments.valid:.0%} of the "
        "tokens are not padding.\nFloor of time: a copy, in the same run, that moves the least bytes (each student and "
        "teacher state read once,\neach gradient written once). Floor of memory: the gradients."
    )
    report("kernels", measures, notes, arguments.write)


def make_pairs(case: Case, device: str, valid: float) -> list[HiddenPair]:
    """Pairs of one stack: the end of each span is the start of the next, as in a tiling."""
    torch.manual_seed(0)
    num_batch, num_tokens, _width = case.shape_BTD
    mask_BT = (torch.arange(num_tokens, device=device) < round(valid * num_tokens)).expand(num_batch, num_tokens)
    mask_BT = mask_BT.contiguous()
    start_BTD, pairs = torch.randn(case.shape_BTD, device=device).to(case.dtype), []
    for _ in range(case.num_pairs):
        teacher_BTD = start_BTD + torch.randn(case.shape_BTD, device=device).to(case.dtype)
        student_BTD = teacher_BTD + 0.3 * torch.randn(case.shape_BTD, device=device).to(case.dtype)
        pairs.append(HiddenPair(student_BTD.requires_grad_(), teacher_BTD, mask_BT, start_BTD))
        start_BTD = teacher_BTD
    return pairs


def measure_case(case: Case, pairs: Sequence[HiddenPair], mode: Mode, rounds: int) -> list[Measure]:
    """Time, and on CUDA peak memory, of ours and of every baseline; ours must equal the definition first."""
    expected_P = reference.hidden_loss(pairs, mode).detach()
    torch.testing.assert_close(hidden_loss(pairs, mode).detach(), expected_P, rtol=LOSS_RTOL, atol=0.0)
    device = expected_P.device
    losses: dict[str, Loss] = {"ours": hidden_loss, "eager_fp32": eager_loop}
    if case.dtype != torch.float32:
        losses["eager_storage"] = partial(eager_loop, upcast=False)
    if device.type == "cuda" and (compiled := compile_loop(pairs, mode)) is not None:
        losses["compile"] = compiled
    steps: dict[str, Callable[[], object]] = {name: partial(step, loss, pairs, mode) for name, loss in losses.items()}
    state = pairs[0].student_BTD
    floor_bytes = 3 * len(pairs) * state.numel() * state.element_size()
    source = torch.ones(floor_bytes // 2, dtype=torch.uint8, device=device)
    steps["copy"] = partial(source.new_empty(source.shape).copy_, source)
    time_ms = median_ms(steps, device, rounds)
    name = f"hidden_loss {mode} {case}"
    baselines = [name for name in losses if name != "ours"]
    measures = [
        Measure("kernels", f"{name} time", time_ms["ours"], time_ms[baseline], baseline, "ms", time_ms["copy"])
        for baseline in baselines
    ]
    if device.type == "cuda":
        peak_mib = {name: peak_memory_mib(steps[name]) for name in losses}
        floor_mib = floor_bytes / 3 / 2**20
        measures += [
            Measure("kernels", f"{name} memory", peak_mib["ours"], peak_mib[baseline], baseline, "MiB", floor_mib)
            for baseline in baselines
        ]
    return measures


def step(loss: Loss, pairs: Sequence[HiddenPair], mode: Mode) -> object:
    # 0.25: a loss weight, as in training; so no path can skip the gradient of the loss
    return torch.autograd.grad(0.25 * loss(pairs, mode).sum(), [pair.student_BTD for pair in pairs])


def eager_loop(pairs: Sequence[HiddenPair], mode: Mode, upcast: bool = True) -> Tensor:
    """The loop over pairs that distillation toolkits write: mse_loss, times the mask, over the count."""
    losses = []
    for pair in pairs:
        teacher_BTD = pair.teacher_BTD.float() if upcast else pair.teacher_BTD
        student_BTD = pair.student_BTD.float() if upcast else pair.student_BTD
        keep_BT1 = pair.mask_BT[..., None].to(student_BTD.dtype)
        error = (functional.mse_loss(student_BTD, teacher_BTD, reduction="none") * keep_BT1).sum()
        if mode == "span":
            assert pair.start_BTD is not None
            start_BTD = pair.start_BTD.float() if upcast else pair.start_BTD
            total = (functional.mse_loss(teacher_BTD, start_BTD, reduction="none") * keep_BT1).sum()
        else:
            total = pair.mask_BT.sum() * student_BTD.shape[-1]
        losses.append(error / total)
    return torch.stack(losses)


def compile_loop(pairs: Sequence[HiddenPair], mode: Mode) -> Loss | None:
    """eager_loop under torch.compile; None, and a line that says so, where the compiler does not work."""
    torch.compiler.reset()
    compiled: Loss = torch.compile(eager_loop)
    try:
        step(compiled, pairs, mode)
    except Exception as error:  # a missing host compiler and a failed graph arrive as many different types
        print(f"no baseline torch.compile: {type(error).__name__}: {str(error).splitlines()[0]}")
        return None
    return compiled


def median_ms(steps: dict[str, Callable[[], object]], device: torch.device, rounds: int) -> dict[str, float]:
    """Median milliseconds of each step; all run in turns, so that a change of clock or load meets all of them."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    once = _cuda_ms if device.type == "cuda" else _cpu_ms
    for number in range(-3, rounds):
        for name, run in steps.items():
            elapsed = once(run)
            if number >= 0:
                times[name].append(elapsed)
    return {name: statistics.median(values) for name, values in times.items()}


def _cpu_ms(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


def _cuda_ms(run: Callable[[], object]) -> float:
    """Device time from an empty L2 cache, with the host's gaps between launches in it."""
    torch.empty(L2_FLUSH_BYTES, dtype=torch.uint8, device="cuda").zero_()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def peak_memory_mib(run: Callable[[], object]) -> float:
    """Memory that a step takes beyond what is there before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20
