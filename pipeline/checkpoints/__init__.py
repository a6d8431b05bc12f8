"""The state of a training run there and back: sharded, published last, verified on load."""

from __future__ import annotations

from pipeline.checkpoints.checkpointer import Checkpointer, Keep, TrainState
from pipeline.checkpoints.format import checkpoints, damage, full_weights, read_manifest, write_weights

__all__ = [
    "Checkpointer",
    "Keep",
    "TrainState",
    "checkpoints",
    "damage",
    "full_weights",
    "read_manifest",
    "write_weights",
]
