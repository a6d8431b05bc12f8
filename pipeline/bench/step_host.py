"""CPU time of a step whose arithmetic is next to nothing, of the step benchmark: what Python, torch and DeepSpeed take
to say what is to be computed."""

from __future__ import annotations

import copy
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import T5ForConditionalGeneration

from pipeline.bench.step_model import SETTINGS, Plain, loss_of, new_engine, new_task, random_batch, t5, with_draws
from pipeline.config.recipe import DistillConfig
from pipeline.data import MicroBatch
from pipeline.training.engine import join_world
from pipeline.training.loop import Task

PLAIN = "plain PyTorch"
CONFIGURATIONS = ("zero2_cpu", "zero3_cpu")
DRAWS = {"one draw": SETTINGS.draws, "default draws": DistillConfig().draws}
NUM_WARM_UP = 3
"""Steps before those that count: ZeRO-3 learns the order of its leaves in them."""
NUM_SMALL = 10_000
"""Operations that the time of one is taken from."""


def host(folder: str, steps: int) -> list[dict[str, Any]]:
    """Milliseconds of rank 0's CPU in each step by side, for all draws and phases: 24+24 layers, d 64, 1 x 4/4 tokens.

    The floor is what as many of the smallest operations take as plain PyTorch starts.
    """
    world, config = join_world(), t5(24, 64, 64, vocab_size=64)
    torch.manual_seed(0)
    teacher = T5ForConditionalGeneration(config)
    tasks = {name: new_task(copy.deepcopy(teacher)) for name in (PLAIN, *CONFIGURATIONS)}
    sides = {name: Plain(task) if name == PLAIN else new_engine(task, world, name) for name, task in tasks.items()}
    smallest = _smallest_ms()
    found = []
    for drawn, draws in DRAWS.items():
        times: defaultdict[str, dict[str, list[float]]] = defaultdict(lambda: {name: [] for name in sides})
        for step in range(NUM_WARM_UP + steps):
            batch = random_batch(step * world.size + world.rank, (1, 4, 4), config.vocab_size, world.device)
            for name, side in sides.items():
                for phase, run in _phases(side, with_draws(tasks[name], draws), step, batch, world.size).items():
                    times[phase][name].append(_cpu_ms(run))
        plain = _phases(sides[PLAIN], with_draws(tasks[PLAIN], draws), step, batch, world.size)
        found += [
            {
                "name": f"{phase}, {drawn}",
                "ms": {name: each[NUM_WARM_UP:] for name, each in times[phase].items()},
                "floor": _num_operations(run) * smallest,
            }
            for phase, run in plain.items()
        ]
    world.close()
    return found


def _phases(
    side: Any, task: Task, step: int, batch: MicroBatch, num_micro_batches: int
) -> dict[str, Callable[[], Any]]:
    return {
        "micro-batch": lambda: side.backward(loss_of(side, task, step, batch, num_micro_batches)),
        "optimizer step": lambda: side.step(1e-4),
    }


def _cpu_ms(run: Callable[[], Any]) -> float:
    """Of this thread alone, which on a CPU runs backward, too: threads of gloo do what a device would do."""
    started_at = time.thread_time()
    run()
    return (time.thread_time() - started_at) * 1e3


def _smallest_ms() -> float:
    """Milliseconds that one of the smallest operations takes."""
    one = torch.ones(1)
    return _cpu_ms(lambda: [torch.neg(one) for _ in range(NUM_SMALL)]) / NUM_SMALL


def _num_operations(run: Callable[[], Any]) -> int:
    """Operations of torch that are more than a view."""
    with _Operations() as operations:
        run()
    return operations.count


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))
