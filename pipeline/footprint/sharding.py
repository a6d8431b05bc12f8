"""DeepSpeed configurations: files of ds_configs/, what they may say, and what they say about memory and traffic."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DS_CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"
AUTO = "auto"
HPZ = "zero_hpz_partition_size"
DEFAULT_BUCKET = 5 * 10**8
"""DeepSpeed's reduce_bucket_size."""
OFFLOADS = ("offload_optimizer", "offload_param")
OURS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "optimizer",
    "scheduler",
    "data_types",
)


def read_ds_config(name: str) -> dict[str, Any]:
    """A DeepSpeed configuration by its name in ds_configs/ or by path.

    Raises:
        ValueError: no such file, or it sets what the recipe decides or what this engine does not run.
    """
    path = Path(name) if name.endswith(".json") else DS_CONFIGS / f"{name}.json"
    if not path.is_file():
        known = ", ".join([*sorted(each.stem for each in DS_CONFIGS.glob("*.json")), AUTO])
        raise ValueError(f"no DeepSpeed configuration {name!r}: choose from {known}, or give the path of a .json file")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} is not a DeepSpeed configuration: it must be a JSON object")
    taken = [key for key in OURS if key in config]
    if taken:
        raise ValueError(f"{path} sets {', '.join(taken)}: the recipe decides these, remove them there")
    for key in ("zero_optimization", "bf16", "fp16"):
        if not isinstance(config.get(key, {}), dict):
            raise ValueError(f"{path}: {key} is {config[key]!r}: it must be a JSON object")
    zero = config.get("zero_optimization", {})
    for key, value in zero.items():
        if value == AUTO and key != HPZ:
            raise ValueError(f"{path}: zero_optimization.{key} is {AUTO!r}, which nobody fills in here: give a number")
        if key in OFFLOADS and (not isinstance(value, dict) or value.get("device") != "cpu"):
            raise ValueError(f'{path}: zero_optimization.{key} must be {{"device": "cpu"}}, or left out')
    offloads = any(key in zero for key in OFFLOADS)
    if zero.get("stage") not in (2, 3) or (zero["stage"] == 2 and offloads) or config.get("fp16", {}).get("enabled"):
        raise ValueError(f"{path}: this engine runs ZeRO stage 3, or stage 2 without offload, in bf16 or fp32")
    return config


@dataclass(frozen=True)
class Sharding:
    """What a configuration means for memory and traffic on a number of ranks."""

    name: str
    num_ranks: int
    ranks_per_node: int
    stage: int
    element_bytes: int
    """2 in bf16, 4 in fp32."""
    has_hpz: bool
    offloads_optimizer: bool
    offloads_parameters: bool
    reduce_bucket: int
    """Elements of a reduction buffer."""
    num_buckets: int
    """Reduction buffers: stage 2 fills one while another is sent."""
    max_live: int
    """Elements of gathered layers that stage 3 holds. Before each layer it gathers up to as many more ahead, and keeps
    those that it finds for their backward, too: without this bound all that is gathered ahead stays."""
    keeps_weights: bool
    """Linear layers of stage 3 are plain PyTorch's. Until backward those hold on to a view of the weight that was
    gathered for forward, so that its memory stays though the layer is released."""
    sub_group: int
    """Elements of a rank that the optimizer of stage 3 steps through at a time."""
    is_gpu: bool = True

    @staticmethod
    def of(name: str, num_ranks: int, ranks_per_node: int, *, is_gpu: bool = True) -> Sharding:
        config = read_ds_config(name)
        zero = config["zero_optimization"]
        return Sharding(
            name=name,
            num_ranks=num_ranks,
            ranks_per_node=ranks_per_node,
            stage=zero["stage"],
            element_bytes=2 if config.get("bf16", {}).get("enabled") else 4,
            has_hpz=zero.get(HPZ, 1) != 1,
            offloads_optimizer=OFFLOADS[0] in zero,
            offloads_parameters=OFFLOADS[1] in zero,
            reduce_bucket=int(zero.get("reduce_bucket_size", DEFAULT_BUCKET)),
            num_buckets=1 + (zero["stage"] == 2 and bool(zero.get("overlap_comm"))),
            max_live=int(zero.get("stage3_max_live_parameters", 1e9)),
            keeps_weights=zero["stage"] == 3 and not zero.get("memory_efficient_linear", True),
            sub_group=int(zero.get("sub_group_size", 1e9)),
            is_gpu=is_gpu,
        )
