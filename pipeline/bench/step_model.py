"""Models, batches, the plain PyTorch step and the counters of the step benchmark.

Shapes: B examples, S source tokens, T target tokens.
"""

from __future__ import annotations

import json
import re
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from transformers import T5Config

from pipeline.config.recipe import SAMPLED, DistillConfig, OptimConfig
from pipeline.data import MicroBatch
from pipeline.distill import modular_task
from pipeline.families import family_of
from pipeline.footprint.estimate import training_flops, useful_flops
from pipeline.footprint.sharding import read_ds_config
from pipeline.footprint.sizes import Sizes
from pipeline.model.draws import Draws, Sampler
from pipeline.model.losses import GlobalCounts
from pipeline.model.modular import ModularModel
from pipeline.spans.spans import STACKS, Assembly
from pipeline.training.engine import Engine
from pipeline.training.loop import Task
from pipeline.world import World

SETTINGS = DistillConfig(local_steps=0, draws=(SAMPLED,), optim=OptimConfig(num_steps=1000, learning_rate=1e-4))
COLLECTIVES = {"all_gather_into_tensor": 0, "reduce_scatter_tensor": 1}
"""Functions of torch.distributed that ZeRO gathers and reduces with, and which argument is the whole tensor."""


def t5(num_layers: int, d_model: int, d_ff: int, vocab_size: int = 32128) -> T5Config:
    new_config: Any = T5Config  # which takes the keys of every configuration, too
    return new_config(
        vocab_size=vocab_size,
        d_model=d_model,
        d_kv=64,
        d_ff=d_ff,
        num_heads=d_model // 64,
        num_layers=num_layers,
        feed_forward_proj="gated-gelu_pytorch_tanh",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
        dropout_rate=0.0,
    )


def new_task(model: nn.Module, settings: DistillConfig = SETTINGS) -> Task:
    """The replacing phase over a teacher."""
    config: Any = model.config
    family = family_of(config.model_type)
    modular = ModularModel(model, family, settings.by_stack, settings.init, share_memory=True)
    return modular_task(modular, family, config, settings, seed=0)


def with_draws(task: Task, draws: Sequence[str]) -> Task:
    """The same module with other draws."""
    module: Any = task.module
    return replace(task, draws=Sampler(replace(SETTINGS, draws=tuple(draws)), seed=0, stacks=module.stacks).draws)


def new_engine(task: Task, world: World, ds_config: str, num_accumulated: int = 1) -> Engine:
    return Engine(
        task.module,
        world=world,
        ds_config=ds_config,
        optim=SETTINGS.optim,
        leaf_classes=task.leaf_classes,
        lr_factor=lambda name: 1.0,
        clip_group=task.clip_group,
        num_accumulated=num_accumulated,
    )


def random_batch(index: int, shape_BST: tuple[int, int, int], vocab_size: int, device: torch.device) -> MicroBatch:
    """Random ids without padding."""
    num, source, target = shape_BST
    generator = torch.Generator().manual_seed(index)
    source_BS = torch.randint(2, vocab_size, (num, source), generator=generator).to(device)
    labels_BT = torch.randint(2, vocab_size, (num, target), generator=generator).to(device)
    return MicroBatch(index, np.arange(num), source_BS, torch.ones_like(source_BS, dtype=torch.bool), labels_BT)


def loss_of(side: Any, task: Task, step: int, batch: MicroBatch, num_micro_batches: int) -> torch.Tensor:
    """The loss of a micro-batch of a step, by the engine or by plain PyTorch."""
    counts = GlobalCounts(batch.labels_BT.numel() * num_micro_batches, num_micro_batches, side.upstream)
    args = task.forward_args(step, task.draws(step, batch.index), counts)
    return task.loss_terms(step, side(batch, *args), counts).total


def in_fp32(ds_config: str, folder: str, **zero: Any) -> str:
    """Path of a configuration with bf16 turned off and some keys of zero_optimization changed."""
    config = read_ds_config(ds_config)
    config["bf16"] = {"enabled": False}
    config["zero_optimization"] |= zero
    path = Path(tempfile.mkdtemp(dir=folder)) / f"{ds_config}.json"
    path.write_text(json.dumps(config))
    return str(path)


class Counted:
    """Bytes that go through torch.distributed; DeepSpeed picks the functions up when the process group starts."""

    def __init__(self) -> None:
        self.bytes: Counter[str] = Counter()
        for name, argument in COLLECTIVES.items():
            setattr(dist, name, self._counted(name, argument, getattr(dist, name)))

    def _counted(self, name: str, argument: int, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            tensor = args[argument] if len(args) > argument else list(kwargs.values())[argument - len(args)]
            self.bytes[name] += tensor.numel() * tensor.element_size()
            return function(*args, **kwargs)

        return counted

    def take(self) -> tuple[int, int]:
        """(gathered, reduced) since the last call."""
        found = self.bytes["all_gather_into_tensor"], self.bytes["reduce_scatter_tensor"]
        self.bytes.clear()
        return found


def read_prefetch() -> int:
    return read_ds_config("zero3")["zero_optimization"]["stage3_prefetch_bucket_size"]


def p_numel(parameter: Any) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())


def drawn_elements(sizes: Sizes, draw: Assembly) -> int:
    """Parameters to gather if only the layers that a draw uses were: the teacher's once forward, for both passes; the
    modular layers of the draw forward and backward; teacher layers on the student's path behind the first of them
    backward."""
    total, replaced = 0, False
    for stack in STACKS:
        of = {leaf.trained: leaf.num_parameters for leaf in sizes.leaves if leaf.stack == stack}
        total += draw.tiling(stack).num_teacher_layers * of[False]
        for span in draw.tiling(stack).spans:
            replaced = replaced or span.num_layers > 1
            total += 2 * of[True] if span.num_layers > 1 else of[False] * replaced
    return total


def resident() -> dict[str, int]:
    """Bytes of this process: VmRSS now, VmHWM at its fullest since the last reset, RssAnon without pages of files."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return {name: int(kib) * 1024 for name, kib in re.findall(r"(VmRSS|VmHWM|RssAnon):\s+(\d+) kB", status)}


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def reset_peak_of(device: torch.device) -> None:
    torch.cuda.reset_peak_memory_stats() if device.type == "cuda" else reset_peak()


def peak_of(device: torch.device) -> int:
    """Bytes at the fullest since the last reset: allocated on a GPU, of the whole process on a CPU."""
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else resident()["VmHWM"]


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else "CPU"


class PrivatePeak:
    """Highest RssAnon, looked at a hundred times a second: VmHWM would count the pages of files too."""

    def __init__(self) -> None:
        self._done = threading.Event()
        self._peak = 0
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            self._peak = max(self._peak, resident()["RssAnon"])

    def stop(self) -> int:
        self._done.set()
        self._thread.join()
        return self._peak


class Plain:
    """The same step without DeepSpeed: zeroed gradients, clipping of each modular layer, fused AdamW."""

    upstream = 1.0

    def __init__(self, task: Task) -> None:
        self.task = task
        self.groups: dict[str, list[nn.Parameter]] = {}
        for name, parameter in task.module.named_parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.clone()  # it starts in the teacher's memory, and is trained in place
                parameter.grad = torch.zeros_like(parameter)
                self.groups.setdefault(task.clip_group(name), []).append(parameter)
        parameters = [parameter for group in self.groups.values() for parameter in group]
        optim = SETTINGS.optim
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-4, betas=(optim.beta1, optim.beta2), fused=True)

    def __call__(self, *args: Any) -> Any:
        return self.task.module(*args)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self, learning_rate: float) -> None:
        for group in self.groups.values():
            nn.utils.clip_grad_norm_(group, SETTINGS.optim.max_grad_norm, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)


def timed_step(side: Any, task: Task, step: int, batch: MicroBatch) -> dict[str, float]:
    synchronize = torch.cuda.synchronize if batch.source_BS.is_cuda else lambda: None
    marks = []
    for run in ("start", "forward", "backward", "optimizer"):
        if run == "forward":
            loss = loss_of(side, task, step, batch, 1)
        elif run == "backward":
            side.backward(loss)
        elif run == "optimizer":
            side.step(1e-4)
        synchronize()
        marks.append(time.perf_counter())
    names = ("forward", "backward", "optimizer")
    return {name: end - start for name, start, end in zip(names, marks, marks[1:], strict=False)} | {
        "whole": marks[-1] - marks[0]
    }


def flops_of(sizes: Sizes, draws: Draws, shape_BST: tuple[int, int, int]) -> float:
    """Useful FLOPs of a micro-batch of this shape in the replacing phase."""
    assert draws is not None
    num, source, target = shape_BST
    return useful_flops(sizes, num * source, num * target, draws)


def flops_of_fine_tuning(sizes: Sizes, shape_BST: tuple[int, int, int]) -> float:
    """Useful FLOPs of a micro-batch where all layers of the teacher are trained and no others are there."""
    num, source, target = shape_BST
    layers = tuple(replace(leaf, trained=True) for leaf in sizes.leaves if not leaf.trained)
    return training_flops(
        replace(sizes, leaves=layers, num_trained_of_rest=sum(sizes.rest)), num * source, num * target
    )


def matmul_flops(device: torch.device) -> float:
    """FLOP/s of a large matrix product, in bf16 on a GPU and fp32 on a CPU."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (2048, torch.float32)
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(5):
        if device.type == "cuda":
            torch.cuda.synchronize()
        started_at = time.perf_counter()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started_at)
    return 2 * size**3 / best


def profile_of(run: Callable[[], object], num_rows: int = 6) -> str:
    """The operations that take most of a step, in milliseconds of their own."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        run()
    rows: Iterable[Any] = sorted(profiler.key_averages(), key=lambda row: -row.self_cpu_time_total)
    return ", ".join(f"{row.key} {row.self_cpu_time_total / 1e3:.0f} ({row.count}x)" for row in list(rows)[:num_rows])
