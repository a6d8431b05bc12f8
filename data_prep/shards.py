"""THE FORMAT: blocks of token ids in standard tar files, an index, and a manifest published last (see FORMAT.md).

Block (little endian), one tar member, readable with tar and with a stock webdataset reader:

    magic "MTB1" | bytes per id (u32: 2 or 4) | examples N (u32) | source ids S (u32) | target ids T (u32)
    N source lengths (u16) | N target lengths (u16) | S source ids | T target ids | CRC32 of all before (u32)

A shard's bytes depend on its examples only: fixed times, owners and order, so any rank writes the same file.
"""

from __future__ import annotations

import hashlib
import io
import json
import struct
import sys
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from backports import zstd

from data_prep.publish import publish_bytes, publish_json

FORMAT_VERSION = 3
READABLE = (2, FORMAT_VERSION)  # shards of 2 are the same; builds of it knew fewer settings and other tokenizer files
MANIFEST = "manifest.json"
BLOCK, BLOCK_ZSTD = "block", "block.zst"  # extensions of the members of a shard
_MAGIC = b"MTB1"
_HEADER = struct.Struct("<4s4I")
_CRC = struct.Struct("<I")


# ---- blocks


@dataclass(frozen=True)
class Block:
    """Examples back to back: ids uint16 or uint32 [sum of lengths], lengths uint16 [num_examples]."""

    source_lengths: np.ndarray
    target_lengths: np.ndarray
    source_ids: np.ndarray
    target_ids: np.ndarray

    @property
    def lengths(self) -> tuple[np.ndarray, np.ndarray]:
        """Lengths of the sources and of the targets."""
        return self.source_lengths, self.target_lengths

    @classmethod
    def of(cls, sources: Sequence[np.ndarray], targets: Sequence[np.ndarray]) -> Block:
        """Pack examples; needs at least one, and as many targets as sources."""
        assert 0 < len(sources) == len(targets)
        lengths = [np.array([len(ids) for ids in side], dtype=np.uint16) for side in (sources, targets)]
        return cls(lengths[0], lengths[1], np.concatenate(sources), np.concatenate(targets))

    @classmethod
    def joined(cls, blocks: Sequence[Block]) -> Block:
        """Several blocks of one id type as one; none gives a block without examples."""
        if not blocks:
            none = np.empty(0, dtype=np.uint16)
            return cls(none, none, none, none)
        names = ("source_lengths", "target_lengths", "source_ids", "target_ids")
        return cls(*(np.concatenate([getattr(block, name) for block in blocks]) for name in names))


def encode_block(block: Block) -> bytes:
    """A block as bytes, see the top of the file."""
    ids = (block.source_ids, block.target_ids)
    lengths = block.lengths
    width = ids[0].dtype.itemsize
    assert ids[0].dtype in (np.uint16, np.uint32), "ids are uint16 or uint32"
    assert ids[0].dtype == ids[1].dtype, "both sides have the same type"
    assert all(int(n.sum()) == len(i) for n, i in zip(lengths, ids, strict=True)), "lengths must add up to the ids"
    header = _HEADER.pack(_MAGIC, width, len(lengths[0]), len(ids[0]), len(ids[1]))
    arrays = [n.astype("<u2").tobytes() for n in lengths] + [i.astype(f"<u{width}").tobytes() for i in ids]
    body = b"".join((header, *arrays))
    return body + _CRC.pack(zlib.crc32(body))


def decode_block(payload: bytes, place: str = "block") -> Block:
    """The inverse of encode_block. Any damage (cut, flipped bit, foreign bytes) raises ValueError naming `place`."""
    body, crc = payload[: -_CRC.size], payload[-_CRC.size :]
    if len(body) < _HEADER.size or zlib.crc32(body) != _CRC.unpack(crc)[0]:
        raise ValueError(f"{place}: the checksum does not match, the block is damaged; run python -m data_prep repair")
    magic, width, num_examples, num_source, num_target = _HEADER.unpack_from(body)
    if magic != _MAGIC or width not in (2, 4):
        raise ValueError(f"{place}: not a block (magic {magic!r}, {width} bytes per id)")
    offset, arrays = _HEADER.size, []
    for dtype, count in (("<u2", num_examples), ("<u2", num_examples), (f"<u{width}", num_source)):
        arrays.append(np.frombuffer(body, dtype, count, offset))
        offset += arrays[-1].nbytes
    arrays.append(np.frombuffer(body, f"<u{width}", num_target, offset))
    return Block(*arrays)


# ---- shards

INDEX_COLUMNS = (
    "shard", "offset", "bytes", "crc32", "examples", "source_tokens", "target_tokens", "longest_source",
    "longest_target", "longest_pair",
)  # fmt: skip
"""One row of int64 a block: the number of its shard in the split, where its bytes lie in that file, the CRC32 of those
bytes, how much it holds, and its longest source, target and sum of both in tokens."""


@dataclass(frozen=True)
class ShardEntry:
    """What the manifest says of one shard; `path` is relative to the manifest, `bytes` the size of the file."""

    path: str
    examples: int
    source_tokens: int
    target_tokens: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Shard:
    """A shard ready to publish: the bytes of the file and, by block, the columns of INDEX_COLUMNS after the first."""

    entry: ShardEntry
    payload: bytes
    blocks: list[list[int]]


def cut_block(block: Block, examples_per_block: int) -> Iterator[Block]:
    """A large block as blocks of at most `examples_per_block`, in order."""
    source, target = (np.concatenate(([0], np.cumsum(n, dtype=np.int64))) for n in block.lengths)
    for start in range(0, len(block.source_lengths), examples_per_block):
        stop = min(start + examples_per_block, len(block.source_lengths))
        yield Block(
            block.source_lengths[start:stop],
            block.target_lengths[start:stop],
            block.source_ids[source[start] : source[stop]],
            block.target_ids[target[start] : target[stop]],
        )


@cache
def _tar_writer() -> Any:
    """webdataset.TarWriter. Where torch is not loaded already, webdataset is imported as if torch were not installed,
    which it allows: nothing here needs torch, and importing it takes longer than writing some shards."""
    has_torch = "torch" in sys.modules
    if not has_torch:
        sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        from webdataset import TarWriter
    finally:
        if not has_torch:
            del sys.modules["torch"]
    return TarWriter


def make_shard(path: str, blocks: Iterable[Block], compress: bool = False) -> Shard:
    """Blocks as one tar file in memory (a shard is some MiB), `path` relative to the manifest."""
    buffer = io.BytesIO()
    tar = _tar_writer()(buffer, user="", group="", encoder=False, mtime=0)
    extension = BLOCK_ZSTD if compress else BLOCK
    rows: list[list[int]] = []
    for number, block in enumerate(blocks):
        member = encode_block(block)
        if compress:
            member = zstd.compress(member, level=3)
        tar.write({"__key__": f"{Path(path).stem}-{number:05d}", extension: member})
        source, target = (lengths.astype(np.int64) for lengths in block.lengths)
        sums = [len(source), int(source.sum()), int(target.sum())]
        longest = [int(source.max()), int(target.max()), int((source + target).max())]
        rows.append([len(member), zlib.crc32(member), *sums, *longest])
    tar.close()
    payload = buffer.getvalue()
    with tarfile.open(fileobj=io.BytesIO(payload)) as made:
        rows = [[member.offset_data, *row] for member, row in zip(made, rows, strict=True)]
    examples, source_tokens, target_tokens = (sum(row[column] for row in rows) for column in (3, 4, 5))
    entry = ShardEntry(path, examples, source_tokens, target_tokens, len(payload), hashlib.sha256(payload).hexdigest())
    return Shard(entry, payload, rows)


def blocks_of_shard(payload: bytes, place: str) -> Iterator[Block]:
    """The blocks of a shard's bytes without its index, each checked; ValueError names shard and block."""
    try:
        with tarfile.open(fileobj=io.BytesIO(payload)) as tar:
            for member in tar:
                block = payload[member.offset_data : member.offset_data + member.size]
                yield decode_member(block, member.name.endswith(BLOCK_ZSTD), f"{place}:{member.name}")
    except tarfile.TarError as err:
        raise ValueError(f"{place}: not a tar file ({err}); run python -m data_prep repair") from err


def decode_member(member: bytes, compressed: bool, place: str) -> Block:
    """A tar member as a block. ValueError names `place` on any damage."""
    if compressed:
        try:
            member = zstd.decompress(member)
        except zstd.ZstdError as err:
            raise ValueError(f"{place}: damaged zstd data ({err}); run python -m data_prep repair") from err
    return decode_block(member, place)


def unpack_blocks(samples: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Examples of the samples of a stock reader: wds.WebDataset(urls, shardshuffle=False).compose(unpack_blocks).

    Yields {"__key__", "source_ids", "target_ids"}, ids as uint16 or uint32 [length], in the order of the shards.
    """
    for sample in samples:
        compressed = BLOCK_ZSTD in sample
        block = decode_member(sample[BLOCK_ZSTD if compressed else BLOCK], compressed, sample["__key__"])
        sources, targets = (np.cumsum(lengths, dtype=np.int64)[:-1] for lengths in block.lengths)
        rows = zip(np.split(block.source_ids, sources), np.split(block.target_ids, targets), strict=True)
        for number, (source, target) in enumerate(rows):
            yield {"__key__": f"{sample['__key__']}/{number}", "source_ids": source, "target_ids": target}


# ---- manifest


@dataclass(frozen=True)
class Ledger:
    """Conservation: read = written + the sum of dropped, in records. `dropped` is by reason, `truncated` by side."""

    read: int
    written: int
    dropped: dict[str, int]
    truncated: dict[str, int]
    unknown: dict[str, int] = field(default_factory=dict)
    """Tokens that stand for characters which the tokenizer does not know, by side."""
    whole: int = 0
    """Texts that were encoded whole instead of word by word."""

    def check(self, split: str) -> None:
        """Refuse a split that lost or invented a record."""
        if self.read != self.written + sum(self.dropped.values()):
            raise ValueError(
                f"{split}: {self.read} records read, but {self.written} written and {self.dropped} dropped"
            )


@dataclass(frozen=True)
class Split:
    """One part of the data: its shards in order, how many shards each set of the mixture has, its index, its ledger."""

    shards: tuple[ShardEntry, ...]
    shards_of_sets: tuple[int, ...]
    index: dict[str, Any]
    """path, bytes and sha256 of the index file: int64 [num_blocks, columns], a NumPy file."""
    ledger: Ledger

    @property
    def num_examples(self) -> int:
        """Examples in all shards."""
        return sum(shard.examples for shard in self.shards)


@dataclass(frozen=True)
class Manifest:
    """What a finished build made. Its presence says that all it names is complete."""

    format_version: int
    plan_hash: str
    settings: dict[str, Any]
    inputs: tuple[dict[str, Any], ...]
    tokenizer: dict[str, Any]
    sets: tuple[dict[str, Any], ...]
    """name, weight and licence of each set of the mixture, in the order of the shards; all weights 0: by size."""
    splits: dict[str, Split]

    @property
    def pad_id(self) -> int:
        """Id that fills sources."""
        return int(self.tokenizer["pad_id"])

    def publish(self, folder: Path) -> None:
        """Write manifest.json; call it last."""
        publish_json(folder / MANIFEST, asdict(self))


def publish_index(folder: Path, split: str, blocks_of_shards: Sequence[Sequence[Sequence[int]]]) -> dict[str, Any]:
    """Publish the index of a split from the rows of its shards; returns what the manifest says of it."""
    rows = [[shard, *row] for shard, blocks in enumerate(blocks_of_shards) for row in blocks]
    buffer = io.BytesIO()
    np.save(buffer, np.array(rows, dtype="<i8").reshape(len(rows), len(INDEX_COLUMNS)))
    payload = buffer.getvalue()
    path = f"{split}/index.npy"
    publish_bytes(folder / path, payload)
    return {"path": path, "bytes": len(payload), "sha256": hashlib.sha256(payload).hexdigest()}


def read_index(folder: Path, split: Split) -> np.ndarray:
    """The index of a split, int64 [num_blocks, columns]; ValueError if the file is not as published."""
    path = folder / split.index["path"]
    payload = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(payload).hexdigest() != split.index["sha256"]:
        raise ValueError(f"{path}: missing or damaged; run python -m data_prep repair {folder}")
    return np.load(io.BytesIO(payload))


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a finished build. FileNotFoundError if the build is not finished, ValueError if it is foreign."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder}: no {MANIFEST}, so the data build is not finished; run python -m data_prep build"
        )
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as err:
        raise ValueError(f"{path}: damaged ({err}); remove it and run python -m data_prep build") from err
    if raw.get("format_version") not in READABLE:
        version = raw.get("format_version")
        raise ValueError(f"{path}: format version {version}, this code reads {READABLE}; build the data again")
    splits = {
        name: Split(
            tuple(ShardEntry(**shard) for shard in split["shards"]),
            tuple(split["shards_of_sets"]),
            split["index"],
            Ledger(**split["ledger"]),
        )
        for name, split in raw.pop("splits").items()
    }
    return Manifest(**{**raw, "inputs": tuple(raw["inputs"]), "sets": tuple(raw["sets"])}, splits=splits)
