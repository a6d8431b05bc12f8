"""BART: a norm behind each part of a layer, learned positions, a norm behind the embeddings."""

from __future__ import annotations

from typing import ClassVar

from pipeline.families.layernorm import LayerNormFamily


class BartFamily(LayerNormFamily):
    norm_first: ClassVar[bool] = False
