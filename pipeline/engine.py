"""The one place that talks to DeepSpeed: initialise, step, and hand out the sharded state.

DeepSpeed is trusted with partitioning, gathering and reducing, and with nothing else: clipping, schedules, accumulation
counts and checkpoints are ours, because its defaults for these are silent traps (it clips at 1.0 unless told otherwise,
and its checkpoints repeat the frozen teacher).
"""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")  # read when it is imported

import deepspeed
from deepspeed.utils import logger as deepspeed_logger
from deepspeed.utils import (
    safe_get_local_fp32_param,
    safe_get_local_grad,
    safe_get_local_optimizer_state,
    set_z3_leaf_modules,
)
from torch import nn
from transformers.utils.logging import disable_progress_bar

from pipeline.config import OptimConfig
from pipeline.world import World, free_port

DS_CONFIGS = Path(__file__).resolve().parent.parent / "ds_configs"
OURS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "optimizer",
    "scheduler",
    "data_types",
)
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class ParameterSlice:
    """This rank's share of one trainable parameter and its AdamW moments, as 1-D fp32 tensors that share memory."""

    name: str
    shape: tuple[int, ...]
    offset: int
    """Index of the first element in the flattened parameter."""
    tensors: dict[str, torch.Tensor]
    """weight, exp_avg, exp_avg_sq."""


def read_ds_config(name: str) -> dict[str, Any]:
    """A DeepSpeed configuration by its name in ds_configs/ or by path.

    Raises:
        ValueError: no such file, or it sets what the recipe decides.
    """
    path = Path(name) if name.endswith(".json") else DS_CONFIGS / f"{name}.json"
    if not path.is_file():
        known = ", ".join(sorted(each.stem for each in DS_CONFIGS.glob("*.json")))
        raise ValueError(f"no DeepSpeed configuration {name!r}: choose from {known}, or give the path of a .json file")
    config = json.loads(path.read_text(encoding="utf-8"))
    taken = [key for key in OURS if key in config]
    if taken:
        raise ValueError(f"{path} sets {', '.join(taken)}: the recipe decides these, remove them there")
    zero = config.get("zero_optimization", {})
    if zero.get("stage") != 3 or "offload_optimizer" in zero or config.get("fp16", {}).get("enabled"):
        raise ValueError(f"{path}: this engine runs ZeRO stage 3 in bf16 or fp32 without offload_optimizer")
    return config


def join_world() -> World:
    """Start torch.distributed for this process: NCCL on GPUs, gloo on CPUs; a plain process is a world of one."""
    defaults = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    for key, value in defaults.items():
        os.environ.setdefault(key, value)
    os.environ.setdefault("MASTER_PORT", str(free_port()))
    os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))
    deepspeed_logger.setLevel(logging.ERROR)
    disable_progress_bar()  # of loading and saving weights
    # torch renames collectives that DeepSpeed calls by their old names
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    world = World.from_environment()
    if world.device.type == "cpu":
        torch.set_flush_denormal(True)  # denormal moments slow a CPU down several times
        _skip_shared_memory_op()
    deepspeed.init_distributed(dist_backend="nccl" if world.device.type == "cuda" else "gloo", verbose=False)
    return world


def _skip_shared_memory_op() -> None:
    """Keep DeepSpeed from compiling a C++ collective for a minute at start; gloo does its work."""
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    deepspeed.ops.__compatible_ops__[ShareMemCommBuilder.NAME] = False


class Engine:
    """A model under DeepSpeed ZeRO-3 with AdamW.

    Args:
        model: parameters that require grad are trained; all are partitioned.
        leaf_classes: modules that are gathered as a whole.
        lr_factor: learning-rate factor of a parameter by its name.
        clip_group: name of the group whose gradient norm a parameter counts in, by its name.
        num_accumulated: micro-batches of a rank in one optimizer step.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        world: World,
        ds_config: str,
        optim: OptimConfig,
        leaf_classes: Sequence[type[nn.Module]],
        lr_factor: Callable[[str], float],
        clip_group: Callable[[str], str],
        num_accumulated: int,
    ) -> None:
        self.world = world
        self.max_grad_norm = optim.max_grad_norm
        set_z3_leaf_modules(model, list(leaf_classes))
        # Any: DeepSpeed hangs its own attributes (ds_shape, partition_numel, ...) on parameters
        self._parameters: dict[str, Any] = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._clip_groups: dict[str, list[nn.Parameter]] = {}
        by_factor: dict[float, list[nn.Parameter]] = {}
        for name, parameter in self._parameters.items():
            self._clip_groups.setdefault(clip_group(name), []).append(parameter)
            by_factor.setdefault(lr_factor(name), []).append(parameter)
        groups = [{"params": parameters, "factor": factor} for factor, parameters in sorted(by_factor.items())]
        optimizer = torch.optim.AdamW(
            groups, lr=0.0, betas=(optim.beta1, optim.beta2), weight_decay=optim.weight_decay, eps=1e-8
        )
        config = {
            **read_ds_config(ds_config),
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": num_accumulated,
            "gradient_clipping": 0.0,
            # with bf16 DeepSpeed would accumulate in bf16 and hand out copies of gradients, which clipping cannot reach
            "data_types": {"grad_accum_dtype": "fp32"},
            "zero_allow_untested_optimizer": True,
        }
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=model, model_parameters=list(self._parameters.values()), optimizer=optimizer, config=config
        )
        assert self._optimizer.grad_partitions_flat_buffer.dtype == torch.float32, (
            "gradients must be handed out as views"
        )
        for flat in self._optimizer.fp32_partitioned_groups_flat:
            self._optimizer.optimizer.state[flat] = {
                "step": torch.zeros((), dtype=torch.float32),
                **{moment: torch.zeros_like(flat) for moment in MOMENTS},
            }

    def __call__(self, *args: Any) -> Any:
        """Forward through the root, where DeepSpeed's hooks are."""
        return self._engine(*args)

    def backward(self, loss: torch.Tensor) -> None:
        """Add one micro-batch's gradients. `loss` is its share: gradients are summed over micro-batches and ranks."""
        self._engine.backward(loss * self.world.size, scale_wrt_gas=False)  # DeepSpeed averages over ranks
        self._last_of_step = self._engine.is_gradient_accumulation_boundary()
        if not self._last_of_step:
            self._engine.step()

    def step(self, learning_rate: float) -> torch.Tensor:
        """Clip, update, and return the gradient norm of each clip group [G] (before clipping, on the device).

        Stops with an error before the optimizer moves when a gradient is not finite.
        """
        assert self._last_of_step, "the optimizer steps after the last micro-batch"
        norms_G = self._clip()
        for group in self._optimizer.optimizer.param_groups:
            group["lr"] = learning_rate * group["factor"]
        self._engine.step()
        return norms_G

    @property
    def clip_groups(self) -> list[str]:
        return list(self._clip_groups)

    def _clip(self) -> torch.Tensor:
        grads = [[safe_get_local_grad(p) for p in parameters] for parameters in self._clip_groups.values()]
        squares_G = torch.stack([torch.stack(torch._foreach_norm(group)).square().sum() for group in grads])
        norms_G = self.world.sum(squares_G).sqrt()
        torch._assert_async(torch.isfinite(norms_G).all(), "a gradient is not finite")
        scales_G = (self.max_grad_norm / (norms_G + 1e-6)).clamp(max=1.0)
        for group, scale in zip(grads, scales_G, strict=True):
            torch._foreach_mul_(group, scale)
        return norms_G

    def slices(self) -> Iterator[ParameterSlice]:
        """This rank's part of every trainable parameter; parts that hold no element are left out."""
        for name, parameter in self._parameters.items():
            size = parameter.partition_numel()
            offset = size * self.world.rank
            count = min(size, parameter.ds_numel - offset)
            if count <= 0:
                continue
            tensors = {"weight": safe_get_local_fp32_param(parameter)}
            tensors |= {moment: safe_get_local_optimizer_state(parameter, moment) for moment in MOMENTS}
            tensors = {key: tensor.narrow(0, 0, count) for key, tensor in tensors.items()}
            yield ParameterSlice(name, tuple(parameter.ds_shape), offset, tensors)

    def restart_optimizer(self) -> None:
        """Forget the moments, as if no step had been made."""
        for flat in self._optimizer.fp32_partitioned_groups_flat:
            for value in self._optimizer.optimizer.state[flat].values():
                value.zero_()

    def restored(self, num_steps: int) -> None:
        """Make what was written into `slices()` take effect; the moments have seen `num_steps` optimizer steps."""
        optimizer = self._optimizer
        for index, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
            optimizer.optimizer.state[flat]["step"].fill_(num_steps)
            optimizer._reassign_or_swap_out_partitioned_parameters(index)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
