"""SIGKILL of random workers of an evaluation, again and again: the scores must be those of an uninterrupted one.

A trial is a whole evaluation by 2 to 4 real processes over real files, of a tiny model. Trials are counted over any
number of slices (see tests/faults/trials.py).
"""

from __future__ import annotations

import gc
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from threading import RLock
from typing import Any

import pytest
import torch
from tqdm import tqdm

from pipeline.config.recipe import EvaluateConfig, Recipe
from pipeline.evaluation.stage import evaluate
from pipeline.rundir.run_dir import RunDir
from pipeline.world import World
from tests.evaluated import SETTINGS, inputs, outputs, table  # noqa: F401 a fixture
from tests.faults.trials import SEED, count_trials, folder_of

NUM_TRIALS = 100
NUM_EXAMPLES = 100
# few examples in many slices: a worker has many units to be killed in, and gets through them in little time
SETTINGS_HERE = {"max_examples": NUM_EXAMPLES, "tokens_per_batch": 100, "latency_examples": 1}
RECIPE = Recipe(evaluate=EvaluateConfig(**{**SETTINGS, **SETTINGS_HERE}))
NUM_RESULTS = 5  # systems


def start(root: Path, rank: int, size: int) -> int:
    """A worker in a process of its own, forked because starting Python costs more than the work; its process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        tqdm.set_lock(RLock())  # its own is shared by all that are forked, and stays taken when its holder is killed
        evaluate(RECIPE, RunDir(root), World(rank, size, 0, torch.device("cpu")))
        code = 0
    finally:
        os._exit(code)


def wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def results(root: Path) -> dict[str, Any]:
    """All that an evaluation publishes but measured times: table, outputs, and each system's scores with its counts."""
    scores = {path.name: path.read_bytes() for path in (root / "evaluate/scores").glob("*.json")}
    return {"table": table(root), "outputs": outputs(root), "scores": scores}


def progress(root: Path) -> dict[str, int]:
    """Units of decoding and systems' scores that are published."""
    folder = root / "evaluate"
    return {"units": len(list(folder.glob("units/*/*.json"))), "scores": len(list(folder.glob("scores/*.json")))}


@pytest.fixture
def frozen() -> Iterator[None]:
    """What was imported need not be looked through by the garbage collector of every worker again."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.faults
@pytest.mark.timeout(2400)
@pytest.mark.usefixtures("frozen")
def test_kills_of_workers_lose_and_double_nothing(inputs: Path, tmp_path: Path) -> None:  # noqa: F811
    whole, root = tmp_path / "whole", tmp_path / "run"
    shutil.copytree(inputs, whole)
    started_at = time.monotonic()
    assert wait(start(whole, 0, 1)) == 0
    seconds = time.monotonic() - started_at
    expected = results(whole)
    assert len(expected["scores"]) == len(expected["outputs"]) == NUM_RESULTS

    def trial(number: int) -> dict[str, Any] | None:
        chance = random.Random(f"evaluation/{SEED}/{number}")
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(inputs, root)
        size = chance.choice((2, 3, 4))
        workers = {rank: start(root, rank, size) for rank in range(size)}
        time.sleep(chance.uniform(0.0, 0.6 * seconds))  # the last part of a run is worker 0 measuring, alone
        victim = chance.randrange(size)
        os.kill(workers[victim], signal.SIGKILL)
        seen = progress(root)
        was_killed = wait(workers.pop(victim)) == -signal.SIGKILL
        assert [wait(pid) for pid in workers.values()] == [0] * len(workers)
        if victim == 0 and was_killed:  # as a scheduler starts it again
            assert wait(start(root, 0, size)) == 0
        found = results(root)
        assert found == expected, number
        for name, content in found["outputs"].items():
            ids = [json.loads(line)["id"] for line in content.decode().split("\n") if line]
            assert len(ids) == len(set(ids)) == NUM_EXAMPLES, (number, name)
        return {"workers": size, "victim": victim, **seen} if was_killed else None

    found = count_trials(folder_of("evaluation"), "kills", NUM_TRIALS, trial)
    decoding = sum(not each["scores"] for each in found)
    print(f"{len(found)} kills, {decoding} while decoding, {sum(each['victim'] == 0 for each in found)} of worker 0")
    assert {each["workers"] for each in found} == {2, 3, 4}
    assert NUM_TRIALS // 10 < decoding < NUM_TRIALS
