"""Objectives, as sums over tokens on the device; the one place that normalises them.

Every term is divided by counts of the whole global batch, which every rank knows beforehand from the lengths of the
examples. So the sum of the terms over micro-batches and ranks is the mean over the global batch, whatever their number.

Shapes: N valid target tokens of a micro-batch, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from pipeline.config import LossConfig
from pipeline.kernels import hidden_loss
from pipeline.modular import ModularOutputs


@dataclass(frozen=True)
class GlobalCounts:
    """What the terms of one optimizer step are divided by."""

    num_target_tokens: int
    num_micro_batches: int
    """Micro-batches with data in them."""


@dataclass(frozen=True)
class LossTerms:
    """Share of one micro-batch in the losses of a step."""

    total: torch.Tensor
    """To run backward from."""
    parts: dict[str, torch.Tensor]
    """What to log, detached, by name; adds up over micro-batches and ranks."""


def task_loss(logits_NV: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
    """Cross entropy summed over tokens, in nats, fp32."""
    return F.cross_entropy(logits_NV.float(), labels_N, reduction="sum")


def logit_loss(student_NV: torch.Tensor, teacher_NV: torch.Tensor, temperature: float) -> torch.Tensor:
    """KL(teacher || student) at a temperature, summed over tokens, times temperature^2 (Hinton 2015), in nats."""
    student_NV = F.log_softmax(student_NV.float() / temperature, dim=-1)
    teacher_NV = F.log_softmax(teacher_NV.float() / temperature, dim=-1)
    return F.kl_div(student_NV, teacher_NV, reduction="sum", log_target=True) * temperature**2


def local_terms(outputs: ModularOutputs, counts: GlobalCounts) -> LossTerms:
    """Local phase: each modular layer's hidden error on its own span; they share no parameters, so the sum is free."""
    errors = hidden_loss(list(outputs.pairs.values()), "span") / counts.num_micro_batches
    parts = {f"hidden/{name}": error for name, error in zip(outputs.pairs, errors.detach(), strict=True)}
    return LossTerms(errors.sum(), parts)


def replacing_terms(outputs: ModularOutputs, counts: GlobalCounts, weights: LossConfig) -> LossTerms:
    """Replacing phase: hidden error at the ends of the drawn spans (their mean), logit distillation, task loss."""
    assert outputs.student_logits_NV is not None
    assert outputs.teacher_logits_NV is not None
    assert outputs.labels_N is not None
    hidden = hidden_loss(list(outputs.pairs.values()), "span").mean() / counts.num_micro_batches
    logit = logit_loss(outputs.student_logits_NV, outputs.teacher_logits_NV, weights.temperature)
    task = task_loss(outputs.student_logits_NV, outputs.labels_N)
    parts = {
        "hidden": hidden,
        "logit": logit / counts.num_target_tokens,
        "task": task / counts.num_target_tokens,
    }
    total = weights.hidden * parts["hidden"] + weights.logit * parts["logit"] + weights.task * parts["task"]
    return LossTerms(total, {name: part.detach() for name, part in parts.items()})
