"""How fast this machine is, in what a training step on CPUs is made of."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch

from data_prep.publish import sha256_of
from pipeline.rundir.files import write_atomic


def matmul_flops() -> float:
    """Matrix products of a few tokens with a layer of a large model, in bf16 (FLOP/s)."""
    a, b = torch.randn(96, 1024, dtype=torch.bfloat16), torch.randn(1024, 4096, dtype=torch.bfloat16)
    return 2 * a.shape[0] * b.numel() / _fastest_s(lambda: a @ b)


def copied_bytes_per_s() -> float:
    """Copies in memory."""
    source, target = torch.ones(2, 2**26)
    return source.nbytes / _fastest_s(lambda: target.copy_(source))


def written_bytes_per_s(folder: Path) -> float:
    """Written, synced, and read again for the checksum."""
    path, content = folder / "speed", b"1" * 2**28

    def write_and_read() -> None:
        write_atomic(path, content)
        sha256_of(path)

    try:
        return len(content) / _fastest_s(write_and_read, 2)
    finally:
        path.unlink()


def _fastest_s(run: Callable[[], object], num_rounds: int = 5) -> float:
    found = []
    for _ in range(num_rounds):
        started_at = time.perf_counter()
        run()
        found.append(time.perf_counter() - started_at)
    return min(found)
