"""The hidden-state loss on a CPU: the definition of reference.py in one pass over chunks that stay in the cache.

The gradient is made in the forward pass and is all that is kept. Padding is cleared by row index, which touches padded
rows only (on a GPU `nonzero` would wait for the device).

Shapes: P pairs, B batch, T tokens, D channels, R = B x T rows, C rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.kernels.reference import (
    MIN_DENOMINATOR,
    MIN_NORM,
    USED_UP,
    HiddenLoss,
    HiddenPair,
    Mode,
    accumulation_dtype,
    check_pairs,
)

CHUNK_BYTES = 2**19  # of one fp32 buffer; two or three of these share a core's L2 cache


def hidden_loss(pairs: Sequence[HiddenPair], mode: Mode, weight: float = 1.0, upstream: float = 1.0) -> HiddenLoss:
    """Same contract as `pipeline.kernels.reference.hidden_loss`; CPU tensors only. States whose batch and token
    dimensions cannot be seen as one are copied first."""
    check_pairs(pairs, mode)
    return HiddenLoss(*_HiddenLoss.apply(pairs, mode, weight, upstream, *(pair.student_BTD for pair in pairs)))


class _HiddenLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, pairs: Sequence[HiddenPair], mode: Mode, weight: float, upstream: float, *students: Tensor
    ) -> tuple[Tensor, Tensor]:
        padding = {id(pair.mask_BT): (~pair.mask_BT).flatten().nonzero().squeeze(1) for pair in pairs}
        losses, gradients = [], []
        for pair, student_BTD, wanted in zip(pairs, students, ctx.needs_input_grad[4:], strict=True):
            gradient_BTD = torch.empty(student_BTD.shape, dtype=student_BTD.dtype) if wanted else None
            pass_over = _cosine_pass if mode == "cosine" else _square_pass
            losses.append(pass_over(pair, padding[id(pair.mask_BT)], mode, weight * upstream, gradient_BTD))
            gradients.append(gradient_BTD)
        ctx.save_for_backward(*gradients)
        ctx.upstream, ctx.used_up = upstream, False
        loss_P = torch.stack(losses)
        ctx.mark_non_differentiable(loss_P)
        return loss_P * weight, loss_P

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_P: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.used_up:
            raise RuntimeError(USED_UP)
        ctx.used_up = True
        gradients = ctx.saved_tensors
        for gradient_BTD, grad in zip(gradients, grad_P.tolist(), strict=True):
            if grad != ctx.upstream and gradient_BTD is not None:
                gradient_BTD.mul_(grad / ctx.upstream)
        return (None, None, None, None, *gradients)


def _square_pass(pair: HiddenPair, padding: Tensor, mode: Mode, scale: float, gradient_BTD: Tensor | None) -> Tensor:
    """Loss of one pair in mode mse or span; writes the gradient for a gradient `scale` of the loss."""
    dtype = accumulation_dtype(pair.student_BTD, pair.teacher_BTD)
    student_RD, teacher_RD = _rows(pair.student_BTD), _rows(pair.teacher_BTD)
    if mode == "span":
        assert pair.start_BTD is not None  # check_pairs has refused it
        start_RD = _rows(pair.start_BTD)
        change_R = torch.empty(len(teacher_RD), dtype=dtype)
        for chunk, padded in _chunks(teacher_RD, padding):
            change_CD = _difference(teacher_RD[chunk], start_RD[chunk], padded, dtype)
            torch.linalg.vecdot(change_CD, change_CD, out=change_R[chunk])
        total = change_R.sum()
    else:
        total = torch.tensor((len(student_RD) - len(padding)) * student_RD.shape[1], dtype=dtype)
    total = total.clamp(min=MIN_DENOMINATOR)
    factor = 2 * torch.tensor(scale, dtype=dtype) / total
    error_R = torch.empty(len(student_RD), dtype=dtype)
    for chunk, padded in _chunks(student_RD, padding):
        error_CD = _difference(student_RD[chunk], teacher_RD[chunk], padded, dtype)
        # One dot a row, then a pairwise sum: half the time of (d * d).sum(), and a thousandth of the rounding error of
        # one long torch.dot, which adds 4M squares with an error of 6e-5.
        torch.linalg.vecdot(error_CD, error_CD, out=error_R[chunk])
        if gradient_BTD is not None:
            torch.mul(error_CD, factor, out=_rows(gradient_BTD)[chunk])
    return error_R.sum() / total


def _cosine_pass(pair: HiddenPair, padding: Tensor, mode: Mode, scale: float, gradient_BTD: Tensor | None) -> Tensor:
    """Loss of one pair in mode cosine. With d = s - t, both scaled to length 1, the loss of a row is e = |d|^2 / 2 and
    its gradient (d - e s) / |student|: nothing cancels where student and teacher are near."""
    dtype = accumulation_dtype(pair.student_BTD, pair.teacher_BTD)
    student_RD, teacher_RD = _rows(pair.student_BTD), _rows(pair.teacher_BTD)
    num_rows = max(1, len(student_RD) - len(padding))
    loss_R = torch.empty(len(student_RD), dtype=dtype)
    for chunk, padded in _chunks(student_RD, padding):
        states = [state_RD[chunk].to(dtype) for state_RD in (student_RD, teacher_RD)]
        norms = [torch.linalg.vector_norm(state_CD, dim=1, keepdim=True).clamp_(min=MIN_NORM) for state_CD in states]
        student_CD = states[0] / norms[0]
        difference_CD = student_CD - states[1].div(norms[1])
        loss_C = torch.linalg.vecdot(difference_CD, difference_CD).div_(2).index_fill_(0, padded, 0)
        loss_R[chunk] = loss_C
        if gradient_BTD is not None:
            difference_CD.addcmul_(student_CD, loss_C[:, None], value=-1).mul_((scale / num_rows) / norms[0])
            _rows(gradient_BTD)[chunk] = difference_CD.index_fill_(0, padded, 0)
    return loss_R.sum() / num_rows


def _rows(state_BTD: Tensor) -> Tensor:
    return state_BTD.detach().reshape(-1, state_BTD.shape[-1])


def _chunks(state_RD: Tensor, padding: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """(rows, padded rows counted from the first of them) of each chunk."""
    num_rows, width = state_RD.shape
    size = max(1, CHUNK_BYTES // (4 * max(1, width)))
    edges = [*range(0, num_rows, size), num_rows]
    if len(edges) == 2:
        yield slice(0, num_rows), padding
        return
    places = torch.searchsorted(padding, torch.tensor(edges)).tolist()
    for index, first in enumerate(edges[:-1]):
        yield slice(first, edges[index + 1]), padding[places[index] : places[index + 1]] - first


def _difference(left_CD: Tensor, right_CD: Tensor, padded: Tensor, dtype: torch.dtype) -> Tensor:
    """left - right in the accumulation dtype, with zeros (not products with zero) in padded rows."""
    if left_CD.dtype == right_CD.dtype == dtype:
        return torch.sub(left_CD, right_CD).index_fill_(0, padded, 0)
    return left_CD.to(dtype, copy=True).sub_(right_CD.to(dtype)).index_fill_(0, padded, 0)
