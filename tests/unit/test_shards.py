"""The format: what is written comes back, and no damage passes."""

from __future__ import annotations

import re
import subprocess
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.publish import publish_bytes
from data_prep.reader import Examples, SplitReader
from data_prep.shards import (
    FORMAT_VERSION,
    Block,
    Ledger,
    Manifest,
    Split,
    cut_block,
    decode_block,
    encode_block,
    make_shard,
    publish_index,
    read_manifest,
    unpack_blocks,
)

Row = tuple[list[int], list[int]]
ids = st.lists(st.integers(0, 65_535), min_size=1, max_size=9)


def block_of(rows: list[Row], dtype: type = np.uint16) -> Block:
    return Block.of([np.array(row[0], dtype) for row in rows], [np.array(row[1], dtype) for row in rows])


@given(st.lists(st.tuples(ids, ids), min_size=1, max_size=9), st.sampled_from([np.uint16, np.uint32]))
def test_a_block_comes_back(rows: list[Row], dtype: type) -> None:
    block = block_of(rows, dtype)
    again = decode_block(encode_block(block))
    assert again.source_ids.dtype == dtype
    for name in ("source_lengths", "target_lengths", "source_ids", "target_ids"):
        assert np.array_equal(getattr(again, name), getattr(block, name))


def test_every_flipped_bit_and_every_cut_of_a_block_is_found() -> None:
    payload = encode_block(block_of([([5, 6, 7], [8, 9]), ([1], [2, 3])]))
    for bit in range(8 * len(payload)):
        damaged = bytearray(payload)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError, match="here"):
            decode_block(bytes(damaged), "here")
    for size in range(len(payload)):
        with pytest.raises(ValueError, match="damaged"):
            decode_block(payload[:size])


def write_data(folder: Path, blocks: list[Block], compress: bool = False) -> Manifest:
    """A finished data directory of one shard."""
    shard = make_shard("train/000000.tar", blocks, compress)
    (folder / "train").mkdir(parents=True, exist_ok=True)
    publish_bytes(folder / shard.entry.path, shard.payload)
    count = shard.entry.examples
    ledger = Ledger(read=count, written=count, dropped={}, truncated={})
    split = Split((shard.entry,), (1,), publish_index(folder, "train", [shard.blocks]), ledger)
    sets = ({"name": "data", "weight": 0},)
    Manifest(FORMAT_VERSION, "hash", {"compress": compress}, (), {"pad_id": 0}, sets, {"train": split}).publish(folder)
    return read_manifest(folder)


BLOCKS = [block_of([([5, 6, 7], [8, 9]), ([1], [2, 3])]), block_of([([4, 4], [4])])]


@pytest.mark.parametrize("compress", [False, True])
def test_examples_come_back_by_their_place(tmp_path: Path, compress: bool) -> None:
    manifest = write_data(tmp_path, BLOCKS, compress)
    reader = SplitReader(tmp_path, manifest, "train")
    assert len(reader) == 3 == manifest.splits["train"].num_examples
    examples = reader.read(np.array([2, 0, 1, 0]))
    assert len(examples) == 4
    assert examples.source_ids.tolist() == [4, 4, 5, 6, 7, 1, 5, 6, 7]
    assert examples.source_offsets.tolist() == [0, 2, 5, 6, 9]
    assert examples.target_ids.tolist() == [4, 8, 9, 2, 3, 8, 9]
    assert examples.target_lengths.tolist() == [1, 2, 2, 2]
    assert manifest.splits["train"].shards[0].source_tokens == 6
    assert [reader.index[f"longest_{side}"].tolist() for side in ("source", "target", "pair")] == [
        [3, 2],
        [2, 1],
        [5, 3],
    ]


def test_a_large_block_is_cut_in_order() -> None:
    rows = [([n] * (n + 1), [n]) for n in range(7)]
    parts = list(cut_block(block_of(rows), 3))
    assert [len(part.source_lengths) for part in parts] == [3, 3, 1]
    whole = Block.joined(parts)
    assert encode_block(whole) == encode_block(block_of(rows))


@pytest.mark.parametrize("compress", [False, True])
def test_a_shard_is_plain_tar_and_its_bytes_depend_on_the_examples_only(tmp_path: Path, compress: bool) -> None:
    shard = make_shard("train/000000.tar", BLOCKS, compress)
    assert make_shard("train/000000.tar", BLOCKS, compress) == shard
    (tmp_path / "a.tar").write_bytes(shard.payload)
    listing = subprocess.run(["tar", "tf", tmp_path / "a.tar"], capture_output=True, text=True, check=True).stdout
    extension = "block.zst" if compress else "block"
    assert listing.split() == [f"000000-00000.{extension}", f"000000-00001.{extension}"]
    with tarfile.open(tmp_path / "a.tar") as tar:
        members = tar.getmembers()
    assert {(member.mtime, member.uid, member.gid, member.uname) for member in members} == {(0, 0, 0, "")}
    assert [(member.offset_data, member.size) for member in members] == [tuple(row[:2]) for row in shard.blocks]


@pytest.mark.parametrize("compress", [False, True])
def test_a_stock_webdataset_reader_yields_the_same_examples(tmp_path: Path, compress: bool) -> None:
    import webdataset

    manifest = write_data(tmp_path, BLOCKS, compress)
    dataset = webdataset.WebDataset(str(tmp_path / "train/000000.tar"), shardshuffle=False).compose(unpack_blocks)
    ours = SplitReader(tmp_path, manifest, "train").read(np.arange(3))
    rows = list(dataset)
    assert np.concatenate([row["source_ids"] for row in rows]).tolist() == ours.source_ids.tolist()
    assert [len(row["target_ids"]) for row in rows] == ours.target_lengths.tolist()
    assert [row["__key__"] for row in rows] == ["000000-00000/0", "000000-00000/1", "000000-00001/0"]


@pytest.mark.parametrize("compress", [False, True])
def test_every_flipped_bit_and_every_cut_of_a_shard_is_refused_or_changes_nothing(
    tmp_path: Path, compress: bool
) -> None:
    """Flips outside of blocks (tar headers, padding) change no example; all others name the shard and the block."""
    manifest = write_data(tmp_path, BLOCKS, compress)
    path = tmp_path / "train/000000.tar"
    good = path.read_bytes()
    expected = SplitReader(tmp_path, manifest, "train").read(np.arange(3))
    inside = np.zeros(len(good), dtype=bool)
    for offset, size, *_ in make_shard("train/000000.tar", BLOCKS, compress).blocks:
        inside[offset : offset + size] = True
    rng = np.random.Generator(np.random.Philox(3))
    places = np.concatenate([np.flatnonzero(inside), rng.integers(0, len(good), 300)])
    for place in places.tolist():
        damaged = bytearray(good)
        damaged[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        refused = read_or_refuse(tmp_path, manifest, expected)
        assert refused == bool(inside[place])
    for size in (0, 100, 520, 1030, 1560, len(good) - 1):
        path.write_bytes(good[:size])
        assert read_or_refuse(tmp_path, manifest, expected) == bool(inside[size:].any())
    path.unlink()
    with pytest.raises(ValueError, match=r"000000.tar: missing; run python -m data_prep repair"):
        SplitReader(tmp_path, manifest, "train").read(np.arange(3))


def read_or_refuse(folder: Path, manifest: Manifest, expected: Examples) -> bool:
    try:
        examples = SplitReader(folder, manifest, "train").read(np.arange(3))
    except ValueError as err:
        return bool(re.search(r"train/000000.tar: block [01] is damaged", str(err)))
    for name in ("source_ids", "source_offsets", "target_ids", "target_offsets"):
        assert np.array_equal(getattr(examples, name), getattr(expected, name))
    return False


def test_a_damaged_index_is_refused(tmp_path: Path) -> None:
    manifest = write_data(tmp_path, BLOCKS)
    path = tmp_path / "train/index.npy"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"index.npy: missing or damaged"):
        SplitReader(tmp_path, manifest, "train")


def test_publishing_leaves_no_temporary_file_and_replaces(tmp_path: Path) -> None:
    publish_bytes(tmp_path / "a", b"one")
    publish_bytes(tmp_path / "a", b"two")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"two"


def test_an_unfinished_folder_a_foreign_format_and_an_unknown_split_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no manifest.json.*not finished"):
        read_manifest(tmp_path)
    manifest = write_data(tmp_path, BLOCKS)
    with pytest.raises(ValueError, match="no split 'tset'; the build made train"):
        SplitReader(tmp_path, manifest, "tset")
    replace(manifest, format_version=99).publish(tmp_path)
    with pytest.raises(ValueError, match="format version 99"):
        read_manifest(tmp_path)


def test_the_ledger_refuses_a_lost_example() -> None:
    Ledger(read=3, written=2, dropped={"empty source": 1}, truncated={}).check("train")
    with pytest.raises(ValueError, match="3 records read, but 2 written"):
        Ledger(read=3, written=2, dropped={}, truncated={}).check("train")


def test_a_failed_write_leaves_nothing_and_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"cannot write .*/gone/a: No such file or directory; nothing was published"):
        publish_bytes(tmp_path / "gone/a", b"one")
    (tmp_path / "b").mkdir()
    with pytest.raises(OSError, match=r"cannot write .*/b: Is a directory"):
        publish_bytes(tmp_path / "b", b"one")
    assert [path.name for path in tmp_path.rglob("*")] == ["b"]
