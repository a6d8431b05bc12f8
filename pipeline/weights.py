"""What safetensors files say of the weights in them, without reading the weights."""

from __future__ import annotations

import json
from pathlib import Path

MAX_HEADER_BYTES = 100_000_000
"""Of a safetensors file, by its specification."""


def shapes_of(file: Path) -> dict[str, list[int]]:
    """Shapes of the tensors in a safetensors file, from its header alone: it may be larger than the memory.

    Raises:
        ValueError: it is shorter than its header says, or no safetensors file.
    """
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
    return {name: entry["shape"] for name, entry in entries.items()}


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model; none where it has weights of another kind."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file() or not index.is_file():
        return [path for path in [folder / "model.safetensors"] if path.is_file()]
    names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    return [folder / name for name in sorted(set(names))]
