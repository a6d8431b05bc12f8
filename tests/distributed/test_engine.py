"""The engine on real ranks against plain PyTorch: same draws, same losses, same weights; and its checkpoints.

The draws use different layers in every micro-batch and step. So these tests fail if gradients of layers that a step
did not use are left over from the step before (ZeRO-3 keeps them), if DeepSpeed clips by itself (it does unless told
not to), or if accumulation or the number of ranks changes the scale of a gradient.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pipeline.checkpoints.format import checkpoints, damage, full_weights
from pipeline.footprint.sharding import Sharding
from tests import forks
from tests.distributed import engine_ranks, freed
from tests.ranks import run_ranks
from tests.tiny import SPECIAL

TRAIN = "tests.distributed.engine_ranks:train"


@pytest.fixture(scope="module")
def references():
    return {size: engine_ranks.reference(size) for size in (2, 4)}


def check_weights(folder, expected):
    """Equal but for rounding. AdamW divides a gradient by its own size, so noise in the few smallest ones moves those
    weights by a share of the learning rate (3e-3); a leftover gradient or a wrong scale moves them all."""
    mean, largest = engine_ranks.errors(str(folder), expected)
    assert mean < 1e-7
    assert largest < 1e-3


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(losses, checkpoint folder) of an uninterrupted run on two ranks with two micro-batches each."""
    folder = tmp_path_factory.mktemp("whole")
    return run_ranks(2, TRAIN, num_micro_batches=4, folder=str(folder)), folder


def test_zero3_equals_plain_pytorch(references, whole):
    losses, weights = references[4]
    ours, folder = whole
    assert ours[0] == ours[1] == pytest.approx(losses, rel=1e-5)
    check_weights(folder, weights)


@pytest.mark.parametrize(
    ("ds_config", "num_ranks", "num_micro_batches"), [("zero3_cpu", 1, 2), ("zero3_cpu", 4, 4), ("zero2_cpu", 2, 4)]
)
def test_any_number_of_ranks_equals_plain_pytorch(references, tmp_path, ds_config, num_ranks, num_micro_batches):
    losses, weights = references[num_micro_batches]
    ours = run_ranks(num_ranks, TRAIN, num_micro_batches=num_micro_batches, folder=str(tmp_path), ds_config=ds_config)
    assert ours[0] == pytest.approx(losses, rel=1e-5)
    check_weights(tmp_path, weights)


@pytest.fixture(scope="module")
def several():
    """References whose micro-batches take three draws, each in a forward pass of its own, two of them independent."""
    settings = engine_ranks.settings_of(engine_ranks.NUM_STEPS, engine_ranks.NUM_LOCAL, engine_ranks.SEVERAL)
    return {size: engine_ranks.reference(size, settings) for size in (2, 4)}


@pytest.mark.parametrize(("num_ranks", "num_micro_batches"), [(1, 2), (2, 4), (4, 4)])
def test_draws_that_share_a_pass_equal_a_plain_pass_for_each(several, tmp_path, num_ranks, num_micro_batches):
    losses, weights = several[num_micro_batches]
    ours = run_ranks(
        num_ranks, TRAIN, num_micro_batches=num_micro_batches, folder=str(tmp_path), draws=engine_ranks.SEVERAL
    )
    assert ours[0] == pytest.approx(losses, rel=1e-5)
    check_weights(tmp_path, weights)


def test_bf16_follows_the_reference(references, tmp_path):
    """The configuration of GPUs, with fp32 master weights."""
    losses, weights = references[2]
    ours = run_ranks(2, TRAIN, num_micro_batches=2, folder=str(tmp_path), ds_config="zero3")
    assert ours[0] == pytest.approx(losses, rel=5e-3)
    assert engine_ranks.errors(str(tmp_path), weights)[0] < 1e-3


@pytest.mark.parametrize("kind", ["v1.0", "umt5", "bart", "m2m_100", "t5gemma2"])
def test_every_configuration_of_gpus_follows_the_reference_in_bf16(kind):
    """BART and M2M100 have buffers, which stage 3 leaves in fp32 and on the host; T5Gemma 2 must not round its
    positions."""
    losses, _ = engine_ranks.reference(2, engine_ranks.SHORT, kind=kind)
    names = ["zero2_replicated", "zero3_hpz", "zero3", "zero3_offload"]
    for ours in run_ranks(2, "tests.distributed.engine_ranks:in_bf16", kind=kind, ds_configs=names):
        for name, found in zip(names, ours, strict=True):
            assert found == pytest.approx(losses, rel=5e-3), name


def test_every_family_equals_plain_pytorch():
    """Weights as in `check_weights`."""
    modes, kinds = ["zero3_cpu", "zero2_cpu"], ["umt5", *SPECIAL, "t5gemma2"]
    for found in run_ranks(2, "tests.distributed.engine_ranks:by_family", kinds=kinds, ds_configs=modes):
        assert len(found) == 2 * len(kinds)
        limits = (1e-5, 1e-7, 1e-3)
        wrong = {name: each for name, each in found.items() if any(a >= b for a, b in zip(each, limits, strict=True))}
        assert wrong == {}


@pytest.fixture(scope="module", params=["zero3_cpu", "zero3"])
def first_pass(request):
    return request.param, run_ranks(2, "tests.distributed.engine_ranks:first_pass", ds_config=request.param)


def test_clipping_reaches_the_gradients_of_each_modular_layer_by_itself(first_pass):
    """Without fp32 accumulation DeepSpeed hands out copies of bf16 gradients, and clipping them does nothing."""
    limit = engine_ranks.SETTINGS.optim.max_grad_norm
    for before, after, _ in first_pass[1]:
        assert len(before) == 12
        assert max(before) > 2 * limit
        assert after == pytest.approx([min(norm, limit) for norm in before], rel=1e-3)


def test_released_weights_are_freed_but_where_linear_layers_are_plain(first_pass):
    """Those hold on to views of what was gathered: then nearly all of every modular layer lies on each rank."""
    ds_config, ranks = first_pass
    held = [share for *_, share in ranks]
    if ds_config == "zero3_cpu":
        assert min(held) > 0.5
    else:
        assert held == [0.0, 0.0]
    assert Sharding.of(ds_config, 2, 2).keeps_weights == (ds_config == "zero3_cpu")


def test_resume_continues_the_same_training(references, whole, tmp_path):
    """Bit for bit on the same ranks; equal to the reference through 2, 1 and 2 ranks again."""
    losses, weights = references[4]
    first = run_ranks(2, TRAIN, num_micro_batches=4, folder=str(tmp_path / "a"), last=4)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    rest = run_ranks(2, TRAIN, num_micro_batches=4, folder=str(tmp_path / "a"), first=4)
    assert first[0] + rest[0] == whole[0][0]
    assert engine_ranks.errors(str(tmp_path / "a"), full_weights(checkpoints(whole[1])[-1])) == (0, 0)
    alone = run_ranks(1, TRAIN, num_micro_batches=4, folder=str(tmp_path / "b"), first=4, last=5)
    again = run_ranks(2, TRAIN, num_micro_batches=4, folder=str(tmp_path / "b"), first=5)
    assert first[0] + alone[0] + again[0] == pytest.approx(losses, rel=1e-5)
    check_weights(tmp_path / "b", weights)


def test_a_checkpoint_holds_no_teacher_and_a_damaged_one_is_passed_over(tmp_path):
    run_ranks(2, TRAIN, num_micro_batches=2, folder=str(tmp_path), last=2)
    run_ranks(2, TRAIN, num_micro_batches=2, folder=str(tmp_path), first=2, last=4)
    old, new = checkpoints(tmp_path)
    assert all(name.startswith("modular.") for name in full_weights(new))
    manifest = json.loads((new / "manifest.json").read_text())
    assert manifest["cursor"] == {"epoch": 1, "window": 2, "step_in_window": 3}
    damaged = new / "rank_00001.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-5] ^= 1
    damaged.write_bytes(content)
    assert damage(old) is None
    assert "rank_00001.safetensors" in str(damage(new))
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


@pytest.mark.parametrize("draws", [engine_ranks.ONE, engine_ranks.SEVERAL], ids=len)
def test_configurations_continue_each_others_checkpoints(references, several, tmp_path, draws):
    """And each trains what plain PyTorch trains, weights and moments included."""
    losses, weights = {engine_ranks.ONE: references, engine_ranks.SEVERAL: several}[draws][4]
    turns = [("zero3", 2, False), ("zero2_replicated", 2, False), ("zero3_offload", 1, True)]
    turns += [("zero3_hpz", 1, True), ("zero3_hpz", 1, False)]  # more than one of them in a process
    ours = run_ranks(2, "tests.distributed.engine_ranks:modes_in_turn", folder=str(tmp_path), turns=turns, draws=draws)
    assert ours[0] == pytest.approx(losses, rel=1e-5)
    check_weights(tmp_path / "checkpoints", weights)


@pytest.mark.parametrize("ds_config", ["zero3_cpu", "zero2_cpu", "zero2_replicated", "zero3_offload"])
def test_norms_are_computed_once(ds_config):
    assert run_ranks(2, "tests.distributed.engine_ranks:norms", ds_config=ds_config) == [0, 0]


def test_a_gradient_that_is_not_finite_stops_before_the_optimizer_moves():
    for said in run_ranks(2, "tests.distributed.engine_ranks:non_finite", ds_config="zero3_cpu"):
        assert "gradients are not finite in encoder.0-1" in said
        assert "unchanged: True" in said


def test_greedy_outputs_do_not_depend_on_the_ranks():
    """Three micro-batches of different lengths on two ranks: one of them makes empty rounds to keep step."""
    expected = engine_ranks.greedy(under_engine=False)
    assert run_ranks(2, "tests.distributed.engine_ranks:greedy", under_engine=True) == [expected, expected]


def test_a_rank_gives_freed_tensors_back(tmp_path):
    """By itself the C library keeps them: gathered layers would take as much memory again as training."""
    assert forks.run_ranks(1, freed.grown, tmp_path / "grown") == [0]
    assert int((tmp_path / "grown").read_text()) < 2**24


@pytest.mark.parametrize("ds_config", ["zero3_cpu", "zero2_cpu"])
def test_a_closed_engine_leaves_nothing_in_memory(ds_config):
    """Else baselines that are trained one after the other in a process would pile up."""
    assert run_ranks(2, "tests.distributed.memory_ranks:left_after_closing", ds_config=ds_config) == [[], []]


def test_no_weight_is_read_outside_of_its_module():
    assert run_ranks(2, "tests.distributed.memory_ranks:kept_by_name", ds_config="zero3_cpu") == [0, 0]


def test_the_largest_gradient_goes_into_the_buffer(tmp_path):
    """One that does not is freed while it may still be sent."""
    small = {"zero_optimization": {"stage": 2, "reduce_bucket_size": 10, "overlap_comm": False}}
    (tmp_path / "small.json").write_text(json.dumps(small))
    found = run_ranks(2, "tests.distributed.memory_ranks:room_for_a_gradient", ds_config=str(tmp_path / "small.json"))
    assert all(room == largest > 10 for room, largest in found)
