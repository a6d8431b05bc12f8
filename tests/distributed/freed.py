"""Memory of a process that frees large tensors between small ones."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from pipeline.training.engine import join_world


def grown(file: Path) -> None:
    """Write to a file by how many bytes a rank's private memory has grown after 128 MiB of tensors were freed again."""
    join_world()
    torch.ones(2**22)  # freed at once: by itself the C library takes pieces below its size from the heap from now on
    before = _private_bytes()
    pieces = [(torch.ones(2**19), torch.ones(2**8)) for _ in range(64)]
    kept = [small for _, small in pieces]
    del pieces
    file.write_text(str(_private_bytes() - before))
    assert len(kept) == 64


def _private_bytes() -> int:
    found = re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text(encoding="ascii"))
    assert found is not None
    return int(found[1]) * 1024
