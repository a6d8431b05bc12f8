"""M2M100 and NLLB: a norm before each part of a layer and one behind the last; positions are sinusoids that are no
weights, count from behind the padding token's id, and are zero for padding."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from pipeline.families.keys import Keys
from pipeline.families.layernorm import LayerNormFamily, keys_of


class SinusoidsBehindPadding(nn.Module):
    """Positions of M2M100: a buffer, in which the first position has the row behind that of the padding token's id."""

    def __init__(self, table: nn.Module) -> None:
        super().__init__()
        self.table: Any = table

    def forward(self, ids_RQ: torch.Tensor, positions_RQ: torch.Tensor | None) -> torch.Tensor:
        """See LearnedPositions."""
        if positions_RQ is None:
            return self.table(ids_RQ)  # padding within a text counts as no position
        pad_id = self.table.padding_idx
        # guesses may reach behind the last position; they are never kept
        rows_RQ = (positions_RQ + 1 + pad_id).clamp(max=len(self.table.weights) - 1)
        return self.table.weights[torch.where(ids_RQ == pad_id, pad_id, rows_RQ)]


class M2M100Family(LayerNormFamily):
    keys: ClassVar[Keys] = keys_of(
        norm_first=True, embeddings_normed=False, final_norm=True, sinusoids=True, tie_word_embeddings=(True,)
    )
    norm_first: ClassVar[bool] = True
    positions: ClassVar[type[nn.Module]] = SinusoidsBehindPadding
