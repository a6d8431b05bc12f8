"""Queries, keys and position biases of a layer's attentions, taken while the layer runs.

Shapes: B examples, Q queries, S keys, H heads, K width of a head, R distances.
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
    bias: nn.Module | None = None
    """Table of the layer's own position bias, which it looks up once, for all distances."""


class QueriesKeys(NamedTuple):
    query_BQHK: torch.Tensor
    key_BSHK: torch.Tensor
    bias_RH: torch.Tensor | None = None
    """The layer's own position bias by distance."""

    def chunk(self, count: int) -> list[QueriesKeys]:
        """Those of `count` equal parts of the batch."""
        queries, keys = self.query_BQHK.chunk(count), self.key_BSHK.chunk(count)
        return [QueriesKeys(query, key, self.bias_RH) for query, key in zip(queries, keys, strict=True)]


@contextmanager
def captured(projections: Mapping[str, Projections], wanted: bool) -> Iterator[dict[str, QueriesKeys]]:
    """Fills the dict that it yields when the block ends: queries, keys and own position bias of each attention that
    ran, by its name (self, cross). Nothing is taken unless wanted."""
    found: dict[str, QueriesKeys] = {}
    if not wanted:
        yield found
        return
    outputs: dict[nn.Module, torch.Tensor] = {}

    def keep(module: nn.Module, _: object, output: torch.Tensor) -> None:
        outputs[module] = output

    modules = [module for each in projections.values() for module in (each.query, each.key, each.bias)]
    handles = [module.register_forward_hook(keep) for module in modules if module is not None]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
    for name, each in projections.items():
        if each.query in outputs:
            query_BQHK, key_BSHK = (
                outputs[projection].unflatten(-1, (each.num_heads, each.width)) for projection in (each.query, each.key)
            )
            found[name] = QueriesKeys(query_BQHK, key_BSHK, outputs[each.bias] if each.bias is not None else None)
