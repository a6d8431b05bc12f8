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

from pipeline.bench import Measure, kernels_attention, kernels_head, report
from pipeline.bench.timing import Step, median_ms, num_launches, peak_mib, works
from pipeline.kernels import HiddenMode, HiddenPair, hidden_loss

Loss = Callable[[Sequence[HiddenPair], HiddenMode], Tensor]  # the sum over pairs, times WEIGHT

LOSSES = ("hidden", "head", "attention")
LOSS_RTOL = 1e-4
NOTES = """\
Forward and backward, median of {rounds} runs in turns (CUDA: the host is ahead). Memory: the most that a step takes
beyond its inputs; its floor: the gradients. {valid:.0%} of the tokens are not padding.
hidden_loss: all pairs. Floor of time: a copy, in the same run, that moves the least bytes (each student and teacher
state read once, each gradient written). Launches (CUDA): without backward. Baseline `ours`: mode mse, the same padding.
head_loss: cross entropy and KL divergence, frozen head shared with the teacher. Floor of time: the bare matrix products
in the same run. Liger's liger_jsd and liger_kl_div make the divergence only.
attention_loss: pairs x batch x queries x keys x heads x width. Floor of time: the four matrix products that make both
maps and both gradients. Baselines hold whole maps, but for `chunks` (CUDA), which holds those of some examples."""
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
            for mode in get_args(HiddenMode):
                measures += measure_case(case, pairs, mode, arguments.rounds)
            measures += compare_ours(case, pairs, arguments.valid, arguments.rounds)
    if "head" in arguments.only:
        for head_case in kernels_head.GPU_CASES if on_gpu else kernels_head.CPU_CASES:
            measures += kernels_head.measure_case(head_case, arguments.device, arguments.rounds)
    if "attention" in arguments.only:
        for attention_case in kernels_attention.GPU_CASES if on_gpu else kernels_attention.CPU_CASES:
            measures += kernels_attention.measure_case(
                attention_case, arguments.device, arguments.valid, arguments.rounds
            )
    notes = NOTES.format(rounds=arguments.rounds, valid=arguments.valid)
    name = "kernels" if set(arguments.only) == set(LOSSES) else "_".join(("kernels", *arguments.only))
    report(name, measures, notes, arguments.write)


def make_pairs(case: Case, device: str, valid: float) -> list[HiddenPair]:
    """Pairs of one stack: the end of each span is the start of the next, as in a tiling."""
    torch.manual_seed(0)
    mask_BT = make_mask(case, device, valid)
    start_BTD, pairs = torch.randn(case.shape_BTD, device=device).to(case.dtype), []
    for _ in range(case.num_pairs):
        teacher_BTD = start_BTD + torch.randn(case.shape_BTD, device=device).to(case.dtype)
        student_BTD = teacher_BTD + 0.3 * torch.randn(case.shape_BTD, device=device).to(case.dtype)
        pairs.append(HiddenPair(student_BTD.requires_grad_(), teacher_BTD, mask_BT, start_BTD))
        start_BTD = teacher_BTD
    return pairs


def make_mask(case: Case, device: str, valid: float) -> Tensor:
    num_batch, num_tokens, _ = case.shape_BTD
    mask_T = torch.arange(num_tokens, device=device) < round(valid * num_tokens)
    return mask_T.expand(num_batch, num_tokens).contiguous()


def measure_case(case: Case, pairs: Sequence[HiddenPair], mode: HiddenMode, rounds: int) -> list[Measure]:
    """Time and peak memory of ours and of every baseline; ours must equal the definition first."""
    expected = hidden_loss(pairs, mode, WEIGHT, eager=True).share_P.detach().sum()
    torch.testing.assert_close(fused(pairs, mode).detach(), expected, rtol=LOSS_RTOL, atol=0.0)
    device = expected.device
    losses: dict[str, Loss] = {"ours": fused, "eager_fp32": eager_loop}
    if case.dtype != torch.float32:
        losses["eager_storage"] = partial(eager_loop, upcast=False)
    if device.type == "cuda":
        torch.compiler.reset()
        losses["compile"] = torch.compile(eager_loop)
        losses["compile_combo"] = torch.compile(eager_loop, options={"combo_kernels": True})
    losses = {name: loss for name, loss in losses.items() if works(name, partial(step, loss, pairs, mode))}
    steps: dict[str, Step] = {name: partial(step, loss, pairs, mode) for name, loss in losses.items()}
    memory = {name: peak_mib(steps[name], device) for name in losses}
    title = f"hidden_loss {mode} {case}"
    time_ms = median_ms(title, {**steps, "copy": bare_copy(pairs)}, device, rounds)
    gradient_mib = sum(pair.student_BTD.nbytes for pair in pairs) / 2**20
    measures = []
    for name in losses:
        if name != "ours":
            measures += [
                Measure("kernels", f"{title} time", time_ms["ours"], time_ms[name], name, "ms", time_ms["copy"]),
                Measure("kernels", f"{title} memory", memory["ours"], memory[name], name, "MiB", gradient_mib),
            ]
            if device.type == "cuda":
                launches = num_launches(partial(hidden_loss, pairs, mode))
                others, least = num_launches(partial(losses[name], pairs, mode)), 3 if mode == "span" else 2
                measures.append(Measure("kernels", f"{title} launches", launches, others, name, "launches", least))
    return measures


def compare_ours(case: Case, pairs: Sequence[HiddenPair], valid: float, rounds: int) -> list[Measure]:
    """What rows of length 1 cost and what padding saves, in turns with the plain loss."""
    device = pairs[0].student_BTD.device
    half_BT = make_mask(case, device.type, valid / 2)
    halves = [pair._replace(mask_BT=half_BT) for pair in pairs]
    steps: dict[str, Step] = {
        "plain": partial(step, fused, pairs, "mse"),
        "cosine": partial(step, fused, pairs, "cosine"),
        "half the tokens, mse": partial(step, fused, halves, "mse"),
        "copy": bare_copy(pairs),
    }
    time_ms = median_ms(f"hidden_loss, ours {case}", steps, device, rounds)
    return [
        Measure(
            "kernels", f"hidden_loss {name} {case} time", time_ms[name], time_ms["plain"], "ours", "ms", time_ms["copy"]
        )
        for name in ("cosine", "half the tokens, mse")
    ]


def bare_copy(pairs: Sequence[HiddenPair]) -> Step:
    """A copy that moves as many bytes as states of student and teacher and the gradients have."""
    num_bytes = 3 * sum(pair.student_BTD.nbytes for pair in pairs)
    source = torch.ones(num_bytes // 2, dtype=torch.uint8, device=pairs[0].student_BTD.device)
    return partial(torch.empty_like(source).copy_, source)


def step(loss: Loss, pairs: Sequence[HiddenPair], mode: HiddenMode) -> object:
    return torch.autograd.grad(loss(pairs, mode), [pair.student_BTD for pair in pairs])


def fused(pairs: Sequence[HiddenPair], mode: HiddenMode) -> Tensor:
    return hidden_loss(pairs, mode, WEIGHT).share_P.sum()


def eager_loop(pairs: Sequence[HiddenPair], mode: HiddenMode, upcast: bool = True) -> Tensor:
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
