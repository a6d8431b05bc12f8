"""Data builds with real MPI ranks: the same bytes from any world, and from any kill followed by another run."""

from __future__ import annotations

import gzip
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from backports import zstd

from data_prep.encode import Encoder
from data_prep.reader import SplitReader
from data_prep.shards import read_manifest, unpack_blocks

ROOT = Path(__file__).resolve().parents[2]
MPIEXEC = Path(sys.executable).with_name("mpiexec")
SMALL = {"num_demo_pairs": 1500, "num_validation": 60, "num_test": 60, "examples_per_block": 32, "blocks_per_shard": 2}


def command(recipe: Path, out: Path, ranks: int, *options: str) -> list[str]:
    build = [sys.executable, "-m", "data_prep", "build", "--config", str(recipe), "--out", str(out), *options]
    return build if ranks == 0 else [str(MPIEXEC), "-n", str(ranks), *build]


def build(recipe: Path, out: Path, ranks: int = 0, *options: str) -> subprocess.CompletedProcess[str]:
    """ranks = 0 is one plain process."""
    return subprocess.run(
        command(recipe, out, ranks, *options), cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def write_recipe(path: Path, data: dict) -> Path:
    path.write_text(json.dumps({"name": "test", "teacher": {"any": 1}, "data": data}), encoding="utf-8")  # JSON is YAML
    return path


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe") / "recipe.yaml", SMALL)


@pytest.fixture(scope="module")
def built(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("built") / "data"
    result = build(recipe, out)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("data: train 1,380, validation 60, test 60 examples")
    return out


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


@pytest.mark.parametrize("moment", ["corpus", "tokenizer", "plan.json", "train/000002.json", "train/000015.json"])
def test_a_killed_build_is_finished_by_another_world(recipe: Path, built: Path, tmp_path: Path, moment: str) -> None:
    out = tmp_path / "data"
    process = subprocess.Popen(
        command(recipe, out, 2), cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while not (out / moment).exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.001)
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
    result = subprocess.run(launch, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
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


def family_of(process: subprocess.Popen) -> set[int]:
    """The process and everything it started, also ranks that moved to their own process group or session."""
    listing = subprocess.run(["ps", "-eo", "pid=,ppid=,sid="], capture_output=True, text=True, check=True).stdout
    rows = [tuple(map(int, row.split())) for row in listing.splitlines()]
    family = {process.pid} | {pid for pid, _, session in rows if session == process.pid}
    while more := {pid for pid, parent, _ in rows if parent in family} - family:
        family |= more
    return family


def kill_session(process: subprocess.Popen) -> None:
    """SIGKILL for the process and everything it started."""
    for pid in family_of(process):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()


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


def test_files_with_defects_are_counted_or_refused(tmp_path: Path) -> None:
    row = '{"q": {"en": "number %d is here"}, "a": "Nummer %d ist da"}'
    lines = [row % (n, n) for n in range(200)]
    lines += [lines[7], lines[150]]
    lines[3:3] = ["", '{"q": {"en": " "}, "a": "x"}', '{"q": {"en": "y"}, "a": ""}']
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
    out = tmp_path / "dropped"
    recipe = write_recipe(tmp_path / "recipe.yaml", data | {"drop_empty": True, "drop_duplicates": True})
    result = build(recipe, out, 2)
    assert result.returncode == 0, result.stderr
    manifest = read_manifest(out)
    assert set(manifest.splits) == {"train", "test"}
    ledger = manifest.splits["train"].ledger
    assert (ledger.read, ledger.written) == (205, 200)
    assert ledger.dropped == {"blank line": 1, "empty source": 1, "empty target": 1, "duplicate": 2}
    test = [json.loads(line) for line in (out / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    assert test[3] == {"id": "test/6", "source": "translate: number 3 is here", "target": "Nummer 3 ist da"}
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
        ("spiece.model", b"no model", ": damaged, or no tokenizer of this kind"),
        ("tokenizer.json", b"{}", ": damaged, or no tokenizer of this kind"),
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
    assert result.stderr.startswith(f"data_prep: {tmp_path / name}{message if message[0] == ':' else ': ' + message}")
    assert not (tmp_path / "data/manifest.json").exists()
    if not is_text:
        assert [path.name for path in (tmp_path / "data").iterdir()] == []


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ({"vocab_sise": 9}, [], "data has no setting 'vocab_sise'; did you mean 'vocab_size'?"),
        ({"vocab_size": 9}, [], "data.vocab_size is 9: choose a value from 64"),
        ({"corpus": "files"}, [], "data.train is empty"),
        ({"corpus": "files", "train": ["nowhere.jsonl"]}, [], "nowhere.jsonl: no such file"),
        ({"seed": "x"}, [], "seed"),
        ({}, ["--data.sed", "3"], "--data.sed"),
        ({"tokenizer": "nowhere"}, [], "nowhere: neither spiece.model nor tokenizer.json"),
        ({"corpus": "files", "train": ["hub:datasets/a/b/train.jsonl"]}, [], "all 40 digits of a commit"),
        ({"corpus": "files", "sets": [{"train": ["a"], "weight": 2}, {"train": ["b"]}]}, [], "two sets of one name"),
        ({"task": "spans"}, [], "data.task is 'spans': choose pairs or span_corruption"),
    ],
)
def test_mistakes_in_a_recipe_are_one_line(tmp_path: Path, data: dict, options: list[str], message: str) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", {**SMALL, **data})
    result = build(recipe, tmp_path / "data", 2 if options else 0, *options)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
    assert message in result.stderr


def verify_and_read(out: Path) -> dict[str, list[tuple[list[int], list[int]]]]:
    """Ids of every example by split, from a directory that verifies."""
    verify = [sys.executable, "-m", "data_prep", "verify", str(out)]
    result = subprocess.run(verify, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
    manifest, found = read_manifest(out), {}
    for name in manifest.splits:
        reader = SplitReader(out, manifest, name)
        found[name] = [
            (row["source_ids"].tolist(), row["target_ids"].tolist())
            for path in sorted((out / name).glob("*.tar"))
            for row in unpack_blocks({"__key__": "", "block": member} for member in members(path))
        ]
        assert len(found[name]) == len(reader)
    return found


def members(path: Path) -> list[bytes]:
    with tarfile.open(path) as tar:
        return [tar.extractfile(member).read() for member in tar]


def test_a_mixture_with_span_corruption(built: Path, tmp_path: Path) -> None:
    """Raw text beside pairs: every token of the text once, T5's lengths, the same masks from any world."""
    rows = [json.loads(line) for line in (built / "corpus/train.jsonl").read_text(encoding="utf-8").splitlines()]
    (tmp_path / "raw.txt").write_text("".join(row["source"] + "\n" for row in rows), encoding="utf-8")
    pairs = {"name": "pairs", "train": [str(built / "corpus/train.jsonl")], "prefix": "to {kind}: ", "weight": 1}
    pairs["licence"] = "ours"
    raw = {"name": "raw", "train": [str(tmp_path / "raw.txt")], "source_field": "text", "task": "span_corruption"}
    data = {"corpus": "files", "sets": [pairs, raw | {"weight": 3}], "vocab_size": 400, "max_source_tokens": 60}
    data |= {"examples_per_block": 32, "blocks_per_shard": 8}
    recipe = write_recipe(tmp_path / "recipe.yaml", data)
    for name, ranks in (("a", 0), ("b", 3)):
        result = build(recipe, tmp_path / name, ranks)
        assert result.returncode == 0, result.stderr
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    manifest = read_manifest(tmp_path / "a")
    assert manifest.sets == (
        {"name": "pairs", "weight": 1, "licence": "ours"},
        {"name": "raw", "weight": 3, "licence": ""},
    )
    first_shards = manifest.splits["train"].shards_of_sets[0]
    num_pairs = sum(shard.examples for shard in manifest.splits["train"].shards[:first_shards])
    assert num_pairs == len(rows)
    encoder = Encoder(tmp_path / "a/tokenizer", 9, 9)
    sentinels = encoder.sentinels(3).tolist()
    examples = verify_and_read(tmp_path / "a")["train"][num_pairs:]
    plain = encoder.tokens([row["source"] for row in rows])
    restored: list[int] = []
    for source, target in examples:
        assert source[-1] == target[-1] == encoder.info.eos_id
        parts = iter(split_at(target[:-1], sentinels))
        assert next(parts) == []
        masked = dict(zip([i for i in target if i in sentinels], parts, strict=True))
        restored += [token for i in source[:-1] for token in masked.get(i, [i])]
    assert {len(source) for source, _ in examples[:5]} == {60}
    eos = encoder.info.eos_id  # may end a unit whose last segment would be a single token
    assert [i for i in restored if i != eos] == plain.tolist()


def split_at(ids: list[int], marks: list[int]) -> list[list[int]]:
    parts: list[list[int]] = [[]]
    for each in ids:
        if each in marks:
            parts.append([])
        else:
            parts[-1].append(each)
    return parts


def test_every_source_gives_the_same_shards(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """1,000 pairs as JSONL, gzip, zstd, CSV, TSV, Parquet, a folder saved by `datasets`, and fetched from a hub."""
    import datasets

    rows = [json.loads(line) for line in (built / "corpus/train.jsonl").read_text(encoding="utf-8").splitlines()][:1000]
    table = datasets.Dataset.from_list(
        [{"id": row["id"], "source": row["source"], "target": row["target"]} for row in rows]
    )
    table.to_json(tmp_path / "a.jsonl")
    table.to_csv(tmp_path / "a.csv")
    table.to_csv(tmp_path / "a.tsv", sep="\t")
    table.to_parquet(tmp_path / "a.parquet")
    table.save_to_disk(tmp_path / "saved", num_shards=2)
    text = (tmp_path / "a.jsonl").read_bytes()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(text))
    (tmp_path / "a.jsonl.zst").write_bytes(zstd.compress(text))
    commit = "c0ffee" * 6 + "cafe"
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    fetched = tmp_path / f"cache/datasets--owner--pairs/snapshots/{commit}/data"
    fetched.mkdir(parents=True)
    shutil.copy(tmp_path / "a.parquet", fetched / "train-0.parquet")
    names = ("a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.csv", "a.tsv", "a.parquet", "saved")
    inputs = {name: str(tmp_path / name) for name in names}
    inputs["hub"] = f"hub:datasets/owner/pairs@{commit}/data/train-*.parquet"
    hashes = {}
    for name, train in inputs.items():
        data = {"corpus": "files", "train": [train], "tokenizer": str(built / "tokenizer")}
        out = tmp_path / f"data-{name}"
        result = build(write_recipe(tmp_path / "recipe.yaml", data), out)
        assert result.returncode == 0, result.stderr
        hashes[name] = [shard.sha256 for shard in read_manifest(out).splits["train"].shards]
    assert len(set(map(tuple, hashes.values()))) == 1, hashes


def test_a_full_disk_and_a_folder_without_permission_are_one_line(recipe: Path, built: Path, tmp_path: Path) -> None:
    """A file system of 300 KiB, and one that is read-only: nothing is published, and more space finishes the build."""
    out = tmp_path / "small"
    out.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", out]).returncode:
        pytest.skip("needs the right to mount")
    try:
        result = build(recipe, out / "data")
        assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
        assert "No space left on device; free some space and run again" in result.stderr
        assert not (out / "data/manifest.json").exists()
        subprocess.run(["mount", "-o", "remount,ro", out], check=True)
        result = build(recipe, out / "other")
        assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
        assert "Read-only file system; give write permission" in result.stderr
        subprocess.run(["mount", "-o", "remount,rw,size=50m", out], check=True)
        assert build(recipe, out / "data", 2).returncode == 0
        assert contents(out / "data") == contents(built)
    finally:
        subprocess.run(["umount", out], check=True)


def test_importing_the_programs_is_light() -> None:
    probe = "import sys, data_prep.__main__, data_prep.build, data_prep.verify; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", probe], cwd=ROOT, check=False).returncode == 0
