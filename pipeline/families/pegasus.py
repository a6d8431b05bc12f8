"""Pegasus: a norm before each part of a layer and one behind the last; positions are sinusoids."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from pipeline.families.keys import Keys
from pipeline.families.layernorm import LayerNormFamily, keys_of


class SinusoidalTable(nn.Module):
    """Positions of Pegasus and Marian: a table that transformers computes, of as many rows as the model has
    positions."""

    def __init__(self, table: nn.Module) -> None:
        super().__init__()
        self.table: Any = table

    def forward(self, ids_RQ: torch.Tensor, positions_RQ: torch.Tensor | None) -> torch.Tensor:
        """See LearnedPositions."""
        if positions_RQ is None:
            return self.table(ids_RQ.shape)
        # guesses may reach behind the last position; they are never kept
        return self.table(ids_RQ.shape, position_ids=positions_RQ.clamp(max=self.table.num_embeddings - 1))


class PegasusFamily(LayerNormFamily):
    keys: ClassVar[Keys] = keys_of(
        norm_first=True,
        embeddings_normed=False,
        final_norm=True,
        sinusoids=True,
        tie_word_embeddings=(True,),
        extra_pos_embeddings=(1,),
    )
    norm_first: ClassVar[bool] = True
    positions: ClassVar[type[nn.Module]] = SinusoidalTable
    computed_weights: ClassVar[tuple[str, ...]] = LayerNormFamily.position_weights
