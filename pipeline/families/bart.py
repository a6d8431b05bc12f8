"""BART: a norm behind each part of a layer, learned positions, a norm behind the embeddings."""

from __future__ import annotations

from typing import ClassVar

from pipeline.families.keys import Keys
from pipeline.families.layernorm import CARRIED, LayerNormFamily


class BartFamily(LayerNormFamily):
    keys: ClassVar[Keys] = Keys.of(
        CARRIED,
        normalize_before=(False,),
        normalize_embedding=(True,),
        add_final_layer_norm=(False,),
        static_position_embeddings=(False,),
        add_bias_logits=(False,),
    )
    norm_first: ClassVar[bool] = False
