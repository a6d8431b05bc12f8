"""Checkpoints in the formats of inference engines, by the engines' own converters, each held against its checkpoint."""

from pipeline.engines.ctranslate import PATIENCE, Translator, refuse_missing, to_ctranslate2

__all__ = ["PATIENCE", "Translator", "refuse_missing", "to_ctranslate2"]
