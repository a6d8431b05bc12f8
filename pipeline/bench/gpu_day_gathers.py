"""Two ranks on one GPU, over gloo and the host: what ZeRO gathers and reduces there, which one rank never does.

NCCL takes one rank a GPU. So collectives on a GPU's tensors go through the host here, on the streams that they would
run on: a gather that does not wait for the step before it finds the weights of before.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import T5ForConditionalGeneration

from pipeline.bench.step_model import loss_of, new_engine, new_task, random_batch, t5
from pipeline.training.engine import Engine, join_world
from pipeline.world import World, free_port

NUM_RANKS = 2
NUM_LAYERS, VOCABULARY = 6, 4096
REFERENCE = "zero2_replicated"
CONFIGS = ("zero2_replicated", "zero3", "zero3_hpz")
WITHOUT_WAITING = "zero3, gathers that do not wait"
COLLECTIVES = ("all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce", "broadcast", "all_gather", "reduce")
"""Their first argument is what they write."""


def gathers(world: World, size: dict[str, Any]) -> dict[str, Any]:
    """How far the losses of two ranks are from those of one rank with the same micro-batches, by configuration."""
    expected = _losses(world, REFERENCE, size)
    with tempfile.TemporaryDirectory() as folder:
        processes.spawn(_rank, (free_port(), size, folder), nprocs=NUM_RANKS)
        found = json.loads((Path(folder) / "losses.json").read_text())
    figures: dict[str, Any] = {"losses of one rank": ", ".join(f"{loss:.4f}" for loss in expected)}
    for name, losses in found.items():
        apart = max(abs(loss / other - 1) for loss, other in zip(losses, expected, strict=True))
        figures[f"largest difference of a loss, {name}"] = apart
    return figures


def _losses(world: World, ds_config: str, size: dict[str, Any]) -> list[float]:
    """The loss of each step, over the same micro-batches whatever the number of ranks."""
    torch.manual_seed(0)
    with torch.device(world.device):
        task = new_task(
            T5ForConditionalGeneration(t5(**{**size["model"], "num_layers": NUM_LAYERS}, vocab_size=VOCABULARY))
        )
    engine = new_engine(task, world, ds_config, NUM_RANKS // world.size)
    losses = []
    for step in range(1 + size["steps"]):
        total = torch.zeros((), device=world.device)
        for index in range(world.rank, NUM_RANKS, world.size):
            shape_BST = (4, size["source"], size["target"])
            batch = random_batch(NUM_RANKS * step + index, shape_BST, VOCABULARY, world.device)
            loss = loss_of(engine, task, step, batch, NUM_RANKS)
            engine.backward(loss)
            total += loss.detach()
        engine.step(1e-3)
        losses.append(float(world.sum(total)))
    return losses


def _rank(rank: int, port: int, size: dict[str, Any], folder: str) -> None:
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": NUM_RANKS, "LOCAL_WORLD_SIZE": NUM_RANKS}
    os.environ.update({name: str(value) for name, value in {**places, "MASTER_PORT": port}.items()})
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    for name in COLLECTIVES:  # before DeepSpeed takes them
        setattr(dist, name, _through_host(getattr(dist, name)))
    dist.init_process_group("gloo")
    world = join_world()
    found = {name: _losses(world, name, size) for name in CONFIGS}
    with mock.patch.object(Engine, "_let_gathers_wait"):
        found[WITHOUT_WAITING] = _losses(world, "zero3", size)
    if world.is_main:
        (Path(folder) / "losses.json").write_text(json.dumps(found))
    world.close()


class _Done:
    """A collective that has ended."""

    def wait(self) -> None:
        """Nothing to wait for."""


def _through_host(collective: Callable[..., Any]) -> Callable[..., Any]:
    """The same collective for tensors of a GPU, which gloo does not take all: over copies on the host."""

    def run(*args: Any, async_op: bool = False, **options: Any) -> Any:
        wholes = tree_leaves(next(iter((*args, *options.values()))))
        if not wholes[0].is_cuda:
            return collective(*args, async_op=async_op, **options)
        host_args, host_options = tree_map_only(torch.Tensor, lambda each: each.cpu(), (args, options))
        collective(*host_args, **host_options)
        for whole, written in zip(wholes, tree_leaves(next(iter((*host_args, *host_options.values())))), strict=True):
            whole.copy_(written)
        return _Done() if async_op else None

    return run
