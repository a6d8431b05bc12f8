"""Data builds that are killed, or whose disk fills up, at any instant: the bytes must be those of a quiet build.

Trials are counted in FAULT_DIR over as many starts of this suite as it takes, each of FAULT_SECONDS; FAULT_SEED chooses
other instants.
"""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.reader import SplitReader
from data_prep.shards import read_manifest
from tests.builds import ROOT, build, command, contents, family_of, kill_session, write_recipe
from tests.faults.trials import SEED, count_trials, folder_of

FOLDER = folder_of("data")
NUM_KILLED = 300
DATA = {"corpus": "demo", "num_demo_pairs": 400, "num_validation": 20, "num_test": 20, "vocab_size": 150}
DATA |= {"examples_per_block": 32, "blocks_per_shard": 2}
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
    """Each call in turn, killed before and after it and failing as on a full disk, then a restart with other ranks."""
    expected = contents(quiet)
    num_calls = int(injected(recipe, tmp_path / "count", 0, "count").stdout.split()[-1])
    faults = [(which, mode) for which in range(1, num_calls + 1) for mode in ("before", "after", "error")]

    def trial(number: int) -> dict[str, Any]:
        which, mode = faults[number - 1]
        out, ranks = tmp_path / "data", WORLDS[number % len(WORLDS)]
        result = injected(recipe, out, which, mode)
        if mode == "error":
            assert (result.returncode, result.stderr.count("\n")) == (2, 1), (which, result.stderr)
            assert "No space left on device" in result.stderr
            assert not (out / "manifest.json").exists() or contents(out) == expected
        else:
            assert result.returncode == -9, (which, mode, result.stderr)
        result = build(recipe, out, ranks)
        assert result.returncode == 0, (which, mode, result.stderr)
        assert contents(out) == expected, (which, mode)
        shutil.rmtree(out)
        return {"call": which, "mode": mode, "restarted_ranks": ranks}

    count_trials(FOLDER, f"call-{num_calls}", len(faults), trial)


def test_kill_of_any_rank_at_any_instant(recipe: Path, quiet: Path, tmp_path: Path) -> None:
    """One process of the job, or all, at a random instant; up to two kills, then a restart with another world."""
    expected = contents(quiet)
    start = time.monotonic()
    assert build(recipe, tmp_path / "timed", 2).returncode == 0
    seconds = time.monotonic() - start

    def trial(number: int) -> dict[str, Any] | None:
        generator = random.Random(f"data/{SEED}/{number}")
        out, worlds, published = tmp_path / "data", [], 0
        for _ in range(generator.choice((1, 2))):
            world = generator.choice(WORLDS)
            process = subprocess.Popen(
                command(recipe, out, world),
                cwd=ROOT,
                start_new_session=True,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            time.sleep(generator.uniform(0, seconds))
            if process.poll() is None:
                worlds.append(world)
            family = sorted(family_of(process))
            if family and generator.random() < 0.5:
                subprocess.run(["kill", "-9", str(generator.choice(family))], stderr=subprocess.DEVNULL, check=False)
                time.sleep(0.05)
            kill_session(process)
            published = len(list(out.glob("*/*.tar")))
        world = generator.choice(WORLDS)
        result = build(recipe, out, world)
        assert result.returncode == 0, (number, result.stderr)
        assert contents(out) == expected, f"trial {number}"
        shutil.rmtree(out)
        return {"killed_worlds": worlds, "shards_then": published, "restarted_ranks": world} if worlds else None

    records = count_trials(FOLDER, "killed", NUM_KILLED, trial)
    assert any(0 < record["shards_then"] < len(list(quiet.glob("*/*.tar"))) for record in records)


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
