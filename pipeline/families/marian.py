"""Marian (OPUS-MT): a norm behind each part of a layer, none elsewhere; positions are sinusoids."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from pipeline.families.keys import Keys
from pipeline.families.layernorm import CARRIED, LayerNormFamily
from pipeline.families.pegasus import SinusoidalTable


class MarianFamily(LayerNormFamily):
    keys: ClassVar[Keys] = Keys.of(
        CARRIED,
        equal={"decoder_vocab_size": "vocab_size"},
        normalize_before=(False,),
        normalize_embedding=(False,),
        add_final_layer_norm=(False,),
        static_position_embeddings=(True,),
        add_bias_logits=(False,),
        tie_word_embeddings=(True,),
        share_encoder_decoder_embeddings=(True,),
    )
    norm_first: ClassVar[bool] = False
    positions: ClassVar[type[nn.Module]] = SinusoidalTable
    computed_weights: ClassVar[tuple[str, ...]] = LayerNormFamily.position_weights
