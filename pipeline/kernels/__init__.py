"""Fused losses. Each function takes the fastest path for the device; `reference` is the definition of all paths."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec

from torch import Tensor

from pipeline.kernels import attention_chunked, attention_reference, head, head_rows_cpu, hidden_cpu, reference
from pipeline.kernels.attention_reference import AttentionLoss, AttentionPair
from pipeline.kernels.head import HeadSums, attach
from pipeline.kernels.reference import HeadLoss, HeadObjective, HiddenLoss, HiddenPair, Mode, distribution_loss

__all__ = [
    "AttentionLoss",
    "AttentionPair",
    "HeadLoss",
    "HeadObjective",
    "HeadSums",
    "HiddenLoss",
    "HiddenPair",
    "Mode",
    "attach",
    "attention_loss",
    "distribution_loss",
    "head_loss",
    "head_sums",
    "hidden_loss",
    "is_fused",
]


def is_fused(device_type: str) -> bool:
    """True where there is a faster path than the definition."""
    return device_type == "cpu" or (device_type == "cuda" and _has_triton())


def hidden_loss(
    pairs: Sequence[HiddenPair], mode: Mode, weight: float = 1.0, upstream: float = 1.0, *, eager: bool = False
) -> HiddenLoss:
    """Hidden-state loss of each pair; the contract is `reference.hidden_loss`.

    CUDA: all pairs in two launches (mode "span": three), and one in backward (needs triton; without it the definition).
    CPU: plain PyTorch in chunks that stay in the cache.

    Args:
        eager: take the definition, whatever the device.
    """
    device_type = pairs[0].student_BTD.device.type if pairs else "cpu"
    if eager or not is_fused(device_type):
        return reference.hidden_loss(pairs, mode, weight, upstream)
    if device_type == "cpu":
        return hidden_cpu.hidden_loss(pairs, mode, weight, upstream)
    from pipeline.kernels import hidden_triton  # late: importing triton takes a second, and a CPU has no use for it

    return hidden_triton.hidden_loss(pairs, mode, weight, upstream)


def head_loss(
    student_ND: Tensor,
    teacher_ND: Tensor | None,
    weight_VD: Tensor,
    labels_N: Tensor,
    objective: HeadObjective,
    upstream: float = 1.0,
    bias_V: Tensor | None = None,
    *,
    eager: bool = False,
) -> HeadLoss:
    """Losses of the vocabulary head; the contract is `reference.head_loss`.

    CUDA: two GEMMs and a Triton kernel for each chunk of tokens. CPU: the same with plain PyTorch for the kernel.

    Args:
        eager: take the definition, whatever the device.
    """
    if eager or not is_fused(student_ND.device.type):
        return reference.head_loss(student_ND, teacher_ND, weight_VD, labels_N, objective, upstream, bias_V)
    with_gradient = student_ND.requires_grad
    sums = head_sums(student_ND, teacher_ND, weight_VD, labels_N, objective, upstream, bias_V, with_gradient)
    return attach(student_ND, sums, objective, upstream)


def head_sums(
    student_ND: Tensor,
    teacher_ND: Tensor | None,
    weight_VD: Tensor,
    labels_N: Tensor,
    objective: HeadObjective,
    upstream: float,
    bias_V: Tensor | None,
    with_gradient: bool,
) -> HeadSums:
    """The part of `head_loss` that needs the weight; `attach` makes the loss of it, where the weight may be gone."""
    if student_ND.device.type == "cuda":
        from pipeline.kernels import head_triton

        row_pass = head_triton.row_pass
    else:
        row_pass = head_rows_cpu.row_pass
    return head.head_sums(
        student_ND, teacher_ND, weight_VD, labels_N, objective, upstream, bias_V, with_gradient, row_pass
    )


def attention_loss(
    pairs: Sequence[AttentionPair], weight: float = 1.0, upstream: float = 1.0, *, eager: bool = False
) -> AttentionLoss:
    """Attention loss of each pair; the contract is `attention_reference.attention_loss`.

    CUDA: two launches a pair, in which maps exist tile by tile (without triton, in fp64 or with wider heads than the
    kernels take: as on a CPU). CPU: plain PyTorch in chunks of examples.

    Args:
        eager: take the definition, which makes whole attention maps.
    """
    if eager:
        return attention_reference.attention_loss(pairs, weight, upstream)
    if pairs and pairs[0].student_query_BQHK.device.type == "cuda" and _has_triton():
        from pipeline.kernels import attention_triton

        if attention_triton.takes(pairs):
            return attention_triton.attention_loss(pairs, weight, upstream)
    return attention_chunked.attention_loss(pairs, weight, upstream)


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
