"""The pass over rows of logits on CUDA: one launch for a chunk, one program for a row, which reads the row once for its
losses and once more for its gradient. README.md has the numbers.

Shapes: M rows, V vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeline.kernels.common_gpu import max_registers
from pipeline.kernels.head.reference import HeadObjective

BLOCK = 2048  # logits of a row that a program holds at once: 8 a thread and tensor, one 16-byte load in 16 bits
NUM_WARPS = 8


def row_pass(
    student_MV: Tensor,
    teacher_MV: Tensor | None,
    labels_M: Tensor,
    task_M: Tensor,
    logit_M: Tensor,
    objective: HeadObjective,
    with_gradient: bool,
    keep_teacher: bool,
) -> None:
    """See pipeline.kernels.head.chunks.RowPass; bf16, fp16 and fp32, no wait for the device. Always keeps the teacher's
    logits."""
    if student_MV.dtype == torch.float64:
        raise ValueError("the fused head loss has no torch.float64; call it with eager=True")
    vocabulary = student_MV.shape[1]
    with torch.cuda.device_of(student_MV):
        rows_kernel[(len(student_MV),)](
            student_MV,
            teacher_MV if teacher_MV is not None else student_MV,
            labels_M.contiguous(), task_M, logit_M,
            student_MV.stride(0), vocabulary,
            objective.task, objective.logit * objective.temperature, 1 / objective.temperature,
            WITH_TEACHER=teacher_MV is not None, TEMPERED=objective.temperature != 1, REVERSE=objective.reverse,
            WITH_GRADIENT=with_gradient, BLOCK=min(BLOCK, triton.next_power_of_2(max(16, vocabulary))),
            num_warps=NUM_WARPS, maxnreg=max_registers(NUM_WARPS),
        )  # fmt: skip


@triton.jit
def _grow(highest: tl.tensor, total: tl.tensor, logits: tl.tensor) -> tl.tuple:
    """(new maximum, terms e^(logit - maximum), factor for old sums, new sums by lane) of an online softmax."""
    new = tl.maximum(highest, tl.max(logits, axis=0))
    terms = tl.exp(logits - new)
    factor = tl.exp(highest - new)
    return new, terms, factor, total * factor + terms


@triton.jit
def _sums(
    student_row: tl.tensor, teacher_row: tl.tensor, row_stride: tl.tensor, vocabulary: tl.tensor,
    inverse_temperature: tl.tensor,
    WITH_TEACHER: tl.constexpr, TEMPERED: tl.constexpr, REVERSE: tl.constexpr, BLOCK: tl.constexpr,
) -> tl.tuple:  # fmt: skip
    """(logarithms of the normalisers of student, teacher and student at temperature 1; the divergence) of a row."""
    lanes = tl.arange(0, BLOCK)
    s_max, t_max, u_max = -float("inf"), -float("inf"), -float("inf")  # student, teacher, student at temperature 1
    s_sum = tl.zeros([BLOCK], dtype=tl.float32)
    t_sum = tl.zeros([BLOCK], dtype=tl.float32)
    u_sum = tl.zeros([BLOCK], dtype=tl.float32)
    mixed = tl.zeros([BLOCK], dtype=tl.float32)  # sum of e^(first - max) (first - second)
    first = vocabulary * 0
    while first < vocabulary:  # not range: see hidden/gpu.py
        col = first + lanes
        keep = col < vocabulary  # loads go to the end of the row, whose length is a multiple of a vector's
        student = tl.load(student_row + col, mask=col < row_stride, other=0.0).to(tl.float32)
        student = tl.where(keep, student, -float("inf"))
        if TEMPERED:
            u_max, _terms, _factor, u_sum = _grow(u_max, u_sum, student)
            student *= inverse_temperature
        s_max, s_terms, s_factor, s_sum = _grow(s_max, s_sum, student)
        if WITH_TEACHER:
            teacher = tl.load(teacher_row + col, mask=col < row_stride, other=0.0).to(tl.float32)
            teacher = tl.where(keep, teacher, -float("inf"))
            if TEMPERED:
                teacher *= inverse_temperature
            t_max, t_terms, t_factor, t_sum = _grow(t_max, t_sum, teacher)
            if REVERSE:
                mixed = mixed * s_factor + tl.where(keep, s_terms * (student - teacher), 0.0)
            else:
                mixed = mixed * t_factor + tl.where(keep, t_terms * (teacher - student), 0.0)
        first += BLOCK
    s_total, t_total = tl.sum(s_sum, axis=0), tl.sum(t_sum, axis=0)
    s_log, t_log, divergence = s_max + tl.log(s_total), 0.0, 0.0
    if WITH_TEACHER:
        t_log = t_max + tl.log(t_total)
        if REVERSE:
            divergence = tl.sum(mixed, axis=0) / s_total - s_log + t_log
        else:
            divergence = tl.sum(mixed, axis=0) / t_total - t_log + s_log
    u_log = u_max + tl.log(tl.sum(u_sum, axis=0)) if TEMPERED else s_log
    return s_log, t_log, u_log, divergence


@triton.jit(do_not_specialize=["vocabulary"])
def rows_kernel(
    student_MV: tl.tensor, teacher_MV: tl.tensor, labels_M: tl.tensor, task_M: tl.tensor, logit_M: tl.tensor,
    row_stride: tl.tensor, vocabulary: tl.tensor,
    task: tl.tensor, pull: tl.tensor, inverse_temperature: tl.tensor,
    WITH_TEACHER: tl.constexpr, TEMPERED: tl.constexpr, REVERSE: tl.constexpr, WITH_GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """Losses of one row; then its gradient for the student's logits, written over them.

    task and pull are the weights of softmax(student) - onehot(label) and of the divergence's gradient; pull holds the
    one factor of the temperature that is left of temperature^2.
    """
    row = tl.program_id(0).to(tl.int64)
    student_row, teacher_row = student_MV + row * row_stride, teacher_MV + row * row_stride
    label = tl.load(labels_M + row)
    label_logit = tl.load(student_row + label).to(tl.float32)
    s_log, t_log, u_log, divergence = _sums(
        student_row, teacher_row, row_stride, vocabulary, inverse_temperature, WITH_TEACHER, TEMPERED, REVERSE, BLOCK
    )
    tl.store(task_M + row, u_log - label_logit)
    if WITH_TEACHER:
        tl.store(logit_M + row, divergence / (inverse_temperature * inverse_temperature))
    if WITH_GRADIENT:
        first = vocabulary * 0
        while first < vocabulary:
            col = first + tl.arange(0, BLOCK)
            keep = col < row_stride
            student = tl.load(student_row + col, mask=keep, other=0.0).to(tl.float32)
            gradient = task * (tl.exp(student - u_log) - tl.where(col == label, 1.0, 0.0))
            if WITH_TEACHER:
                teacher = tl.load(teacher_row + col, mask=keep, other=0.0).to(tl.float32)
                s_logp = student * inverse_temperature - s_log
                t_logp = teacher * inverse_temperature - t_log
                if REVERSE:
                    gradient += pull * tl.exp(s_logp) * (s_logp - t_logp - divergence)
                else:
                    gradient += pull * (tl.exp(s_logp) - tl.exp(t_logp))
            tl.store(student_row + col, gradient.to(student_MV.dtype.element_ty), mask=keep)
            first += BLOCK
