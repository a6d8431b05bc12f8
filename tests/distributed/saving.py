"""What the ranks of test_checkpoint.py run: a checkpointer over tensors whose values tell the step."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pipeline.checkpoints.checkpointer import Checkpointer, Keep, TrainState
from pipeline.data import Cursor
from pipeline.world import World
from tests.faults.disk import FailingDisk
from tests.patience import wait_until

SHAPES = {"layer.weight": (5, 7), "layer.bias": (3,), "scale": (1,), "head.weight": (64, 33)}
KEYS = ("weight", "exp_avg", "exp_avg_sq")
INPUTS = {"identity": {"seed": 1, "output of teacher": "a1"}, "schedule": {"num_steps": 9}}


class Part:
    """A rank's share of a parameter."""

    def __init__(self, name: str, world: World) -> None:
        self.name, self.shape = name, SHAPES[name]
        total = torch.Size(self.shape).numel()
        size = -(-total // world.size)
        self.offset = min(size * world.rank, total)
        self.tensors = {key: torch.zeros(min(size, total - self.offset)) for key in KEYS}


class Shards:
    """Slices as an engine hands them out; `train` gives them the values of a step."""

    def __init__(self, world: World) -> None:
        self.parts = [part for name in SHAPES if (part := Part(name, world)).tensors["weight"].numel()]
        self.num_steps = 0

    def slices(self) -> Iterator[Part]:
        yield from self.parts

    def restored(self, num_steps: int) -> None:
        self.num_steps = num_steps

    def train(self, step: int) -> None:
        for part in self.parts:
            for key, tensor in part.tensors.items():
                tensor.copy_(values(part.name, key, step)[part.offset : part.offset + len(tensor)])

    def is_at(self, step: int) -> bool:
        return all(
            torch.equal(tensor, values(part.name, key, step)[part.offset : part.offset + len(tensor)])
            for part in self.parts
            for key, tensor in part.tensors.items()
        )


def values(name: str, key: str, step: int) -> torch.Tensor:
    """What a flattened parameter or moment is at a step [numel]."""
    seed = sum(f"{name}/{key}/{step}".encode()) * 1000 + step
    return torch.randn(torch.Size(SHAPES[name]).numel(), generator=torch.Generator().manual_seed(seed))


def checkpointer(world: World, folder: Path, keep: Keep = Keep(last=2)) -> Checkpointer:  # noqa: B008 frozen
    return Checkpointer(folder, world, keep=keep, inputs=INPUTS)


def state_at(step: int) -> TrainState:
    return TrainState(step, Cursor(epoch=step))


def save(world: World, folder: Path, *steps: int) -> None:
    """Checkpoints of these steps; what is trained moves on while they are written."""
    shards, saver = Shards(world), checkpointer(world, folder)
    for step in steps:
        shards.train(step)
        saver.save(shards, state_at(step))
        shards.train(step + 1)
    saver.finish()


def restore(world: World, folder: Path, step: int) -> None:
    """The newest good checkpoint is of this step, with all its values."""
    shards = Shards(world)
    state = checkpointer(world, folder).restore(shards, restarts=(2,))
    assert state == state_at(step), state
    assert shards.is_at(step)
    assert shards.num_steps == step - 2 if step >= 2 else step


def save_on_failing_disk(world: World, folder: Path, die_at: int, after: bool, lossy: bool, count: Path) -> None:
    """Save a third checkpoint, which prunes the first, and die at one of its operations on the disk."""
    shards, saver = Shards(world), checkpointer(world, folder)
    shards.train(3)
    if world.rank == 0:
        disk = FailingDisk(folder, die_at, after=after, lossy=lossy)
    saver.save(shards, state_at(3))
    try:
        saver.finish()
    except RuntimeError:
        os._exit(7)  # another rank died: this one has noticed
    if world.rank == 0:
        disk.die_at = -1
        count.write_text(str(disk.count))


def fill_the_disk(world: World, folder: Path, on_rank: int) -> None:
    """ENOSPC in one rank's background write: an error on all ranks, with its cause where it happened."""
    shards, saver = Shards(world), checkpointer(world, folder)
    write = os.write

    def full(descriptor: int, data: memoryview) -> int:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if path.endswith(".safetensors"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data)

    if world.rank == on_rank:
        os.write = full  # type: ignore[assignment]
    saver.save(shards, state_at(5))  # the error is not raised here: training goes on meanwhile
    wait_until(lambda: saver.failed)
    with pytest.raises(RuntimeError, match=f"rank {on_rank}: OSError.*No space left") as error:
        saver.save(shards, state_at(6))
    if world.rank == on_rank:
        assert isinstance(error.value.__cause__.__cause__, OSError)  # type: ignore[union-attr]
