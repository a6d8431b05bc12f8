"""SIGKILL of data builds at random instants with random numbers of ranks; the bytes must be those of a quiet build."""

from __future__ import annotations

import os
import random
import subprocess
import time
from pathlib import Path

import pytest

from tests.distributed.test_data_build import build, command, contents, kill_session, write_recipe

SEED = int(os.environ.get("FAULT_SEED", "0"))
NUM_TRIALS = 12
KILLS_PER_TRIAL = 3
DATA = {"corpus": "demo", "num_demo_pairs": 6000, "num_validation": 100, "num_test": 100, "vocab_size": 300}


@pytest.mark.faults
@pytest.mark.timeout(2400)
def test_any_kills_and_worlds_make_the_same_bytes(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", {**DATA, "examples_per_block": 64, "blocks_per_shard": 2})
    start = time.monotonic()
    assert build(recipe, tmp_path / "quiet", 2).returncode == 0
    seconds = time.monotonic() - start
    expected = contents(tmp_path / "quiet")
    generator = random.Random(f"data/{SEED}")
    num_kills = 0
    for trial in range(NUM_TRIALS):
        out = tmp_path / f"trial{trial}"
        for _ in range(KILLS_PER_TRIAL):
            words = command(recipe, out, generator.choice((0, 1, 2, 3)))
            process = subprocess.Popen(
                words, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            time.sleep(generator.uniform(0, seconds))
            num_kills += process.poll() is None
            kill_session(process)
        assert build(recipe, out, generator.choice((0, 1, 2, 3))).returncode == 0
        assert contents(out) == expected, f"trial {trial}"
    assert num_kills >= NUM_TRIALS
