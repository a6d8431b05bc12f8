"""Queries and keys of a layer's attentions, taken while the layer runs.

Shapes: B examples, Q queries, S keys, H heads, K width of a head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn


class Projections(NamedTuple):
    """Where one attention of a layer gets its queries and keys from."""

    query: nn.Module
    key: nn.Module
    num_heads: int
    width: int
    """Of a head."""
    scale: float
    """Factor of the scores before the bias."""


class QueriesKeys(NamedTuple):
    query_BQHK: torch.Tensor
    key_BSHK: torch.Tensor


@contextmanager
def captured(projections: Mapping[str, Projections], wanted: bool) -> Iterator[dict[str, QueriesKeys]]:
    """Fills the dict that it yields when the block ends: queries and keys of each attention that ran, by its name
    (self, cross). Nothing is taken unless wanted."""
    found: dict[str, QueriesKeys] = {}
    if not wanted:
        yield found
        return
    outputs: dict[nn.Module, torch.Tensor] = {}

    def keep(module: nn.Module, _: object, output: torch.Tensor) -> None:
        outputs[module] = output

    handles = [each.register_forward_hook(keep) for pair in projections.values() for each in (pair.query, pair.key)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
    for name, (query, key, num_heads, width, _scale) in projections.items():
        if query in outputs:
            heads = (num_heads, width)
            found[name] = QueriesKeys(outputs[query].unflatten(-1, heads), outputs[key].unflatten(-1, heads))
