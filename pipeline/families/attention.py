"""Attention of new tokens over a cache, for the families' cached layer calls.

Shapes: B encoder outputs or examples, R rows (those of one example follow each other), Q new tokens of a row, L tokens
looked at, H heads, K width of a head, X = H * K.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from pipeline.families.base import KeysValues


def heads(projected_BLX: torch.Tensor, width: int) -> torch.Tensor:
    """[B, L, H * K] -> [B, L, H, K] for heads of width K."""
    return projected_BLX.unflatten(-1, (-1, width))


def attend(queries_BQHK: torch.Tensor, seen: KeysValues, bias: torch.Tensor | None, scale: float) -> torch.Tensor:
    """Attention over keys and values [B, L, H, K] with an additive bias; heads side by side, [B, Q, H * K]."""
    queries, keys, values = (each.transpose(1, 2) for each in (queries_BQHK, seen.keys, seen.values))
    attended_BHQK = F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias, scale=scale)
    return attended_BHQK.transpose(1, 2).flatten(2)


def attend_across(
    queries_RQHK: torch.Tensor, cross: KeysValues, bias: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """Cross-attention of R rows over B encoder outputs, whose rows follow each other, [R, Q, H * K]: all rows of one
    output ask as one, so that its keys and values are neither copied nor read more than once."""
    queries_BQHK = queries_RQHK.reshape(len(cross.keys), -1, *queries_RQHK.shape[2:])
    return attend(queries_BQHK, cross, bias, scale).view(*queries_RQHK.shape[:2], -1)
