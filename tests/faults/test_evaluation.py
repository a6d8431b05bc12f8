"""SIGKILL of random workers of an evaluation, again and again: the scores must be those of an uninterrupted one.

A run takes FAULT_TRIALS trials from FAULT_SEED on, so that trials are counted over runs.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from pipeline.config import EvaluateConfig, Recipe
from pipeline.evaluate import evaluate
from pipeline.evaluation import folder_hashes
from pipeline.rundir import RunDir
from pipeline.world import World
from tests.end_to_end.test_evaluate import NUM_EXAMPLES, SETTINGS, inputs, outputs, table  # noqa: F401 a fixture

SEED = int(os.environ.get("FAULT_SEED", "0"))
NUM_TRIALS = int(os.environ.get("FAULT_TRIALS", "10"))
RECIPE = Recipe(evaluate=EvaluateConfig(**{**SETTINGS, "latency_examples": 2}))


def start(root: Path, rank: int, size: int) -> int:
    """A worker in a process of its own, forked because starting Python costs more than the work; its process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        folder_hashes.cache_clear()
        evaluate(RECIPE, RunDir(root), World(rank, size, 0, torch.device("cpu")))
        code = 0
    finally:
        os._exit(code)


def wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.faults
@pytest.mark.timeout(2400)
def test_kills_of_workers_lose_and_double_nothing(inputs: Path, tmp_path: Path) -> None:  # noqa: F811
    whole = tmp_path / "whole"
    shutil.copytree(inputs, whole)
    started_s = time.monotonic()
    assert wait(start(whole, 0, 1)) == 0
    seconds = time.monotonic() - started_s
    expected, texts = table(whole), outputs(whole)
    hits = 0
    for trial in range(SEED, SEED + NUM_TRIALS):
        generator = random.Random(f"evaluation/{trial}")
        root, size = tmp_path / "run", generator.choice((2, 3, 4))
        shutil.copytree(inputs, root)
        workers = {rank: start(root, rank, size) for rank in range(size)}
        victim = generator.randrange(size)
        time.sleep(generator.uniform(0.0, 0.8 * seconds))
        os.kill(workers[victim], signal.SIGKILL)
        killed = wait(workers.pop(victim)) == -signal.SIGKILL
        hits += killed
        assert [wait(pid) for pid in workers.values()] == [0] * len(workers)
        if victim == 0 and killed:  # as a scheduler starts it again
            assert wait(start(root, 0, size)) == 0
        assert table(root) == expected, trial
        assert outputs(root) == texts, trial
        for name, content in outputs(root).items():
            ids = [json.loads(line)["id"] for line in content.decode().split("\n") if line]
            assert len(ids) == len(set(ids)) == NUM_EXAMPLES, (trial, name)
        shutil.rmtree(root)
        print(f"trial {trial}: {size} workers, worker {victim} {'killed' if killed else 'was done'}; equal", flush=True)
    assert hits >= NUM_TRIALS // 2
