"""Vocabulary head, cross entropy and divergence in one pass over chunks of tokens, so that logits never exist whole.

For each chunk: one GEMM makes the logits of students and teacher (one read of the weight for all), a pass over the rows
of each student makes the losses and puts the gradient of the logits in the place of the student's logits, and a second
GEMM takes it to the states. The GEMMs are the BLAS library's, the pass over rows is a Triton kernel (gpu.py) or plain
PyTorch (cpu.py).

Shapes: U students, N tokens, D channels, V vocabulary, M tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pipeline.kernels.common import accumulation_dtype, empty_gradient, with_gradients
from pipeline.kernels.head.reference import HeadLoss, HeadObjective, check_head

LOGIT_BYTES = {"cuda": 2**30, "cpu": 128 * 2**20}  # of the logits of one chunk; a GEMM of few rows re-reads the weight
ROW_ALIGNMENT = {"cuda": 64, "cpu": 1}  # elements: rows of logits start where vector loads can


class RowPass(Protocol):
    def __call__(
        self,
        student_MV: Tensor,
        teacher_MV: Tensor | None,
        labels_M: Tensor,
        task_M: Tensor,
        logit_M: Tensor,
        objective: HeadObjective,
        with_gradient: bool,
        keep_teacher: bool,
    ) -> None:
        """Write the losses of each row and, with a gradient, the gradient of the logits over student_MV; teacher_MV is
        left as it is where it is to be kept."""


class HeadSums(NamedTuple):
    """Results without autograd: the two sums, and the gradient of the share for the gradient `upstream` of it."""

    task: Tensor
    logit: Tensor
    gradient_UND: Tensor | None


@torch.no_grad()
def head_sums(
    student_UND: Tensor,
    shares_U: Sequence[float],
    teacher_ND: Tensor | None,
    weight_VD: Tensor,
    labels_N: Tensor,
    objective: HeadObjective,
    upstream: float,
    bias_V: Tensor | None,
    with_gradient: bool,
    row_pass: RowPass,
) -> HeadSums:
    """What `head.reference.head_loss` defines, summed over students by their shares; the logits of their one teacher
    are made once. Takes LOGIT_BYTES and twice the chunk's states beyond its results."""
    check_head(student_UND[0], teacher_ND, weight_VD, labels_N, objective)
    num_tokens, device = student_UND.shape[1], student_UND.device
    copies = len(shares_U) + (teacher_ND is not None)
    alignment = ROW_ALIGNMENT.get(device.type, 1)
    row_stride = -(-len(weight_VD) // alignment) * alignment
    size = chunk_size(num_tokens, copies * row_stride * student_UND.element_size(), device.type)
    logits = student_UND.new_empty(copies * size, row_stride)[:, : len(weight_VD)]
    dtype = accumulation_dtype(student_UND)
    task_UN, logit_UN = student_UND.new_zeros(2, len(shares_U), num_tokens, dtype=dtype).unbind()
    gradient_UND = empty_gradient(student_UND) if with_gradient else None
    # gradients of logits are made for the larger weight 1 and scaled in the second GEMM: nothing underflows in fp16
    largest = max(abs(objective.task), abs(objective.logit)) or 1.0
    relative = objective._replace(task=objective.task / largest, logit=objective.logit / largest)
    for first in range(0, num_tokens, size):
        chunk = slice(first, min(first + size, num_tokens))
        count = chunk.stop - first
        states = [*student_UND[:, chunk], *([] if teacher_ND is None else [teacher_ND[chunk]])]
        together = torch.cat(states) if len(states) > 1 else states[0]
        logits_MV = torch.mm(together, weight_VD.t(), out=logits[: copies * count])
        if bias_V is not None:
            logits_MV += bias_V
        teacher_MV = logits_MV[-count:] if teacher_ND is not None else None
        for place, share in enumerate(shares_U):
            student_MV = logits_MV[place * count : (place + 1) * count]
            row_pass(
                student_MV, teacher_MV, labels_N[chunk], task_UN[place, chunk], logit_UN[place, chunk], relative,
                with_gradient, keep_teacher=place + 1 < len(shares_U),
            )  # fmt: skip
            if gradient_UND is not None:
                out_MD = gradient_UND[place, chunk]
                torch.addmm(out_MD, student_MV, weight_VD, beta=0, alpha=largest * upstream * share, out=out_MD)
    task, logit = (
        torch.stack([share * losses_N.sum() for share, losses_N in zip(shares_U, losses_UN, strict=True)]).sum()
        for losses_UN in (task_UN, logit_UN)
    )
    return HeadSums(task, logit, gradient_UND)


def chunk_size(num_tokens: int, bytes_per_token: int, device_type: str) -> int:
    """Tokens of a chunk: as many as the budget holds, in chunks of about one size."""
    most = max(1, LOGIT_BYTES.get(device_type, LOGIT_BYTES["cpu"]) // max(1, bytes_per_token))
    return -(-max(1, num_tokens) // -(-max(1, num_tokens) // most))


def attach(student_UND: Tensor, sums: HeadSums, objective: HeadObjective, upstream: float) -> HeadLoss:
    """The loss whose gradient for `student_UND` was made beforehand; of one `sums` only once."""
    share = objective.task * sums.task + objective.logit * sums.logit
    return HeadLoss(with_gradients(share, [student_UND], [sums.gradient_UND], upstream), sums.task, sums.logit)
