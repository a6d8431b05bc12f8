"""THE FORMAT of checkpoints: a folder of safetensors files, one of each rank, and a sealed manifest.

    step_00000400/
        rank_00000.safetensors    slices (name, start..stop of the flattened parameter): fp32 weight and AdamW moments
        manifest.json             step, cursor, sizes and sha256 of the files, what the run was started with

A checkpoint holds nothing of the teacher but its hash, and nothing of it is ever unpickled. Slices are put together by
name and offset, so neither the number of ranks nor the ZeRO mode that wrote them matters to who reads them.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open

from data_prep.publish import discard, sha256_of, unused_name

FORMAT_VERSION = 2
CHUNK_BYTES = 2**24
SMALLEST_PIECE = 2**18
"""Elements of a part of a snapshot that is worth an allocation of its own."""


class Slice(Protocol):
    """A rank's share of one trainable parameter; see pipeline.training.engine.ParameterSlice."""

    name: str
    shape: tuple[int, ...]
    offset: int
    tensors: dict[str, torch.Tensor]


class Snapshot:
    """A copy of this rank's slices in host memory, laid out as the file it will be: 12 bytes a trainable parameter of
    the rank, allocated once. Pinned where the slices live on a GPU, so that copying runs at the speed of the bus.

    Args:
        copied: False takes no copy: the slices must stay as they are until they are written.
    """

    def __init__(self, slices: Sequence[Slice], *, copied: bool = True) -> None:
        index: dict[str, Any] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for part in slices:
            count = part.tensors["weight"].numel()
            index[part.name] = {"shape": part.shape, "start": part.offset, "stop": part.offset + count}
            for key, tensor in part.tensors.items():
                assert tensor.dtype == torch.float32, f"{key} of {part.name} is {tensor.dtype}"
                assert tensor.shape == (count,), f"{key} of {part.name} is not flat"
                shapes[f"{key}/{part.name}"] = (count,)
        self._header, _ = fp32_layout(shapes, {"index": json.dumps(index)})
        size = sum(map(math.prod, shapes.values()))
        on_gpu = any(tensor.is_cuda for part in slices for tensor in part.tensors.values())
        sizes = piece_sizes(size) if copied else []
        self._pieces = [torch.empty(each, dtype=torch.float32, pin_memory=on_gpu) for each in sizes]
        self._copied, self._on_gpu = copied, on_gpu
        self._tensors: list[torch.Tensor] = []

    @torch.no_grad()
    def take(self, slices: Sequence[Slice]) -> None:
        """Copy the slices as they are now; returns when all is in host memory."""
        tensors = [tensor for part in slices for tensor in part.tensors.values()]
        if not self._copied:
            self._tensors = tensors
            return
        pieces, room = iter(self._pieces), torch.empty(0)
        for tensor in tensors:
            while len(tensor):
                room = room if len(room) else next(pieces)
                count = min(len(room), len(tensor))
                room[:count].copy_(tensor[:count], non_blocking=True)
                room, tensor = room[count:], tensor[count:]
        self._tensors = self._pieces
        if self._on_gpu:
            torch.cuda.current_stream().synchronize()

    def write(self, path: Path) -> dict[str, Any]:
        """Write the safetensors file, make it durable, and return its entry in the manifest.

        The checksum is of what was meant to be written: it is taken from memory, not from the file. The interpreter's
        lock is free nearly all the time, so training runs on. (The library's writer would copy every tensor first.)
        """
        digest, size = hashlib.sha256(), 0
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            for chunk in self._chunks():
                digest.update(chunk)
                size += len(chunk)
                while chunk:
                    chunk = chunk[os.write(descriptor, chunk) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        return {"bytes": size, "sha256": digest.hexdigest()}

    def _chunks(self) -> Iterator[memoryview]:
        yield memoryview(self._header)
        for tensor in filter(torch.Tensor.numel, self._tensors):
            part = memoryview(tensor.cpu().numpy().data).cast("B")
            for first in range(0, len(part), CHUNK_BYTES):
                yield part[first : first + CHUNK_BYTES]


def piece_sizes(num_elements: int) -> list[int]:
    """Elements of the allocations that a snapshot is made of: powers of two, because pinned memory of another size
    takes as much as the next one, and one last piece of what is left."""
    sizes = []
    while num_elements >= SMALLEST_PIECE:
        sizes.append(1 << (num_elements.bit_length() - 1))
        num_elements -= sizes[-1]
    return [*sizes, num_elements] if num_elements else sizes


def fp32_layout(shapes: Mapping[str, Sequence[int]], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """What a safetensors file of fp32 tensors starts with, and at which byte of the file each of them starts."""
    header: dict[str, Any] = {"__metadata__": metadata}
    position = 0
    for name, shape in shapes.items():
        end = position + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # data starts at a multiple of 8 bytes
    before = len(text).to_bytes(8, "little") + text
    return before, {name: len(before) + header[name]["data_offsets"][0] for name in shapes}


def rank_file(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


def checkpoint_name(step: int) -> str:
    return f"step_{step:08d}"


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def checkpoints(folder: Path) -> list[Path]:
    """Published checkpoints, oldest first. What is being written or removed has a name that starts with a dot."""
    return sorted((path.parent for path in folder.glob("step_*/manifest.json")), key=step_of)


def remove_checkpoint(checkpoint: Path) -> None:
    """Remove a published checkpoint so that no reader ever sees a part of it."""
    hidden = unused_name(checkpoint.with_name(f".{checkpoint.name}.old.tmp"))
    checkpoint.rename(hidden)
    discard(hidden)


def seal(manifest: dict[str, Any]) -> bytes:
    """Bytes of a manifest with a checksum over all of it."""
    text = json.dumps(manifest, sort_keys=True)
    return json.dumps({**manifest, "checksum": hashlib.sha256(text.encode()).hexdigest()}, sort_keys=True).encode()


def unseal(content: bytes) -> dict[str, Any]:
    """The manifest in these bytes.

    Raises:
        ValueError: any of them has changed since they were sealed, or another version of this code wrote them.
    """
    try:
        manifest = json.loads(content)
        del manifest["checksum"]
    except (ValueError, KeyError, TypeError):
        raise ValueError("manifest.json has changed since it was written") from None
    # compared as bytes: some changes, such as 1e-3 to 1E-3, mean the same in JSON
    if seal(manifest) != content:
        raise ValueError("manifest.json has changed since it was written")
    if manifest["format"] != FORMAT_VERSION:
        raise ValueError(f"manifest.json is of format {manifest['format']}; this code reads {FORMAT_VERSION}")
    return manifest


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a published checkpoint; see unseal."""
    return unseal((checkpoint / "manifest.json").read_bytes())


def damage(checkpoint: Path, part: int = 0, num_parts: int = 1) -> str | None:
    """What is wrong with a published checkpoint, or None when the manifest is sealed and every file has its size and
    sha256. With num_parts the files are divided among as many callers, and this one looks at every num_parts-th."""
    try:
        files = read_manifest(checkpoint)["files"]
        for name in sorted(files)[part::num_parts]:
            path = checkpoint / name
            if not path.is_file():
                return f"{name} is missing"
            size = path.stat().st_size
            if size != files[name]["bytes"]:
                return f"{name} has {size} bytes of {files[name]['bytes']}"
            if sha256_of(path) != files[name]["sha256"]:
                return f"{name} has changed since it was written"
    except (ValueError, OSError) as error:
        return str(error)
    return None


@dataclass(frozen=True)
class StoredSlice:
    """Elements start..stop of a flattened parameter, as one rank wrote them."""

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    file: Any

    def read(self, key: str, start: int, stop: int) -> torch.Tensor:
        """Elements start..stop of the weight or a moment; both within this slice."""
        return self.file.get_slice(f"{key}/{self.name}")[start - self.start : stop - self.start]


def stored_slices(checkpoint: Path) -> Iterator[StoredSlice]:
    """Every slice of every rank's file; each can be read until the next is asked for."""
    for name in sorted(read_manifest(checkpoint)["files"]):
        with safe_open(checkpoint / name, framework="pt") as file:
            for parameter, entry in json.loads(file.metadata()["index"]).items():
                yield StoredSlice(parameter, tuple(entry["shape"]), entry["start"], entry["stop"], file)


def full_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All trained weights of a checkpoint in fp32, put together from every rank's slices."""
    weights: dict[str, torch.Tensor] = {}
    missing: dict[str, int] = {}
    for stored in stored_slices(checkpoint):
        flat = weights.setdefault(stored.name, torch.empty(stored.shape, dtype=torch.float32)).view(-1)
        flat[stored.start : stored.stop] = stored.read("weight", stored.start, stored.stop)
        missing[stored.name] = missing.get(stored.name, flat.numel()) - (stored.stop - stored.start)
    check_complete(checkpoint, missing)
    return weights


def write_weights(checkpoint: Path, path: Path, name_of: Callable[[str], str]) -> None:
    """Write all trained weights of a checkpoint into one safetensors file in fp32, slice by slice: host memory never
    holds more than one slice.

    Args:
        name_of: name of a weight in the file, by its name in the checkpoint.
    """
    shapes = {stored.name: stored.shape for stored in stored_slices(checkpoint)}
    header, starts = fp32_layout({name_of(name): shapes[name] for name in sorted(shapes)}, {"format": "pt"})
    missing = {name: math.prod(shape) for name, shape in shapes.items()}
    with open(path, "wb") as file:
        file.write(header)
        for stored in stored_slices(checkpoint):
            file.seek(starts[name_of(stored.name)] + 4 * stored.start)
            file.write(stored.read("weight", stored.start, stored.stop).numpy().data)
            missing[stored.name] -= stored.stop - stored.start
    check_complete(checkpoint, missing)


@torch.no_grad()
def fill(slices: Iterable[Slice], checkpoint: Path) -> None:
    """Copy a checkpoint's weights and moments into these slices, whatever ranks wrote them."""
    wanted = {part.name: part for part in slices}
    missing = {name: part.tensors["weight"].numel() for name, part in wanted.items()}
    for stored in stored_slices(checkpoint):
        part = wanted.get(stored.name)
        if part is None:
            continue
        assert stored.shape == part.shape, f"{part.name} is {stored.shape} in the checkpoint, {part.shape} in the model"
        start = max(stored.start, part.offset)
        stop = min(stored.stop, part.offset + part.tensors["weight"].numel())
        if start >= stop:
            continue
        for key, target in part.tensors.items():
            target[start - part.offset : stop - part.offset] = stored.read(key, start, stop).to(target.device)
        missing[part.name] -= stop - start
    check_complete(checkpoint, missing)


def check_complete(checkpoint: Path, missing: dict[str, int]) -> None:
    lacking = [name for name, count in missing.items() if count]
    assert not lacking, f"{checkpoint} lacks parts of {lacking}"
