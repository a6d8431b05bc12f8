"""What a process knows of its world before it meets the others."""

from __future__ import annotations

import os
import random
import socket

import pytest
import torch

from pipeline.training.engine import _placed
from pipeline.world import World, free_port


def test_a_port_that_another_listens_on_is_not_given(monkeypatch):
    with socket.socket() as other:
        while True:
            taken = random.randrange(20000, 32000)
            try:
                other.bind(("127.0.0.1", taken))
                break
            except OSError:
                continue
        other.listen()
        given = iter([taken, taken, 0])
        monkeypatch.setattr(random.SystemRandom, "randrange", lambda *_: next(given))
        assert free_port() == 0, "the system finds a free one for 0"


@pytest.fixture
def gpus(monkeypatch):
    """Make torch show so many GPUs; the list of those that were taken."""
    taken: list[torch.device] = []

    def show(count: int) -> list[torch.device]:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", taken.append)
        return taken

    for name, value in {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    yield show
    torch.backends.cuda.enable_cudnn_sdp(True)


def test_a_rank_takes_the_gpu_of_its_number(gpus):
    taken = gpus(4)
    assert World.from_environment().device == torch.device("cuda", 3)
    assert taken == [torch.device("cuda", 3)]
    assert os.environ["LOCAL_RANK"] == "3"


def test_a_task_that_is_shown_one_gpu_takes_it(gpus):
    """As with --gpus-per-task or --gpu-bind: all tasks of a node know theirs as number 0."""
    gpus(1)
    world = World.from_environment()
    assert (world.device, world.rank, world.ranks_per_node) == (torch.device("cuda", 0), 3, 4)
    assert os.environ["LOCAL_RANK"] == "0", "DeepSpeed goes by it"


def test_no_gpu_takes_the_attention_that_plans_every_shape(gpus):
    assert torch.backends.cuda.cudnn_sdp_enabled()
    gpus(1)
    World.from_environment()
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_ranks_behind_the_first_make_room_for_weights_and_read_none():
    """What has no data cannot be read."""
    unread = torch.empty(3, 2, device="meta")
    placed = _placed(unread, torch.bfloat16, World(1, 2, 1, torch.device("cpu")))
    assert (placed.shape, placed.dtype, placed.device.type) == ((3, 2), torch.bfloat16, "cpu")
    weight = torch.randn(3, 2)
    assert torch.equal(_placed(weight, torch.bfloat16, World(0, 2, 0, torch.device("cpu"))), weight.bfloat16())
