"""Data builds with real MPI ranks: the same bytes from any world, and from any kill followed by another run."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from data_prep.reader import SplitReader
from data_prep.shards import read_manifest
from tests.builds import MPIEXEC, ROOT, build, command, contents, family_of, kill_session, write_recipe
from tests.patience import PATIENCE_S, wait_until


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 8])
def test_any_number_of_ranks_makes_the_same_bytes(recipe: Path, built: Path, tmp_path: Path, ranks: int) -> None:
    result = build(recipe, tmp_path / "data", ranks)
    assert result.returncode == 0, result.stderr
    assert f"on {ranks} rank(s)" in result.stdout
    assert result.stdout.count("\n") == 1
    assert contents(tmp_path / "data") == contents(built)


def test_every_record_is_written_once_and_comes_back(built: Path) -> None:
    manifest = read_manifest(built)
    for name, split in manifest.splits.items():
        rows = (built / f"corpus/{name}.jsonl").read_text(encoding="utf-8").splitlines()
        assert split.ledger.read == split.ledger.written == split.num_examples == len(rows)
        assert len(SplitReader(built, manifest, name)) == len(rows)
    corpus = [json.loads(line) for line in (built / "corpus/test.jsonl").read_text(encoding="utf-8").splitlines()]
    test = [json.loads(line) for line in (built / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    assert test == [{name: row[name] for name in ("id", "source", "target")} for row in corpus]
    assert sum(row["held_out"] for row in corpus) == 24


def test_a_finished_build_is_left_alone(recipe: Path, built: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in built.rglob("*")}
    result = build(recipe, built, 2)
    assert (result.returncode, result.stdout[:22]) == (0, "data: nothing to do, /"), result.stderr
    assert {path: path.stat().st_mtime_ns for path in built.rglob("*")} == before


def test_what_an_older_format_has_finished_stays_finished(recipe: Path, built: Path, tmp_path: Path) -> None:
    """Format 2 had no setting for quotes."""
    out = shutil.copytree(built, tmp_path / "out")
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["format_version"] = 2
    for settings in (manifest["settings"], *manifest["settings"]["sets"]):
        del settings["quotes"]
    (out / "manifest.json").write_text(json.dumps(manifest))
    result = build(recipe, out)
    assert "is complete" in result.stdout, result.stderr


@pytest.mark.parametrize("moment", ["corpus", "tokenizer", "plan.json", "train/000002.json", "train/000015.json"])
def test_a_killed_build_is_finished_by_another_world(recipe: Path, built: Path, tmp_path: Path, moment: str) -> None:
    out = tmp_path / "data"
    process = subprocess.Popen(
        command(recipe, out, 2), cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wait_until(lambda: (out / moment).exists() or process.poll() is not None, look_every_s=0.001)
    kill_session(process)
    assert not (out / "manifest.json").exists(), "the build was over before the kill"
    with pytest.raises(FileNotFoundError, match="not finished"):
        read_manifest(out)
    (out / "train").mkdir(exist_ok=True)
    (out / "train/000001.tar.tmp-1").write_bytes(b"left by the killed build")
    kept = {p: p.stat().st_mtime_ns for p in out.rglob("*.json") if p.parent.name in ("train", "tokenizer")}
    result = build(recipe, out, 3)
    assert result.returncode == 0, result.stderr
    assert contents(out) == contents(built)
    redone = [path for path, mtime in kept.items() if path.stat().st_mtime_ns != mtime]
    assert not redone, "what was published is not made again"


def test_a_killed_rank_stops_no_other_and_a_rerun_makes_only_its_units(
    recipe: Path, built: Path, tmp_path: Path
) -> None:
    """1 of 8 ranks kills itself after one of its three units, started as the batch script does it with mpiexec."""
    out, options = tmp_path / "data", ("--data.patience_s", "1")
    own = shlex.join([sys.executable, str(ROOT / "tests/faults/injected_build.py"), "9", "before"])
    rank = f"""trap "" USR1; if ((PMI_RANK == 5)); then {own} "${{@:4}}"; else "$@"; fi; exit $?"""
    words = ["bash", "-c", rank, "rank", sys.executable, "-m", "data_prep", *command(recipe, out, 0, *options)[3:]]
    launch = [str(MPIEXEC), "-disable-auto-cleanup", "-n", "8", *words]
    result = subprocess.run(launch, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert "a rank has died; run the same command again" in result.stderr
    assert not (out / "manifest.json").exists()
    made = {path: path.stat().st_mtime_ns for path in out.rglob("*.json")}
    units = [path for path in made if path.parent.name in ("train", "validation", "test")]
    assert {path.name for path in (built / "train").glob("*.json")} - {path.name for path in units} == {
        "000016.json",
        "000017.json",
    }
    assert len(units) == 22
    result = build(recipe, out, 3)
    assert result.returncode == 0, result.stderr
    assert contents(out) == contents(built)
    assert {path: path.stat().st_mtime_ns for path in made} == made, "what stood was not made again"


def test_no_rank_outlives_the_launcher_of_its_node(recipe: Path, tmp_path: Path) -> None:
    """mpiexec's proxy is killed while one rank is stopped, for which another would wait at full load for ever."""
    launcher = subprocess.Popen(
        command(recipe, tmp_path / "data", 2), cwd=ROOT, start_new_session=True, stderr=subprocess.DEVNULL
    )
    wait_until((tmp_path / "data/corpus").exists, look_every_s=0.001)
    started = [p for p in map(psutil.Process, family_of(launcher)) if "PMI_RANK" in p.environ()]
    ranks = [p for p in started if "data_prep.served" not in p.cmdline()]
    assert len(ranks) == 2
    ranks[1].suspend()
    ranks[0].parent().kill()
    _, left = psutil.wait_procs(started, timeout=PATIENCE_S)  # transformers beside the first rank, too
    kill_session(launcher)
    for rank in left:
        rank.kill()
    assert not left


def test_a_damaged_shard_is_found_and_made_again(recipe: Path, built: Path, tmp_path: Path) -> None:
    out = tmp_path / "data"
    assert build(recipe, out).returncode == 0
    verify = [sys.executable, "-m", "data_prep", "verify", str(out)]
    assert subprocess.run(verify, cwd=ROOT, capture_output=True, check=False).returncode == 0
    shard = out / "train/000003.tar"
    damaged = bytearray(shard.read_bytes())
    damaged[700] ^= 4
    shard.write_bytes(damaged)
    result = subprocess.run(verify, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "train/000003.tar:000003-00000.block: the checksum does not match" in result.stdout
    (out / "train/000005.tar").unlink()
    (out / "train/index.npy").write_bytes(b"")
    (out / "tokenizer/spiece.model").write_bytes(b"")
    result = subprocess.run([*verify[:3], "repair", str(out)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout.count("made again")) == (0, 4), result.stderr
    assert contents(out) == contents(built)
    (out / "train/000005.tar").unlink()
    (out / "corpus/train.jsonl").write_text("{}")
    result = subprocess.run([*verify[:3], "repair", str(out)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "changed since the plan was made" in result.stderr
    shutil.copyfile(built / "corpus/train.jsonl", out / "corpus/train.jsonl")
    assert build(recipe, out, 2).returncode == 0
    assert contents(out) == contents(built)


def test_importing_the_programs_is_light() -> None:
    probe = "import sys, data_prep.__main__, data_prep.build, data_prep.verify; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", probe], cwd=ROOT, check=False).returncode == 0


def test_lists_of_targets_are_references_of_the_test_and_refused_in_training(tmp_path: Path) -> None:
    rows = [{"source": f"number {n}", "target": [f"Nummer {n}", " ", f"Zahl {n}"]} for n in range(40)]
    one = [{**row, "target": row["target"][0]} for row in rows]
    for name, content in (("several", rows), ("one", one)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    paths = {name: [str(tmp_path / f"{name}.jsonl")] for name in ("several", "one")}
    data = {"corpus": "files", "train": paths["one"], "validation": paths["several"], "test": paths["several"]}
    result = build(write_recipe(tmp_path / "recipe.yaml", data | {"vocab_size": 64}), tmp_path / "data")
    assert result.returncode == 0, result.stderr
    test = [json.loads(line) for line in (tmp_path / "data/test.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["references"] for row in test] == [[f"Nummer {n}", f"Zahl {n}"] for n in range(40)]
    assert [row["target"] for row in test] == [row["target"] for row in one]
    splits = read_manifest(tmp_path / "data").splits
    assert splits["validation"].shards[0].target_tokens == splits["train"].shards[0].target_tokens
    recipe = write_recipe(tmp_path / "bad.yaml", data | {"train": paths["several"], "vocab_size": 64})
    result = build(recipe, tmp_path / "bad")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
    assert "field 'target' holds 2 texts; training takes one target a record: write a record for each" in result.stderr
