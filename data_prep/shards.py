"""THE FORMAT: blocks of token ids in standard tar files, a sidecar beside each, and a manifest published last.

Block (little endian), one tar member, readable with tar and with a stock webdataset reader:

    magic "MTB1" | bytes per id (u32: 2 or 4) | examples N (u32) | source ids S (u32) | target ids T (u32)
    N source lengths (u16) | N target lengths (u16) | S source ids | T target ids | CRC32 of all before (u32)

A shard's bytes depend on its examples only: fixed times, owners and order, so any rank writes the same file.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import struct
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
BLOCK_EXTENSION = "block"
_MAGIC = b"MTB1"
_HEADER = struct.Struct("<4s4I")
_CRC = struct.Struct("<I")


# ---- publishing: a reader sees all of a file or nothing of it


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish_bytes(path: Path, payload: bytes) -> None:
    """Write a file at once: temporary name, fsync, rename, fsync of the folder."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    with temporary.open("wb") as file:
        file.write(payload)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    fsync_folder(path.parent)


def publish_json(path: Path, value: dict[str, Any]) -> None:
    """Publish a dict as JSON; the same dict gives the same bytes."""
    publish_bytes(path, (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode())


def is_temporary(path: Path) -> bool:
    """Whether a name is that of a file or folder that was never published."""
    return ".tmp-" in path.name


def sha256_of(path: Path) -> str:
    """The sha256 of a file as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- blocks


@dataclass(frozen=True)
class Block:
    """Examples back to back: ids uint16 or uint32 [sum of lengths], lengths uint16 [num_examples]."""

    source_lengths: np.ndarray
    target_lengths: np.ndarray
    source_ids: np.ndarray
    target_ids: np.ndarray

    @classmethod
    def of(cls, sources: Sequence[np.ndarray], targets: Sequence[np.ndarray]) -> Block:
        """Pack examples; needs at least one, and as many targets as sources."""
        assert 0 < len(sources) == len(targets)
        lengths = [np.array([len(ids) for ids in side], dtype=np.uint16) for side in (sources, targets)]
        return cls(lengths[0], lengths[1], np.concatenate(sources), np.concatenate(targets))


def encode_block(block: Block) -> bytes:
    """A block as bytes, see the top of the file."""
    ids = (block.source_ids, block.target_ids)
    lengths = (block.source_lengths, block.target_lengths)
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
        raise ValueError(
            f"{place}: the checksum does not match, the block is damaged; delete the shard and build again"
        )
    magic, width, num_examples, num_source, num_target = _HEADER.unpack_from(body)
    if magic != _MAGIC or width not in (2, 4):
        raise ValueError(f"{place}: not a block of format {FORMAT_VERSION} (magic {magic!r}, {width} bytes per id)")
    offset, arrays = _HEADER.size, []
    for dtype, count in (("<u2", num_examples), ("<u2", num_examples), (f"<u{width}", num_source)):
        arrays.append(np.frombuffer(body, dtype, count, offset))
        offset += arrays[-1].nbytes
    arrays.append(np.frombuffer(body, f"<u{width}", num_target, offset))
    return Block(*arrays)


# ---- shards


@dataclass(frozen=True)
class ShardEntry:
    """What the manifest says of one shard; `path` is relative to the manifest, `bytes` the size of the file."""

    path: str
    examples: int
    source_tokens: int
    target_tokens: int
    bytes: int
    sha256: str


class ShardWriter:
    """Collects blocks into one tar file, published at the end of the `with` block and not at all on an exception."""

    def __init__(self, folder: Path, name: str) -> None:
        # webdataset imports torch, which takes a second that only a rank that writes should pay.
        from webdataset import TarWriter

        self._path = folder / name
        self._key = self._path.stem
        self._buffer = io.BytesIO()  # a shard is a few MiB: whole in memory, so nothing half-written meets the disk
        self._tar = TarWriter(self._buffer, user="", group="", encoder=False, mtime=0)
        self._num_blocks = self._examples = self._source_tokens = self._target_tokens = 0
        self.entry: ShardEntry | None = None

    def write(self, block: Block) -> None:
        """Append one block."""
        self._tar.write({"__key__": f"{self._key}-{self._num_blocks:05d}", BLOCK_EXTENSION: encode_block(block)})
        self._num_blocks += 1
        self._examples += len(block.source_lengths)
        self._source_tokens += len(block.source_ids)
        self._target_tokens += len(block.target_ids)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tar.close()
        if kind is not None:
            return
        payload = self._buffer.getvalue()
        publish_bytes(self._path, payload)
        self.entry = ShardEntry(
            path=f"{self._path.parent.name}/{self._path.name}",
            examples=self._examples,
            source_tokens=self._source_tokens,
            target_tokens=self._target_tokens,
            bytes=len(payload),
            sha256=hashlib.sha256(payload).hexdigest(),
        )


def read_shard(folder: Path, shard: ShardEntry) -> bytes:
    """The bytes of a shard, equal to what was published; ValueError if size or sha256 differ or it is missing."""
    path = folder / shard.path
    if not path.is_file():
        raise ValueError(f"{path}: the manifest names this shard but it is missing; build the data again")
    payload = path.read_bytes()
    if len(payload) != shard.bytes or hashlib.sha256(payload).hexdigest() != shard.sha256:
        raise ValueError(f"{path}: size or sha256 differ from the manifest; remove it and build the data again")
    return payload


def blocks_of_shard(payload: bytes, place: str) -> Iterator[Block]:
    """The blocks of a shard's bytes, each checked against its CRC."""
    try:
        with tarfile.open(fileobj=io.BytesIO(payload)) as tar:
            for member in tar:
                block = payload[member.offset_data : member.offset_data + member.size]
                yield decode_block(block, f"{place}:{member.name}")
    except tarfile.TarError as err:
        raise ValueError(f"{place}: not a tar file ({err}); remove it and build again") from err


# ---- manifest


@dataclass(frozen=True)
class Ledger:
    """Conservation: read = written + the sum of dropped. `dropped` is by reason, `truncated` by side."""

    read: int
    written: int
    dropped: dict[str, int]
    truncated: dict[str, int]

    def check(self, split: str) -> None:
        """Refuse a split that lost or invented an example."""
        if self.read != self.written + sum(self.dropped.values()):
            raise ValueError(
                f"{split}: {self.read} records read, but {self.written} written and {self.dropped} dropped"
            )


@dataclass(frozen=True)
class Split:
    """One part of the data: its shards in order and its ledger."""

    shards: tuple[ShardEntry, ...]
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
    splits: dict[str, Split]

    @property
    def pad_id(self) -> int:
        """Id that fills sources."""
        return int(self.tokenizer["pad_id"])

    def publish(self, folder: Path) -> None:
        """Write manifest.json; call it last."""
        publish_json(folder / MANIFEST, asdict(self))


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a finished build. FileNotFoundError if the build is not finished, ValueError if it is foreign."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder}: no {MANIFEST}, so the data build is not finished; run python -m data_prep build"
        )
    raw = json.loads(path.read_text(encoding="utf-8"))
    if raw.get("format_version") != FORMAT_VERSION:
        version = raw.get("format_version")
        raise ValueError(f"{path}: format version {version}, this code reads {FORMAT_VERSION}; build the data again")
    splits = {
        name: Split(tuple(ShardEntry(**shard) for shard in split["shards"]), Ledger(**split["ledger"]))
        for name, split in raw.pop("splits").items()
    }
    return Manifest(**{**raw, "inputs": tuple(raw["inputs"])}, splits=splits)


@dataclass(frozen=True)
class Examples:
    """All examples of a split: example i is ids[offsets[i] : offsets[i + 1]]; offsets int64 [num_examples + 1]."""

    source_ids: np.ndarray
    source_offsets: np.ndarray
    target_ids: np.ndarray
    target_offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.source_offsets) - 1

    @property
    def source_lengths(self) -> np.ndarray:
        """Tokens of every source, int64 [num_examples]."""
        return np.diff(self.source_offsets)

    @property
    def target_lengths(self) -> np.ndarray:
        """Tokens of every target, int64 [num_examples]."""
        return np.diff(self.target_offsets)


def read_split(folder: Path, manifest: Manifest, split: str) -> Examples:
    """Load one split, checking every shard's sha256 and every block's CRC. ValueError on damage or an unknown split."""
    if split not in manifest.splits:
        raise ValueError(f"{folder}: no split {split!r}; the build made {', '.join(manifest.splits)}")
    blocks = [
        block
        for shard in manifest.splits[split].shards
        for block in blocks_of_shard(read_shard(Path(folder), shard), shard.path)
    ]
    if not blocks:
        raise ValueError(f"{folder}: split {split!r} holds no example")
    arrays = [
        np.concatenate([getattr(block, name) for block in blocks])
        for name in ("source_ids", "source_lengths", "target_ids", "target_lengths")
    ]
    return Examples(arrays[0], _offsets(arrays[1]), arrays[2], _offsets(arrays[3]))


def _offsets(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
