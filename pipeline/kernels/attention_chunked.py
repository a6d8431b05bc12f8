"""The attention loss in chunks of examples, so that attention maps never exist whole: at most CHUNK_BYTES of each of
four. Plain PyTorch, for every device. Gradients are made in the forward pass.

Shapes: P pairs, B batch, Q queries, S keys, H heads, K width of a head, C examples of a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.kernels.attention_reference import (
    AttentionLoss,
    AttentionPair,
    check_attention,
    counted_queries,
    distances,
    position_bias,
)
from pipeline.kernels.reference import accumulation_dtype

CHUNK_BYTES = {"cpu": 2**21, "cuda": 2**28}  # of one fp32 map; one example at least


def attention_loss(pairs: Sequence[AttentionPair], weight: float = 1.0, upstream: float = 1.0) -> AttentionLoss:
    """Same contract as `pipeline.kernels.attention_reference.attention_loss`."""
    check_attention(pairs)
    students = [state for pair in pairs for state in (pair.student_query_BQHK, pair.student_key_BSHK)]
    return AttentionLoss(*_AttentionLoss.apply(pairs, weight, upstream, *students))


class _AttentionLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, pairs: Sequence[AttentionPair], weight: float, upstream: float, *students: Tensor
    ) -> tuple[Tensor, Tensor]:
        wanted = any(ctx.needs_input_grad)
        losses, gradients = [], list[Tensor]()
        for pair in pairs:
            loss, *both = _pass_over(pair, weight * upstream, wanted)
            losses.append(loss)
            gradients += both
        ctx.save_for_backward(*gradients)
        ctx.upstream = upstream
        loss_P = torch.stack(losses)
        ctx.mark_non_differentiable(loss_P)
        return loss_P * weight, loss_P

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_P: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        # no test for a factor of 1: on a GPU that would wait for the device, and these are few bytes beside the maps
        factors = (grad_P / ctx.upstream).repeat_interleave(2).unbind()
        gradients = (gradient * factor for gradient, factor in zip(ctx.saved_tensors, factors, strict=True))
        return (None, None, None, *gradients)


def _pass_over(pair: AttentionPair, scale: float, with_gradient: bool) -> tuple[Tensor, ...]:
    """(loss, gradient of the queries, gradient of the keys), the gradients for a gradient `scale` of the loss."""
    num_batch, num_queries_each, num_heads, _ = pair.student_query_BQHK.shape
    num_keys, dtype = pair.student_key_BSHK.shape[1], accumulation_dtype(pair.student_query_BQHK)
    counted_BQ = counted_queries(pair)
    num_rows = (counted_BQ.sum() * num_heads).clamp(min=1).to(dtype)
    bias_HQS = position_bias(pair, dtype) if pair.bias_HR is not None else None
    later_QS = distances(pair) > 0 if pair.causal else None
    gradients = [
        torch.empty(state.shape, dtype=state.dtype, device=state.device)
        for state in (pair.student_query_BQHK, pair.student_key_BSHK)
        if with_gradient
    ]
    device_type = pair.student_query_BQHK.device.type
    budget = CHUNK_BYTES.get(device_type, CHUNK_BYTES["cpu"])
    size = max(1, budget // max(1, 4 * num_heads * num_queries_each * num_keys))
    loss = torch.zeros((), dtype=dtype, device=num_rows.device)
    for first in range(0, num_batch, size):
        chunk = slice(first, min(first + size, num_batch))
        queries_keys = [
            torch.where(mask[chunk, :, None, None], state[chunk].to(dtype), 0).transpose(1, 2)
            for state, mask in zip(pair[:4], [pair.query_mask_BQ, pair.key_mask_BS] * 2, strict=True)
        ]
        student_query_CHQK, student_key_CHSK, teacher_query_CHQK, teacher_key_CHSK = queries_keys
        hidden_C1QS = ~pair.key_mask_BS[chunk, None, None, :]
        if later_QS is not None:
            hidden_C1QS = hidden_C1QS | later_QS
        student_CHQS = _log_attention(student_query_CHQK, student_key_CHSK, pair.scale, bias_HQS, hidden_C1QS)
        teacher_CHQS = _log_attention(teacher_query_CHQK, teacher_key_CHSK, pair.scale, bias_HQS, hidden_C1QS)
        probability_CHQS = teacher_CHQS.exp()
        divergence_CHQ = torch.linalg.vecdot(probability_CHQS, teacher_CHQS.sub_(student_CHQS))
        counted_C1Q = counted_BQ[chunk, None, :]
        loss += torch.where(counted_C1Q, divergence_CHQ, 0).sum()
        if with_gradient:
            pull_CHQS = student_CHQS.exp_().sub_(probability_CHQS).mul_(pair.scale * scale / num_rows)
            pull_CHQS.masked_fill_(~counted_C1Q[..., None], 0)
            gradients[0][chunk] = (pull_CHQS @ student_key_CHSK).transpose(1, 2)
            gradients[1][chunk] = (pull_CHQS.transpose(-1, -2) @ student_query_CHQK).transpose(1, 2)
    return (loss / num_rows, *gradients)


def _log_attention(
    query_CHQK: Tensor, key_CHSK: Tensor, scale: float, bias_HQS: Tensor | None, hidden_C1QS: Tensor
) -> Tensor:
    scores_CHQS = (query_CHQK @ key_CHSK.transpose(-1, -2)).mul_(scale)
    if bias_HQS is not None:
        scores_CHQS.add_(bias_HQS)
    scores_CHQS.masked_fill_(hidden_C1QS, torch.finfo(scores_CHQS.dtype).min)
    return torch.log_softmax(scores_CHQS, dim=-1)
