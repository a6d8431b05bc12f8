"""Fused losses. Each function takes the fastest path for the device; reference.py of a loss is its definition."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec

from torch import Tensor

from pipeline.kernels.attention import cpu as attention_cpu
from pipeline.kernels.attention import reference as attention_reference
from pipeline.kernels.attention.reference import AttentionPair, distances, position_bias
from pipeline.kernels.common import PairLosses, needs_gradient
from pipeline.kernels.head import chunks
from pipeline.kernels.head import cpu as head_cpu
from pipeline.kernels.head import reference as head_reference
from pipeline.kernels.head.chunks import HeadSums, attach
from pipeline.kernels.head.reference import HeadLoss, HeadObjective, distribution_loss
from pipeline.kernels.hidden import cpu as hidden_cpu
from pipeline.kernels.hidden import reference as hidden_reference
from pipeline.kernels.hidden.reference import HiddenMode, HiddenPair

__all__ = [
    "AttentionPair",
    "HeadLoss",
    "HeadObjective",
    "HeadSums",
    "HiddenMode",
    "HiddenPair",
    "PairLosses",
    "attach",
    "attention_loss",
    "distances",
    "distribution_loss",
    "head_loss",
    "head_sums",
    "hidden_loss",
    "is_fused",
    "position_bias",
]


def is_fused(device_type: str) -> bool:
    """True where there is a faster path than the definition."""
    return device_type == "cpu" or (device_type == "cuda" and _has_triton())


def hidden_loss(
    pairs: Sequence[HiddenPair], mode: HiddenMode, weight: float = 1.0, upstream: float = 1.0, *, eager: bool = False
) -> PairLosses:
    """Hidden-state loss of each pair; the contract is `hidden.reference.hidden_loss`.

    CUDA: all pairs in two launches (mode "span": three), and one in backward (needs triton; without it the definition).
    CPU: plain PyTorch in chunks that stay in the cache.

    Args:
        eager: take the definition, whatever the device.
    """
    device_type = pairs[0].student_BTD.device.type if pairs else "cpu"
    if eager or not is_fused(device_type):
        return hidden_reference.hidden_loss(pairs, mode, weight, upstream)
    if device_type == "cpu":
        return hidden_cpu.hidden_loss(pairs, mode, weight, upstream)
    from pipeline.kernels.hidden import gpu  # late: importing triton takes a second, and a CPU has no use for it

    return gpu.hidden_loss(pairs, mode, weight, upstream)


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
    """Losses of the vocabulary head; the contract is `head.reference.head_loss`.

    CUDA: two GEMMs and a Triton kernel for each chunk of tokens. CPU: the same with plain PyTorch for the kernel.

    Args:
        eager: take the definition, whatever the device.
    """
    if eager or not is_fused(student_ND.device.type):
        return head_reference.head_loss(student_ND, teacher_ND, weight_VD, labels_N, objective, upstream, bias_V)
    wanted, student_UND = needs_gradient(student_ND), student_ND[None]
    sums = head_sums(student_UND, (1.0,), teacher_ND, weight_VD, labels_N, objective, upstream, bias_V, wanted)
    return attach(student_UND, sums, objective, upstream)


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
) -> HeadSums:
    """The part of `head_loss` that needs the weight, for several students of one teacher, whose losses are added up by
    their shares; `attach` makes the loss of it, where the weight may be gone."""
    if student_UND.device.type == "cuda":
        from pipeline.kernels.head import gpu

        row_pass = gpu.row_pass
    else:
        row_pass = head_cpu.row_pass
    return chunks.head_sums(
        student_UND, shares_U, teacher_ND, weight_VD, labels_N, objective, upstream, bias_V, with_gradient, row_pass
    )


def attention_loss(
    pairs: Sequence[AttentionPair], weight: float = 1.0, upstream: float = 1.0, *, eager: bool = False
) -> PairLosses:
    """Attention loss of each pair; the contract is `attention.reference.attention_loss`.

    CUDA: two launches a pair, in which maps exist tile by tile (without triton, in fp64, with wider heads than the
    kernels take or a position bias of the student's own: as on a CPU). CPU: plain PyTorch in chunks of examples.

    Args:
        eager: take the definition, which makes whole attention maps.
    """
    if eager:
        return attention_reference.attention_loss(pairs, weight, upstream)
    if pairs and pairs[0].student_query_BQHK.device.type == "cuda" and _has_triton():
        from pipeline.kernels.attention import gpu

        if gpu.takes(pairs):
            return gpu.attention_loss(pairs, weight, upstream)
    return attention_cpu.attention_loss(pairs, weight, upstream)


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
