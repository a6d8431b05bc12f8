"""The attention loss in chunks of examples, so that attention maps never exist whole: at most CHUNK_BYTES of each of
five. Plain PyTorch, for every device. Gradients are made in the forward pass.

Shapes: P pairs, B batch, Q queries, S keys, H heads, K width of a head, C examples of a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.kernels.attention.reference import (
    AttentionPair,
    check_attention,
    counted_queries,
    distances,
    position_bias,
)
from pipeline.kernels.common import PairLosses, accumulation_dtype, empty_gradient, needs_gradient, with_gradients

CHUNK_BYTES = {"cpu": 2**21, "cuda": 2**28}  # of one fp32 map; one example at least


def attention_loss(pairs: Sequence[AttentionPair], weight: float = 1.0, upstream: float = 1.0) -> PairLosses:
    """Same contract as `pipeline.kernels.attention.reference.attention_loss`."""
    check_attention(pairs)
    students = [state for pair in pairs for state in pair.students]
    gradients = [empty_gradient(student) for student in students if needs_gradient(*students)]
    each = len(gradients) // len(pairs)
    losses = [
        _pass_over(pair, weight * upstream, gradients[each * index : each * (index + 1)])
        for index, pair in enumerate(pairs)
    ]
    loss_P = torch.stack(losses)
    return PairLosses(with_gradients(loss_P * weight, students, gradients, upstream), loss_P)


@torch.no_grad()
def _pass_over(pair: AttentionPair, scale: float, gradients: Sequence[Tensor]) -> Tensor:
    """The loss; writes the gradients of the students, if there are any, for a gradient `scale` of the loss."""
    num_batch, num_queries_each, num_heads, _ = pair.student_query_BQHK.shape
    num_keys, dtype = pair.student_key_BSHK.shape[1], accumulation_dtype(pair.student_query_BQHK)
    counted_BQ = counted_queries(pair)
    num_rows = (counted_BQ.sum() * num_heads).clamp(min=1).to(dtype)
    bias_HQS = None if pair.bias_HR is None else position_bias(pair.bias_HR, pair, dtype)
    own_bias_HQS = None if pair.student_bias_HR is None else position_bias(pair.student_bias_HR, pair, dtype)
    pull_of_bias_HQS = None if own_bias_HQS is None else torch.zeros_like(own_bias_HQS)
    later_QS = distances(pair) > 0 if pair.causal else None
    device_type = pair.student_query_BQHK.device.type
    budget = CHUNK_BYTES.get(device_type, CHUNK_BYTES["cpu"])
    size = max(1, budget // max(1, 4 * num_heads * num_queries_each * num_keys))
    loss = torch.zeros((), dtype=dtype, device=num_rows.device)
    for first in range(0, num_batch, size):
        chunk = slice(first, min(first + size, num_batch))
        student_query_CHQK, student_key_CHSK, teacher_query_CHQK, teacher_key_CHSK = (
            _heads_first(state[chunk], mask[chunk], dtype)
            for state, mask in zip(pair[:4], [pair.query_mask_BQ, pair.key_mask_BS] * 2, strict=True)
        )
        added_CHQS = _added(pair.key_mask_BS[chunk], num_heads, bias_HQS, later_QS, dtype)
        teacher_CHQS = _log_attention(teacher_query_CHQK, teacher_key_CHSK, pair.scale, added_CHQS)
        if own_bias_HQS is not None:
            added_CHQS = _added(pair.key_mask_BS[chunk], num_heads, own_bias_HQS, later_QS, dtype)
        student_CHQS = _log_attention(student_query_CHQK, student_key_CHSK, pair.scale, added_CHQS)
        probability_CHQS = teacher_CHQS.exp()
        divergence_CHQ = torch.linalg.vecdot(probability_CHQS, teacher_CHQS.sub_(student_CHQS))
        counted_C1Q = counted_BQ[chunk, None, :]
        loss += torch.where(counted_C1Q, divergence_CHQ, 0).sum()
        if gradients:
            pull_CHQS = student_CHQS.exp_().sub_(probability_CHQS)
            factor_C1Q1 = torch.where(counted_C1Q, pair.scale * scale / num_rows, 0)[..., None]
            gradients[0][chunk] = (pull_CHQS @ student_key_CHSK).mul_(factor_C1Q1).transpose(1, 2)
            gradients[1][chunk] = (pull_CHQS.mT @ student_query_CHQK.mul_(factor_C1Q1)).transpose(1, 2)
            if pull_of_bias_HQS is not None:
                pull_of_bias_HQS += torch.einsum("chqs,cq->hqs", pull_CHQS, counted_BQ[chunk].to(dtype))
    if gradients and pull_of_bias_HQS is not None:
        gradients[2].copy_(_by_distance(pull_of_bias_HQS) * (scale / num_rows))
    return loss / num_rows


def _by_distance(each_HQS: Tensor) -> Tensor:
    """Sums [H, R] over the pairs of a query and a key that have the same distance: each row is moved along by its place
    from the last, so that these pairs stand below each other."""
    num_queries, num_keys = each_HQS.shape[1:]
    padded_HQX = F.pad(each_HQS.flip(1), (0, num_queries))
    return padded_HQX.flatten(1)[:, :-num_queries].unflatten(1, (num_queries, num_queries + num_keys - 1)).sum(1)


def _heads_first(state_CLHK: Tensor, mask_CL: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy [C, H, L, K], as batched products read it without another one, with zeros where not real."""
    state_CHLK = state_CLHK.to(dtype).transpose(1, 2)
    copy_CHLK = torch.empty(state_CHLK.shape, dtype=dtype, device=state_CHLK.device)
    return torch.where(mask_CL[:, None, :, None], state_CHLK, copy_CHLK.new_zeros(()), out=copy_CHLK)


def _added(
    key_mask_CS: Tensor, num_heads: int, bias_HQS: Tensor | None, later_QS: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """What both maps have added to their scores, [C, H, Q, S] or [C, H, 1, S]: the bias, and at keys that a query does
    not see a number that no score changes (rows that see nothing stay finite)."""
    hidden_C1QS = ~key_mask_CS[:, None, None, :]
    if later_QS is not None:
        hidden_C1QS = hidden_C1QS | later_QS
    bias = bias_HQS if bias_HQS is not None else hidden_C1QS.new_zeros((), dtype=dtype)
    added_CHQS = torch.where(hidden_C1QS, torch.finfo(dtype).min, bias)
    return added_CHQS.expand(-1, num_heads, -1, -1)


def _log_attention(query_CHQK: Tensor, key_CHSK: Tensor, scale: float, added_CHQS: Tensor) -> Tensor:
    """Logarithms of the attention, [C, H, Q, S]."""
    added, query, key = (each.flatten(0, 1) for each in (added_CHQS, query_CHQK, key_CHSK))
    scores = torch.baddbmm(added, query, key.mT, alpha=scale)
    return torch.log_softmax(scores, dim=-1).unflatten(0, query_CHQK.shape[:2])
