"""Vocabulary head, cross entropy and divergence in one pass over chunks of tokens, so that logits never exist whole.

For each chunk: one GEMM makes the logits of student and teacher (one read of the weight for both), a pass over the rows
makes the losses and puts the gradient of the logits in the place of the student's logits, and a second GEMM takes it to
the states. The GEMMs are the BLAS library's, the pass over rows is a Triton kernel (gpu.py) or plain PyTorch (cpu.py).

Shapes: N tokens, D channels, V vocabulary, M tokens of a chunk.
"""

from __future__ import annotations

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
    ) -> None:
        """Write the losses of each row and, with a gradient, the gradient of the logits over student_MV."""


class HeadSums(NamedTuple):
    """Results without autograd: the two sums, and the gradient of the share for the gradient `upstream` of it."""

    task: Tensor
    logit: Tensor
    gradient_ND: Tensor | None


@torch.no_grad()
def head_sums(
    student_ND: Tensor,
    teacher_ND: Tensor | None,
    weight_VD: Tensor,
    labels_N: Tensor,
    objective: HeadObjective,
    upstream: float,
    bias_V: Tensor | None,
    with_gradient: bool,
    row_pass: RowPass,
) -> HeadSums:
    """What `head.reference.head_loss` defines. Takes LOGIT_BYTES and twice the chunk's states beyond its results."""
    check_head(student_ND, teacher_ND, weight_VD, labels_N, objective)
    num_tokens, device = len(student_ND), student_ND.device
    copies = 1 if teacher_ND is None else 2
    alignment = ROW_ALIGNMENT.get(device.type, 1)
    row_stride = -(-len(weight_VD) // alignment) * alignment
    size = chunk_size(num_tokens, copies * row_stride * student_ND.element_size(), device.type)
    logits = student_ND.new_empty(copies * size, row_stride)[:, : len(weight_VD)]
    task_N, logit_N = student_ND.new_zeros(2, num_tokens, dtype=accumulation_dtype(student_ND)).unbind()
    gradient_ND = empty_gradient(student_ND) if with_gradient else None
    # gradients of logits are made for the larger weight 1 and scaled in the second GEMM: nothing underflows in fp16
    largest = max(abs(objective.task), abs(objective.logit)) or 1.0
    relative = objective._replace(task=objective.task / largest, logit=objective.logit / largest)
    for first in range(0, num_tokens, size):
        chunk = slice(first, min(first + size, num_tokens))
        count = chunk.stop - first
        states = student_ND[chunk] if teacher_ND is None else torch.cat([student_ND[chunk], teacher_ND[chunk]])
        logits_MV = torch.mm(states, weight_VD.t(), out=logits[: copies * count])
        if bias_V is not None:
            logits_MV += bias_V
        teacher_MV = logits_MV[count:] if teacher_ND is not None else None
        student_MV = logits_MV[:count]
        row_pass(student_MV, teacher_MV, labels_N[chunk], task_N[chunk], logit_N[chunk], relative, with_gradient)
        if gradient_ND is not None:
            out_MD = gradient_ND[chunk]
            torch.addmm(out_MD, student_MV, weight_VD, beta=0, alpha=largest * upstream, out=out_MD)
    return HeadSums(task_N.sum(), logit_N.sum(), gradient_ND)


def chunk_size(num_tokens: int, bytes_per_token: int, device_type: str) -> int:
    """Tokens of a chunk: as many as the budget holds, in chunks of about one size."""
    most = max(1, LOGIT_BYTES.get(device_type, LOGIT_BYTES["cpu"]) // max(1, bytes_per_token))
    return -(-max(1, num_tokens) // -(-max(1, num_tokens) // most))


def attach(student_ND: Tensor, sums: HeadSums, objective: HeadObjective, upstream: float) -> HeadLoss:
    """The loss whose gradient for `student_ND` was made beforehand; of one `sums` only once."""
    share = objective.task * sums.task + objective.logit * sums.logit
    return HeadLoss(with_gradients(share, [student_ND], [sums.gradient_ND], upstream), sums.task, sums.logit)
