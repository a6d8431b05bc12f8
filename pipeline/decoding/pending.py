"""Rows of several assemblies that wait to go through the decoder that they share, all at once.

Shapes: B rows, H heads, S source tokens, T tokens of a pass, K width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from pipeline.decoding.decoder import Memory
from pipeline.decoding.greedy import NOTHING, Prefix
from pipeline.families import KeysValues


@dataclass(frozen=True)
class Pending:
    """Rows of one encoder output, and what one pass over their references has found out where that serves."""

    names: Sequence[str]
    """The assemblies whose outputs these rows are: those with this encoder and this decoder."""
    examples: Sequence[int]
    """The place of each row's example in the batch."""
    memory: Memory
    prefix: Prefix | None

    @property
    def num_bytes(self) -> int:
        """Of the keys and values that are held."""
        held = [*self.memory.cross, *(self.prefix.caches if self.prefix else ())]
        return sum(2 * each.keys.nbytes for each in held)

    def select(self, rows: torch.Tensor) -> Pending:
        """Some of the rows, without what hangs on the others."""
        examples = [self.examples[i] for i in rows.tolist()]
        return Pending(self.names, examples, self.memory.select(rows), self.prefix and self.prefix.select(rows))


def join(parts: Sequence[Pending]) -> tuple[Memory, Prefix | None]:
    """The rows of all, one after the other, padded to the longest source and the longest pass."""
    memories, prefixes = [part.memory for part in parts], [part.prefix for part in parts if part.prefix]
    masked = torch.finfo(memories[0].bias.dtype).min
    bias = _stack([memory.bias for memory in memories], -1, masked)
    memory = Memory([_join(each) for each in zip(*(memory.cross for memory in memories), strict=True)], bias)
    if not prefixes:
        return memory, None
    given_BT = _stack([prefix.given_BT for prefix in prefixes], -1, 0)
    said_BT = _stack([prefix.said_BT for prefix in prefixes], -1, NOTHING)
    caches = [_join(each) for each in zip(*(prefix.caches for prefix in prefixes), strict=True)]
    return memory, Prefix(given_BT, said_BT, caches)


def _join(parts: Sequence[KeysValues]) -> KeysValues:
    return KeysValues(_stack([each.keys for each in parts], -2, 0.0), _stack([each.values for each in parts], -2, 0.0))


def _stack(parts: Sequence[torch.Tensor], dim: int, filler: float) -> torch.Tensor:
    """Tensors one after the other along dimension 0, filled up along `dim`, counted from the last (-1)."""
    longest = max(part.shape[dim] for part in parts)
    room = [0, 0] * (-dim - 1)
    return torch.cat([F.pad(part, (*room, 0, longest - part.shape[dim]), value=filler) for part in parts])
