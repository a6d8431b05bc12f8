"""The fused losses, forward and backward, against the ways in which others compute them.

Shapes: P pairs, B batch, T tokens, D channels.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.bench import Measure, kernels_head, report
from pipeline.bench.timing import Step, median_ms, peak_mib
from pipeline.kernels import HiddenPair, Mode, hidden_loss, reference

Loss = Callable[[Sequence[HiddenPair], Mode], Tensor]  # the sum over pairs, times WEIGHT

LOSSES = ("hidden", "head")
LOSS_RTOL = 1e-4
WEIGHT = 0.25  # a loss weight, as in training; so no path can skip the gradient of the loss


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
    Case(24, (8, 128, 1024), torch.float32),
    Case(24, (8, 128, 1024), torch.bfloat16),
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--valid", type=float, default=1.0, help="fraction of tokens that are not padding (default 1)")
    parser.add_argument("--rounds", type=int, default=30, help="timed runs of each, in turns (default 30)")
    parser.add_argument("--only", nargs="+", choices=LOSSES, default=LOSSES, help="losses to measure (default all)")
    parser.add_argument("--write", type=Path, metavar="DIR", help="write the table to DIR as Markdown, too")


def main(arguments: argparse.Namespace) -> None:
    if not 0 < arguments.valid <= 1:
        raise ValueError(f"--valid is {arguments.valid}; it must be above 0 and at most 1")
    if arguments.rounds < 1:
        raise ValueError(f"--rounds is {arguments.rounds}; it must be at least 1")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda, but torch sees no CUDA device; use --device cpu")
    on_gpu, measures = arguments.device == "cuda", list[Measure]()
    if "hidden" in arguments.only:
        for case in GPU_CASES if on_gpu else CPU_CASES:
            pairs = make_pairs(case, arguments.device, arguments.valid)
            for mode in get_args(Mode):
                measures += measure_case(case, pairs, mode, arguments.rounds)
    if "head" in arguments.only:
        for head_case in kernels_head.GPU_CASES if on_gpu else kernels_head.CPU_CASES:
            measures += kernels_head.measure_case(head_case, arguments.device, arguments.rounds)
    notes = (
        f"Forward and backward, median of {arguments.rounds} runs in turns. Memory: the most that a step takes beyond "
        "its inputs;\nits floor: the gradients.\n"
        f"hidden_loss: all pairs, {arguments.valid:.0%} of the tokens are not padding. Floor of time: a copy, in the "
        "same run, that moves\nthe least bytes (each student and teacher state read once, each gradient written).\n"
        "head_loss: cross entropy and KL divergence, frozen head shared with the teacher. Floor of time: the bare "
        "matrix\nproducts in the same run. Liger's liger_jsd and liger_kl_div make the divergence only."
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
    """Time and peak memory of ours and of every baseline; ours must equal the definition first."""
    expected = reference.hidden_loss(pairs, mode, WEIGHT).share_P.detach().sum()
    torch.testing.assert_close(fused(pairs, mode).detach(), expected, rtol=LOSS_RTOL, atol=0.0)
    device = expected.device
    losses: dict[str, Loss] = {"ours": fused, "eager_fp32": eager_loop}
    if case.dtype != torch.float32:
        losses["eager_storage"] = partial(eager_loop, upcast=False)
    if device.type == "cuda" and (compiled := compile_loop(pairs, mode)) is not None:
        losses["compile"] = compiled
    steps: dict[str, Step] = {name: partial(step, loss, pairs, mode) for name, loss in losses.items()}
    memory = {name: peak_mib(steps[name], device) for name in losses}
    state = pairs[0].student_BTD
    floor_bytes = 3 * len(pairs) * state.numel() * state.element_size()
    source = torch.ones(floor_bytes // 2, dtype=torch.uint8, device=device)
    steps["copy"] = partial(source.new_empty(source.shape).copy_, source)
    time_ms = median_ms(steps, device, rounds)
    measures = []
    for name in losses:
        if name != "ours":
            title = f"hidden_loss {mode} {case}"
            measures += [
                Measure("kernels", f"{title} time", time_ms["ours"], time_ms[name], name, "ms", time_ms["copy"]),
                Measure(
                    "kernels", f"{title} memory", memory["ours"], memory[name], name, "MiB", floor_bytes / 3 / 2**20
                ),
            ]
    return measures


def step(loss: Loss, pairs: Sequence[HiddenPair], mode: Mode) -> object:
    return torch.autograd.grad(loss(pairs, mode), [pair.student_BTD for pair in pairs])


def fused(pairs: Sequence[HiddenPair], mode: Mode) -> Tensor:
    return hidden_loss(pairs, mode, WEIGHT).share_P.sum()


def eager_loop(pairs: Sequence[HiddenPair], mode: Mode, upcast: bool = True) -> Tensor:
    """The loop over pairs that distillation toolkits write: mse_loss (cosine_similarity), times the mask, over the
    count."""
    losses = []
    for pair in pairs:
        dtype = torch.float32 if upcast else pair.student_BTD.dtype
        teacher_BTD, student_BTD = pair.teacher_BTD.to(dtype), pair.student_BTD.to(dtype)
        keep_BT1 = pair.mask_BT[..., None].to(dtype)
        if mode == "cosine":
            cosine_BT = functional.cosine_similarity(student_BTD, teacher_BTD, dim=-1)
            losses.append(((1 - cosine_BT) * keep_BT1[..., 0]).sum() / pair.mask_BT.sum())
            continue
        error = (functional.mse_loss(student_BTD, teacher_BTD, reduction="none") * keep_BT1).sum()
        if mode == "span":
            assert pair.start_BTD is not None
            start_BTD = pair.start_BTD.to(dtype)
            total = (functional.mse_loss(teacher_BTD, start_BTD, reduction="none") * keep_BT1).sum()
        else:
            total = pair.mask_BT.sum() * student_BTD.shape[-1]
        losses.append(error / total)
    return WEIGHT * torch.stack(losses).sum()


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
