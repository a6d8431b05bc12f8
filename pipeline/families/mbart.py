"""mBART, mBART-50: BART with a norm before each part of a layer, and one behind the last layer of a stack."""

from __future__ import annotations

from typing import ClassVar

from pipeline.families.layernorm import LayerNormFamily


class MBartFamily(LayerNormFamily):
    norm_first: ClassVar[bool] = True
