"""Model families behind one small interface: where the layers are, how one is called, how depth is written down."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pipeline.families.bart import BartFamily
from pipeline.families.base import (
    Family,
    KeysValues,
    StackInputs,
    shifted,
    sizes_of,
    stored_weights,
)
from pipeline.families.capture import QueriesKeys, captured
from pipeline.families.m2m_100 import M2M100Family
from pipeline.families.marian import MarianFamily
from pipeline.families.mbart import MBartFamily
from pipeline.families.pegasus import PegasusFamily
from pipeline.families.t5 import MT5Family, T5Family, new_t5, t5_config
from pipeline.families.t5gemma2 import T5Gemma2Family
from pipeline.families.umt5 import UMT5Family

FAMILIES: dict[str, Family] = {
    "t5": T5Family(),
    "mt5": MT5Family(),
    "umt5": UMT5Family(),
    "bart": BartFamily(),
    "mbart": MBartFamily(),
    "pegasus": PegasusFamily(),
    "m2m_100": M2M100Family(),
    "marian": MarianFamily(),
    "t5gemma2": T5Gemma2Family(),
}


def refuse_uncarried(settings: Mapping[str, Any], place: Path) -> None:
    """Refuse a config.json that asks for what its family does not carry.

    Raises:
        ValueError: a model type that no family knows, or a key, in one line.
    """
    if refusal := family_of(settings.get("model_type", "")).keys.refusal(settings):
        raise ValueError(f"{place} {refusal}")


def family_of(model_type: str) -> Family:
    """The family of a Hugging Face `model_type`.

    Raises:
        ValueError: a model type that no family knows.
    """
    if model_type not in FAMILIES:
        raise ValueError(f"model type {model_type!r} is not supported: choose one of {', '.join(sorted(FAMILIES))}")
    return FAMILIES[model_type]


def decoder_inputs(config: Any, labels_BT: torch.Tensor) -> torch.Tensor:
    """Decoder input ids of labels for a Hugging Face config, [B, T]."""
    return shifted(labels_BT, getattr(config, family_of(config.model_type).start_key), config.pad_token_id)


__all__ = [
    "FAMILIES",
    "Family",
    "KeysValues",
    "QueriesKeys",
    "StackInputs",
    "captured",
    "decoder_inputs",
    "family_of",
    "new_t5",
    "refuse_uncarried",
    "sizes_of",
    "stored_weights",
    "t5_config",
]
