"""umT5: T5 v1.1 with a relative position bias in every layer, on the installed transformers' own layer classes.

Shapes: B examples, L tokens of a stack, S source tokens, D model width, H heads; in cached decoding R rows, Q new
tokens of each and T tokens looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from torch import nn
from transformers.models.umt5.modeling_umt5 import UMT5LayerNorm

from pipeline.families.base import StackInputs, set_layer_index, visible_at
from pipeline.families.capture import Projections
from pipeline.families.keys import Keys
from pipeline.families.t5 import CARRIED, RelativePositions, T5Family, T5Shared, biased


class UMT5Shared(T5Shared):
    """T5's without position biases: layers get a mask, and distances to look their own biases up by."""

    def inputs(self, stack: str, mask_BL: torch.Tensor, source_mask_BS: torch.Tensor | None = None) -> StackInputs:
        positions: Any = self.bias[stack]
        distances = positions.distances(mask_BL.shape[1], mask_BL.device)
        cross_bias = self.bias_of_source(source_mask_BS)
        return StackInputs(self.masked(positions.visible(mask_BL)), cross_bias, distances=distances)

    def inputs_at(self, positions_RQ: torch.Tensor, num_keys: int, cross_bias: torch.Tensor) -> StackInputs:
        positions: Any = self.bias["decoder"]
        distances = positions.distances_at(positions_RQ, num_keys)
        return StackInputs(self.masked(visible_at(positions_RQ, num_keys)), cross_bias, distances=distances)


class UMT5Family(T5Family):
    """See pipeline.families.base.Family."""

    keys: ClassVar[Keys] = Keys.of(CARRIED, harmless=("scalable_attention",))
    norm: ClassVar[type[nn.Module]] = UMT5LayerNorm

    def is_shared_weight(self, name_in_layer: str) -> bool:
        return False

    def correct(self, model: nn.Module, settings: Mapping[str, Any]) -> None:
        """5.17 scales the outputs of every umT5, whatever config.json says. And it leaves it to masks that no target
        sees those behind it, but with SDPA makes none where no target is padded: only a `generate` that keeps a cache,
        and so gives one token at a time, is right by itself."""
        whole: Any = model
        told = settings.get("tie_word_embeddings") is not False  # beside which 5.24 saves the key that says it
        whole.config.tie_word_embeddings = settings.get("scale_decoder_outputs", told)
        for block in whole.decoder.block:
            block.layer[0].SelfAttention.is_causal = True

    def take_shared(self, model: nn.Module) -> UMT5Shared:
        config: Any = model.config
        scaled = getattr(config, "scale_decoder_outputs", config.tie_word_embeddings)
        return UMT5Shared(model, RelativePositions, scaled=scaled)

    def self_bias(self, attention: Any, inputs: StackInputs) -> torch.Tensor:
        """The layer's position bias with the stack's mask, [B or 1, H, L, L] or [R or 1, H, Q, T]."""
        assert inputs.distances is not None
        by_distance_RH = attention.relative_attention_bias(inputs.distances.buckets_R)
        return biased(by_distance_RH, inputs.distances, inputs.self_bias == 0)

    def place_layer(self, layer: nn.Module, index: int, first: nn.Module) -> None:
        set_layer_index(layer, index)

    def attentions(self, layer: nn.Module) -> dict[str, Projections]:
        found = super().attentions(layer)
        table = cast(Any, layer).layer[0].SelfAttention.relative_attention_bias
        return {**found, "self": found["self"]._replace(bias=table)}
