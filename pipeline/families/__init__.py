"""Model families behind one small interface: where the layers are, how one is called, how depth is written down."""

from __future__ import annotations

from pipeline.families.bart import BartFamily
from pipeline.families.base import Family, KeysValues, StackInputs, empty_bias, sizes_of
from pipeline.families.capture import QueriesKeys, captured
from pipeline.families.t5 import T5Family, new_t5, t5_config

FAMILIES: dict[str, Family] = {"t5": T5Family(), "mt5": T5Family(), "bart": BartFamily()}


def family_of(model_type: str) -> Family:
    """The family of a Hugging Face `model_type`.

    Raises:
        ValueError: a model type that no family knows.
    """
    if model_type not in FAMILIES:
        raise ValueError(f"model type {model_type!r} is not supported: choose one of {', '.join(sorted(FAMILIES))}")
    return FAMILIES[model_type]


__all__ = [
    "FAMILIES",
    "Family",
    "KeysValues",
    "QueriesKeys",
    "StackInputs",
    "captured",
    "empty_bias",
    "family_of",
    "new_t5",
    "sizes_of",
    "t5_config",
]
