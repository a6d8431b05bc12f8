"""The format: what is written comes back, and no damage passes."""

from __future__ import annotations

import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.shards import (
    FORMAT_VERSION,
    Block,
    Examples,
    Ledger,
    Manifest,
    ShardEntry,
    ShardWriter,
    Split,
    decode_block,
    encode_block,
    publish_bytes,
    read_manifest,
    read_split,
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


def write_shard(folder: Path, blocks: list[Block]) -> ShardEntry:
    folder.mkdir(exist_ok=True, parents=True)
    with ShardWriter(folder, "000000.tar") as writer:
        for block in blocks:
            writer.write(block)
    assert writer.entry is not None
    return writer.entry


def write_data(folder: Path, blocks: list[Block]) -> Manifest:
    entry = write_shard(folder / "train", blocks)
    ledger = Ledger(read=entry.examples, written=entry.examples, dropped={}, truncated={})
    splits = {"train": Split((entry,), ledger)}
    Manifest(FORMAT_VERSION, "hash", {}, (), {"pad_id": 0}, splits).publish(folder)
    return read_manifest(folder)


BLOCKS = [block_of([([5, 6, 7], [8, 9]), ([1], [2, 3])]), block_of([([4, 4], [4])])]


def test_a_split_comes_back_flat(tmp_path: Path) -> None:
    manifest = write_data(tmp_path, BLOCKS)
    examples = read_split(tmp_path, manifest, "train")
    assert isinstance(examples, Examples)
    assert len(examples) == 3 == manifest.splits["train"].num_examples
    assert examples.source_ids.tolist() == [5, 6, 7, 1, 4, 4]
    assert examples.source_offsets.tolist() == [0, 3, 4, 6]
    assert examples.target_ids.tolist() == [8, 9, 2, 3, 4]
    assert examples.target_lengths.tolist() == [2, 2, 1]
    assert manifest.splits["train"].shards[0].source_tokens == 6


def test_a_shard_is_plain_tar_and_the_same_bytes_whoever_writes(tmp_path: Path) -> None:
    first, second = write_shard(tmp_path / "a", BLOCKS), write_shard(tmp_path / "b", BLOCKS)
    assert (tmp_path / "a/000000.tar").read_bytes() == (tmp_path / "b/000000.tar").read_bytes()
    assert replace(second, path=first.path) == first
    with tarfile.open(tmp_path / "a/000000.tar") as tar:
        members = tar.getmembers()
    assert [member.name for member in members] == ["000000-00000.block", "000000-00001.block"]
    assert {(member.mtime, member.uid, member.gid, member.uname) for member in members} == {(0, 0, 0, "")}


def test_a_damaged_cut_or_missing_shard_is_refused(tmp_path: Path) -> None:
    manifest = write_data(tmp_path, BLOCKS)
    path = tmp_path / "train/000000.tar"
    good = path.read_bytes()
    for bad in (good[:-512], good[:600] + bytes([good[600] ^ 1]) + good[601:], b""):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match="size or sha256 differ"):
            read_split(tmp_path, manifest, "train")
    path.unlink()
    with pytest.raises(ValueError, match="missing"):
        read_split(tmp_path, manifest, "train")


def test_nothing_is_published_on_an_exception(tmp_path: Path) -> None:
    def interrupted() -> None:
        with ShardWriter(tmp_path, "000000.tar") as writer:
            writer.write(BLOCKS[0])
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        interrupted()
    assert list(tmp_path.iterdir()) == []


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
        read_split(tmp_path, manifest, "tset")
    replace(manifest, format_version=99).publish(tmp_path)
    with pytest.raises(ValueError, match="format version 99"):
        read_manifest(tmp_path)


def test_the_ledger_refuses_a_lost_example() -> None:
    Ledger(read=3, written=2, dropped={"empty source": 1}, truncated={}).check("train")
    with pytest.raises(ValueError, match="3 records read, but 2 written"):
        Ledger(read=3, written=2, dropped={}, truncated={}).check("train")
