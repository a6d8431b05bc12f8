"""BART: a norm behind each part of a layer, learned positions, a norm behind the embeddings."""

from __future__ import annotations

from typing import ClassVar

from pipeline.families.keys import Keys
from pipeline.families.layernorm import LayerNormFamily, keys_of


class BartFamily(LayerNormFamily):
    keys: ClassVar[Keys] = keys_of(
        norm_first=False,
        embeddings_normed=True,
        final_norm=False,
        sinusoids=False,
    )
    norm_first: ClassVar[bool] = False
