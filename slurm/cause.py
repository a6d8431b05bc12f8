"""Which rank of a step failed first, and of what: read from the logs of one start (standard library only)."""

from __future__ import annotations

import re
import shutil
import signal
from dataclasses import dataclass, replace
from pathlib import Path

TAIL_BYTES = 64_000
MAX_LENGTH = 300
NO_SPACE = "No space left on device"
FULL_BYTES = 1 << 20  # less is left on a disk that is full: what its programs said of that found no room there

# `srun --label` puts the number of the node in front of what its torchrun says
_TORCHRUN = re.compile(
    r"^\s*(?P<node>\d+): [EW](?P<when>\d{4} [\d:.]+) .*failed \(exitcode: (?P<code>-?\d+)\) local_rank: (?P<local>\d+)",
    re.MULTILINE,
)
_SRUN = re.compile(r"^srun: error: \S+: tasks? (?P<rank>\d+)\S*: (?P<how>.+)$", re.MULTILINE)
_NOT_STARTED = re.compile(r"slurmstepd\S*: error: (execve\(\): .+)")
_NODE_FAILURE = re.compile(r"Node failure on (\S+)|NODE FAILURE", re.IGNORECASE)
_TORCH = re.compile(r"^\[rank\d+\]: ?")  # what torch puts before every line of a traceback
_EXIT_CODE = re.compile(r"exit code (\d+)")
_MISTAKE = re.compile(r"^(?:error|data_prep): .+", re.MULTILINE)  # in recipe or data
_MESSAGE = re.compile(
    rf"{_MISTAKE.pattern}"
    r"|^failed: .+"  # what may pass, such as a full disk
    r"|^\[\d+/\d+\] (?:rank|no progress) .+"  # pipeline/training/watchdog.py
    r"|^(?:\w+\.)*\w*(?:Error|Exception|Interrupt|Exit|Timeout)\b"
)


@dataclass(frozen=True)
class Failure:
    """How a start failed."""

    text: str
    """One line for people."""
    exit_status: int
    """Of the process that failed first; negative: the signal that killed it."""
    lost_node: bool = False


def first_failure(logs: Path, status: int, processes_per_node: int, first_rank: int = 0) -> Failure:
    """The first failure of a start.

    Args:
        logs: folder of the start: launch.log, rank-K.log, HUNG when the watchdog ended it.
        status: exit status of the step, for when the logs do not tell.
        processes_per_node: workers of each torchrun.
        first_rank: rank of srun's task 0.
    """
    failure = _failure_told(logs, status, processes_per_node, first_rank)
    if _is_full(logs) and NO_SPACE not in failure.text:
        return replace(failure, text=f"{failure.text}; {NO_SPACE}, for logs either: make room there")
    return failure


def _failure_told(logs: Path, status: int, processes_per_node: int, first_rank: int) -> Failure:
    """What the logs tell, as far as they go."""
    if (logs / "HUNG").exists():
        return Failure(f"hung: {_read(logs / 'HUNG').strip()}; {quietest_rank(logs)}", status)
    launch = _read(logs / "launch.log")
    lost = _NODE_FAILURE.search(launch)
    if lost:
        return Failure(f"lost node {lost[1] or ''}".strip(), status, lost_node=True)
    unstarted = _NOT_STARTED.search(launch)
    if unstarted:
        return Failure(f"not started: {unstarted[1]}", status)
    first = _first_of_torchrun(launch, processes_per_node) or _first_of_srun(launch)
    if first is None:
        return Failure(f"failed with exit status {status}: {_cause(logs / 'launch.log')}", status)
    rank, code = first_rank + first[0], first[1]
    how = f"killed by {_signal_name(-code)}" if code < 0 else f"exit status {code}"
    return Failure(f"rank {rank} failed first ({how}): {_cause(logs / f'rank-{rank}.log')}", code)


def tells_mistake(logs: Path) -> bool:
    """Whether a rank says that a mistake in recipe or data ended it. The exit status alone does not tell: it is also
    that of execve for what is not there, and of many programs that are called wrongly."""
    return any(_MISTAKE.search(_read(log)) for log in logs.glob("rank-*.log"))


def quietest_rank(logs: Path) -> str:
    """Which rank's log has been still for longest."""
    files = sorted(logs.glob("rank-*.log"), key=lambda path: path.stat().st_mtime)
    return f"quiet first: {files[0].stem.replace('-', ' ')}" if files else "no rank has written a log"


def _first_of_torchrun(launch: str, processes_per_node: int) -> tuple[int, int] | None:
    """(rank, exit status) of the worker that torchrun saw fail first, over all nodes."""
    first = min(_TORCHRUN.finditer(launch), key=lambda match: match["when"], default=None)
    return (int(first["node"]) * processes_per_node + int(first["local"]), int(first["code"])) if first else None


def _first_of_srun(launch: str) -> tuple[int, int] | None:
    match = _SRUN.search(launch)
    if match is None:
        return None
    exit_code = _EXIT_CODE.search(match["how"])
    killed = {"Killed": signal.SIGKILL, "Terminated": signal.SIGTERM, "Aborted": signal.SIGABRT}
    for word, number in (killed | {"Segmentation fault": signal.SIGSEGV}).items():
        if match["how"].startswith(word):
            return int(match["rank"]), -number
    return int(match["rank"]), int(exit_code[1]) if exit_code else 1


def _signal_name(number: int) -> str:
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    return f"{name}, perhaps for want of memory" if number == signal.SIGKILL else name


def _cause(log: Path) -> str:
    """The last line of a log that reads like an error, else the last line."""
    lines = [_TORCH.sub("", line.strip()) for line in _read(log).splitlines() if line.strip()]
    told = [line for line in lines if _MESSAGE.match(line)]
    return (told or lines or [f"{log.name} is empty"])[-1][:MAX_LENGTH]


def _is_full(folder: Path) -> bool:
    try:
        return shutil.disk_usage(folder).free < FULL_BYTES
    except OSError:
        return False


def _read(path: Path) -> str:
    """The end of a log; empty when there is none."""
    try:
        with open(path, "rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - TAIL_BYTES))
            return file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""
