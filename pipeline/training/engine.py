"""The one place that talks to DeepSpeed: initialise, step, and hand out the sharded state.

DeepSpeed is trusted with partitioning, gathering and reducing, and with nothing else: clipping, schedules, accumulation
counts and checkpoints are ours, because its defaults for these are silent traps (it clips at 1.0 unless told otherwise,
and its checkpoints repeat the frozen teacher).
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")  # read when it is imported

import deepspeed
from deepspeed.runtime.zero import parameter_offload
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from deepspeed.utils import groups, set_z3_leaf_modules
from deepspeed.utils import logger as deepspeed_logger
from pydantic import ValidationError
from torch import nn
from transformers.utils.logging import disable_progress_bar

from pipeline.config import OptimConfig
from pipeline.footprint import AUTO, DEFAULT_BUCKET, read_ds_config
from pipeline.training.partitions import Partition, Stage2Partition, Stage3Partition
from pipeline.world import World, free_port, release_memory, return_freed_memory

MOMENTS = ("exp_avg", "exp_avg_sq")
LONGEST_WAIT = timedelta(hours=6)
"""For other ranks: rank 0 may load, hash and write a large model meanwhile. Ranks that hang are the watchdog's work."""


@dataclass
class ParameterSlice:
    """This rank's share of one trainable parameter and its AdamW moments, as 1-D fp32 tensors that share memory."""

    name: str
    shape: tuple[int, ...]
    offset: int
    """Index of the first element in the flattened parameter."""
    tensors: dict[str, torch.Tensor]
    """weight, exp_avg, exp_avg_sq."""


def check_ds_config(name: str) -> None:
    """Refuse a DeepSpeed configuration that DeepSpeed itself does not take.

    Raises:
        ValueError: a key that it does not know, or a value of another kind; also as read_ds_config does.
    """
    zero = {key: value for key, value in read_ds_config(name)["zero_optimization"].items() if value != AUTO}
    try:
        DeepSpeedZeroConfig(**zero)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{name}: zero_optimization.{'.'.join(map(str, first['loc']))}: {first['msg']}") from error


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
        return_freed_memory()
        _skip_shared_memory_op()
    try:
        deepspeed.init_distributed(
            dist_backend="nccl" if world.device.type == "cuda" else "gloo", verbose=False, timeout=LONGEST_WAIT
        )
    except torch.distributed.DistNetworkError as error:
        if not world.is_main:  # which listens there; the others lack it
            raise
        port, address = os.environ["MASTER_PORT"], os.environ["MASTER_ADDR"]
        raise ValueError(f"port {port} of {address} cannot be used: set MASTER_PORT to a free one ({error})") from error
    return world


def _skip_shared_memory_op() -> None:
    """Keep DeepSpeed from compiling a C++ collective for a minute at start; gloo does its work."""
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    deepspeed.ops.__compatible_ops__[ShareMemCommBuilder.NAME] = False


class Engine:
    """A model under DeepSpeed ZeRO with AdamW.

    Args:
        model: parameters that require grad are trained; the configuration says what is partitioned.
        leaf_classes: modules that are gathered as a whole, and whose gradients are reduced together.
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
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._shapes = {name: tuple(p.shape) for name, p in self._parameters.items()}
        self._clip_groups: dict[str, list[nn.Parameter]] = {}
        by_factor: dict[float, list[nn.Parameter]] = {}
        for name, parameter in self._parameters.items():
            self._clip_groups.setdefault(clip_group(name), []).append(parameter)
            by_factor.setdefault(lr_factor(name), []).append(parameter)
        by_rate = [{"params": parameters, "factor": factor} for factor, parameters in sorted(by_factor.items())]
        optimizer = torch.optim.AdamW(
            by_rate, lr=0.0, betas=(optim.beta1, optim.beta2), weight_decay=optim.weight_decay, eps=1e-8, fused=True
        )
        config = {
            **read_ds_config(ds_config),
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": num_accumulated,
            "gradient_clipping": 0.0,
            # with bf16 DeepSpeed would accumulate in bf16 and hand out copies of gradients, which clipping cannot reach
            "data_types": {"grad_accum_dtype": "fp32"},
            "timers": {"throughput": {"enabled": False}},  # it waits for the device in every forward and step
            "zero_allow_untested_optimizer": True,
        }
        dtype = torch.bfloat16 if config.get("bf16", {}).get("enabled") else torch.float32
        place_buffers(model, world.device, dtype)
        zero = config["zero_optimization"]
        if zero.get("zero_hpz_partition_size") == "auto":
            zero["zero_hpz_partition_size"] = world.ranks_per_node
        if zero["stage"] == 2:  # a gradient that does not fit is not copied, and freed while it may still be sent
            largest = max(map(math.prod, self._shapes.values()))
            zero["reduce_bucket_size"] = max(largest, int(zero.get("reduce_bucket_size", DEFAULT_BUCKET)))
        leaves = [module for module in model.modules() if isinstance(module, tuple(leaf_classes))]
        if zero["stage"] == 3:
            set_z3_leaf_modules(model, list(leaf_classes))
            _into_shards(model, leaves, config, dtype, world)
        elif world.device.type == "cuda":
            for parameter in model.parameters():
                parameter.data = _placed(parameter.data, dtype, world)
        self._engine, zero_optimizer, _, _ = deepspeed.initialize(
            model=model, model_parameters=list(self._parameters.values()), optimizer=optimizer, config=config
        )
        self._partition: Partition = (
            Stage3Partition(zero_optimizer, world.rank)
            if zero["stage"] == 3
            else Stage2Partition(zero_optimizer, leaves)
        )
        self._adamw: Any = zero_optimizer.optimizer
        for flat in self._partition.flats:
            self._adamw.state[flat] = {
                "step": torch.zeros((), dtype=torch.float32, device=flat.device),
                **{moment: torch.zeros_like(flat) for moment in MOMENTS},
            }

    def close(self) -> None:
        """Give back the memory of weights and optimizer, for what this process does next. The engine is then of no use;
        the model goes when its last reference does."""
        self._engine.destroy()
        _forget_modules()
        self._parameters.clear()
        self._clip_groups.clear()
        del self._engine, self._partition, self._adamw
        release_memory(self.world.device)

    def __call__(self, *args: Any) -> Any:
        """Forward through the root, where DeepSpeed's hooks are."""
        return self._engine(*args)

    @property
    def upstream(self) -> float:
        """Gradient that backward brings for its loss."""
        return float(self.world.size)  # DeepSpeed averages over ranks

    def backward(self, loss: torch.Tensor) -> None:
        """Add one micro-batch's gradients. `loss` is its share: gradients are summed over micro-batches and ranks."""
        self._engine.backward(loss * self.upstream, scale_wrt_gas=False)
        self._last_of_step = self._engine.is_gradient_accumulation_boundary()
        if not self._last_of_step:
            self._engine.step()

    def step(self, learning_rate: float) -> torch.Tensor:
        """Clip, update, and return the gradient norm of each clip group [G] (before clipping, on the device).

        Raises:
            FloatingPointError: a gradient is not finite; on every rank, and before the optimizer moves.
        """
        assert self._last_of_step, "the optimizer steps after the last micro-batch"
        norms_G = self._clip()
        if not torch.isfinite(norms_G).all():
            broken = [n for n, norm in zip(self._clip_groups, norms_G.tolist(), strict=True) if not math.isfinite(norm)]
            raise FloatingPointError(f"gradients are not finite in {', '.join(broken)}")
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate * group["factor"]
        self._engine.step()
        self._let_gathers_wait()
        return norms_G

    def _let_gathers_wait(self) -> None:
        """Have gathers from here on see the weights as they are now: they run on a stream of their own, which waits for
        nothing by itself."""
        if self._partition.gather_stream is not None:
            self._partition.gather_stream.wait_stream(torch.cuda.current_stream())

    @property
    def clip_groups(self) -> list[str]:
        return list(self._clip_groups)

    def _clip(self) -> torch.Tensor:
        grads = [self._partition.gradients(parameters) for parameters in self._clip_groups.values()]
        norms_G = self.world.sum(_sums_of_squares(grads, self.world.device)).sqrt()
        scales_G = (self.max_grad_norm / (norms_G + 1e-6)).clamp(max=1.0).to(self._partition.flats[0].device)
        for group, scale in zip(grads, scales_G, strict=True):
            if group:
                torch._foreach_mul_(group, scale)
        return norms_G

    def slices(self) -> Iterator[ParameterSlice]:
        """This rank's part of every trainable parameter; parts that hold no element are left out."""
        for name, parameter in self._parameters.items():
            place = self._partition.place(parameter)
            if place is None:
                continue
            flat = self._partition.flats[place.group]
            whole = {"weight": flat.detach()} | {moment: self._adamw.state[flat][moment] for moment in MOMENTS}
            views = {key: place.of(tensor) for key, tensor in whole.items()}
            yield ParameterSlice(name, self._shapes[name], place.offset, views)

    def restart_optimizer(self) -> None:
        """Forget the moments, as if no step had been made."""
        for flat in self._partition.flats:
            for value in self._adamw.state[flat].values():
                value.zero_()

    def restored(self, num_steps: int) -> None:
        """Make what was written into `slices()` take effect; the moments have seen `num_steps` optimizer steps."""
        for flat in self._partition.flats:
            self._adamw.state[flat]["step"].fill_(num_steps)
        self._partition.publish()
        self._let_gathers_wait()


def _forget_modules() -> None:
    """Let go of the modules that DeepSpeed's stage 3 keeps for as long as the process lives."""
    parameter_offload.FWD_MODULE_STACK.clear()
    measured: Any = PartitionedParameterCoordinator._PartitionedParameterCoordinator__params_to_release
    for cell in measured.__closure__:  # of what measures the time of what has a cache
        if hasattr(cell.cell_contents, "cache_clear"):
            cell.cell_contents.cache_clear()


def place_buffers(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Put buffers where parameters go, in the type that these train in: stage 3 leaves them on the host, in fp32."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device, dtype if buffer.is_floating_point() else None))


def _placed(weight: torch.Tensor, dtype: torch.dtype, world: World) -> torch.Tensor:
    """A weight in the type that it trains in, on the device, where it is cast; DeepSpeed hands rank 0's to the others,
    which only make room for it and read nothing. The pages of a file stay untouched."""
    if world.is_main:
        return weight.to(world.device).to(dtype, copy=True)
    return torch.empty(weight.shape, dtype=dtype, device=world.device)


def _into_shards(
    model: nn.Module, leaves: Sequence[nn.Module], config: dict[str, Any], dtype: torch.dtype, world: World
) -> None:
    """Spread the parameters over the ranks layer by layer, in the type that they train in.

    By itself DeepSpeed casts the whole model and moves it to the device first. So a model would have to fit on one
    device.
    """
    has_hpz = config["zero_optimization"].get("zero_hpz_partition_size", 1) > 1
    converted: Any = None
    for module in (*leaves, model):
        fresh = [parameter for parameter in module.parameters() if not hasattr(parameter, "ds_id")]
        for parameter in fresh:
            parameter.data = _placed(parameter.data, dtype, world)
        if converted is None:
            # a second model of this process takes the group of the node that the first has made
            group = groups._get_zero_param_intra_parallel_group() if has_hpz else None
            deepspeed.zero.Init(module=module, config_dict_or_path=config, dtype=dtype, zero_param_parallel_group=group)
            converted = fresh[0]
        elif fresh:
            converted.convert_to_zero_parameters(param_list=fresh)


def _sums_of_squares(groups: Sequence[Sequence[torch.Tensor]], device: torch.device) -> torch.Tensor:
    """The sum of the squares of each group's elements [G], in one pass over all tensors; 0 for a group without any."""
    tensors = [tensor for group in groups for tensor in group]
    if not tensors:
        return torch.zeros(len(groups), device=device)
    squares_N = torch.stack(torch._foreach_norm(tensors)).square().to(device)
    return torch.stack([each.sum() for each in squares_N.split([len(group) for group in groups])])
