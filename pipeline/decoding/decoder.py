"""One step of cached decoding through an assembled decoder: what greedy decoding and beam search are made of.

Shapes: B examples, R rows (examples, or examples x beams), Q new tokens of a row, T tokens so far, L most tokens, S
source tokens, D model width, H heads, K width of a head, V vocabulary, N states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from pipeline.families import Family, KeysValues

# elements of logits held at once: on a CPU so few that they stay in its cache
MAX_LOGITS = {"cpu": 2**20, "cuda": 2**26}
GROWTH = 16  # tokens that a cache takes room for at once


@dataclass(frozen=True)
class Decoder:
    """One assembled decoder."""

    family: Family
    shared: Any
    layers: Sequence[nn.Module]
    vocabulary_size: int


@dataclass(frozen=True)
class Memory:
    """What the decoder reads of the encoder's output, for B examples."""

    cross: Sequence[KeysValues]
    """For each decoder layer, [B, H, S, K]."""
    bias: torch.Tensor
    """[B, 1, 1, S]."""

    @property
    def num_examples(self) -> int:
        return len(self.bias)

    def select(self, examples: torch.Tensor) -> Memory:
        return Memory([each.select(examples) for each in self.cross], self.bias[examples])


class GrowingCache:
    """Self-attention's keys and values of one layer, [R, H, L, K], where L grows as tokens come.

    Rows may stand at different positions: what lies behind a row's position is left over, masked, and overwritten.
    There is little room behind the last one: attention reads twice as fast where the next row's tokens are near.
    """

    def __init__(self, like: KeysValues, num_rows: int) -> None:
        shape = (num_rows, like.keys.shape[1], 0, like.keys.shape[3])
        self.keys, self.values = like.keys.new_empty(shape), like.values.new_empty(shape)
        self.positions_RQ = torch.empty(0)
        self.num_keys = 0

    @staticmethod
    def of(first: KeysValues) -> GrowingCache:
        """A cache that begins with these keys and values [R, H, T, K], which it may overwrite."""
        cache = GrowingCache(first, len(first.keys))
        cache.keys, cache.values = first.keys, first.values
        return cache

    def at(self, positions_RQ: torch.Tensor, num_keys: int) -> GrowingCache:
        """Where the next call writes, [R or 1, Q], each row's one after the other, and how much it reads."""
        self.positions_RQ, self.num_keys = positions_RQ, num_keys
        return self

    def extend(self, new: KeysValues) -> KeysValues:
        if self.num_keys > self.keys.shape[2]:
            self.keys, self.values = self._grown(self.keys), self._grown(self.values)
        if len(self.positions_RQ) == 1:  # all rows at the same
            places = slice(self.num_keys - self.positions_RQ.shape[1], self.num_keys)
            self.keys[:, :, places], self.values[:, :, places] = new.keys, new.values
        else:
            rows_R1 = torch.arange(len(self.keys), device=self.keys.device)[:, None]
            place = (rows_R1, slice(None), self.positions_RQ)  # [R, Q, H, K]: indices apart come to the front
            self.keys[place], self.values[place] = new.keys.transpose(1, 2), new.values.transpose(1, 2)
        return KeysValues(self.keys[:, :, : self.num_keys], self.values[:, :, : self.num_keys])

    def _grown(self, held_RHLK: torch.Tensor) -> torch.Tensor:
        missing = self.num_keys - held_RHLK.shape[2]
        return F.pad(held_RHLK, (0, 0, 0, -(-missing // GROWTH) * GROWTH))

    def select(self, rows: torch.Tensor) -> None:
        """Keep these rows, in this order."""
        self.keys, self.values = self.keys[rows], self.values[rows]


def step(
    decoder: Decoder,
    caches: Sequence[GrowingCache],
    memory: Memory,
    tokens_RQ: torch.Tensor,
    positions_RQ: torch.Tensor,
) -> torch.Tensor:
    """Finished decoder states [R, Q, D] of new tokens at these positions [R or 1, Q]."""
    num_keys = int(positions_RQ.max()) + 1
    inputs = decoder.shared.inputs_at(positions_RQ, num_keys, memory.bias)
    hidden_RQD = decoder.shared.embed_at(tokens_RQ, positions_RQ)
    for layer, cache, cross in zip(decoder.layers, caches, memory.cross, strict=True):
        hidden_RQD = decoder.family.call_cached(layer, hidden_RQD, cache.at(positions_RQ, num_keys), cross, inputs)
    return decoder.shared.finish("decoder", hidden_RQD)


def best_tokens(decoder: Decoder, finished_RQD: torch.Tensor) -> torch.Tensor:
    """The likeliest token after each state, [R, Q]."""
    parts = finished_RQD.flatten(0, 1).split(logits_at_once(decoder, finished_RQD.device))
    found = [decoder.shared.logits(part_ND).float().argmax(-1) for part_ND in parts]
    return torch.cat(found).view(finished_RQD.shape[:2])


def logits_at_once(decoder: Decoder, device: torch.device) -> int:
    """For how many states logits are computed at once."""
    return max(1, MAX_LOGITS[device.type] // decoder.vocabulary_size)
