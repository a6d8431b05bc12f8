"""Marian (OPUS-MT): a norm behind each part of a layer, none elsewhere; positions are sinusoids."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from pipeline.families.layernorm import LayerNormFamily
from pipeline.families.pegasus import SinusoidalTable


class MarianFamily(LayerNormFamily):
    norm_first: ClassVar[bool] = False
    positions: ClassVar[type[nn.Module]] = SinusoidalTable
    computed_weights: ClassVar[tuple[str, ...]] = LayerNormFamily.position_weights
