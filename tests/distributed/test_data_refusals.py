"""Data builds of bad inputs, wrong settings and full disks: one clear line, and nothing published."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.shards import read_manifest
from tests.builds import MPIEXEC, ROOT, SMALL, build, command, contents, write_recipe
from tests.patience import PATIENCE_S


def test_other_settings_are_refused_with_the_difference(recipe: Path, built: Path, tmp_path: Path) -> None:
    result = build(recipe, built, 2, "--data.seed", "5")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1
    assert "seed 0 -> 5" in result.stderr
    half = tmp_path / "half"
    half.mkdir()
    (half / "plan.json").write_bytes((built / "plan.json").read_bytes())
    result = build(recipe, half, 0, "--data.vocab_size", "400")
    assert result.returncode == 2
    assert "vocab_size 512 -> 400" in result.stderr
    assert [path.name for path in half.iterdir()] == ["plan.json"]


def test_files_with_defects_are_counted_or_refused(tmp_path: Path) -> None:
    row = '{"q": {"en": "number %d is here"}, "a": "Nummer %d ist da"}'
    lines = [row % (n, n) for n in range(200)]
    lines += [lines[7], lines[150]]
    lines[3:3] = [
        "",
        '{"q": {"en": " "}, "a": "x"}',
        '{"q": {"en": "y"}, "a": ""}',
        '{"q": {"en": "y"}, "a": null}',
        '{"q": null, "a": "x"}',
    ]
    train = tmp_path / "train.jsonl"
    train.write_text("\n".join(lines), encoding="utf-8")
    data = {"corpus": "files", "train": [str(train)], "test": [str(train)], "source_field": "q.en", "target_field": "a"}
    data |= {"prefix": "translate: ", "vocab_size": 80, "examples_per_block": 16, "blocks_per_shard": 2}
    recipe = write_recipe(tmp_path / "recipe.yaml", data)
    out = tmp_path / "data"
    result = build(recipe, out, 2)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
    assert f"{train}: record 5 (id train/4): empty source; remove it, or set data.drop_empty" in result.stderr
    assert not (out / "manifest.json").exists()
    (tmp_path / "null.jsonl").write_text("\n".join([*lines[:3], *lines[6:]]), encoding="utf-8")
    result = build(
        write_recipe(tmp_path / "null.yaml", data | {"train": [str(tmp_path / "null.jsonl")]}), tmp_path / "n"
    )
    assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
    assert "record 4 (id train/3): null target; remove it, or set data.drop_empty to leave out and" in result.stderr
    out = tmp_path / "dropped"
    recipe = write_recipe(tmp_path / "recipe.yaml", data | {"drop_empty": True, "drop_duplicates": True})
    result = build(recipe, out, 2)
    assert result.returncode == 0, result.stderr
    manifest = read_manifest(out)
    assert set(manifest.splits) == {"train", "test"}
    ledger = manifest.splits["train"].ledger
    assert (ledger.read, ledger.written) == (207, 200)
    assert ledger.dropped == {
        "blank line": 1, "empty source": 1, "empty target": 1, "null target": 1, "null source": 1, "duplicate": 2
    }  # fmt: skip
    test = [json.loads(line) for line in (out / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    assert test[3] == {"id": "test/8", "source": "translate: number 3 is here", "target": "Nummer 3 ist da"}
    train.write_text("\n".join([*lines[:150], '{"q": {"en": "y"}}']), encoding="utf-8")
    message = f"{train}:151: no field 'a'; present: q.en; set data.target_field"
    # Found on rank 0 while it trains a tokenizer, and on rank 1 in its unit (lines 129-151) with a given one.
    for name, options in (("bad", []), ("worse", ["--data.tokenizer", str(out / "tokenizer")])):
        result = build(recipe, tmp_path / name, 2, *options)
        assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1), result.stderr
        assert message in result.stderr
        assert not (tmp_path / name / "manifest.json").exists()


GOOD = [b'{"source": "number %d", "target": "Nummer %d"}' % (n, n) for n in range(60)]


def with_bad_line(line: bytes) -> bytes:
    """60 good records, the bad one as the 41st of the file."""
    return b"\n".join([*GOOD[:40], line, *GOOD[40:]])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl.gz", gzip.compress(with_bad_line(GOOD[0]), mtime=0)[:-30], "the file is truncated or damaged"),
        ("a.jsonl", with_bad_line('{"source": "\u00fc"}'.encode("latin-1")), ":41: not UTF-8 (byte 12)"),
        (
            "a.jsonl",
            with_bad_line(b'{"source": "a"}'),
            ":41: no field 'target'; present: source; set data.target_field",
        ),
        ("a.jsonl", b"", ": the file holds no record; remove it from the recipe or fill it"),
        ("a.jsonl", with_bad_line(b"\0" * 9), ":41: not a JSON object"),
        (
            "a.jsonl",
            with_bad_line(b'{"source": "a\\u0000", "target": "b"}'),
            ":41: field 'source' holds a NUL character",
        ),
        (
            "a.jsonl",
            with_bad_line(b'{"source": "%s"}' % (b"x" * 1_000_000)),
            ":41: a line of 1,000,015 bytes, more than",
        ),
        (
            "a.jsonl",
            with_bad_line('{"source": "\u200b", "target": "b"}'.encode()),
            "record 41 (id train/40): empty source",
        ),
        ("spiece.model", b"no model", "(spiece.model) cannot be read"),
        ("tokenizer.json", b"{}", "(tokenizer.json) cannot be read"),
    ],
    ids=["gzip", "utf-8", "field", "empty", "nuls", "nul", "long", "nothing", "sentencepiece", "tokenizer"],
)
def test_bad_inputs_are_one_line_and_publish_nothing(
    built: Path, tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    """From two ranks, the bad record in the half of the second. A full and a read-only disk have a test below."""
    (tmp_path / "good.jsonl").write_bytes(b"\n".join(GOOD))
    (tmp_path / name).write_bytes(content)
    is_text = name.startswith("a.")
    tokenizer = str(built / "tokenizer" if is_text else tmp_path)
    data = {"corpus": "files", "train": [str(tmp_path / (name if is_text else "good.jsonl"))], "tokenizer": tokenizer}
    recipe = write_recipe(tmp_path / "recipe.yaml", data | {"examples_per_block": 8, "blocks_per_shard": 1})
    result = build(recipe, tmp_path / "data", 2)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1), result.stderr
    place = tmp_path / name if is_text else f"the tokenizer in {tmp_path}"
    assert result.stderr.startswith(
        f"data_prep: {place}{'' if message[0] == ':' else ': ' if is_text else ' '}{message}"
    )
    assert not (tmp_path / "data/manifest.json").exists()
    if not is_text:
        assert [path.name for path in (tmp_path / "data").iterdir()] == []


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ({"vocab_sise": 9}, [], "data has no setting 'vocab_sise'; did you mean 'vocab_size'?"),
        ({"vocab_size": 9}, [], "data.vocab_size is 9: choose at least 64"),
        ({"corpus": "files"}, [], "data.train is empty"),
        ({"train": ["mine.jsonl"]}, [], 'data.train is given but data.corpus is "demo"'),
        ({"corpus": "files", "train": ["nowhere.jsonl"]}, [], "nowhere.jsonl: no such file"),
        ({"seed": "x"}, [], "seed"),
        ({}, ["--data.sed", "3"], "--data.sed"),
        ({"tokenizer": "nowhere"}, [], "nowhere: neither spiece.model nor tokenizer.json"),
        ({"corpus": "files", "train": ["hub:datasets/a/b/train.jsonl"]}, [], "all 40 digits of a commit"),
        ({"corpus": "files", "sets": [{"train": ["a"], "weight": 2}, {"train": ["b"]}]}, [], "two sets of one name"),
        ({"task": "spans"}, [], "data.task is 'spans': choose one of pairs, span_corruption"),
    ],
)
def test_mistakes_in_a_recipe_are_one_line(tmp_path: Path, data: dict, options: list[str], message: str) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", {**SMALL, **data})
    result = build(recipe, tmp_path / "data", 2 if options else 0, *options)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
    assert message in result.stderr


def test_the_full_disk_of_a_later_rank_is_told_as_what_it_is(recipe: Path, built: Path, tmp_path: Path) -> None:
    """It may pass by itself, unlike a bad record, so another exit code tells it."""
    out = tmp_path / "data"
    fails = [sys.executable, str(ROOT / "tests/faults/injected_build.py"), "10", "error"]  # of about 100 calls
    later = [*fails, *command(recipe, out, 0)[3:]]
    ranks = [str(MPIEXEC), "-n", "1", *command(recipe, out, 0), ":", "-n", "1", *later]
    result = subprocess.run(ranks, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert (result.returncode, result.stderr.count("\n")) == (1, 1), result.stderr
    assert result.stderr.startswith(f"failed: cannot write {out}/train/0000")
    assert build(recipe, out, 2).returncode == 0
    assert contents(out) == contents(built)


@pytest.mark.parametrize("ranks", [0, 2])
def test_a_full_disk_and_a_folder_without_permission_are_one_line(
    recipe: Path, built: Path, tmp_path: Path, ranks: int
) -> None:
    """A file system of 300 KiB, and one that is read-only: nothing is published, and more space finishes the build."""
    out = tmp_path / "small"
    out.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", out]).returncode:
        pytest.skip("needs the right to mount")
    try:
        result = build(recipe, out / "data", ranks)
        assert (result.returncode, result.stderr.count("\n")) == (1, 1), result.stderr
        assert "No space left on device; free some space and run again" in result.stderr
        assert not (out / "data/manifest.json").exists()
        subprocess.run(["mount", "-o", "remount,ro", out], check=True)
        result = build(recipe, out / "other", ranks)
        assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
        assert "Read-only file system; give write permission" in result.stderr
        subprocess.run(["mount", "-o", "remount,rw,size=50m", out], check=True)
        assert build(recipe, out / "data", 2).returncode == 0
        assert contents(out / "data") == contents(built)
    finally:
        subprocess.run(["umount", out], check=True)
