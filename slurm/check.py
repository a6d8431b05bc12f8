"""What training needs of a cluster: python -m slurm.check node | ranks FOLDER (a shared one).

`node` checks the node it runs on, as `python -m pipeline doctor` does. `ranks` is started like training workers, by
torchrun or srun, and checks what they need of each other; rank 0 prints a line for each check. Exit status 1 or 2 when
one failed.
"""

from __future__ import annotations

import fcntl
import os
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipeline.config import run_program
from pipeline.doctor import doctor, train_a_little
from pipeline.world import World

NODE_CHECKS = ("python", "packages", "devices", "storage", "kernels")
MAX_CLOCK_DIFFERENCE_S = 30.0
MEGABYTE = 2**20


class CheckFailedError(Exception):
    """What is wrong, and what to do."""


@dataclass(frozen=True)
class Ranks:
    """All ranks of the job, which meet without their GPUs, so that a network of GPUs that fails is named as such."""

    world: World
    group: dist.ProcessGroup | None

    def gather(self, value: Any) -> list[Any]:
        """The value of each rank."""
        return self.world.gather(value, self.group)

    def meet(self) -> None:
        self.gather(None)


def check_hosts(ranks: Ranks, folder: Path) -> str:
    hosts = ranks.gather(os.environ.get("SLURMD_NODENAME", socket.gethostname()))
    expected = int(os.environ.get("SLURM_JOB_NUM_NODES", 1))
    if len(set(hosts)) != expected:
        raise CheckFailedError(f"ranks run on {sorted(set(hosts))}, not on {expected} nodes")
    return f"{len(hosts)} ranks on {', '.join(dict.fromkeys(hosts))}"


def check_all_reduce(ranks: Ranks, folder: Path) -> str:
    world = ranks.world
    values = torch.full((MEGABYTE,), float(world.rank), device=world.device)
    world.sum(values)
    begin_s = time.perf_counter()
    for _ in range(5):
        world.sum(torch.ones_like(values))
    if world.device.type == "cuda":
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - begin_s) / 5
    if not torch.all(values == world.size * (world.size - 1) / 2):
        raise CheckFailedError(f"all_reduce over {world.size} ranks gives a wrong sum")
    return f"all_reduce of 4 MiB over {dist.get_backend()}: {1000 * seconds:.1f} ms"


def check_visible(ranks: Ranks, folder: Path) -> str:
    """Every rank sees what the others have written."""
    rank = ranks.world.rank
    (folder / f"seen-{rank}").write_text(str(rank))
    ranks.meet()
    for other in range(ranks.world.size):
        path = folder / f"seen-{other}"
        if not path.is_file() or path.read_text() != str(other):
            raise CheckFailedError(f"rank {rank} does not see {path}: is the run directory on a disk that all share?")
    return f"files in {folder} are seen by all"


def check_rename(ranks: Ranks, folder: Path) -> str:
    """A folder is published whole by renaming it."""
    final = folder / "published"
    if ranks.world.rank == 0:
        temporary = folder / ".published.tmp"
        temporary.mkdir()
        (temporary / "content").write_text("whole")
        temporary.rename(final)
    ranks.meet()
    if not (final / "content").is_file() or (final / "content").read_text() != "whole":
        raise CheckFailedError(f"rank {ranks.world.rank} does not see a folder that rank 0 renamed")
    return "renamed folders are seen by all"


def check_exclusive(ranks: Ranks, folder: Path) -> str:
    """Of all ranks that link a file to one name, one wins: claims of evaluation rest on that."""
    mine = folder / f"claim-{ranks.world.rank}"
    mine.touch()
    ranks.meet()
    won = True
    try:
        os.link(mine, folder / "claim")
    except FileExistsError:
        won = False
    winners = sum(ranks.gather(won))
    if winners != 1:
        raise CheckFailedError(f"{winners} ranks claimed one file: hard links do not exclude each other here")
    return "one of all ranks wins a claim"


def check_locks(ranks: Ranks, folder: Path) -> str:
    """A lock that one rank holds keeps the others out: `submit` and `run` rest on that."""
    with open(folder / "lock", "w", encoding="utf-8") as file:
        if ranks.world.rank == 0:
            fcntl.flock(file, fcntl.LOCK_EX)
        ranks.meet()
        got = ranks.world.rank > 0
        if got:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                got = False
        if any(ranks.gather(got)):
            raise CheckFailedError(
                "file locks do not reach other nodes: start `submit` and `run` on one login node only"
            )
    return "file locks reach all ranks"


def check_clocks(ranks: Ranks, folder: Path) -> str:
    ranks.meet()
    times = ranks.gather(time.time())
    difference_s = max(times) - min(times)
    if difference_s > MAX_CLOCK_DIFFERENCE_S:
        raise CheckFailedError(f"clocks differ by {difference_s:.0f} s: ages of files mislead the watchdog and claims")
    return f"clocks differ by {difference_s:.2f} s or less"


CHECKS: dict[str, Callable[[Ranks, Path], str]] = {
    "hosts": check_hosts,
    "visible": check_visible,
    "rename": check_rename,
    "exclusive": check_exclusive,
    "locks": check_locks,
    "clocks": check_clocks,
    "all_reduce": check_all_reduce,
}


def check_ranks(folder: Path) -> None:
    """Collective."""
    from pipeline.training import join_world  # late: the check of a node does not wait for DeepSpeed

    world = join_world()
    ranks = Ranks(world, world.side_group())
    failed = False
    for name, check in CHECKS.items():
        told, problem = "", ""
        try:
            told = check(ranks, folder)
        except (CheckFailedError, OSError) as error:
            problem = str(error)
        problems = [each for each in ranks.gather(problem) if each]
        if world.is_main:
            print(f"failed  {name:<11} {problems[0]}" if problems else f"ok      {name:<11} {told}", flush=True)
        failed |= bool(problems)
    told = train_a_little(world)  # what is wrong there ends the rank that finds it, and the job's step with it
    if world.is_main:
        print(f"ok      {'training':<11} {told}", flush=True)
    world.close()
    if failed:
        raise SystemExit(1)


def main(what: str, folder: Path) -> None:
    run_program(lambda: doctor(folder, NODE_CHECKS) if what == "node" else check_ranks(folder), verbose=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
