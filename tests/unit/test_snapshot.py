"""Copies of the trained state in host memory."""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch

from pipeline.checkpoints import format
from pipeline.checkpoints.format import SMALLEST_PIECE, Snapshot, piece_sizes


def test_pieces_are_those_that_pinned_memory_is_given_out_in():
    for num_elements in (0, 1, SMALLEST_PIECE, 3 * SMALLEST_PIECE + 7, 1_234_567_890):
        sizes = piece_sizes(num_elements)
        assert sum(sizes) == num_elements
        given = sum(1 << math.ceil(math.log2(size)) for size in sizes)
        assert given <= num_elements + SMALLEST_PIECE, "a single piece takes up to twice as much"


def test_a_copy_in_pieces_writes_the_file_of_the_slices_themselves(tmp_path, monkeypatch):
    monkeypatch.setattr(format, "SMALLEST_PIECE", 2)
    keys = ("weight", "exp_avg", "exp_avg_sq")
    slices = [
        SimpleNamespace(name=f"w{n}", shape=(n,), offset=0, tensors={key: torch.randn(n) for key in keys})
        for n in (5, 1, 30)
    ]
    for copied in (True, False):
        snapshot = Snapshot(slices, copied=copied)
        snapshot.take(slices)
        snapshot.write(tmp_path / str(copied))
    assert (tmp_path / "True").read_bytes() == (tmp_path / "False").read_bytes()
