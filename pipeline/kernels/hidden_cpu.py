"""The hidden-state loss on a CPU: the definition of reference.py in one pass over chunks that stay in the cache.

The gradient is made in the forward pass and is all that is kept; a difference in its dtype is made in its place.
Padding is cleared by row index, which touches padded rows only (on a GPU `nonzero` would wait for the device).

Shapes: P pairs, B batch, T tokens, D channels, R = B x T rows, C rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

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


class _Cut(NamedTuple):
    """How the rows of some states are cut into chunks."""

    padded: list[Tensor | None]
    """Which rows of each chunk are padding, counted from the first of them; None for none."""
    num_valid: int
    buffers_CD: Tensor
    """Memory for two chunks, which stays in the cache from chunk to chunk."""
    norm_R: Tensor
    """Memory for a number a row."""
    norms: Sequence[Tensor]
    """The same in chunks."""


class _HiddenLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, pairs: Sequence[HiddenPair], mode: Mode, weight: float, upstream: float, *students: Tensor
    ) -> tuple[Tensor, Tensor]:
        dtype = accumulation_dtype(students[0], pairs[0].teacher_BTD)
        pass_over = _cosine_pass if mode == "cosine" else _square_pass
        cuts: dict[tuple[int, int], _Cut] = {}  # pairs of one stack share theirs
        errors, totals, gradients = [], [], []
        for pair, student_BTD, wanted in zip(pairs, students, ctx.needs_input_grad[4:], strict=True):
            gradient_BTD = torch.empty(student_BTD.shape, dtype=student_BTD.dtype) if wanted else None
            key = (id(pair.mask_BT), student_BTD.shape[-1])
            if key not in cuts:
                cuts[key] = _cut(pair.mask_BT, student_BTD.shape[-1], dtype)
            error, total = pass_over(pair, cuts[key], mode, weight * upstream, gradient_BTD)
            errors.append(error)
            totals.append(total)
            gradients.append(gradient_BTD)
        ctx.save_for_backward(*gradients)
        ctx.upstream, ctx.used_up = upstream, False
        loss_P = torch.stack(errors) / torch.tensor(totals, dtype=dtype)
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


def _square_pass(
    pair: HiddenPair, cut: _Cut, mode: Mode, scale: float, gradient_BTD: Tensor | None
) -> tuple[Tensor, float]:
    """(error, what it is divided by) of one pair in mode mse or span; writes the gradient for a gradient `scale` of
    the loss."""
    total = float(cut.num_valid * pair.student_BTD.shape[-1])
    if mode == "span":
        assert pair.start_BTD is not None  # check_pairs has refused it
        total = _square_distance(pair.teacher_BTD, pair.start_BTD, cut).item()
    total = max(total, MIN_DENOMINATOR)
    return _square_distance(pair.student_BTD, pair.teacher_BTD, cut, gradient_BTD, 2 * scale / total), total


def _square_distance(
    left_BTD: Tensor, right_BTD: Tensor, cut: _Cut, gradient_BTD: Tensor | None = None, factor: float = 0.0
) -> Tensor:
    """Sum of (left - right)^2 over real tokens; writes factor x (left - right) into the gradient."""
    buffer_CD = cut.buffers_CD[0]
    chunks = _chunks(left_BTD, cut), _chunks(right_BTD, cut), _gradient_chunks(gradient_BTD, cut)
    for left_CD, right_CD, gradient_CD, padded, norm_C in zip(*chunks, cut.padded, cut.norms, strict=True):
        error_CD = buffer_CD[: left_CD.shape[0]]
        if gradient_CD is not None and gradient_CD.dtype == buffer_CD.dtype:
            error_CD = gradient_CD
        if left_CD.dtype == right_CD.dtype == error_CD.dtype:
            torch.sub(left_CD, right_CD, out=error_CD)
        else:
            error_CD.copy_(left_CD).sub_(right_CD)
        if padded is not None:
            error_CD.index_fill_(0, padded, 0)
        # A norm a row, then a pairwise sum of squares: less than half the time of (d * d).sum(), and a thousandth of
        # the rounding error of one long torch.dot, which adds 4M squares with an error of 6e-5.
        torch.linalg.vector_norm(error_CD, dim=1, out=norm_C)
        if gradient_CD is not None:
            error_CD.mul_(factor)
            if gradient_CD is not error_CD:
                gradient_CD.copy_(error_CD)
    return cut.norm_R.square_().sum()


def _cosine_pass(
    pair: HiddenPair, cut: _Cut, mode: Mode, scale: float, gradient_BTD: Tensor | None
) -> tuple[Tensor, float]:
    """(error, what it is divided by) of one pair in mode cosine. With d = s - t, both scaled to length 1, the loss of a
    row is e = |d|^2 / 2 and its gradient (d - e s) / |student|: nothing cancels where student and teacher are near."""
    num_valid, dtype = max(1, cut.num_valid), cut.buffers_CD.dtype
    losses = []
    states = zip(_chunks(pair.student_BTD, cut), _chunks(pair.teacher_BTD, cut), strict=True)
    for both, gradient_CD, padded in zip(states, _gradient_chunks(gradient_BTD, cut), cut.padded, strict=True):
        student_CD, difference_CD = cut.buffers_CD[:, : both[0].shape[0]]
        norms = []
        for state_CD, unit_CD in zip(both, (student_CD, difference_CD), strict=True):
            state_CD = state_CD.to(dtype)
            norms.append(torch.linalg.vector_norm(state_CD, dim=1, keepdim=True).clamp_(min=MIN_NORM))
            torch.div(state_CD, norms[-1], out=unit_CD)
        torch.sub(student_CD, difference_CD, out=difference_CD)
        loss_C = torch.linalg.vector_norm(difference_CD, dim=1).square_().div_(2)
        if padded is not None:
            loss_C.index_fill_(0, padded, 0)
        losses.append(loss_C)
        if gradient_CD is not None:
            difference_CD.addcmul_(student_CD, loss_C[:, None], value=-1).mul_((scale / num_valid) / norms[0])
            gradient_CD.copy_(difference_CD)
            if padded is not None:
                gradient_CD.index_fill_(0, padded, 0)
    return torch.cat(losses).sum(), float(num_valid)


def _chunks(state_BTD: Tensor, cut: _Cut) -> Sequence[Tensor]:
    state_RD = state_BTD.reshape(-1, state_BTD.shape[-1])
    return state_RD.chunk(len(cut.padded)) if len(cut.padded) > 1 else (state_RD,)  # small states are many calls


def _gradient_chunks(gradient_BTD: Tensor | None, cut: _Cut) -> Sequence[Tensor | None]:
    return _chunks(gradient_BTD, cut) if gradient_BTD is not None else [None] * len(cut.padded)


def _cut(mask_BT: Tensor, width: int, dtype: torch.dtype) -> _Cut:
    num_rows = mask_BT.numel()
    num_chunks = max(1, -(-4 * num_rows * width // CHUNK_BYTES))
    padding = [chunk.nonzero().squeeze(1) for chunk in (~mask_BT.flatten()).chunk(num_chunks)]
    num_valid = num_rows - sum(map(len, padding))
    buffers_CD = torch.empty(2, -(-num_rows // len(padding)), width, dtype=dtype)
    norm_R = torch.empty(num_rows, dtype=dtype)
    padded = [rows if len(rows) else None for rows in padding]
    return _Cut(padded, num_valid, buffers_CD, norm_R, norm_R.chunk(len(padded)))
