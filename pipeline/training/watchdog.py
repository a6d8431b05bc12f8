"""Ranks that die or hang are found by the others within a minute, and named.

Every rank writes RUN/heartbeat/<stage>/rank_*.json each few seconds, from a thread: where it is (step, phase, draw). A
rank that makes no progress itself looks at the files of the others: one whose process is gone, or whose file no longer
changes, is dead, and this rank leaves with that in its message. When all are alive and nothing moves, all leave after a
time with the step, the phase and the draw of every rank.

The watch begins before the ranks have met, so that nobody waits for one that died on its way. There a file may be of an
earlier start: it counts from when it is seen to change, or its process to live.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from data_prep.processes import process_start
from pipeline.world import World

BEAT_S = 2.0
LOOK_AFTER_S = 10.0  # without progress
SILENCE_S = 30.0  # of a rank that is taken for dead; long enough for a file to be seen on a network's file system
NUM_READ = 8  # files of others at a time, so that many ranks that wait together do not read each other's all the time
BEAT_BYTES = 2048  # a beat, padded to cover the one before it
EXIT_LOST = 1


class Position(Protocol):
    """Where a rank is; see pipeline.training.clock.PhaseClock."""

    step: int
    phase: str
    detail: str
    num_phases: int


@dataclass
class _Apart:
    """Where a rank is that is not in training."""

    phase: str
    step: int = 0
    detail: str = ""
    num_phases: int = 0


@dataclass
class _Peer:
    """What this rank has seen of another."""

    record: dict[str, Any]
    came: bool
    """The record is of this start."""
    silent_s: float = 0.0


class Watchdog:
    """Watches from a thread, inside of the `with` statement, which begins before the ranks have met.

    Args:
        hang_timeout_s: seconds of waiting for the others to come, or without progress in training, after which this
            rank leaves though no rank is known to be dead.
    """

    def __init__(
        self,
        folder: Path,
        world: World,
        *,
        hang_timeout_s: float,
        beat_s: float = BEAT_S,
        look_after_s: float = LOOK_AFTER_S,
        silence_s: float = SILENCE_S,
    ) -> None:
        self._folder, self._world = folder, world
        self._hang_timeout_s, self._beat_s = hang_timeout_s, beat_s
        self._look_after_s, self._silence_s = look_after_s, silence_s
        self._peers: dict[int, _Peer] = {}
        self._position: Position = _Apart("meeting")
        self._has_met = self._is_training = False
        self._num_beats = self._num_looks = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._path(self._world.rank).unlink(missing_ok=True)
        self._write()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        self._ended.set()
        self._thread.join()
        if not isinstance(error, Exception):
            self._beat(left="in good order")
            return
        lost = self._search(self._silence_s + self._look_after_s) if _is_of_communication(error) else None
        self._beat(left=lost or f"{type(error).__name__}: {error}")
        if lost:
            raise RuntimeError(f"{lost}\n{self.report()}") from error

    def met(self) -> None:
        """All ranks are in the process group: from here on no file is of an earlier start. Collective."""
        self._world.barrier()
        self._position, self._has_met = _Apart("start"), True

    @contextmanager
    def training(self, position: Position) -> Iterator[None]:
        """Inside of it a rank has to make progress.

        Args:
            position: where this rank is; read by the thread.
        """
        self._position, self._is_training = position, True
        try:
            yield
        finally:
            self._is_training = False

    def report(self) -> str:
        """Where every rank is, a line each."""
        self._look(0.0, self._others())
        lines = [_line(self._own())]
        lines += [_line(peer.record) for _, peer in sorted(self._peers.items()) if peer.came]
        return "\n".join(lines)

    def _watch(self) -> None:
        place, still_s = self._place(), 0.0
        while not self._ended.wait(self._beat_s):
            self._beat()
            # counted in beats, not by the clock: when all processes were suspended together nobody is late
            still_s = still_s + self._beat_s if place == self._place() else 0.0
            place = self._place()
            if self._has_met and still_s < self._look_after_s:
                self._peers.clear()
                continue
            lost = self._look_around()
            if lost is None and still_s >= self._hang_timeout_s:
                lost = self._hang(still_s)
            if lost is not None:
                self._leave(lost)

    def _place(self) -> tuple[int, int]:
        """Changes with all progress."""
        return id(self._position), self._position.num_phases

    def _hang(self, still_s: float) -> str | None:
        if not self._has_met:
            return f"after {still_s:.0f} s {self._absent()}"
        if self._is_training:
            return f"no progress for {still_s:.0f} s, though all ranks are alive: a collective hangs"
        return None  # rank 0 may take its time with what the others wait for

    def _absent(self) -> str:
        """Which ranks have not come, so far as this one has seen."""
        came = {self._world.rank} | {rank for rank, peer in self._peers.items() if peer.came}
        absent = [f"rank {rank}" for rank in range(self._world.size) if rank not in came]
        if not absent:
            return "the ranks cannot reach each other, though all are alive: see MASTER_ADDR and the network"
        return f"{', '.join(absent)} of {self._world.size} ha{'ve' if absent[1:] else 's'} not come"

    def _leave(self, why: str) -> None:
        """End this process, whose main thread may wait in a collective for ever."""
        self._beat(left=why)
        try:
            print(f"[{self._world.rank}/{self._world.size}] {why}\n{self.report()}", file=sys.stderr, flush=True)
        finally:
            os._exit(EXIT_LOST)

    def _search(self, seconds: float) -> str | None:
        """Look for a lost rank for some time; for when communication has failed already."""
        deadline = time.monotonic() + seconds
        while (lost := self._look_around()) is None and time.monotonic() < deadline:
            self._beat()
            time.sleep(self._beat_s)
        return lost if self._has_met else lost or self._absent()

    def _others(self) -> list[int]:
        """The other ranks, from the next one on: each rank begins elsewhere."""
        return [(self._world.rank + i) % self._world.size for i in range(1, self._world.size)]

    def _look_around(self) -> str | None:
        """Once a beat: read the files of the next few others, so that all have their turn; says which rank is lost, if
        any of these."""
        others = self._others()
        turns = [others[first : first + NUM_READ] for first in range(0, len(others), NUM_READ)] or [[]]
        turn = turns[self._num_looks % len(turns)]
        self._num_looks += 1
        return self._look(self._beat_s * len(turns), turn)

    def _look(self, passed_s: float, ranks: Sequence[int]) -> str | None:
        """Read the files of these ranks, `passed_s` after the last time; says which of them is lost, if any."""
        lost = []
        for rank in ranks:
            record = self._read(rank) or (self._peers[rank].record if rank in self._peers else None)
            if record is None:
                continue
            peer = self._peers.setdefault(rank, _Peer(record, came=self._has_met or _is_alive(record)))
            is_silent = peer.record["beat"] == record["beat"]
            peer.silent_s = peer.silent_s + passed_s if is_silent else 0.0
            peer.came = peer.came or not is_silent or _is_alive(record)
            peer.record = record
            text = _loss_of(peer, self._silence_s) if peer.came else None
            if text is not None:
                lost.append(text)
        return "; ".join(lost) or None

    def _read(self, rank: int) -> dict[str, Any] | None:
        """What a rank's file says; None where there is none, or it is being written this instant."""
        try:
            return json.loads(self._path(rank).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def _own(self) -> dict[str, Any]:
        position = self._position
        return {
            "rank": self._world.rank,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "start": process_start(os.getpid()),
            "namespace": _namespace(),
            "beat": self._num_beats,
            "step": position.step,
            "phase": position.phase,
            "draw": position.detail[: BEAT_BYTES // 2],
            "left": None,
        }

    def _beat(self, left: str | None = None) -> None:
        """Where the file system fails, it may be back at the next beat; until then the others hear nothing."""
        with suppress(OSError):
            self._write(left)

    def _write(self, left: str | None = None) -> None:
        self._num_beats += 1
        text = json.dumps({**self._own(), "left": left}).ljust(BEAT_BYTES)
        # in place: a reader on another node sees a file that it opens anew sooner than a name that was replaced; over
        # the last beat, in one write: a rank that is killed meanwhile leaves a whole record
        with open(os.open(self._path(self._world.rank), os.O_WRONLY | os.O_CREAT, 0o644), "wb", buffering=0) as file:
            file.write(text.encode())

    def _path(self, rank: int) -> Path:
        return self._folder / f"rank_{rank:05d}.json"


def _loss_of(peer: _Peer, silence_s: float) -> str | None:
    record = peer.record
    if record["left"] == "in good order":
        return None
    if record["left"] is not None:
        return f"rank {record['rank']} has left ({record['left']})"
    if _is_here(record) and not _is_alive(record):
        return f"rank {record['rank']} (process {record['pid']} on {record['host']}) has died"
    if peer.silent_s >= silence_s:
        where = f"process {record['pid']} on {record['host']}"
        return f"rank {record['rank']} ({where}) has not been heard of for {peer.silent_s:.0f} s"
    return None


def _is_here(record: dict[str, Any]) -> bool:
    return record["host"] == socket.gethostname() and record["namespace"] == _namespace()


def _is_alive(record: dict[str, Any]) -> bool:
    """Whether this process can see that of a record live."""
    return _is_here(record) and process_start(record["pid"]) == record["start"]


def _namespace() -> str:
    """Of process numbers: containers on one host may each have their own."""
    return os.readlink("/proc/self/ns/pid")


def _line(record: dict[str, Any]) -> str:
    draw = f" of {record['draw']}" if record["draw"] else ""
    left = f", left: {record['left']}" if record["left"] else ""
    return f"    rank {record['rank']} on {record['host']}: step {record['step']}, {record['phase']}{draw}{left}"


def _is_of_communication(error: BaseException) -> bool:
    """Whether an error looks like that of a collective whose other end is gone."""
    chain = []
    each: BaseException | None = error
    while each is not None:
        chain.append(f"{type(each).__name__} {each}".lower())
        each = each.__cause__
    words = ("gloo", "nccl", "peer", "socket", "disterror", "distbackend", "diststore", "distnetwork")
    return any(word in text for text in chain for word in words)
