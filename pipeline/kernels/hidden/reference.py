"""The definition of the hidden-state loss, in eager PyTorch: what every other path must equal.

Shapes: P pairs, B batch, T tokens, D channels. B, T and D may differ from pair to pair; a student and its teacher have
the same D, because no objective here compares states of different widths.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from pipeline.kernels.common import PairLosses, accumulation_dtype

HiddenMode = Literal["mse", "span", "cosine"]

# Only an all-padding batch, or a span that changes nothing at all, comes near this: real denominators are >> 1.
MIN_DENOMINATOR = 1e-12
MIN_NORM = 1e-6  # what a row's norm is at least taken for, so that a row of zeros has a finite gradient


class HiddenPair(NamedTuple):
    """One student state and the teacher state that it should equal.

    student_BTD  bf16, fp16, fp32 (or fp64 outside the fused kernel); the only tensor that gets a gradient.
    teacher_BTD  same shape; may have another dtype than the student; must not require grad.
    mask_BT      bool, True where the token is real. Pairs of one stack share one mask object.
    start_BTD    the teacher state where the span starts, dtype of teacher_BTD; needed by mode "span" only.
    """

    student_BTD: Tensor
    teacher_BTD: Tensor
    mask_BT: Tensor
    start_BTD: Tensor | None = None


def hidden_loss(
    pairs: Sequence[HiddenPair], mode: HiddenMode, weight: float = 1.0, upstream: float = 1.0
) -> PairLosses:
    """Loss of each pair, normalised over the real tokens of this batch.

    mode "mse":     sum (student - teacher)^2 / (real tokens x D)
    mode "span":    sum (student - teacher)^2 / sum (teacher - start)^2, the fraction of what the span changes that
                    the student does not reproduce (fraction of variance unexplained); 1 for one that copies its input.
    mode "cosine":  mean over real tokens of 1 - cos(student, teacher) = |s - t|^2 / 2 with s, t scaled to length 1.
                    RMS-normalised MSE is twice this, so it has no mode of its own.

    Sums run over real tokens only and padded rows are selected away, never multiplied, so a NaN there stays there.
    The denominators carry no gradient. A batch of padding only gives loss 0 and zero gradients.

    Args:
        weight: factor of share_P.
        upstream: the gradient that backward will bring for share_P, where it is known (the loss scale, the factor of
            the engine). The fused paths make gradients for it in the forward pass; any other one is right, too, but
            costs a pass over the gradients and a rounding. Their backward runs once. No meaning here.

    Raises:
        ValueError: what `check_pairs` refuses.
    """
    check_pairs(pairs, mode)
    losses = []
    for pair in pairs:
        if mode == "cosine":
            losses.append(_cosine_loss(pair))
        else:
            error = square_distance(pair.student_BTD, pair.teacher_BTD, pair.mask_BT)
            losses.append(error / denominator(pair, mode).to(error.dtype))
    loss_P = torch.stack(losses)
    return PairLosses(loss_P * weight, loss_P.detach())


def _cosine_loss(pair: HiddenPair) -> Tensor:
    dtype = accumulation_dtype(pair.student_BTD, pair.teacher_BTD)
    keep_BT1 = pair.mask_BT[..., None]
    directions = []
    for state_BTD in (pair.student_BTD, pair.teacher_BTD):
        state_BTD = torch.where(keep_BT1, state_BTD.to(dtype), 0)
        square_BT1 = torch.where(keep_BT1, state_BTD.square().sum(-1, keepdim=True), 1)  # sqrt has no gradient at 0
        directions.append(state_BTD / square_BT1.clamp(min=MIN_NORM**2).sqrt())
    student_BTD, teacher_BTD = directions
    return (student_BTD - teacher_BTD).square().sum() / 2 / pair.mask_BT.sum().clamp(min=1)


def square_distance(left_BTD: Tensor, right_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    """Sum over real tokens and channels of (left - right)^2: a scalar, fp32 (fp64 if an input is fp64)."""
    dtype = accumulation_dtype(left_BTD, right_BTD)
    difference_BTD = left_BTD.to(dtype) - right_BTD.to(dtype)
    return torch.where(mask_BT[..., None], difference_BTD, 0).square().sum()


@torch.no_grad()
def denominator(pair: HiddenPair, mode: HiddenMode) -> Tensor:
    """What the error of a pair is divided by: a scalar, at least MIN_DENOMINATOR, without gradient."""
    if mode == "mse":
        dtype = accumulation_dtype(pair.student_BTD, pair.teacher_BTD)
        total = pair.mask_BT.sum().to(dtype) * pair.student_BTD.shape[-1]
    else:
        assert pair.start_BTD is not None  # check_pairs has refused it
        total = square_distance(pair.teacher_BTD, pair.start_BTD, pair.mask_BT)
    return total.clamp(min=MIN_DENOMINATOR)


def check_pairs(pairs: Sequence[HiddenPair], mode: HiddenMode) -> None:
    """Refuse, with ValueError, what no path can compute. Looks at shapes and flags only: no device sync."""
    if mode not in get_args(HiddenMode):
        raise ValueError(f"unknown hidden loss mode {mode!r}; use one of {', '.join(get_args(HiddenMode))}")
    if not pairs:
        raise ValueError("hidden_loss needs at least one pair; skip the call when a draw has no modular layer")
    first = pairs[0]
    for index, pair in enumerate(pairs):
        _check_pair(index, pair, mode)
        for name in ("student_BTD", "teacher_BTD"):
            one, other = getattr(first, name), getattr(pair, name)
            if (one.dtype, one.device) != (other.dtype, other.device):
                raise ValueError(
                    f"pair {index}: {name} is {other.dtype} on {other.device} but pair 0 has {one.dtype} on "
                    f"{one.device}; call hidden_loss once for each dtype and device"
                )


def _check_pair(index: int, pair: HiddenPair, mode: HiddenMode) -> None:
    student_BTD, teacher_BTD, mask_BT, start_BTD = pair
    if mode == "span" and start_BTD is None:
        raise ValueError(f'pair {index}: mode "span" needs start_BTD, the teacher state where the span starts')
    if student_BTD.dim() != 3 or not student_BTD.is_floating_point():
        raise ValueError(
            f"pair {index}: student_BTD must be floating point [B, T, D], got {student_BTD.dtype} "
            f"{list(student_BTD.shape)}"
        )
    if mask_BT.dtype != torch.bool or mask_BT.shape != student_BTD.shape[:2] or mask_BT.device != student_BTD.device:
        raise ValueError(
            f"pair {index}: mask_BT must be bool {list(student_BTD.shape[:2])} on {student_BTD.device}, got "
            f"{mask_BT.dtype} {list(mask_BT.shape)} on {mask_BT.device}; convert with attention_mask.bool()"
        )
    for name, state in (("teacher_BTD", teacher_BTD), ("start_BTD", start_BTD)):
        if state is None:
            continue
        if state.requires_grad:
            raise ValueError(f"pair {index}: {name} requires grad, but the teacher is frozen; pass it detached")
        if (state.shape, state.device, state.dtype) != (student_BTD.shape, student_BTD.device, teacher_BTD.dtype):
            raise ValueError(
                f"pair {index}: {name} is {state.dtype} {list(state.shape)} on {state.device}; it must be "
                f"{teacher_BTD.dtype} {list(student_BTD.shape)} on {student_BTD.device}"
            )
