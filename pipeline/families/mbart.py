"""mBART, mBART-50: BART with a norm before each part of a layer, and one behind the last layer of a stack."""

from __future__ import annotations

from typing import ClassVar

from pipeline.families.keys import Keys
from pipeline.families.layernorm import LayerNormFamily, keys_of


class MBartFamily(LayerNormFamily):
    keys: ClassVar[Keys] = keys_of(
        norm_first=True, embeddings_normed=True, final_norm=True, sinusoids=False, tie_word_embeddings=(True,)
    )
    norm_first: ClassVar[bool] = True
