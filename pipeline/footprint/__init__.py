"""What a training run holds, moves and computes, counted from sizes alone; which DeepSpeed configuration fits."""

from pipeline.footprint.estimate import (
    GIB,
    SHARE_OF_MEMORY,
    Machine,
    Traffic,
    local_flops,
    plan,
    readable,
    traffic,
    training_flops,
    useful_flops,
)
from pipeline.footprint.rank_memory import BYTES_IN_CHECKPOINT, Memory, memory
from pipeline.footprint.sharding import AUTO, DEFAULT_BUCKET, Sharding, read_ds_config
from pipeline.footprint.sizes import Sizes, sizes_of
