"""Checkpoints in the formats of inference engines, each held against its checkpoint."""

from pipeline.config import QUANTIZATIONS
from pipeline.engines import onnx
from pipeline.engines.base import Engine, refuse_kind
from pipeline.engines.ctranslate import Translator, to_ctranslate2

ENGINES = {
    "ctranslate2": Engine({"ctranslate2": "4.8.5"}, QUANTIZATIONS, to_ctranslate2),
    "onnx": Engine({"onnx": "1.23.2", "onnxruntime": "1.32.0"}, onnx.QUANTIZATIONS, onnx.to_onnx),
}

__all__ = ["ENGINES", "Translator", "refuse_kind", "to_ctranslate2"]
