"""The definition of the attention loss, in eager PyTorch: what every other path must equal.

Shapes: P pairs, B batch, Q queries, S keys, H heads, K width of a head, R = Q + S - 1 distances.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.kernels.common import PairLosses, accumulation_dtype


class AttentionPair(NamedTuple):
    """Queries and keys of a student's attention and of the teacher's that it should equal.

    student_query_BQHK, student_key_BSHK  as the projections make them; they get gradients.
    teacher_query_BQHK, teacher_key_BSHK  the same shapes; must not require grad.
    query_mask_BQ, key_mask_BS            bool, True where the token is real.
    bias_HR                               position bias of both, by distance: a key at s has bias_HR[:, s - q + Q - 1]
                                          for a query at q. Must not require grad.
    causal                                queries see no keys behind their own position.
    scale                                 factor of the scores before the bias.
    student_bias_HR                       the student's, where it has another than the teacher; gets a gradient.
    """

    student_query_BQHK: Tensor
    student_key_BSHK: Tensor
    teacher_query_BQHK: Tensor
    teacher_key_BSHK: Tensor
    query_mask_BQ: Tensor
    key_mask_BS: Tensor
    bias_HR: Tensor | None = None
    causal: bool = False
    scale: float = 1.0
    student_bias_HR: Tensor | None = None

    @property
    def students(self) -> list[Tensor]:
        """What gets gradients."""
        own = [] if self.student_bias_HR is None else [self.student_bias_HR]
        return [self.student_query_BQHK, self.student_key_BSHK, *own]

    @property
    def biases(self) -> tuple[Tensor | None, Tensor | None]:
        """Position biases of (student, teacher), by distance."""
        return (self.bias_HR if self.student_bias_HR is None else self.student_bias_HR), self.bias_HR


def attention_loss(pairs: Sequence[AttentionPair], weight: float = 1.0, upstream: float = 1.0) -> PairLosses:
    """KL(teacher's attention || student's), in nats, mean over heads and real queries of this batch.

    Padded keys have no probability in either distribution, and padded queries count nowhere; both are selected away,
    never multiplied. A query that sees no real key gives no loss and no gradient. A batch of padding only gives loss 0
    and zero gradients.

    Args:
        weight: factor of share_P.
        upstream: as in `pipeline.kernels.hidden.reference.hidden_loss`. No meaning here.

    Raises:
        ValueError: what `check_attention` refuses.
    """
    check_attention(pairs)
    losses = []
    for pair in pairs:
        keep_BHQS = pair.query_mask_BQ[:, None, :, None] & pair.key_mask_BS[:, None, None, :]
        if pair.causal:
            keep_BHQS = keep_BHQS & (distances(pair) <= 0)
        logs = []
        for (query_BQHK, key_BSHK), bias_HR in zip((pair[0:2], pair[2:4]), pair.biases, strict=True):
            dtype = accumulation_dtype(query_BQHK)
            query_BQHK = torch.where(pair.query_mask_BQ[:, :, None, None], query_BQHK.to(dtype), 0)
            key_BSHK = torch.where(pair.key_mask_BS[:, :, None, None], key_BSHK.to(dtype), 0)
            scores_BHQS = torch.einsum("bqhk,bshk->bhqs", query_BQHK, key_BSHK) * pair.scale
            if bias_HR is not None:
                scores_BHQS = scores_BHQS + position_bias(bias_HR, pair, dtype)
            lowest = torch.finfo(dtype).min
            logs.append(torch.log_softmax(torch.where(keep_BHQS, scores_BHQS, lowest), dim=-1))
        student_BHQS, teacher_BHQS = logs
        terms_BHQS = teacher_BHQS.exp() * (teacher_BHQS - student_BHQS)
        num_rows = (counted_queries(pair).sum() * student_BHQS.shape[1]).clamp(min=1)
        losses.append(torch.where(keep_BHQS, terms_BHQS, 0).sum() / num_rows)
    loss_P = torch.stack(losses)
    return PairLosses(loss_P * weight, loss_P.detach())


def counted_queries(pair: AttentionPair) -> Tensor:
    """Real queries of examples that have a real key; bool [B, Q]."""
    return pair.query_mask_BQ & pair.key_mask_BS.any(1, keepdim=True)


def distances(pair: AttentionPair) -> Tensor:
    """Position of the key minus that of the query, [Q, S]."""
    device = pair.student_query_BQHK.device
    query_Q, key_S = (torch.arange(state.shape[1], device=device) for state in pair[:2])
    return key_S - query_Q[:, None]


def position_bias(bias_HR: Tensor, pair: AttentionPair, dtype: torch.dtype) -> Tensor:
    """A bias by distance as it is added to the scores of every example, [H, Q, S]."""
    return bias_HR.to(dtype)[:, distances(pair) + pair.student_query_BQHK.shape[1] - 1]


def check_attention(pairs: Sequence[AttentionPair]) -> None:
    """Refuse, with ValueError, what no path can compute. Looks at shapes and flags only: no device sync."""
    if not pairs:
        raise ValueError("attention_loss needs at least one pair; skip the call when a draw has no modular layer")
    if len({len(pair.students) for pair in pairs}) > 1:
        raise ValueError("some students have a position bias of their own and some do not: make two calls")
    for index, pair in enumerate(pairs):
        query_BQHK, key_BSHK = pair.student_query_BQHK, pair.student_key_BSHK
        if query_BQHK.dim() != 4 or key_BSHK.shape[::2] != query_BQHK.shape[::2] or key_BSHK.dim() != 4:
            raise ValueError(
                f"pair {index}: queries must be [B, Q, H, K] and keys [B, S, H, K], got {list(query_BQHK.shape)} and "
                f"{list(key_BSHK.shape)}"
            )
        if (pair.teacher_query_BQHK.shape, pair.teacher_key_BSHK.shape) != (query_BQHK.shape, key_BSHK.shape):
            raise ValueError(f"pair {index}: teacher and student have different shapes: no maps to compare")
        for name in ("teacher_query_BQHK", "teacher_key_BSHK", "bias_HR"):
            tensor = getattr(pair, name)
            if tensor is not None and tensor.requires_grad:
                raise ValueError(f"pair {index}: {name} requires grad, but it is frozen; pass it detached")
        for name, state in (("query_mask_BQ", query_BQHK), ("key_mask_BS", key_BSHK)):
            mask = getattr(pair, name)
            if mask.dtype != torch.bool or mask.shape != state.shape[:2]:
                raise ValueError(f"pair {index}: {name} must be bool {list(state.shape[:2])}, got {mask.dtype}")
        bias_shape = (query_BQHK.shape[2], query_BQHK.shape[1] + key_BSHK.shape[1] - 1)
        for name in ("bias_HR", "student_bias_HR"):
            bias_HR = getattr(pair, name)
            if bias_HR is not None and bias_HR.shape != bias_shape:
                raise ValueError(f"pair {index}: {name} must be {list(bias_shape)}, got {list(bias_HR.shape)}")
