"""The search stage on a small real model: what it writes is measured, best, and the same after an interruption."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.assemble.requests import requested_assemblies
from pipeline.config.recipe import AssembleConfig, DistillConfig, EvaluateConfig, Recipe
from pipeline.config.search import SearchConfig
from pipeline.data import evaluation_batches
from pipeline.families import family_of
from pipeline.rundir.run_dir import RunDir
from pipeline.rundir.stage import Stage
from pipeline.search import costs as search_costs
from pipeline.search.costs import ShapeTimer
from pipeline.search.losses import assembly_losses
from pipeline.search.stage import best_of_budget, fitted_scores, load_library, search, single
from pipeline.spans.solve import Budget, Cost, pareto_front
from pipeline.spans.spans import STACKS, Assembly, modular_spans, teacher_assembly, tilings
from tests.evaluated import train_tokenizer
from tests.unit.test_assemble import make_run
from tests.unit.test_data import publish_data

NUM_EXAMPLES = 24
RECIPE = Recipe(
    distill=DistillConfig(granularities=(2, 3, 6)),
    search=SearchConfig(
        num_examples=NUM_EXAMPLES, candidates_per_size=2, budgets=("layers=7", "parameters=90k", "ms=1M"),
        latency_examples=2,
    ),
    assemble=AssembleConfig(ratios=(1.1, 2.0, 3.0, 6.0), presets=("size-first", "searched")),
    evaluate=EvaluateConfig(max_new_tokens=4),
)  # fmt: skip


def write_validation(folder: Path) -> None:
    """A finished data directory with a validation part of random examples."""
    generator = np.random.default_rng(0)
    sources, targets = (
        [generator.integers(2, 60, generator.integers(3, 12)).astype(np.uint16) for _ in range(NUM_EXAMPLES)]
        for _ in range(2)
    )
    (folder / "validation").mkdir(parents=True)
    publish_data(folder, [[(sources, targets)]], part="validation")


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> RunDir:
    root = tmp_path_factory.mktemp("search")
    run, _ = make_run(root / "run", "v1.1")
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
    train_tokenizer(root / "tokenizer", [" ".join(words[i:] + words[:i]) for i in range(12)]).save_pretrained(
        run.teacher_model
    )
    write_validation(run.data)
    for stage in ("teacher", "distill"):
        (run.stage(stage) / "stage.json").write_text(json.dumps({"outputs_hash": stage}))
    search(RECIPE, run)
    return run


def rows_of(run: RunDir) -> dict[Assembly, dict[str, str]]:
    with open(run.stage("search") / "candidates.csv", newline="") as file:
        return {Assembly.parse(row["assembly"]): row for row in csv.DictReader(file)}


def test_losses_are_measured_end_to_end(finished):
    rows = rows_of(finished)
    model = load_library(finished, RECIPE.distill)
    batches = evaluation_batches(finished.data, "validation", 4096, NUM_EXAMPLES)
    num_tokens = sum(int((batch.labels_BT != -100).sum()) for batch in batches)
    total = sum(assembly_losses(model, family_of("t5"), batch, list(rows)) for batch in batches) / num_tokens
    assert [float(row["loss"]) for row in rows.values()] == pytest.approx(total.tolist(), abs=2e-6)
    assert 30 < len(rows) < 196
    assert teacher_assembly(6, 6) in rows


def test_choices_are_the_best_that_was_measured(finished):
    rows = rows_of(finished)
    choices = json.loads(finished.choices.read_text())
    assert list(choices["ratios"]) == ["1.1", "2", "3", "6"]
    limits = {name: lambda row, n=n: int(row["encoder_layers"]) + int(row["decoder_layers"]) <= n
              for name, n in (("1.1", 11), ("2", 6), ("3", 4), ("6", 2))}  # fmt: skip
    limits |= {
        "layers=7": lambda row: int(row["encoder_layers"]) + int(row["decoder_layers"]) <= 7,
        "parameters=90k": lambda row: float(row["parameters"]) <= 90e3,
        "ms=1M": lambda row: True,
    }
    for name, text in {**choices["ratios"], **choices["budgets"]}.items():
        best = min(float(row["loss"]) for row in rows.values() if limits[name](row))
        assert float(rows[Assembly.parse(text)]["loss"]) == best, name
    sizes = {each.num_layers for each in rows}
    assert sizes == set(range(2, 13)), "every size has candidates"


def test_costs_and_fronts(finished):
    rows = rows_of(finished)
    for name, column in (("parameters", "parameters"), ("ms", "ms")):
        points = {each: (float(row[column]), float(row["loss"])) for each, row in rows.items()}
        assert {each for each, row in rows.items() if name in row["fronts"].split()} == set(pareto_front(points))
    teacher = rows[teacher_assembly(6, 6)]
    weights = finished.teacher_model / "model.safetensors"
    assert int(teacher["bytes"].replace("e+06", "")) == pytest.approx(weights.stat().st_size, rel=1e-4)
    assert all(float(row["ms"]) > 0 for row in rows.values())
    assert (finished.stage("search") / "front.png").read_bytes().startswith(b"\x89PNG")
    assert not list((finished.stage("search") / "shapes").glob("*/")), "the timed shapes do not stay on the disk"


def test_assemble_takes_what_was_found(finished):
    choices = json.loads(finished.choices.read_text())
    requests = requested_assemblies(RECIPE, RECIPE.distill.stacks((6, 6)), choices)
    for ratio, text in choices["ratios"].items():
        assert ("searched", float(ratio)) in requests[Assembly.parse(text)]
    assert all(Assembly.parse(text) in requests for text in choices["budgets"].values())
    others = dataclasses.replace(RECIPE, assemble=AssembleConfig(ratios=(2.0,), presets=("size-first",)))
    assert list(map(str, requested_assemblies(others, others.distill.stacks((6, 6)), choices))) == [
        "e1x6-d1x6",
        "e2x3-d2x3",
    ]


def test_whatever_a_kill_leaves_the_result_is_the_same(finished, tmp_path, capsys):
    search(RECIPE, finished)
    assert "up to date" in capsys.readouterr().out
    broken = RunDir(tmp_path / "run")
    shutil.copytree(finished.root, broken.root)
    folder = broken.stage("search")
    expected = (folder / "candidates.csv").read_text(), broken.choices.read_text()
    for name in ("stage.json", "candidates.csv", "choices.json"):
        (folder / name).unlink()
    records = sorted((folder / "losses").iterdir())
    records[0].write_text(records[0].read_text().replace("5", "6"))  # damaged
    records[-1].unlink()  # not yet there
    kept = {record: record.stat().st_mtime_ns for record in records[1:-1]}
    search(RECIPE, broken)
    assert ((folder / "candidates.csv").read_text(), broken.choices.read_text()) == expected
    assert {record: record.stat().st_mtime_ns for record in kept} == kept, "what was measured is not measured again"


def test_a_budget_beyond_the_coarsest_is_refused_before_anything_is_measured(finished, tmp_path):
    run = RunDir(tmp_path / "run")
    shutil.copytree(finished.root, run.root)
    shutil.rmtree(run.stage("search"))
    settings = dataclasses.replace(RECIPE.search, budgets=("layers=1",))
    with pytest.raises(ValueError, match=r"layers=1 is beyond the coarsest assembly, which takes 2"):
        search(dataclasses.replace(RECIPE, search=settings), run)
    assert not (run.stage("search") / "losses").exists()


def test_other_settings_use_what_was_measured(finished, tmp_path):
    run = RunDir(tmp_path / "run")
    shutil.copytree(finished.root, run.root)
    measured = {path: path.stat().st_mtime_ns for path in run.stage("search").glob("*/*.json")}
    fewer = dataclasses.replace(RECIPE, search=dataclasses.replace(RECIPE.search, rounds=1, budgets=("layers=7",)))
    search(fewer, run)
    assert list(json.loads(run.choices.read_text())["budgets"]) == ["layers=7"]
    now = {path: path.stat().st_mtime_ns for path in run.stage("search").glob("*/*.json")}
    assert now.items() >= measured.items(), "nothing is measured twice, nothing is lost"
    search(RECIPE, run)
    assert {path: path.stat().st_mtime_ns for path in run.stage("search").glob("*/*.json")} == now


def test_a_library_of_other_granularities_is_refused(finished):
    other = dataclasses.replace(RECIPE, distill=DistillConfig(granularities=(2, 3)))
    with pytest.raises(ValueError, match=r"modular layers for encoder 0-1, .* not those of granularities \[2, 3\]"):
        search(other, finished)
    assert finished.choices.is_file()


class Clock:
    """Times shapes without running them."""

    def milliseconds(self, shapes):
        return {shape: 10.0 * sum(shape) for shape in shapes}


def test_a_budget_of_time_takes_the_best_that_keeps_it_when_timed():
    losses = {Assembly.parse(text): loss for text, loss in (("e1x6-d1x6", 1.0), ("e2x3-d2x3", 2.0), ("e6-d6", 3.0))}
    costs = {"ms": Cost(0, 9.5, 9.5)}  # fitted; a little too low
    for limit, best in (("ms=120", "e1x6-d1x6"), ("ms=115", "e2x3-d2x3"), ("ms=59", "e6-d6")):
        assert str(best_of_budget(losses, Budget.parse(limit), costs, Clock())) == best
    with pytest.raises(ValueError, match=r"no assembly keeps within ms=19\.5 when it is timed"):
        best_of_budget(losses, Budget.parse("ms=19.5"), costs, Clock())


def test_shapes_that_do_not_fit_into_memory_are_named(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(search_costs, "costs", lambda folders, *_: {})
    stage = dataclasses.replace(Stage.of(RECIPE, finished, "search"), run=RunDir(tmp_path))
    timer = ShapeTimer(RECIPE, finished, stage, torch.device("cpu"))
    with pytest.raises(ValueError, match="6\\+1 layers do not fit into the memory of cpu"):
        timer.milliseconds([(6, 1)])


def test_fitted_scores_find_what_additive_losses_were_made_of():
    """Where losses are sums of scores, fitting recovers them from a wrong start; the truth is a fixed point."""
    spans = modular_spans(6, (2, 3, 6))
    generator = np.random.default_rng(1)
    truth = {stack: {span: float(generator.uniform(0.1, 0.5)) for span in spans} for stack in STACKS}

    def loss(assembly: Assembly) -> float:
        return 1.0 + sum(truth[s].get(span, 0.0) for s in STACKS for span in assembly.tiling(s).spans)

    everything = [Assembly(a, b) for a in tilings(6, spans) for b in tilings(6, spans)]
    losses = {each: loss(each) for each in everything}
    assert losses[single("decoder", spans[0], Assembly.parse("e1x6-d1x6"))] == 1.0 + truth["decoder"][spans[0]]
    same = fitted_scores(truth, losses, 1.0)
    zeros = {stack: dict.fromkeys(spans, 0.0) for stack in STACKS}
    near = fitted_scores(zeros, losses, 1.0)
    for stack in STACKS:
        for span in spans:
            assert same[stack][span] == pytest.approx(truth[stack][span], abs=1e-9)
            assert near[stack][span] == pytest.approx(truth[stack][span], abs=0.06)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
