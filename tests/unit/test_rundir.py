"""Stamps: when a stage is done, when it must be made again, and when it is refused."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace

import pytest

from data_prep.publish import publishing_folder
from pipeline.config.kinds import fields_of_kind
from pipeline.config.recipe import BaselineConfig, DistillConfig, EvaluateConfig, OptimConfig, Recipe
from pipeline.rundir.files import write_atomic
from pipeline.rundir.run_dir import RunDir
from pipeline.rundir.stage import Stage, StageConflict


@pytest.fixture
def run(tmp_path):
    run = RunDir(tmp_path)
    write_atomic(run.data / "manifest.json", "{}")
    return run


def with_optim(recipe, **changes):
    teacher = replace(recipe.teacher, optim=replace(recipe.teacher.optim, **changes))
    return replace(recipe, teacher=teacher)


def publish(recipe, run, name, text="same", *, outputs=True, extend=False):
    """Do a stage; without outputs as one that had nothing to do."""
    stage = Stage.of(recipe, run, name)
    stage.begin(extend=extend)
    write_atomic(stage.folder / "out", text)
    stage.publish([stage.folder / "out"] * outputs, started_at=time.time())
    return stage


def finish(recipe, run):
    stage = Stage.of(recipe, run, "teacher")
    stage.begin()
    write_atomic(stage.folder / "model" / "weights", "x")
    stage.publish([stage.folder / "model"], started_at=time.time())
    return stage


def test_a_published_stage_is_done_until_its_inputs_change(run):
    recipe = Recipe()
    assert Stage.of(recipe, run, "teacher").stamp() is None
    finish(recipe, run)
    assert Stage.of(recipe, run, "teacher").stamp() is not None
    operational = replace(
        recipe, teacher=replace(recipe.teacher, loop=replace(recipe.teacher.loop, save_every_steps=7))
    )
    assert Stage.of(operational, run, "teacher").stamp() is not None
    assert Stage.of(with_optim(recipe, weight_decay=0.5), run, "teacher").stamp() is None
    assert Stage.of(with_optim(recipe, num_steps=7), run, "teacher").stamp() is None
    assert Stage.of(replace(recipe, seed=1), run, "teacher").stamp() is None
    write_atomic(run.data / "manifest.json", '{"other": 1}')
    assert Stage.of(recipe, run, "teacher").stamp() is None


def test_a_stage_whose_output_is_gone_or_cut_is_not_done(run):
    stage = finish(Recipe(), run)
    (stage.folder / "model" / "weights").write_text("longer")
    assert stage.stamp() is None
    (stage.folder / "model" / "weights").unlink()
    assert stage.stamp() is None


def test_a_half_finished_stage_refuses_another_identity_and_says_what_differs(run):
    recipe = Recipe()
    Stage.of(recipe, run, "teacher").begin()
    Stage.of(recipe, run, "teacher").begin()
    with pytest.raises(StageConflict, match=r"teacher\.optim\.weight_decay: 0\.0 -> 0\.5"):
        Stage.of(with_optim(recipe, weight_decay=0.5), run, "teacher").begin()


def test_a_finished_stage_of_another_identity_is_set_aside(run):
    stage = finish(Recipe(), run)
    Stage.of(with_optim(Recipe(), weight_decay=0.5), run, "teacher").begin()
    assert not (stage.folder / "model").exists()
    (aside,) = run.root.glob("teacher~*")
    assert (aside / "model" / "weights").read_text() == "x"


def test_another_schedule_continues_only_when_asked(run):
    stage = finish(Recipe(), run)
    longer = Stage.of(with_optim(Recipe(), num_steps=2000), run, "teacher")
    with pytest.raises(StageConflict, match="--extend"):
        longer.begin()
    longer.begin(extend=True)
    assert (stage.folder / "model").exists()


@pytest.mark.parametrize("name", ["search", "recover"])
def test_how_outputs_are_decoded_is_part_of_what_a_stage_measures(run, name):
    for upstream in ("teacher", "distill"):
        write_atomic(run.stage(upstream) / "stage.json", json.dumps({"outputs_hash": upstream}))
    before = Stage.of(Recipe(), run, name).inputs["identity"]
    for changed in ({"num_beams": 4}, {"max_new_tokens": 9}):
        after = Stage.of(Recipe(evaluate=EvaluateConfig(**changed)), run, name).inputs["identity"]
        assert {field for field in after if after[field] != before[field]} == {f"evaluate.{each}" for each in changed}


def test_a_stage_before_it_must_be_done(tmp_path):
    with pytest.raises(FileNotFoundError, match="needs the output of stage data"):
        Stage.of(Recipe(), RunDir(tmp_path), "teacher")


def test_a_field_that_came_later_leaves_outputs_from_before_as_they_are(tmp_path):
    """One sampled draw a micro-batch is what was done when there was no such field; others are told apart."""
    run = RunDir(tmp_path)
    write_atomic(run.stage("teacher") / "stage.json", json.dumps({"outputs_hash": "teacher"}))
    write_atomic(run.data / "manifest.json", "{}")

    def identity(**fields):
        return Stage.of(Recipe(distill=DistillConfig(**fields)), run, "distill").identity

    assert "distill.draws" not in identity(draws=("sampled",))
    assert identity(draws=("sampled", "pure"))["distill.draws"] == ["sampled", "pure"]


def test_every_field_says_what_changing_it_means():
    recipe = Recipe()
    kinds = [fields_of_kind(recipe, kind) for kind in ("identity", "schedule", "operational")]
    names = [name for kind in kinds for name in kind]
    assert len(names) == len(set(names))

    def leaves(value, prefix=""):
        for name, each in vars(value).items():
            yield from leaves(each, f"{prefix}{name}.") if hasattr(each, "__dataclass_fields__") else [prefix + name]

    assert sorted(names) == sorted(leaves(recipe))


def test_publishing_a_folder_replaces_the_old_one(tmp_path):
    for text in ("old", "new"):
        left_by_a_kill = tmp_path / "out.tmp-elsewhere-1"
        left_by_a_kill.mkdir()
        with publishing_folder(tmp_path / "out") as temporary:
            write_atomic(temporary / "deep" / "file", text)
    assert (tmp_path / "out" / "deep" / "file").read_text() == "new"
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_a_folder_is_not_published_on_an_exception_and_the_cause_is_told(tmp_path):
    """What could not be read elsewhere is not called what could not be written here."""
    with pytest.raises(FileNotFoundError, match="nowhere"), publishing_folder(tmp_path / "out"):
        (tmp_path / "nowhere").read_text()
    with pytest.raises(OSError, match=r"cannot write .*out: No such file"), publishing_folder(tmp_path / "out") as new:
        (new / "gone" / "file").write_text("")
    assert not list(tmp_path.iterdir())


def test_a_recipe_without_steps_for_baselines_needs_no_baseline_stage(run):
    recipe = Recipe(baseline=BaselineConfig(optim=OptimConfig(num_steps=0)))
    for name in ("teacher", "distill"):
        publish(recipe, run, name)
    alone = publish(recipe, run, "assemble")
    # runs used to make an empty one first, and their stamps hold its hash
    publish(recipe, run, "baseline", outputs=False)
    assert alone.identity["output of baseline"] == run.output_hash("baseline")
    assert Stage.of(recipe, run, "assemble").stamp() is not None
    with_baselines = replace(recipe, baseline=BaselineConfig(optim=OptimConfig(num_steps=5)))
    publish(with_baselines, run, "baseline", extend=True)
    publish(with_baselines, run, "assemble")
    assert Stage.of(recipe, run, "assemble").stamp() is None, "it lists baselines that the recipe has no steps for"


def test_a_retrained_baseline_makes_what_comes_after_it_stale(run):
    """systems.json only names the baseline's folder, so its weights are not among the files of assemble."""

    for name in ("teacher", "distill", "baseline", "assemble", "evaluate"):
        publish(Recipe(), run, name)
    assert Stage.of(Recipe(), run, "evaluate").stamp() is not None
    publish(Recipe(), run, "baseline", "other weights")
    assert Stage.of(Recipe(), run, "assemble").stamp() is None
    publish(Recipe(), run, "assemble")
    assert Stage.of(Recipe(), run, "evaluate").stamp() is None


def test_other_examples_in_the_files_of_another_test_part_are_scored_anew(run, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text("one\n")
    recipe = Recipe(evaluate=EvaluateConfig(test=(str(other),)))
    for name in ("teacher", "distill", "baseline", "assemble", "evaluate"):
        publish(recipe, run, name)
    assert Stage.of(recipe, run, "evaluate").stamp() is not None
    other.write_text("two\n")
    assert Stage.of(recipe, run, "evaluate").stamp() is None
    publish(recipe, run, "evaluate")
    other.unlink()
    assert Stage.of(recipe, run, "evaluate").stamp() is not None, "what it was is known still"


def model_folder(path, *, last_byte):
    """A folder with a large file that no size and no name tells from another."""
    path.mkdir(exist_ok=True)
    write_atomic(path / "config.json", "{}")
    (path / "model.safetensors").write_bytes(bytes(3 * 2**20) + bytes([last_byte]))
    return str(path)


def taught_by(recipe, folder):
    teacher, data = replace(recipe.teacher, folder=folder), replace(recipe.data, tokenizer=folder)
    return replace(recipe, teacher=teacher, data=data)


def test_other_weights_of_the_same_size_in_a_given_folder_make_the_stages_that_read_it_stale(run, tmp_path):
    peer, metricx, teacher = (model_folder(tmp_path / name, last_byte=1) for name in ("peer", "metricx", "given"))
    recipe = Recipe(evaluate=EvaluateConfig(folders=(f"p={peer}", "nowhere"), metricx=metricx))
    recipe = taught_by(recipe, teacher)
    recipe = replace(recipe, baseline=replace(recipe.baseline, optim=replace(recipe.baseline.optim, num_steps=0)))
    for name in ("teacher", "distill", "assemble", "evaluate"):
        publish(recipe, run, name)
    for folder, name in ((peer, "evaluate"), (metricx, "evaluate"), (teacher, "teacher")):
        assert Stage.of(recipe, run, name).stamp() is not None
        model_folder(tmp_path / folder, last_byte=2)
        assert Stage.of(recipe, run, name).stamp() is None, folder
        model_folder(tmp_path / folder, last_byte=1)
    shutil.rmtree(peer)
    assert Stage.of(recipe, run, "evaluate").stamp() is not None, "what is done stays so without the folder"


def test_a_run_begun_when_large_files_were_known_by_size_goes_on(run, tmp_path):
    recipe = taught_by(Recipe(), model_folder(tmp_path / "given", last_byte=1))
    stage = Stage.of(recipe, run, "teacher")
    old = {**stage.identity["teacher files"], "model.safetensors": 3 * 2**20 + 1}
    stage = replace(stage, identity={**stage.identity, "teacher files": old})
    stage.begin()
    Stage.of(recipe, run, "teacher").check()
    stage.publish([], started_at=time.time())
    assert Stage.of(recipe, run, "teacher").stamp() is not None
