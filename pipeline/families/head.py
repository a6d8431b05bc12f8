"""The vocabulary head of every family: one frozen module that makes logits, or losses without ever holding all logits.

Shapes: N tokens, D model width, V vocabulary, U students.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from pipeline import kernels
from pipeline.kernels import HeadLoss, HeadObjective, HeadSums


class VocabularyHead(nn.Module):
    """Logits of finished decoder states: states x scale @ weight^T + bias.

    Under ZeRO-3 the weight is there while this module's forward runs, so forward is also where the losses are made,
    once for student and teacher. Their gradient is made there, too, and nothing that requires grad goes in or comes
    out: the head is gathered once a micro-batch and not again in backward.

    Args:
        linear: the model's own head, whose weight is taken (tied or not).
        scale: factor of the states.
        bias_1V: added to all logits; a buffer.
    """

    bias: torch.Tensor | None

    def __init__(self, linear: nn.Linear, scale: float = 1.0, bias_1V: torch.Tensor | None = None) -> None:
        super().__init__()
        self.weight = linear.weight
        self.scale = scale
        self.register_buffer("bias", None if bias_1V is None else bias_1V.flatten())

    def forward(
        self,
        student_ND: torch.Tensor,
        shares_U: Sequence[float] = (),
        teacher_ND: torch.Tensor | None = None,
        labels_N: torch.Tensor | None = None,
        objective: HeadObjective | None = None,
        upstream: float = 1.0,
        with_gradient: bool = False,
    ) -> torch.Tensor | HeadSums:
        """Logits [N, V]; or, with an objective, its sums (see pipeline.kernels.head_sums), where the states of students
        are [U, N, D]."""
        if objective is None:
            return nn.functional.linear(student_ND * self.scale, self.weight, self.bias)
        assert labels_N is not None
        if teacher_ND is not None:
            teacher_ND = teacher_ND * self.scale
        return kernels.head_sums(
            student_ND * self.scale, shares_U, teacher_ND, self.weight.detach(), labels_N, objective,
            # the gradient for the states before the factor
            upstream * self.scale, self.bias, with_gradient,
        )  # fmt: skip

    def losses(
        self,
        student_UND: torch.Tensor,
        shares_U: Sequence[float],
        teacher_ND: torch.Tensor | None,
        labels_N: torch.Tensor,
        objective: HeadObjective,
        upstream: float,
        *,
        eager: bool,
    ) -> HeadLoss:
        """The objective for N tokens, summed over students by their shares; see pipeline.kernels.head_loss.

        Args:
            eager: make all logits and take the definition.
        """
        if eager or not kernels.is_fused(student_UND.device.type):
            teacher_NV = None
            if teacher_ND is not None:
                with torch.no_grad():
                    teacher_NV = self(teacher_ND)
            found = [
                kernels.distribution_loss(student_NV, teacher_NV, labels_N, objective)
                for student_NV in self(student_UND)
            ]
            weighted = [[share * term for term in loss] for share, loss in zip(shares_U, found, strict=True)]
            return HeadLoss(*(torch.stack(terms).sum() for terms in zip(*weighted, strict=True)))
        sums = self(
            student_UND.detach(), shares_U, teacher_ND, labels_N, objective, upstream, student_UND.requires_grad
        )
        return kernels.attach(student_UND, sums, objective, upstream)
