"""Processes that start at once: forked from a clean server that has imported everything once.

For what needs real processes, or ranks with a real process group, many times over: kills, hangs, saves on several
ranks, commands. A new interpreter would take longer to import torch than most tests take.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import torch.distributed as dist

from pipeline.world import World, free_port
from tests.patience import PATIENCE_S

IMPORTED = (
    "tests.forks",
    "pipeline.distill",
    "pipeline.teacher",
    "pipeline.evaluation",
    "pipeline.planning",
    "slurm.__main__",
)
"""By the server, before it forks."""


def context() -> ForkServerContext:
    """The fork server of this process."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(list(IMPORTED))
    return found


def start_ranks(
    num_ranks: int, function: Callable[..., Any], *args: Any, log: Path | None = None
) -> list[ForkServerProcess]:
    """Start `function(*args)` on ranks whose environment is that of torchrun's workers; the caller waits for them.

    Args:
        log: folder that gets what each rank prints, as rank_0, rank_1, ...
    """
    environment = {"WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = []
    for rank in range(num_ranks):
        each = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        output = str(log / f"rank_{rank}") if log else os.devnull
        processes.append(context().Process(target=_rank, args=(each, output, function, args), daemon=True))
        processes[-1].start()
    return processes


def run_ranks(
    num_ranks: int,
    function: Callable[..., Any],
    *args: Any,
    log: Path | None = None,
    timeout_s: float = PATIENCE_S,
) -> list[int | None]:
    """Exit codes of the ranks; None for those that had to be killed after `timeout_s`."""
    return wait_for(start_ranks(num_ranks, function, *args, log=log), timeout_s)


def wait_for(processes: list[ForkServerProcess], timeout_s: float = PATIENCE_S) -> list[int | None]:
    """Exit codes (negative: the signal) of processes that end within `timeout_s`; the others are killed: None."""
    deadline = time.monotonic() + timeout_s
    codes: list[int | None] = []
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        codes.append(process.exitcode)
    for process in processes:
        process.kill()
        process.join()
    return codes


def run_forked(
    function: Callable[..., Any], *args: Any, environment: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """Call `function(*args)` in a process with this environment; how it ended and what it printed."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / name for name in ("stdout", "stderr")]
        process = context().Process(target=_forked, args=(dict(environment), outputs, function, args))
        process.start()
        (code,) = wait_for([process])
        assert code is not None, f"{args} hangs"
        return subprocess.CompletedProcess(args, code, *(path.read_text() for path in outputs))


def _forked(
    environment: dict[str, str], outputs: list[Path], function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for number, path in enumerate(outputs, start=1):
        _redirect(path, number)
    function(*args)


def _redirect(path: str | Path, *descriptors: int) -> None:
    opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for each in descriptors:
        os.dup2(opened, each)


def with_group(function: Callable[..., Any], *args: Any) -> None:
    """Call `function(world, *args)` inside a gloo process group of the ranks."""
    world = World.from_environment()
    if world.size > 1:
        dist.init_process_group("gloo")
    function(world, *args)
    world.close()


def _rank(environment: dict[str, str], output: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.update(environment)
    _redirect(output, 1, 2)
    function(*args)
