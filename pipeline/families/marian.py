"""Marian (OPUS-MT): a norm behind each part of a layer, none elsewhere; positions are sinusoids."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from pipeline.families.keys import Keys
from pipeline.families.layernorm import LayerNormFamily, keys_of
from pipeline.families.pegasus import SinusoidalTable


class MarianFamily(LayerNormFamily):
    keys: ClassVar[Keys] = keys_of(
        norm_first=False,
        embeddings_normed=False,
        final_norm=False,
        sinusoids=True,
        equal={"decoder_vocab_size": "vocab_size"},
        tie_word_embeddings=(True,),
        share_encoder_decoder_embeddings=(True,),
    )
    norm_first: ClassVar[bool] = False
    positions: ClassVar[type[nn.Module]] = SinusoidalTable
    computed_weights: ClassVar[tuple[str, ...]] = LayerNormFamily.position_weights
