"""Attention of new tokens over a cache, for the families' cached layer calls.

Shapes: B encoder outputs or examples, R rows (those of one example follow each other), Q new tokens of a row, L tokens
looked at, H heads, K width of a head, X = H * K.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from pipeline.families.base import KeysValues

FEW_QUERIES = 16


def heads(projected_BLX: torch.Tensor, width: int) -> torch.Tensor:
    """[B, L, H * K] -> [B, H, L, K] for heads of width K; a view."""
    return projected_BLX.unflatten(-1, (-1, width)).transpose(1, 2)


def attend(
    queries_BHQK: torch.Tensor, seen: KeysValues, bias: torch.Tensor, scale: float, *, fused: bool = False
) -> torch.Tensor:
    """Attention over keys and values [B, H, L, K] with an additive bias; heads side by side, [B, Q, H * K].

    A few queries on a CPU, which is what cached decoding is made of, take plain matrix products in float32: the fused
    kernel needs 1.3 to 2 times as long for them (torch 2.13).

    Args:
        fused: any number of queries takes the fused kernel, as in transformers, and so gives its bits.
    """
    few = not fused and queries_BHQK.device.type == "cpu" and queries_BHQK.shape[2] <= FEW_QUERIES
    if few and queries_BHQK.dtype == torch.float32:
        queries_BHQK = queries_BHQK.contiguous() if scale == 1.0 else (queries_BHQK * scale).contiguous()
        scores_BHQL = torch.matmul(queries_BHQK, seen.keys.transpose(2, 3)).add_(bias)
        attended_BHQK = torch.matmul(scores_BHQL.softmax(-1), seen.values)
    else:
        attended_BHQK = F.scaled_dot_product_attention(
            queries_BHQK, seen.keys, seen.values, attn_mask=bias, scale=scale
        )
    return attended_BHQK.transpose(1, 2).flatten(2)


def attend_across(
    queries_RHQK: torch.Tensor, cross: KeysValues, bias: torch.Tensor, scale: float, *, fused: bool = False
) -> torch.Tensor:
    """Cross-attention of R rows over B encoder outputs, whose rows follow each other, [R, Q, H * K]: all rows of one
    output ask as one, so that its keys and values are neither copied nor read more than once."""
    num_rows, num_queries = len(queries_RHQK), queries_RHQK.shape[2]
    queries_BHQK = queries_RHQK.unflatten(0, (len(cross.keys), -1)).transpose(1, 2).flatten(2, 3)
    return attend(queries_BHQK, cross, bias, scale, fused=fused).reshape(num_rows, num_queries, -1)


def attend_to_both(
    queries_RHQK: torch.Tensor,
    seen: KeysValues,
    cross: KeysValues,
    self_bias: torch.Tensor,
    cross_bias: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Attention of R rows over their own keys and those of B encoder outputs in one softmax, [R, Q, H * K]. The rows of
    one output follow each other; of the G heads that keys and values have, each serves H / G of the queries' heads."""
    num_rows, num_heads, num_queries, width = queries_RHQK.shape
    num_own, num_outputs = seen.keys.shape[2], len(cross.keys)
    queries_RGXK = (queries_RHQK * scale).reshape(num_rows, seen.keys.shape[1], -1, width)

    def by_output(each_RGXK: torch.Tensor) -> torch.Tensor:
        """All rows of one output side by side, so that its keys and values are neither copied nor read again."""
        return each_RGXK.unflatten(0, (num_outputs, -1)).transpose(1, 2).flatten(2, 3)

    def by_row(each_BGYK: torch.Tensor) -> torch.Tensor:
        return each_BGYK.unflatten(2, (num_rows // num_outputs, -1)).transpose(1, 2).flatten(0, 1)

    own_RGXT = torch.matmul(queries_RGXK, seen.keys.transpose(2, 3))
    own_RHQT = own_RGXT.reshape(num_rows, num_heads, num_queries, -1) + self_bias
    cross_RGXS = by_row(torch.matmul(by_output(queries_RGXK), cross.keys.transpose(2, 3)) + cross_bias)
    cross_RHQS = cross_RGXS.reshape(num_rows, num_heads, num_queries, -1)
    weights_RHQL = torch.cat((own_RHQT, cross_RHQS), dim=-1).softmax(-1, dtype=torch.float32).to(queries_RHQK.dtype)
    weights_RGXL = weights_RHQL.reshape(*queries_RGXK.shape[:3], -1)
    attended_RGXK = torch.matmul(weights_RGXL[..., :num_own], seen.values)
    attended_RGXK = attended_RGXK + by_row(torch.matmul(by_output(weights_RGXL[..., num_own:]), cross.values))
    return attended_RGXK.reshape(num_rows, num_heads, num_queries, width).transpose(1, 2).flatten(2)
