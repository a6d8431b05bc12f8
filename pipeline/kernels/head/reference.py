"""The definition of the vocabulary head's losses, in eager PyTorch: what every other path must equal.

Shapes: N tokens, D channels, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.kernels.common import accumulation_dtype


class HeadObjective(NamedTuple):
    """What is made of the vocabulary distributions of student and teacher.

    task         weight of the cross entropy with the labels.
    logit        weight of the Kullback-Leibler divergence between teacher and student.
    temperature  divides both logits in the divergence, which is multiplied by its square (Hinton et al. 2015), so that
                 its gradient keeps its scale.
    reverse      KL(student || teacher) instead of KL(teacher || student).
    """

    task: float
    logit: float = 0.0
    temperature: float = 1.0
    reverse: bool = False


class HeadLoss(NamedTuple):
    """Three scalars, fp32 (fp64 for fp64 states).

    share  task x cross entropy + logit x divergence: what to run backward from.
    task   cross entropy summed over tokens, in nats, detached.
    logit  temperature^2 x divergence summed over tokens, in nats, detached; 0 without a teacher.
    """

    share: Tensor
    task: Tensor
    logit: Tensor


def head_loss(
    student_ND: Tensor,
    teacher_ND: Tensor | None,
    weight_VD: Tensor,
    labels_N: Tensor,
    objective: HeadObjective,
    upstream: float = 1.0,
    bias_V: Tensor | None = None,
) -> HeadLoss:
    """Losses of the logits `state @ weight^T + bias` of N tokens, for a frozen head that the teacher shares.

    Vocabulary entries that are no tokens (rows that pad the weight) are left out by passing `weight[:num_ids]` (and
    `bias[:num_ids]`): views, no copies, and the same as logits of minus infinity.

    Args:
        teacher_ND: None where there is no divergence; must not require grad.
        labels_N: int64 in [0, V).
        upstream: as in `pipeline.kernels.hidden.reference.hidden_loss`.

    Raises:
        ValueError: what `check_head` refuses.
    """
    check_head(student_ND, teacher_ND, weight_VD, labels_N, objective)
    student_NV = torch.nn.functional.linear(student_ND, weight_VD, bias_V)
    teacher_NV = torch.nn.functional.linear(teacher_ND, weight_VD, bias_V) if teacher_ND is not None else None
    return distribution_loss(student_NV, teacher_NV, labels_N, objective)


def distribution_loss(
    student_NV: Tensor, teacher_NV: Tensor | None, labels_N: Tensor, objective: HeadObjective
) -> HeadLoss:
    """`head_loss` from the logits on."""
    dtype = accumulation_dtype(student_NV)
    student_NV = student_NV.to(dtype)
    task = torch.nn.functional.cross_entropy(student_NV, labels_N, reduction="sum")
    logit = torch.zeros_like(task)
    if teacher_NV is not None:
        student_NV = torch.log_softmax(student_NV / objective.temperature, dim=-1)
        teacher_NV = torch.log_softmax(teacher_NV.to(dtype) / objective.temperature, dim=-1)
        if objective.reverse:
            student_NV, teacher_NV = teacher_NV, student_NV
        logit = torch.nn.functional.kl_div(student_NV, teacher_NV, reduction="sum", log_target=True)
        logit = logit * objective.temperature**2
    return HeadLoss(objective.task * task + objective.logit * logit, task.detach(), logit.detach())


def check_head(
    student_ND: Tensor, teacher_ND: Tensor | None, weight_VD: Tensor, labels_N: Tensor, objective: HeadObjective
) -> None:
    """Refuse, with ValueError, what no path can compute. Looks at shapes and flags only: no device sync."""
    if student_ND.dim() != 2 or weight_VD.dim() != 2 or student_ND.shape[1] != weight_VD.shape[1]:
        raise ValueError(
            f"head_loss needs states [N, D] and a weight [V, D], got {list(student_ND.shape)} and "
            f"{list(weight_VD.shape)}"
        )
    if labels_N.shape != student_ND.shape[:1] or labels_N.dtype != torch.int64:
        raise ValueError(
            f"labels must be int64 [{len(student_ND)}], got {labels_N.dtype} {list(labels_N.shape)}; leave out tokens "
            "whose label is ignored"
        )
    if teacher_ND is None and objective.logit:
        raise ValueError("a divergence needs the teacher's states; set objective.logit to 0 without them")
    for name, tensor in (("teacher", teacher_ND), ("weight", weight_VD)):
        if tensor is None:
            continue
        if tensor.requires_grad:
            raise ValueError(f"{name} requires grad, but head_loss has none for it; pass it detached")
        if (tensor.dtype, tensor.device) != (student_ND.dtype, student_ND.device):
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device}, but the student is {student_ND.dtype} on "
                f"{student_ND.device}"
            )
    if teacher_ND is not None and teacher_ND.shape != student_ND.shape:
        raise ValueError(f"teacher is {list(teacher_ND.shape)}, but the student is {list(student_ND.shape)}")
    if not objective.temperature > 0:
        raise ValueError(f"temperature must be above 0, not {objective.temperature}")
