"""The state of a training run there and back: sharded, published last, verified on load."""

from pipeline.checkpoints.checkpointer import Checkpointer, Keep, TrainState
from pipeline.checkpoints.format import checkpoints, damage, full_weights, read_manifest, write_weights
