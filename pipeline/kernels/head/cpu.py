"""The pass over rows of logits on a CPU: a few rows at a time, so that everything between two GEMMs is in the cache.

Shapes: M rows, V vocabulary, R rows of a slab.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.kernels.head.reference import HeadObjective

SLAB_BYTES = 2**22  # of one of the two or three fp32 buffers of a slab


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
    """See pipeline.kernels.head.chunks.RowPass."""
    size = max(1, SLAB_BYTES // (student_MV.shape[1] * task_M.element_size()))
    for first in range(0, len(student_MV), size):
        rows = slice(first, first + size)
        labels_R1 = labels_M[rows, None]
        student_RV = student_MV[rows].to(task_M.dtype)  # no copy where it has this dtype
        torch.log_softmax(student_RV, dim=-1, out=student_RV)
        task_M[rows] = -student_RV.gather(1, labels_R1)[:, 0]
        pull_RV = None
        if teacher_MV is not None:
            teacher_RV = teacher_MV[rows].to(task_M.dtype, copy=keep_teacher)
            pull_RV, divergence_R = _divergence(student_RV, teacher_RV, objective, with_gradient)
            logit_M[rows] = divergence_R * objective.temperature**2
        if with_gradient:
            gradient_RV = student_RV.exp_().mul_(objective.task)
            if pull_RV is not None:
                gradient_RV.add_(pull_RV, alpha=objective.logit * objective.temperature)
            gradient_RV.scatter_add_(1, labels_R1, gradient_RV.new_full((1, 1), -objective.task).expand_as(labels_R1))
            if student_MV.dtype != task_M.dtype:
                student_MV[rows] = gradient_RV


def _divergence(
    student_RV: Tensor, teacher_RV: Tensor, objective: HeadObjective, with_gradient: bool
) -> tuple[Tensor | None, Tensor]:
    """(its gradient for the student's logits over the temperature, the divergence of each row [R]).

    With p, q the distributions of teacher and student: sum p log(p / q), whose gradient is q - p; reverse
    sum q log(q / p), whose gradient is q (log(q / p) - sum). Writes over teacher_RV.

    Args:
        student_RV: log probabilities at temperature 1.
        teacher_RV: logits.
    """
    temperature = objective.temperature
    if temperature != 1:
        student_RV = torch.log_softmax(student_RV / temperature, dim=-1)
        teacher_RV.div_(temperature)
    torch.log_softmax(teacher_RV, dim=-1, out=teacher_RV)
    if objective.reverse:
        student_probability_RV = student_RV.exp()
        ratio_RV = torch.sub(student_RV, teacher_RV, out=teacher_RV)
        divergence_R = torch.linalg.vecdot(student_probability_RV, ratio_RV)
        if not with_gradient:
            return None, divergence_R
        return ratio_RV.sub_(divergence_R[:, None]).mul_(student_probability_RV), divergence_R
    probability_RV = teacher_RV.exp()
    divergence_R = torch.linalg.vecdot(probability_RV, teacher_RV.sub_(student_RV))
    if not with_gradient:
        return None, divergence_R
    return torch.exp(student_RV, out=teacher_RV).sub_(probability_RV), divergence_R
