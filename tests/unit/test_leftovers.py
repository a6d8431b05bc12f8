"""Leftovers that cannot be removed yet, as on NFS what somebody reads: no reason to end work or to refuse a start."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import torch

from data_prep.config import DataConfig
from data_prep.plan import Plan, make_plan
from data_prep.publish import discard, publishing_folder, remove_temporaries, replace_folder, unused_name
from data_prep.served import Served
from pipeline.checkpoints.format import checkpoints, step_of
from pipeline.config.recipe import Recipe, TeacherConfig
from pipeline.evaluation.subject import folder_hashes
from pipeline.rundir.files import check_empty, write_atomic
from pipeline.rundir.run_dir import RunDir
from pipeline.rundir.stage import Stage
from pipeline.world import World
from tests.builds import SMALL
from tests.distributed import saving
from tests.nfs import kept_open

ALONE = World(0, 1, 0, torch.device("cpu"))


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_training_goes_on_and_starts_again_while_old_checkpoints_are_read(tmp_path: Path) -> None:
    world, keep = ALONE, saving.Keep(last=1)
    shards = saving.Shards(world)
    with kept_open(tmp_path):
        for first in (1, 4, 4):  # two starts, and one from before a save that is made again
            with saving.checkpointer(world, tmp_path, keep) as saver:
                for step in (first, first + 1, first + 2):
                    shards.train(step)
                    saver.save(shards, saving.state_at(step))
            assert [step_of(path) for path in checkpoints(tmp_path)] == [first + 2]
            assert any(name.startswith(".step_") for name in names_in(tmp_path))
            saving.restore(world, tmp_path, first + 2)
    saving.checkpointer(world, tmp_path, keep)
    assert names_in(tmp_path) == ["step_00000006"]


def test_a_save_that_was_killed_and_is_read_is_made_again(tmp_path: Path) -> None:
    world = ALONE
    write_atomic(tmp_path / ".step_00000001.tmp" / "rank_00000.safetensors", "half")
    with kept_open(tmp_path), saving.checkpointer(world, tmp_path) as saver:
        saver.save(saving.Shards(world), saving.state_at(1))
    assert [step_of(path) for path in checkpoints(tmp_path)] == [1]


def test_folders_are_published_over_those_that_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with kept_open(tmp_path):
        for text in ("1", "2", "3"):  # by one process: its temporary names are the same
            with publishing_folder(folder) as temporary:
                write_atomic(temporary / "file", text)
            assert (folder / "file").read_text() == text
            assert not list(folder.glob(".nfs*"))
        new = tmp_path / "new"
        write_atomic(new / "file", "4")
        replace_folder(new, folder)
        remove_temporaries(tmp_path)
    assert (folder / "file").read_text() == "4"
    remove_temporaries(tmp_path)
    assert names_in(tmp_path) == ["out"]


def test_what_cannot_be_removed_is_left(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a" / "file", "")
    with kept_open(tmp_path):
        for _ in range(2):
            discard(tmp_path / "a")
            discard(next((tmp_path / "a").iterdir()))
            discard(tmp_path / "nothing")
    discard(tmp_path / "a")
    assert not names_in(tmp_path)


def test_a_name_that_a_leftover_has_is_not_taken(tmp_path: Path) -> None:
    path = tmp_path / "x"
    assert unused_name(path) == path
    path.symlink_to("nowhere")
    (tmp_path / "x-1").mkdir()
    assert unused_name(path).name == "x-2"


def test_a_stage_is_set_aside_twice(tmp_path: Path) -> None:
    write_atomic(tmp_path / "data" / "manifest.json", "{}")
    run = RunDir(tmp_path)
    with kept_open(tmp_path):
        for seed in (0, 1, 0, 1):
            stage = Stage.of(replace(Recipe(), seed=seed), run, "teacher")
            stage.begin()
            write_atomic(stage.folder / "out", str(seed))
            stage.publish([stage.folder / "out"], started_at=time.time())
            assert stage.stamp() is not None


def test_names_that_nfs_keeps_are_no_part_of_what_is_compared(tmp_path: Path) -> None:
    """They vanish: a stage would be made anew for it, or a start refused."""
    write_atomic(tmp_path / "data" / "manifest.json", "{}")
    write_atomic(tmp_path / "model" / "config.json", "{}")
    recipe = Recipe(data=DataConfig(tokenizer="x"), teacher=TeacherConfig(folder=str(tmp_path / "model")))
    kept = tmp_path / "model" / ".nfs00aa"
    kept.write_text("")
    stage = Stage.of(recipe, RunDir(tmp_path), "teacher")
    stage.begin()
    write_atomic(stage.folder / "model" / "config.json", "{}")
    write_atomic(stage.folder / "model" / ".nfs00ab", "{}")
    stage.publish([stage.folder / "model"], started_at=time.time())
    kept.unlink()
    (stage.folder / "model" / ".nfs00ab").unlink()
    assert Stage.of(recipe, RunDir(tmp_path), "teacher").stamp() is not None
    write_atomic(tmp_path / "free" / ".nfs00ac", "")
    check_empty(tmp_path / "free", "--out")
    write_atomic(tmp_path / "model" / ".nfs00ad", "")
    assert list(folder_hashes(tmp_path / "model")) == ["config.json"]


def test_a_build_goes_on_while_its_tokenizer_is_read(tmp_path: Path) -> None:
    """Its plan stays the same, which holds a hash of the tokenizer; the leftover goes as soon as it can."""
    config = DataConfig(**SMALL)

    def plan() -> Plan:
        with Served() as served:
            return make_plan(tmp_path, config, served)

    first = plan()
    (tmp_path / "tokenizer" / ".nfs00aa").write_text("")
    assert plan() == first
    left = tmp_path / "left.tmp-elsewhere-1"
    write_atomic(left / "file", "")
    with kept_open(tmp_path):
        assert [plan() for _ in range(2)] == [first, first]
        assert left.exists()
    assert plan() == first
    assert not left.exists()
