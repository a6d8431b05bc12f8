"""mBART, mBART-50: BART with a norm before each part of a layer, and one behind the last layer of a stack."""

from __future__ import annotations

from typing import ClassVar

from pipeline.families.keys import Keys
from pipeline.families.layernorm import CARRIED, LayerNormFamily


class MBartFamily(LayerNormFamily):
    keys: ClassVar[Keys] = Keys.of(
        CARRIED,
        normalize_before=(True,),
        normalize_embedding=(True,),
        add_final_layer_norm=(True,),
        static_position_embeddings=(False,),
        add_bias_logits=(False,),
        tie_word_embeddings=(True,),
    )
    norm_first: ClassVar[bool] = True
