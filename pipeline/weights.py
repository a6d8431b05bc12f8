"""What safetensors files say of the weights in them, without holding the weights in memory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MAX_HEADER_BYTES = 100_000_000
"""Of a safetensors file, by its specification."""
CHUNK_BYTES = 16 * 2**20


def shapes_of(file: Path) -> dict[str, list[int]]:
    """Shapes of the tensors in a safetensors file, from its header alone: it may be larger than the memory.

    Raises:
        ValueError: it is shorter than its header says, or no safetensors file.
    """
    return {name: entry["shape"] for name, entry in _entries(file)[0].items()}


def dtypes_of(file: Path) -> set[str]:
    """Types of the floating-point tensors in a safetensors file, by its own names, such as F32; raises what `shapes_of`
    does."""
    return {dtype for entry in _entries(file)[0].values() if "F" in (dtype := entry["dtype"])}


def refuse_packed(file: Path) -> None:
    """Refuse a safetensors file whose weights mean something only with the scales of a library for quantised models.

    Raises:
        ValueError: names the first of them; or what `shapes_of` raises.
    """
    for name, entry in _entries(file)[0].items():
        if entry["dtype"] in ("I8", "U8") or entry["dtype"].startswith("F8"):
            raise ValueError(f"{file} has {name} in {entry['dtype']}: quantised; take the model before that")


def same_bytes(files: Sequence[Path], name: str, other: str) -> bool:
    """Whether two tensors of a model have the same shape, type and bytes; raises what `shapes_of` does."""
    places = {each: (file, *_entries(file)) for file in files for each in (name, other) if each in _entries(file)[0]}
    (file, entries, start), (other_file, other_entries, other_start) = places[name], places[other]
    entry, other_entry = entries[name], other_entries[other]
    if (entry["dtype"], entry["shape"]) != (other_entry["dtype"], other_entry["shape"]):
        return False
    begin, end = entry["data_offsets"]
    with open(file, "rb") as ours, open(other_file, "rb") as theirs:
        ours.seek(start + begin)
        theirs.seek(other_start + other_entry["data_offsets"][0])
        sizes = (min(CHUNK_BYTES, end - place) for place in range(begin, end, CHUNK_BYTES))
        return all(ours.read(size) == theirs.read(size) for size in sizes)


def _entries(file: Path) -> tuple[dict[str, Any], int]:
    """What the header of a safetensors file says of each tensor, and where the bytes of the tensors begin."""
    try:
        with open(file, "rb") as content:
            length = int.from_bytes(content.read(8), "little")
            header = json.loads(content.read(length) if length < MAX_HEADER_BYTES else b"")
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        size = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except (ValueError, AttributeError, KeyError, TypeError):
        raise ValueError(f"{file} is damaged or no safetensors file: fetch it again") from None
    if file.stat().st_size != size:
        raise ValueError(f"{file} has {file.stat().st_size:,} bytes of {size:,}: fetch it again")
    return entries, 8 + length


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model; none where it has weights of another kind."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file() or not index.is_file():
        return [path for path in [folder / "model.safetensors"] if path.is_file()]
    return [folder / name for name in names_of_index(index)]


def names_of_index(path: Path) -> list[str]:
    """The files of weights that an index names, sorted.

    Raises:
        ValueError: it is none.
    """
    try:
        names = sorted({*json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()})
        "".join(names)  # all are texts
        return names
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} is damaged or no index of weights: fetch it again") from None
