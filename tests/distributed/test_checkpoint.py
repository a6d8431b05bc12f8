"""Checkpoints on real ranks: saved beside training, read by any number of ranks, whole whatever dies meanwhile."""

from __future__ import annotations

import logging
import random
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from data_prep.publish import discard
from pipeline.checkpoints.checkpointer import Checkpointer, Keep
from pipeline.checkpoints.format import (
    StoredSlice,
    checkpoints,
    damage,
    full_weights,
    rank_file,
    read_manifest,
    seal,
    step_of,
    write_weights,
)
from pipeline.world import World
from tests.distributed import saving
from tests.forks import run_ranks, with_group

ALONE = World(0, 1, 0, torch.device("cpu"))
NUM_DAMAGES = 60


def ranks(num_ranks, function, *args):
    return run_ranks(num_ranks, with_group, function, *args)


def steps_in(folder):
    return [step_of(each) for each in checkpoints(folder)]


@pytest.mark.parametrize(("writers", "readers"), [(1, 1), (2, 1), (1, 2), (2, 4), (3, 2)])
def test_what_ranks_wrote_any_other_number_reads(tmp_path, writers, readers):
    """The values are those of the step, though training moved on while they were written."""
    assert ranks(writers, saving.save, tmp_path, 1, 2, 3) == [0] * writers
    assert steps_in(tmp_path) == [2, 3]
    assert all(damage(each) is None for each in checkpoints(tmp_path))
    assert ranks(readers, saving.restore, tmp_path, 3) == [0] * readers
    for name, weight in full_weights(checkpoints(tmp_path)[-1]).items():
        assert torch.equal(weight.flatten(), saving.values(name, "weight", 3))


def test_weights_go_into_one_file_and_memory_holds_one_slice(tmp_path, monkeypatch):
    assert ranks(3, saving.save, tmp_path, 1) == [0] * 3
    read, held = StoredSlice.read, []

    def noted(*args):
        assert not any(each() for each in held), "a slice before this one is still held"
        found = read(*args)
        held.append(weakref.ref(found))
        return found

    monkeypatch.setattr(StoredSlice, "read", noted)
    write_weights(checkpoints(tmp_path)[-1], tmp_path / "weights.safetensors", str.upper)
    with safe_open(tmp_path / "weights.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}  # which readers of models ask for
    header_bytes = int.from_bytes((tmp_path / "weights.safetensors").read_bytes()[:8], "little")
    assert header_bytes % 8 == 0  # so that tensors are aligned in the file
    found = load_file(tmp_path / "weights.safetensors")
    expected = full_weights(checkpoints(tmp_path)[-1])
    assert len(held) > len(expected)
    assert found.keys() == {name.upper() for name in expected}
    for name, weight in expected.items():
        assert torch.equal(found[name.upper()], weight)


def test_a_checkpoint_with_whole_files_that_lacks_a_slice_is_not_read(tmp_path):
    assert ranks(2, saving.save, tmp_path, 1) == [0, 0]
    (folder,) = checkpoints(tmp_path)
    manifest = read_manifest(folder)
    del manifest["files"]["rank_00001.safetensors"]
    (folder / "manifest.json").write_bytes(seal(manifest))
    assert damage(folder) is None
    for read in (
        lambda: full_weights(folder),
        lambda: write_weights(folder, tmp_path / "weights.safetensors", str.upper),
        lambda: saving.restore(ALONE, tmp_path, 1),
    ):
        with pytest.raises(AssertionError, match=r"step_00000001 lacks parts of \['"):
            read()


def test_a_save_that_is_waited_for_writes_the_same_bytes_without_a_copy(tmp_path):
    shards = saving.Shards(ALONE)
    for beside in (True, False):
        saver = Checkpointer(tmp_path / str(beside), ALONE, keep=Keep(last=2), inputs=saving.INPUTS, beside=beside)
        shards.train(1)
        saver.save(shards, saving.state_at(1))
        if not beside:
            assert steps_in(saver.folder) == [1]
        shards.train(2)
        saver.finish()
    found = [checkpoints(tmp_path / name)[0] for name in ("True", "False")]
    for name in ("rank_00000.safetensors", "manifest.json"):
        assert (found[0] / name).read_bytes() == (found[1] / name).read_bytes()


@pytest.mark.parametrize("lossy", [False, True])
def test_a_save_that_dies_at_any_operation_leaves_a_whole_newest_checkpoint(tmp_path, lossy):
    """Before or after each write, fsync, rename, unlink of the protocol; with `lossy` the power fails, too."""
    before, count = tmp_path / "before", tmp_path / "count"
    saving.save(ALONE, before, 1, 2)
    quiet = shutil.copytree(before, tmp_path / "quiet")
    assert ranks(1, saving.save_on_failing_disk, quiet, -1, False, False, count) == [0]
    num_operations = int(count.read_text())
    assert num_operations > 12
    found = set()
    for die_at in range(num_operations):
        for after in (False, True):
            folder = shutil.copytree(before, tmp_path / f"{die_at}{after}")
            assert ranks(1, saving.save_on_failing_disk, folder, die_at, after, lossy, count) == [-9]
            newest = steps_in(folder)[-1]
            found.add(newest)
            saving.restore(ALONE, folder, newest)
            saving.save(ALONE, folder, newest + 1)  # whatever was left behind is no hindrance
            saving.restore(ALONE, folder, newest + 1)
            assert not list(folder.glob(".*"))
    assert found == {2, 3}


@pytest.mark.parametrize("die_at", [0, 2, 8, 9])
def test_a_rank_that_dies_in_a_save_fails_the_save_of_the_other(tmp_path, die_at):
    saving.save(ALONE, tmp_path, 1, 2)
    assert ranks(2, saving.save_on_failing_disk, tmp_path, die_at, False, False, tmp_path / "count") == [-9, 7]
    saving.restore(ALONE, tmp_path, 3 if die_at > 8 else 2)  # it is published from its rename on


@pytest.mark.parametrize("lost", ["folder", "file"])
def test_a_second_process_that_clears_up_fails_the_save_and_costs_no_checkpoint(tmp_path, monkeypatch, lost):
    """It takes what the first one is writing for abandoned."""
    saving.save(ALONE, tmp_path, 1, 2)
    write = Checkpointer._write_rank

    def then_lose(self, snapshot, temporary):
        entry = write(self, snapshot, temporary)
        discard(temporary) if lost == "folder" else (temporary / rank_file(0)).unlink()
        return entry

    monkeypatch.setattr(Checkpointer, "_write_rank", then_lose)
    with pytest.raises(RuntimeError, match=r"saving to .* failed: rank 0: FileNotFoundError"):
        saving.save(ALONE, tmp_path, 3)
    assert {1, 2} <= set(steps_in(tmp_path))
    saving.restore(ALONE, tmp_path, 2)


@pytest.mark.parametrize("on_rank", [0, 1])
def test_a_full_disk_is_an_error_on_every_rank_with_its_cause(tmp_path, on_rank):
    assert ranks(2, saving.fill_the_disk, tmp_path, on_rank) == [0, 0]
    assert steps_in(tmp_path) == []


def damage_one_bit_or_the_end(path: Path, generator: random.Random) -> None:
    content = bytearray(path.read_bytes())
    if generator.random() < 0.3:
        del content[generator.randrange(len(content)) :]
    else:
        content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    path.write_bytes(content)


def check_damages(tmp_path: Path, seed: int, num_damages: int) -> None:
    """Each is found and named, and the checkpoint before is used instead."""
    good = tmp_path / "good"
    saving.save(ALONE, good, 1, 2)
    generator = random.Random(f"damage/{seed}")
    for _ in range(num_damages):
        folder = shutil.copytree(good, tmp_path / "damaged")
        newest = checkpoints(folder)[-1]
        name = generator.choice(["manifest.json", "rank_00000.safetensors"])
        damage_one_bit_or_the_end(newest / name, generator)
        assert name in str(damage(newest))
        saving.restore(ALONE, folder, 1)
        shutil.rmtree(folder)


def test_damaged_bytes_are_found_and_named_and_the_checkpoint_before_is_used(tmp_path):
    check_damages(tmp_path, seed=0, num_damages=NUM_DAMAGES)


def test_the_damage_is_in_the_log(tmp_path, caplog, monkeypatch):
    saving.save(ALONE, tmp_path, 1, 2)
    (checkpoints(tmp_path)[-1] / "rank_00000.safetensors").unlink()
    monkeypatch.setattr(logging.getLogger("pipeline"), "propagate", True)
    saving.restore(ALONE, tmp_path, 1)
    assert "step_00000002 is damaged (rank_00000.safetensors is missing)" in caplog.text


def test_when_none_verifies_training_does_not_start_over(tmp_path):
    saving.save(ALONE, tmp_path, 1)
    (checkpoints(tmp_path)[-1] / "rank_00000.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no checkpoint in .* verifies"):
        saving.restore(ALONE, tmp_path, 1)


def test_a_checkpoint_of_another_run_is_refused_with_the_difference(tmp_path, monkeypatch):
    saving.save(ALONE, tmp_path, 1)
    other = {"identity": {**saving.INPUTS["identity"], "output of teacher": "b2"}, "schedule": {"num_steps": 20}}
    monkeypatch.setattr(saving, "INPUTS", other)
    with pytest.raises(ValueError, match=r"\(output of teacher: a1 -> b2\)"):
        saving.restore(ALONE, tmp_path, 1)


@pytest.mark.parametrize(
    ("keep", "kept"),
    [
        (Keep(last=1), {60}),
        (Keep(last=2), {50, 60}),
        (Keep(last=1, every_steps=20), {20, 40, 60}),
        (Keep(last=1, best=True), {30, 60}),
        (Keep(last=2, every_steps=40, best=True), {30, 40, 50, 60}),
    ],
)
def test_which_checkpoints_stay(keep, kept):
    losses = {10: 3.0, 20: None, 30: 1.0, 40: 2.0, 50: None, 60: 1.5}
    assert keep.chosen(losses) == kept


def test_the_best_by_validation_stays_on_disk(tmp_path):
    shards, saver = saving.Shards(ALONE), saving.checkpointer(ALONE, tmp_path, Keep(last=1, best=True))
    for step, loss in ((1, 2.0), (2, 1.0), (3, 1.5), (4, None)):
        saver.save(shards, saving.state_at(step), {} if loss is None else {"e6-d6": loss, "teacher": 0.5})
    saver.finish()
    assert steps_in(tmp_path) == [2, 4]
