"""The hidden-state loss on a CPU: the definition of reference.py in one pass over chunks that stay in the cache.

The gradient is made in the forward pass and is all that is kept; a difference in its dtype is made in its place.
Padding is cleared by row index, which touches padded rows only (on a GPU `nonzero` would wait for the device).

Shapes: P pairs, B batch, T tokens, D channels, R = B x T rows, C rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.kernels.common import PairLosses, accumulation_dtype, empty_gradient, needs_gradient, with_gradients
from pipeline.kernels.hidden.reference import MIN_DENOMINATOR, MIN_NORM, HiddenMode, HiddenPair, check_pairs

CHUNK_BYTES = 2**19  # of one fp32 buffer, for each thread; two or three of these share a core's L2 cache


def hidden_loss(
    pairs: Sequence[HiddenPair], mode: HiddenMode, weight: float = 1.0, upstream: float = 1.0
) -> PairLosses:
    """Same contract as `pipeline.kernels.hidden.reference.hidden_loss`; CPU tensors only. States whose batch and token
    dimensions cannot be seen as one are copied first."""
    check_pairs(pairs, mode)
    students = [pair.student_BTD for pair in pairs]
    gradients = [empty_gradient(student_BTD) if needs_gradient(student_BTD) else None for student_BTD in students]
    loss_P = _losses(pairs, mode, weight * upstream, gradients)
    return PairLosses(with_gradients(loss_P * weight, students, gradients, upstream), loss_P)


class _Chunk(NamedTuple):
    """Some rows, and memory for them that stays in the cache from chunk to chunk."""

    padded: Tensor | None
    """Which of them are padding; None for none."""
    one_CD: Tensor
    other_CD: Tensor
    norm_C: Tensor


class _Cut(NamedTuple):
    """How the rows of some states are cut into chunks."""

    chunks: list[_Chunk]
    num_valid: int


@torch.no_grad()
def _losses(pairs: Sequence[HiddenPair], mode: HiddenMode, scale: float, gradients: Sequence[Tensor | None]) -> Tensor:
    """Loss of each pair; writes the gradients for a gradient `scale` of each."""
    dtype = accumulation_dtype(pairs[0].student_BTD, pairs[0].teacher_BTD)
    pass_over = {"mse": _mse_pass, "span": _span_pass, "cosine": _cosine_pass}[mode]
    cuts: dict[tuple[int, int], _Cut] = {}  # pairs of one stack share theirs
    losses = []
    for pair, gradient_BTD in zip(pairs, gradients, strict=True):
        width = pair.student_BTD.shape[-1]
        key = (id(pair.mask_BT), width)
        if key not in cuts:
            cuts[key] = _cut(pair.mask_BT, width, dtype)
        losses.append(pass_over(pair, cuts[key], scale, gradient_BTD))
    return torch.tensor(losses, dtype=dtype)


# The passes over a pair. Each returns its loss, and writes the gradient for a gradient `scale` of the loss.


def _mse_pass(pair: HiddenPair, cut: _Cut, scale: float, gradient_BTD: Tensor | None) -> float:
    total = max(1, cut.num_valid * pair.student_BTD.shape[-1])
    student, teacher = _rows(pair.student_BTD, cut), _rows(pair.teacher_BTD, cut)
    return _square_distance(student, teacher, cut, gradient_BTD, 2 * scale / total) / total


def _span_pass(pair: HiddenPair, cut: _Cut, scale: float, gradient_BTD: Tensor | None) -> float:
    assert pair.start_BTD is not None  # check_pairs has refused it
    student, teacher = _rows(pair.student_BTD, cut), _rows(pair.teacher_BTD, cut)
    total = max(_square_distance(teacher, _rows(pair.start_BTD, cut), cut), MIN_DENOMINATOR)
    return _square_distance(student, teacher, cut, gradient_BTD, 2 * scale / total) / total


def _square_distance(
    left: Sequence[Tensor],
    right: Sequence[Tensor],
    cut: _Cut,
    gradient_BTD: Tensor | None = None,
    factor: float = 0.0,
) -> float:
    """Sum of (left - right)^2 over real tokens; writes factor x (left - right) into the gradient."""
    total = 0.0
    gradients = _gradient_rows(gradient_BTD, cut)
    for left_CD, right_CD, gradient_CD, chunk in zip(left, right, gradients, cut.chunks, strict=True):
        padded, error_CD, other_CD, norm_C = chunk
        dtype = error_CD.dtype
        if gradient_CD is not None and gradient_CD.dtype == dtype:
            error_CD = gradient_CD
        if left_CD.dtype != dtype:
            left_CD = error_CD.copy_(left_CD)
        if right_CD.dtype != dtype:
            right_CD = other_CD.copy_(right_CD)
        torch.sub(left_CD, right_CD, out=error_CD)
        if padded is not None:
            error_CD.index_fill_(0, padded, 0)
        # A norm a row, then their squares, and chunks in fp64: less than half the time of (d * d).sum(), and a
        # thousandth of the rounding error of one long torch.dot, which adds 4M squares with an error of 6e-5.
        torch.linalg.vector_norm(error_CD, dim=1, out=norm_C)
        total += torch.dot(norm_C, norm_C).item()
        if gradient_CD is not None:
            error_CD.mul_(factor)
            if gradient_CD is not error_CD:
                gradient_CD.copy_(error_CD)
    return total


def _cosine_pass(pair: HiddenPair, cut: _Cut, scale: float, gradient_BTD: Tensor | None) -> float:
    """With d = s - t, both scaled to length 1, a row's loss is e = |d|^2 / 2 and its gradient (d - e s) / |student|:
    nothing cancels where student and teacher are near."""
    num_valid, total = max(1, cut.num_valid), 0.0
    states = zip(_rows(pair.student_BTD, cut), _rows(pair.teacher_BTD, cut), strict=True)
    for both, gradient_CD, chunk in zip(states, _gradient_rows(gradient_BTD, cut), cut.chunks, strict=True):
        padded, student_CD, difference_CD, loss_C = chunk
        if gradient_CD is not None and gradient_CD.dtype == difference_CD.dtype:
            difference_CD = gradient_CD
        norms = []
        for state_CD, unit_CD in zip(both, (student_CD, difference_CD), strict=True):
            if state_CD.dtype != unit_CD.dtype:
                state_CD = unit_CD.copy_(state_CD)
            norms.append(torch.linalg.vector_norm(state_CD, dim=1, keepdim=True).clamp_(min=MIN_NORM))
            torch.div(state_CD, norms[-1], out=unit_CD)
        torch.sub(student_CD, difference_CD, out=difference_CD)
        torch.linalg.vector_norm(difference_CD, dim=1, out=loss_C).square_().div_(2)
        if padded is not None:
            loss_C.index_fill_(0, padded, 0)
        total += loss_C.sum().item()
        if gradient_CD is not None:
            difference_CD.addcmul_(student_CD, loss_C[:, None], value=-1).mul_((scale / num_valid) / norms[0])
            if gradient_CD is not difference_CD:
                gradient_CD.copy_(difference_CD)
            if padded is not None:
                gradient_CD.index_fill_(0, padded, 0)
    return total / num_valid


def _rows(state_BTD: Tensor, cut: _Cut) -> Sequence[Tensor]:
    state_RD, num_chunks = state_BTD.flatten(0, 1), len(cut.chunks)
    return state_RD.chunk(num_chunks) if num_chunks > 1 else (state_RD,)  # small states are many calls


def _gradient_rows(gradient_BTD: Tensor | None, cut: _Cut) -> Sequence[Tensor | None]:
    return _rows(gradient_BTD, cut) if gradient_BTD is not None else [None] * len(cut.chunks)


def _cut(mask_BT: Tensor, width: int, dtype: torch.dtype) -> _Cut:
    num_rows = mask_BT.numel()
    num_chunks = max(1, -(-4 * num_rows * width // (CHUNK_BYTES * torch.get_num_threads())))
    padding = [chunk.nonzero().squeeze(1) for chunk in (~mask_BT.flatten()).chunk(num_chunks)]
    num_valid = num_rows - sum(map(len, padding))
    most_rows = -(-num_rows // len(padding))
    buffers, norms = torch.empty(2, most_rows, width, dtype=dtype), torch.empty(most_rows, dtype=dtype)
    chunks, first = [], 0
    for rows in padding:
        count = min(most_rows, num_rows - first)
        one_CD, other_CD = buffers[:, :count]
        chunks.append(_Chunk(rows if len(rows) else None, one_CD, other_CD, norms[:count]))
        first += count
    return _Cut(chunks, num_valid)
