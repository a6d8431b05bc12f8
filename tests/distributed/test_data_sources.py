"""Data builds from sources of every kind, and of mixtures with span corruption: the same shards, no token lost."""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from backports import zstd

from data_prep.encode import Encoder
from data_prep.reader import SplitReader
from data_prep.shards import read_manifest, unpack_blocks
from tests.builds import ROOT, build, contents, write_recipe


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
    """1,000 pairs as JSONL, gzip, zstd, CSV, TSV, Parquet, folders that `datasets` saved (one table, a dictionary of
    parts, a selection), and fetched from a hub: files of a set, and a whole set."""
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
    doubled = datasets.concatenate_datasets([table, table])
    doubled.select(range(1000, 2000)).save_to_disk(tmp_path / "selected")
    datasets.DatasetDict({"test": table.select(range(9)), "train": table}).save_to_disk(tmp_path / "parts")
    text = (tmp_path / "a.jsonl").read_bytes()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(text))
    (tmp_path / "a.jsonl.zst").write_bytes(zstd.compress(text))
    commit = "c0ffee" * 6 + "cafe"
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    fetched = tmp_path / f"cache/datasets--owner--pairs/snapshots/{commit}/data"
    fetched.mkdir(parents=True)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "tables"))
    shutil.copy(tmp_path / "a.parquet", fetched / "train-0.parquet")
    names = ("a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.csv", "a.tsv", "a.parquet", "saved", "selected", "parts")
    inputs = {name: str(tmp_path / name) for name in names}
    inputs["hub"] = f"hub:datasets/owner/pairs@{commit}/data/train-*.parquet"
    inputs["hub-set"] = f"hub:datasets/owner/pairs@{commit}"
    inputs["hub-part"] = f"hub:datasets/owner/pairs@{commit}#train"
    hashes = {}
    for name, train in inputs.items():
        data = {"corpus": "files", "train": [train], "tokenizer": str(built / "tokenizer")}
        out = tmp_path / f"data-{name}"
        result = build(write_recipe(tmp_path / "recipe.yaml", data), out)
        assert result.returncode == 0, result.stderr
        hashes[name] = [shard.sha256 for shard in read_manifest(out).splits["train"].shards]
    assert len(set(map(tuple, hashes.values()))) == 1, hashes
