"""SIGKILL of training at random instants and in the middle of saves, counted over any number of slices.

Rounds are seeded. A round starts a run, kills one rank or all of them several times, each time at another instant,
starts it again, and compares what comes out in the end with a run that nothing happened to. What was counted is in a
file, so that slices add up; a slice that is itself killed loses the round it was in, nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import time
from dataclasses import asdict, dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from pipeline.checkpoints.format import checkpoints, damage
from tests.distributed import training
from tests.forks import wait_for

NUM_RANKS = 2
KILLS_PER_ROUND = 5
MAX_STARTS = 40
SHARE_AT_START = 0.2  # of the kills that are not aimed at a save
START_S = 6.0
STEP_S = 0.4
SAVE_S = 0.006
LIMIT_S = 60.0
OPTIONS = (
    "--distill.optim.num_steps=12",
    "--distill.loop.save_every_steps=1",
    "--distill.loop.validate_every_steps=12",
    "--distill.loop.hang_timeout_s=40",  # how long a rank waits for one that was killed before it could say anything
)


@dataclass(frozen=True)
class Kill:
    """One kill that met a running training."""

    round: int
    victims: str
    """one, all"""
    in_save: bool
    """A save was begun and not published when they died."""
    newest_step: int
    """Of the checkpoints that verified after it; 0 for none."""
    others_left_s: float
    """Until the other ranks had left; 0 where all were killed."""


def run_round(number: int, seed: int, prepared: Path, whole: Path, folder: Path) -> list[Kill]:
    """Kills of one round, after the run was finished and found equal to the one without."""
    chance = random.Random(f"kills/{seed}/{number}")
    run_dir = training.copy_of(prepared, folder / "run")
    kills: list[Kill] = []
    for _ in range(MAX_STARTS):
        aim_at_save = sum(kill.in_save for kill in kills) * 2 <= len(kills)
        kill = kill_once(number, chance, run_dir, aim_at_save=aim_at_save)
        if kill is not None:
            kills.append(kill)
        if len(kills) == KILLS_PER_ROUND or (run_dir / "distill" / "stage.json").exists():
            break
    assert training.run("distill", NUM_RANKS, run_dir, *OPTIONS) == [0] * NUM_RANKS
    assert training.library(run_dir) == training.library(whole)
    steps = [record["step"] for record in training.records(run_dir)]
    assert steps == [record["step"] for record in training.records(whole)]
    shutil.rmtree(run_dir)
    return kills


def kill_once(number: int, chance: random.Random, run_dir: Path, *, aim_at_save: bool) -> Kill | None:
    """Start, kill at an instant, see that the others leave and that every published checkpoint verifies; None when
    training was over before."""
    places = run_dir / "distill" / "checkpoints"
    begin_s = time.time()
    for log in run_dir.glob("rank_*"):
        log.unlink()
    processes = training.start("distill", NUM_RANKS, run_dir, *OPTIONS, log=run_dir)
    at_start = not aim_at_save and chance.random() < SHARE_AT_START
    if at_start:
        reached = sleep_while_running(processes, chance.uniform(0, START_S))
    else:
        reached = wait_for_save(processes, places, begin_s, num_skipped=chance.randrange(3))
        time.sleep(chance.uniform(0, SAVE_S if aim_at_save else STEP_S))
    victims = processes if chance.random() < 0.5 else [chance.choice(processes)]
    for process in victims:
        if reached and process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
    begin = time.monotonic()
    codes = wait_for(processes, LIMIT_S)
    said = "\n".join(log.read_text()[-2000:] for log in sorted(run_dir.glob("rank_*")))
    assert None not in codes, f"{codes} {LIMIT_S} s after the kill of {len(victims)}, {reached=}:\n{said}"
    broken = {str(each): text for each in checkpoints(places) if (text := damage(each)) is not None}
    assert not broken, broken
    if -signal.SIGKILL not in codes:
        return None
    return Kill(
        round=number,
        victims="all" if len(victims) == NUM_RANKS else "one",
        in_save=bool(saves_under_way(places, begin_s)),
        newest_step=max((int(each.name[5:]) for each in checkpoints(places)), default=0),
        others_left_s=0.0 if len(victims) == NUM_RANKS else round(time.monotonic() - begin, 2),
    )


def saves_under_way(places: Path, since_s: float) -> set[str]:
    """Saves that were begun after an instant and are not published."""
    found = [each for each in places.glob(".step_*.tmp") if not each.name.endswith(".old.tmp")]
    return {each.name for each in found if each.stat().st_mtime > since_s}


def wait_for_save(processes: list[ForkServerProcess], places: Path, since_s: float, *, num_skipped: int) -> bool:
    """Until a save is under way, after some others; False when training ends first."""
    seen: set[str] = set()
    while all(process.is_alive() for process in processes):
        with contextlib.suppress(FileNotFoundError):  # published this instant
            found = saves_under_way(places, since_s)
            seen |= found
            if found and len(seen) > num_skipped:
                return True
        time.sleep(0.0003)
    return False


def sleep_while_running(processes: list[ForkServerProcess], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not all(process.is_alive() for process in processes):
            return False
        time.sleep(0.005)
    return True


def count(folder: Path, seed: int, num_kills: int, seconds: float) -> list[Kill]:
    """All kills counted in `folder` after this slice, which ends when there are `num_kills`, or with the
    round that goes beyond `seconds`."""
    ledger, ready = folder / "kills.jsonl", folder / "ready"
    prepared, whole = folder / "prepared", folder / "whole"
    if len(read(ledger)) >= num_kills:
        ledger.unlink()  # that count is complete: this is the next
    if not ready.exists() or ready.read_text() != version():
        for each in (prepared, whole):
            shutil.rmtree(each, ignore_errors=True)
        training.prepare(prepared)
        training.copy_of(prepared, whole)
        assert training.run("distill", NUM_RANKS, whole, *OPTIONS) == [0] * NUM_RANKS
        ready.write_text(version())
    deadline = time.monotonic() + seconds
    while len(kills := read(ledger)) < num_kills and time.monotonic() < deadline:
        number = max((kill.round for kill in kills), default=-1) + 1
        shutil.rmtree(folder / "round", ignore_errors=True)
        done = run_round(number, seed, prepared, whole, folder / "round")
        with open(ledger, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(asdict(kill)) + "\n" for kill in done)
        print(f"round {number}: {len(done)} kills, {sum(kill.in_save for kill in done)} in a save", flush=True)
    return read(ledger)


def version() -> str:
    """Of the program: another one may train other weights."""
    digest = hashlib.sha256()
    for path in sorted((training.ROOT / "pipeline").rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def read(ledger: Path) -> list[Kill]:
    return [Kill(**json.loads(line)) for line in ledger.read_text().splitlines()] if ledger.exists() else []
