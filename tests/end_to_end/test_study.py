"""A study: who is trained for how much, that it goes on where it was, and what its figures are made of."""

from __future__ import annotations

import dataclasses
import json
import os
import threading

import numpy as np
import pytest

from data_prep.__main__ import main as data_main
from pipeline.__main__ import main
from pipeline.report import read_jsonl, scored
from pipeline.run import lock, stage_command
from pipeline.rundir import RunDir
from pipeline.study import run as study_run
from pipeline.study import table
from pipeline.study.cells import Cells
from pipeline.study.lines import EQUAL, FULL, LEAST_BLEU, RECOVERED, AtBothCosts, Estimate, Line
from tests.forks import run_forked

MAINS = {"data_prep": data_main, "pipeline": main}
SMALL = ["--config", "studies/minute"]


def in_forks(name, recipe, run, options):
    """A stage by its own command, in a process that need not import anything."""
    _, _, module, *arguments = stage_command(name, recipe, run)
    ended = run_forked(MAINS[module], [*arguments, *options], environment=dict(os.environ))
    assert ended.returncode == 0, ended.stderr[-2000:]


@pytest.fixture(scope="module")
def studied(tmp_path_factory):
    """The folder of a small study that has been run, and what was trained, in order."""
    out, trained = tmp_path_factory.mktemp("study"), []

    def stage(name, recipe, run, options):
        recipe = dataclasses.replace(recipe, launch=dataclasses.replace(recipe.launch, num_ranks=1, num_mpi_ranks=1))
        trained.append((run.root.name, name))
        in_forks(name, recipe, run, options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study_run, "run_stage", stage)
        main(["study", *SMALL, "--out", str(out)])
    return out, trained


def test_every_training_is_done_once_and_the_test_part_is_scored_last(studied, monkeypatch, capsys):
    out, trained = studied
    modular = "modular-12-seed0"
    rivals = [f"finetune-{ratio}x-equal-12-seed0" for ratio in ("1.1", "2", "6")]
    assert trained == [
        ("base", "data"), ("base", "teacher"), (modular, "distill"), *((rival, "baseline") for rival in rivals),
        ("finetune-6x-full-12-seed0", "baseline"), (f"recover-6x-{modular}", "recover"),
        (modular, "assemble"), (modular, "evaluate"), ("modular-init-last-12-seed0", "distill"),
    ]  # fmt: skip
    monkeypatch.setattr(study_run, "run_stage", lambda name, *_: pytest.fail(f"{name} again"))
    main(["study", *SMALL, "--out", str(out)])
    assert (out / "study.md").read_text() in capsys.readouterr().out


def test_figures_are_those_of_the_scores(studied):
    out, _ = studied
    figures = json.loads((out / "study.json").read_text())
    lines = figures["sizes"]
    assert [line["ratio"] for line in lines] == [1.1, 2.0, 6.0]
    run = RunDir(out / "modular-12-seed0")
    for line, assembly in zip(lines, ("e1x6-d1x4.2", "e2x3-d2x3", "e6-d6"), strict=True):
        names = (assembly, "e1x6-d1x6", f"equal-{line['ratio']:g}x")
        own, teacher, rival = (scored(run, name).row.bleu for name in names)  # rounded to four digits
        assert line["modular"] == pytest.approx(own, abs=1e-4)
        assert line["teacher"] == pytest.approx(teacher, abs=1e-4)
        assert line["kept"]["value"] == pytest.approx(100 * line["modular"] / max(line["teacher"], LEAST_BLEU))
        (method, bleu, more) = line["rivals"][EQUAL]
        assert method == "finetune"
        assert bleu == pytest.approx(rival, abs=1e-4)
        assert more["value"] == pytest.approx(own - rival, abs=1e-3)
        assert more["low"] - 1e-6 <= more["value"] <= more["high"] + 1e-6
    assert set(lines[2]["rivals"]) == {EQUAL, FULL, RECOVERED}
    assert (out / "study.png").read_bytes().startswith(b"\x89PNG")
    assert [each["name"] for each in figures["variants"]] == ["as it is", "init-last"]
    for each, name in zip(figures["variants"], ("modular-12-seed0", "modular-init-last-12-seed0"), strict=True):
        last = read_jsonl(out / name / "distill" / "metrics.jsonl")[-1]
        assert each["measures"]["validation/e6-d6"]["mean"] == last["validation/e6-d6"]
        assert each["num_steps"] == last["step"] == 12


def test_full_cost_is_held_against_the_seeds_that_have_it(studied, monkeypatch):
    """With a second seed, here a stand-in with other scores, that has no rival at full cost."""
    out, _ = studied
    scores = {"e6-d6": 20.0, "e1x6-d1x6": 40.0, "equal-6x": 10.0, "full-6x": 30.0}
    monkeypatch.setattr(
        table._Pool, "bleu", lambda pool, systems: np.full(3, np.mean([scores.get(each, 0.0) for each in systems]))
    )
    study = study_run.Study(study_run.study_config(SMALL)[0], Cells(["minute"], out), out)
    first = study._entry(12, 0)
    second = dataclasses.replace(
        first, assemblies={6.0: first.teacher}, rivals={EQUAL: first.rivals[EQUAL], FULL: {}, RECOVERED: {}}
    )
    (alone,) = table._lines([dataclasses.replace(first, assemblies={6.0: first.assemblies[6.0]})])
    (pooled,) = table._lines([dataclasses.replace(first, assemblies={6.0: first.assemblies[6.0]}), second])
    assert (alone.modular, pooled.modular) == (20.0, 30.0)
    assert pooled.both == alone.both == AtBothCosts(modular=20.0, equal=10.0, full=30.0)
    assert pooled.break_even == alone.break_even


def test_equal_cost_is_equal_up_to_one_step(studied):
    out, _ = studied
    cells = Cells(["minute"], out)
    modular = cells.modular(400, 1.0, 0)
    for method in ("finetune", "logit"):
        one = cells.rival(method, 6.0, 1.0, 1.0, 0, "one").flops
        assert cells.rival(method, 6.0, modular.flops, 1.0, 0, FULL).flops == pytest.approx(modular.flops, abs=one / 2)


@pytest.mark.parametrize(
    ("options", "trainings"),
    [
        ([], [1, 1, 3, 1, 1]),
        (["--rates", "[1, 2]", "--seeds", "[0, 1]"], [2 + 1, 2, 3 * 2 + 3, 1, 2]),  # the first seed tries both rates
    ],
)
def test_a_dry_run_counts_what_is_done_and_makes_nothing(studied, options, trainings, tmp_path, capsys):
    done = [1, 1, 3, 1, 1]  # at the recipe's rate, with seed 0
    for out, num_done in ((studied[0], done), (tmp_path / "new", [0] * 5)):
        main(["study", *SMALL, *options, "--out", str(out), "--dry-run"])
        _, _, _, *rows = capsys.readouterr().out.splitlines()
        kinds = "modular run", "variants", "finetune at equal cost", "better rival at full cost", "trained further"
        assert [row[: row.index(",")] for row in rows[:-1]] == list(kinds)
        figures = [row.split()[-4:] for row in rows]
        assert [[int(each) for each in of[:2]] for of in figures] == [
            *map(list, zip(trainings, num_done, strict=True)), [sum(trainings), sum(num_done)],
        ]  # fmt: skip
        assert [float(of[3]) == 0 for of in figures] == [int(of[0]) == int(of[1]) for of in figures]
    assert not (tmp_path / "new").exists()


def test_what_another_process_trains_is_left_to_it(studied, tmp_path, monkeypatch, capsys):
    out, _ = studied
    (tmp_path / "base").symlink_to(out / "base")
    (tmp_path / "modular-12-seed0").mkdir()
    monkeypatch.setattr(study_run, "run_stage", lambda name, *_: pytest.fail(f"{name} again"))
    with lock(RunDir(tmp_path / "modular-12-seed0")):
        main(["study", *SMALL, "--out", str(tmp_path)])
    assert "not all done by other processes yet" in capsys.readouterr().out


def test_data_and_teacher_that_another_process_makes_are_waited_for(studied, tmp_path, monkeypatch, capsys):
    out, _ = studied
    base = RunDir(tmp_path / "base")
    base.root.mkdir()
    held = lock(base)

    def make_and_leave():
        for name in ("data", "teacher"):
            (base.root / name).symlink_to(out / "base" / name)
        held.close()

    monkeypatch.setattr(study_run, "run_stage", lambda name, *_: pytest.fail(f"{name} again"))
    other = threading.Timer(0.5, make_and_leave)
    other.start()
    study_run.Study(study_run.study_config(SMALL)[0], Cells(["minute"], tmp_path), tmp_path)._make_base()
    assert held.closed
    assert (base.root / "teacher" / "stage.json").is_file()
    assert capsys.readouterr().out == f"another process works in {base.root}: waiting for it\n"
    other.join()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--seeds", "[]"], "seeds is empty"),
        (["--budgets", "[0]"], "budgets is 0: choose at least 1"),
        (["--rivals", "[theseus]"], "rivals is 'theseus': choose one of finetune, logit"),
        (["--recipes", "[nowhere]"], "no recipe 'nowhere'"),
        (["--rivals", "[]", "--variants", "[]"], "rivals and variants are empty"),
        (["--variants", "[{name: a/b, change: --distill.init last}]"], "variants has the name 'a/b'"),
        (["--variants", "[{name: far, change: --distill.unit last}]"], "distill.unit"),
        (["--full_ratios", "[3]"], "full_ratios has 3, which is none of the recipes' assemble.ratios"),
        (["--bugdets", "[1]"], "unknown field 'bugdets': did you mean budgets?"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_made(arguments, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["study", *SMALL, "--out", str(tmp_path), *arguments])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1
    assert not any(tmp_path.iterdir())


def line_of(modular: float) -> Line:
    """A rival that has 10 BLEU for an eighth of the cost and 30 for all of it."""
    none = Estimate(0.0, 0.0, 0.0)
    rivals = {EQUAL: ("finetune", 10.0, none), FULL: ("finetune", 30.0, none)}
    both = AtBothCosts(modular, 10.0, 30.0)
    return Line(2.0, 40.0, modular, none, rivals, {"modular": 8.0, EQUAL: 1.0, FULL: 8.0}, both)


@pytest.mark.parametrize(("modular", "sizes"), [(9.0, "> 8"), (20.0, f"{8**0.5:.1f}"), (30.0, "1"), (31.0, "1")])
def test_break_even(modular, sizes):
    """Halfway between the two scores a rival as good costs the geometric mean of their costs."""
    assert line_of(modular).break_even == sizes


def test_intervals_are_of_the_resamples():
    found = Estimate.of(5.0, np.arange(1001.0))
    assert (found.low, found.high) == (25.0, 975.0)
    assert found.text(1) == "5.0 [25.0, 975.0]"
