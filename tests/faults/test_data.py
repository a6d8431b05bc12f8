"""Data builds that are killed, or whose disk fills up, at any instant: the bytes must be those of a quiet build.

FAULT_SEED chooses the random instants, FAULT_TRIALS how many of them.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data_prep.reader import SplitReader
from data_prep.shards import read_manifest
from tests.distributed.test_data_build import ROOT, build, command, contents, family_of, kill_session, write_recipe

SEED = int(os.environ.get("FAULT_SEED", "0"))
NUM_TRIALS = int(os.environ.get("FAULT_TRIALS", "40"))
DATA = {"corpus": "demo", "num_demo_pairs": 700, "num_validation": 20, "num_test": 20, "vocab_size": 150}
DATA |= {"examples_per_block": 32, "blocks_per_shard": 4}
WORLDS = (0, 1, 2, 3, 5)

pytestmark = [pytest.mark.faults, pytest.mark.timeout(2400)]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe") / "recipe.yaml", DATA)


@pytest.fixture(scope="module")
def quiet(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quiet") / "data"
    assert build(recipe, out).returncode == 0
    return out


def injected(recipe: Path, out: Path, which: int, mode: str) -> subprocess.CompletedProcess[str]:
    script = str(Path(__file__).with_name("injected_build.py"))
    words = [sys.executable, script, str(which), mode, "build", "--config", str(recipe), "--out", str(out)]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def test_a_fault_before_and_after_every_write_fsync_and_rename(recipe: Path, quiet: Path, tmp_path: Path) -> None:
    """Each in turn, then a restart with another number of ranks. FAULT_TRIALS bounds how many, spread evenly."""
    expected = contents(quiet)
    num_calls = int(injected(recipe, tmp_path / "count", 0, "count").stdout.split()[-1])
    faults = [(which, mode) for which in range(1, num_calls + 1) for mode in ("before", "after", "error")]
    random.Random(f"inject/{SEED}").shuffle(faults)
    for number, (which, mode) in enumerate(faults[:NUM_TRIALS]):
        out = tmp_path / "data"
        result = injected(recipe, out, which, mode)
        if mode == "error":
            assert (result.returncode, result.stderr.count("\n")) == (2, 1), (which, result.stderr)
            assert "No space left on device" in result.stderr
            assert not (out / "manifest.json").exists() or contents(out) == expected
        else:
            assert result.returncode == -9, (which, mode, result.stderr)
        result = build(recipe, out, WORLDS[number % len(WORLDS)])
        assert result.returncode == 0, (which, mode, result.stderr)
        assert contents(out) == expected, (which, mode)
        shutil.rmtree(out)
    print(
        f"\n{min(NUM_TRIALS, len(faults))} of {len(faults)} faults injected, {num_calls} calls of write, fsync, rename"
    )


def test_kill_of_any_rank_at_any_instant(recipe: Path, quiet: Path, tmp_path: Path) -> None:
    """One process of the job, or all, at a random instant; up to two kills, then a restart with another world."""
    expected = contents(quiet)
    generator = random.Random(f"data/{SEED}")
    start = time.monotonic()
    assert build(recipe, tmp_path / "timed", 2).returncode == 0
    seconds = time.monotonic() - start
    num_kills = 0
    for trial in range(NUM_TRIALS):
        out = tmp_path / "data"
        for _ in range(generator.choice((1, 2))):
            words = command(recipe, out, generator.choice(WORLDS))
            process = subprocess.Popen(
                words, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            time.sleep(generator.uniform(0, seconds))
            num_kills += process.poll() is None
            family = sorted(family_of(process))
            if family and generator.random() < 0.5:
                subprocess.run(["kill", "-9", str(generator.choice(family))], stderr=subprocess.DEVNULL, check=False)
                time.sleep(0.05)
            kill_session(process)
        result = build(recipe, out, generator.choice(WORLDS))
        assert result.returncode == 0, (trial, result.stderr)
        assert contents(out) == expected, f"trial {trial}"
        shutil.rmtree(out)
    print(f"\n{NUM_TRIALS} trials with {num_kills} kills")
    assert num_kills >= NUM_TRIALS / 2


def test_bit_flips_and_truncations(quiet: Path, tmp_path: Path) -> None:
    """10,000 flips and 1,000 cuts of shards: what changes an example is refused with shard and block named."""
    folder = tmp_path / "data"
    shutil.copytree(quiet, folder)
    manifest = read_manifest(folder)
    rng = np.random.Generator(np.random.Philox(SEED))
    shards = manifest.splits["train"].shards
    good = {shard.path: (folder / shard.path).read_bytes() for shard in shards}
    reader = SplitReader(folder, manifest, "train")
    places = np.arange(len(reader))
    expected = reader.read(places)
    counts = {"refused": 0, "harmless": 0}
    for trial in range(11_000):
        shard = shards[int(rng.integers(len(shards)))]
        damaged = bytearray(good[shard.path])
        place = int(rng.integers(len(damaged)))
        if trial < 10_000:
            damaged[place] ^= 1 << int(rng.integers(8))
        else:
            del damaged[place:]
        (folder / shard.path).write_bytes(damaged)
        refusal = ""
        try:
            found = reader.read(places)
        except ValueError as err:
            refusal = str(err)
        if refusal:
            assert refusal.startswith(f"{folder / shard.path}: block ")
        else:
            for name in ("source_ids", "source_offsets", "target_ids", "target_offsets"):
                assert np.array_equal(getattr(found, name), getattr(expected, name)), (trial, place)
        counts["refused" if refusal else "harmless"] += 1
        (folder / shard.path).write_bytes(good[shard.path])
    print(f"\n{counts}")
    assert min(counts.values()) > 100
