"""What a training run holds, moves and computes, counted from sizes alone; which DeepSpeed configuration fits."""

from pipeline.footprint.estimate import (
    BYTES_IN_CHECKPOINT,
    GIB,
    SHARE_OF_MEMORY,
    Machine,
    Memory,
    Sizes,
    Traffic,
    local_flops,
    memory,
    plan,
    readable,
    sizes_of,
    traffic,
    training_flops,
    useful_flops,
)
from pipeline.footprint.sharding import AUTO, DEFAULT_BUCKET, Sharding, read_ds_config
