"""The engine on real ranks against plain PyTorch: same draws, same losses, same weights; and its checkpoints.

The draws use different layers in every micro-batch and step. So these tests fail if gradients of layers that a step
did not use are left over from the step before (ZeRO-3 keeps them), if DeepSpeed clips by itself (it does unless told
not to), or if accumulation or the number of ranks changes the scale of a gradient.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.checkpoint import checkpoints, damage, full_weights
from tests.distributed import engine_ranks
from tests.ranks import run_ranks

TRAIN = "tests.distributed.engine_ranks:train"


@pytest.fixture(scope="module")
def references():
    return {size: engine_ranks.reference(size) for size in (2, 4)}


@pytest.mark.parametrize(("num_ranks", "num_micro_batches"), [(1, 2), (2, 2), (2, 4), (4, 4)])
def test_zero3_equals_plain_pytorch(references, tmp_path, num_ranks, num_micro_batches):
    losses, weights = references[num_micro_batches]
    ours = run_ranks(num_ranks, TRAIN, num_micro_batches=num_micro_batches, folder=str(tmp_path))
    assert all(rank == ours[0] for rank in ours)
    assert ours[0] == pytest.approx(losses, rel=1e-5)
    assert engine_ranks.largest_error(str(tmp_path), weights) < 2e-6


@pytest.mark.parametrize(("ranks_before", "ranks_after"), [(2, 2), (2, 1), (1, 2)])
def test_resume_continues_the_same_training(references, tmp_path, ranks_before, ranks_after):
    losses, weights = references[4]
    start = run_ranks(ranks_before, TRAIN, num_micro_batches=4, folder=str(tmp_path), last=4)
    rest = run_ranks(ranks_after, TRAIN, num_micro_batches=4, folder=str(tmp_path), first=4)
    assert start[0] + rest[0] == pytest.approx(losses, rel=1e-5)
    assert engine_ranks.largest_error(str(tmp_path), weights) < 2e-6
    if ranks_before == ranks_after:
        whole = tmp_path / "whole"
        assert run_ranks(2, TRAIN, num_micro_batches=4, folder=str(whole))[0] == start[0] + rest[0]
        assert engine_ranks.largest_error(str(tmp_path), full_weights(checkpoints(whole)[-1])) == 0


def test_a_checkpoint_holds_no_teacher_and_a_damaged_one_is_passed_over(tmp_path):
    run_ranks(2, TRAIN, num_micro_batches=2, folder=str(tmp_path), last=2)
    run_ranks(2, TRAIN, num_micro_batches=2, folder=str(tmp_path), first=2, last=4)
    old, new = checkpoints(tmp_path)
    assert all(name.startswith("modular.") for name in full_weights(new))
    manifest = json.loads((new / "manifest.json").read_text())
    assert manifest["cursor"] == {"epoch": 1, "window": 2, "step_in_window": 3}
    damaged = new / "rank_1.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-5] ^= 1
    damaged.write_bytes(content)
    assert damage(old) is None
    assert "rank_1.safetensors" in str(damage(new))
    # the run continues from step 2, the newest that verifies
    run_ranks(2, TRAIN, num_micro_batches=2, folder=str(tmp_path), first=2, last=3)


def test_what_was_not_published_is_not_read(tmp_path):
    run_ranks(1, TRAIN, num_micro_batches=2, folder=str(tmp_path), last=2)
    half = tmp_path / ".step_00000009.tmp"
    half.mkdir()
    (half / "rank_0.safetensors").write_bytes(b"half")
    unfinished = tmp_path / "step_00000008"
    unfinished.mkdir()
    run_ranks(1, TRAIN, num_micro_batches=2, folder=str(tmp_path), first=2, last=3)
    assert not half.exists()
    assert [Path(c).name for c in checkpoints(tmp_path)] == ["step_00000002", "step_00000003"]


def test_a_gradient_that_is_not_finite_stops_before_the_optimizer_moves():
    for said in run_ranks(2, "tests.distributed.engine_ranks:non_finite"):
        assert "not finite" in said
        assert "weights unchanged: True" in said
