"""What training needs of several nodes, checked by all ranks together: python -m slurm.check FOLDER (a shared one).

Started like training workers, by torchrun or srun. Rank 0 prints one line a check; exit status 1 when one failed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

MAX_CLOCK_DIFFERENCE_S = 30.0
MEGABYTE = 2**20


class CheckFailedError(Exception):
    """What is wrong, and what to do."""


def gathered(value: Any) -> list[Any]:
    """The value of each rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def check_hosts(folder: Path) -> str:
    hosts = gathered(os.environ.get("SLURMD_NODENAME", socket.gethostname()))
    expected = int(os.environ.get("SLURM_JOB_NUM_NODES", 1))
    if len(set(hosts)) != expected:
        raise CheckFailedError(f"ranks run on {sorted(set(hosts))}, not on {expected} nodes")
    return f"{len(hosts)} ranks on {', '.join(dict.fromkeys(hosts))}"


def check_all_reduce(folder: Path) -> str:
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    group = dist.new_group(backend="nccl" if device.type == "cuda" else "gloo")
    size = dist.get_world_size()
    ranks = torch.full((MEGABYTE,), float(dist.get_rank()), device=device)
    dist.all_reduce(ranks, group=group)
    begin_s = time.perf_counter()
    for _ in range(5):
        dist.all_reduce(torch.ones_like(ranks), group=group)
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - begin_s) / 5
    if not torch.all(ranks == size * (size - 1) / 2):
        raise CheckFailedError(f"all_reduce over {size} ranks gives a wrong sum")
    return f"all_reduce of 4 MiB on {device.type}: {1000 * seconds:.1f} ms"


def check_visible(folder: Path) -> str:
    """Every rank sees what the others have written."""
    rank = dist.get_rank()
    (folder / f"seen-{rank}").write_text(str(rank))
    dist.barrier()
    for other in range(dist.get_world_size()):
        path = folder / f"seen-{other}"
        if not path.is_file() or path.read_text() != str(other):
            raise CheckFailedError(f"rank {rank} does not see {path}: is the run directory on a disk that all share?")
    return f"files in {folder} are seen by all"


def check_rename(folder: Path) -> str:
    """A folder is published whole by renaming it."""
    final = folder / "published"
    if dist.get_rank() == 0:
        temporary = folder / ".published.tmp"
        temporary.mkdir()
        (temporary / "content").write_text("whole")
        temporary.rename(final)
    dist.barrier()
    if not (final / "content").is_file() or (final / "content").read_text() != "whole":
        raise CheckFailedError(f"rank {dist.get_rank()} does not see a folder that rank 0 renamed")
    return "renamed folders are seen by all"


def check_exclusive(folder: Path) -> str:
    """Of all ranks that link a file to one name, one wins: claims of evaluation rest on that."""
    mine = folder / f"claim-{dist.get_rank()}"
    mine.touch()
    dist.barrier()
    won = True
    try:
        os.link(mine, folder / "claim")
    except FileExistsError:
        won = False
    winners = sum(gathered(won))
    if winners != 1:
        raise CheckFailedError(f"{winners} ranks claimed one file: hard links do not exclude each other here")
    return "one of all ranks wins a claim"


def check_locks(folder: Path) -> str:
    """A lock that one rank holds keeps the others out: `submit` and `run` rest on that."""
    with open(folder / "lock", "w", encoding="utf-8") as file:
        if dist.get_rank() == 0:
            fcntl.flock(file, fcntl.LOCK_EX)
        dist.barrier()
        got = dist.get_rank() > 0
        if got:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                got = False
        if any(gathered(got)):
            raise CheckFailedError(
                "file locks do not reach other nodes: start `submit` and `run` on one login node only"
            )
    return "file locks reach all ranks"


def check_clocks(folder: Path) -> str:
    dist.barrier()
    times = gathered(time.time())
    difference_s = max(times) - min(times)
    if difference_s > MAX_CLOCK_DIFFERENCE_S:
        raise CheckFailedError(f"clocks differ by {difference_s:.0f} s: ages of files mislead the watchdog and claims")
    return f"clocks differ by {difference_s:.2f} s or less"


CHECKS: dict[str, Callable[[Path], str]] = {
    "hosts": check_hosts,
    "all_reduce": check_all_reduce,
    "visible": check_visible,
    "rename": check_rename,
    "exclusive": check_exclusive,
    "locks": check_locks,
    "clocks": check_clocks,
}


def main(folder: Path) -> int:
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("gloo")
    failed = []
    for name, check in CHECKS.items():
        told, problem = "", ""
        try:
            told = check(folder)
        except (CheckFailedError, OSError) as error:
            problem = str(error)
        problems = [each for each in gathered(problem) if each]
        if dist.get_rank() == 0:
            print(f"failed  {name:<11} {problems[0]}" if problems else f"ok      {name:<11} {told}", flush=True)
        failed += problems
    dist.barrier()
    with contextlib.suppress(RuntimeError):
        dist.destroy_process_group()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
