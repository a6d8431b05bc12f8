"""The hidden-state loss on a CPU: the definition of reference.py with fewer passes over memory.

One pass makes the difference, one sums its squares, and backward scales it. Only the difference is kept, and padding
is cleared by row index, which touches padded rows only (on a GPU `nonzero` would wait for the device).

Shapes: P pairs, B batch, T tokens, D channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.kernels.reference import MIN_DENOMINATOR, HiddenPair, Mode, accumulation_dtype, check_pairs


def hidden_loss(pairs: Sequence[HiddenPair], mode: Mode) -> Tensor:
    """Same contract as `pipeline.kernels.reference.hidden_loss`; CPU tensors only."""
    check_pairs(pairs, mode)
    loss_P: Tensor = _HiddenLoss.apply(pairs, mode, *(pair.student_BTD for pair in pairs))
    return loss_P


class _HiddenLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pairs: Sequence[HiddenPair], mode: Mode, *students: Tensor) -> Tensor:
        padded_rows = {id(pair.mask_BT): (~pair.mask_BT).flatten().nonzero().squeeze(1) for pair in pairs}
        differences, errors, totals = [], [], []
        for pair, student_BTD in zip(pairs, students, strict=True):
            padded = padded_rows[id(pair.mask_BT)]
            difference_BTD = _difference(student_BTD, pair.teacher_BTD, padded)
            differences.append(difference_BTD)
            errors.append(_sum_of_squares(difference_BTD))
            if mode == "span":
                assert pair.start_BTD is not None  # check_pairs has refused it
                totals.append(_sum_of_squares(_difference(pair.teacher_BTD, pair.start_BTD, padded)))
            else:
                num_elements = (pair.mask_BT.numel() - padded.numel()) * student_BTD.shape[-1]
                totals.append(torch.tensor(num_elements, dtype=difference_BTD.dtype))
        error_P = torch.stack(errors)
        total_P = torch.stack(totals).to(error_P.dtype).clamp(min=MIN_DENOMINATOR)
        ctx.save_for_backward(total_P, *differences)
        ctx.dtype = students[0].dtype
        return error_P / total_P

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_P: Tensor) -> tuple[Tensor | None, ...]:
        total_P, *differences = ctx.saved_tensors
        scales = (2 * grad_P / total_P).unbind()
        gradients = ((diff * scale).to(ctx.dtype) for diff, scale in zip(differences, scales, strict=True))
        return (None, None, *gradients)


def _difference(left_BTD: Tensor, right_BTD: Tensor, padded_rows: Tensor) -> Tensor:
    """left - right in the accumulation dtype, contiguous, with zeros (not products with zero) in padded rows."""
    out_BTD = torch.empty(left_BTD.shape, dtype=accumulation_dtype(left_BTD, right_BTD))
    torch.sub(left_BTD.to(out_BTD.dtype), right_BTD.to(out_BTD.dtype), out=out_BTD)
    out_BTD.view(-1, out_BTD.shape[-1]).index_fill_(0, padded_rows, 0)
    return out_BTD


def _sum_of_squares(difference_BTD: Tensor) -> Tensor:
    # One dot a row, then a pairwise sum: half the time of (d * d).sum(), and a thousandth of the rounding error of one
    # long torch.dot, which adds 4M squares with an error of 6e-5.
    return torch.linalg.vecdot(difference_BTD, difference_BTD).sum()
